"""Readers of volumes: one small file a container."""
