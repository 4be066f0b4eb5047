"""A small Stable Diffusion, trained from random weights."""
