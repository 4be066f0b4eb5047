"""Whether generated slices are copies of training slices."""
