"""What a run leaves: weights, model card, upload."""
