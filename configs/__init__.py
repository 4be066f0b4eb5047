"""Presets and the one place that reads settings."""
