"""Recipes of Stable Diffusion fine-tuning, one a file."""
