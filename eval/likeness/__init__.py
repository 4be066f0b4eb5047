"""Whether generated slices look like real ones, and show what was asked."""
