"""Several runs or checkpoints side by side."""
