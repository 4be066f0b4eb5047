"""The loop and what makes it fit: checkpoints, memory, compilation, processes."""
