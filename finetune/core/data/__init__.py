"""Images to batches: read, shaped, encoded once, drawn in a seeded order."""
