"""Distances and intervals that hold on correlated slices."""
