"""Volumes to captioned slices: planned, cut, split and audited."""
