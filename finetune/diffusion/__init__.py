"""One Stable Diffusion as a value: loaded, adapted, denoising, encoding and sampling."""
