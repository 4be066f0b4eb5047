"""Volumes and pictures to captioned training folders; never imports torch."""
