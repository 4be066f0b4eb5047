"""What a run has left in its folder, read without its model."""
