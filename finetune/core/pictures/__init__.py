"""Images to pictures: read and checked, turned, resized and cut."""
