"""What lies on disk, without torch: published folders, manifests, runs and results by their file names."""
