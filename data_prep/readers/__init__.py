"""One small file per storage: each gives planes along Z."""
