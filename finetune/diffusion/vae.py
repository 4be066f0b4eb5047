"""Pictures to latents and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import TisserandError
from finetune.diffusion.models import Models, evaluating, together

Request = tuple[str, int]

_DECODED_PIXELS = 2 * 256 * 256
"""Pixels decoded at once, or two pictures: the decoder takes far more memory than the U-Net, and more at once
are slower on a CPU."""


@torch.no_grad()
def decode(models: Models, latents: Tensor, requests: Sequence[Request], *, batch_size: int = 16) -> np.ndarray:
    """Turn scaled latents (N, 4, h, w) into pictures (N, H, W, 3) uint8, few at a time; raise if one is not finite."""
    pictures = []
    pixels_each = latents.shape[-2] * latents.shape[-1] * models.vae_scale_factor**2
    batch_size = min(batch_size, max(2, _DECODED_PIXELS // pixels_each))
    with evaluating(models), together(models):
        for start in range(0, len(latents), batch_size):
            batch = (
                latents[start : start + batch_size].to(models.vae.device, models.vae.dtype)
                / models.vae.config.scaling_factor
            )
            pixels = models.vae.decode(batch).sample.float()  # (B, 3, H, W) in about [-1, 1]
            finite = pixels.isfinite().flatten(1).all(1).tolist()
            if not all(finite):
                prompt, seed = requests[start + finite.index(False)]
                raise TisserandError(
                    f"the picture of '{prompt}' with seed {seed} is not finite; the weights have diverged, or the "
                    "number format is too small for this model: try float32, or an earlier checkpoint"
                )
            levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            pictures.append(levels.permute(0, 2, 3, 1).contiguous().cpu().numpy())  # or whoever saves them must copy
    return np.concatenate(pictures)


@torch.no_grad()
def slice_latents(models: Models, slices: NDArray[np.uint8], *, batch_size: int = 16) -> Tensor:
    """Return the scaled latents of grey slices (N, H, W) uint8: the mean of the VAE's posterior, without noise."""
    pixels = torch.from_numpy(slices).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    with evaluating(models):
        parts = [
            models.vae.encode(batch.to(models.vae.device, models.vae.dtype)).latent_dist.mean
            for batch in pixels.split(batch_size)
        ]
    return torch.cat(parts) * models.vae.config.scaling_factor
