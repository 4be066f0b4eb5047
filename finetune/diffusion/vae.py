"""Pictures to latents and back: the one place that calls the VAE.

Shapes: N is the number of pictures, B that of a batch, H x W their pixels, h x w their latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import TisserandError
from finetune.diffusion.models import Models, evaluating, together

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Request = tuple[str, int]

_PIXELS_AT_ONCE = 2 * 256 * 256
"""Pixels encoded or decoded at once, or one or two pictures: the VAE takes far more memory than the U-Net, and more at
once are slower on a CPU."""


@dataclass(frozen=True)
class Moments:
    """The VAE's posterior of N images: ``mean`` and ``std``, (N, 4, h, w) float32, not scaled."""

    mean: Tensor
    std: Tensor


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor, *, batch_size: int | None = None) -> Moments:
    """Return the posterior of pixels (N, 3, H, W) in [-1, 1], computed in the VAE's dtype, on its device.

    Without a batch size, few pictures are encoded at a time.
    """
    batch_size = batch_size or max(1, _PIXELS_AT_ONCE // (pixels.shape[-2] * pixels.shape[-1]))
    posteriors = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist for part in pixels.split(batch_size)]
    mean, std = (torch.cat([getattr(one, name) for one in posteriors]).float() for name in ("mean", "std"))
    return Moments(mean, std)


def scaled_latents(vae: AutoencoderKL, moments: Moments, noise: Tensor | None = None) -> Tensor:
    """Return latents as the U-Net reads them, mean + std * noise, scaled; without noise, the mean alone."""
    latents = moments.mean if noise is None else moments.mean + moments.std * noise
    return latents * vae.config.scaling_factor


def slice_latents(models: Models, slices: NDArray[np.uint8], *, batch_size: int = 16) -> Tensor:
    """Return the scaled latents of grey slices (N, H, W) uint8: the mean of the VAE's posterior, without noise."""
    with evaluating(models):
        return scaled_latents(models.vae, encode(models.vae, _pixels(slices), batch_size=batch_size))


@torch.no_grad()
def decode(models: Models, latents: Tensor, requests: Sequence[Request], *, batch_size: int = 16) -> np.ndarray:
    """Turn scaled latents (N, 4, h, w) into pictures (N, H, W, 3) uint8, few at a time; raise if one is not finite."""
    pictures = []
    vae = models.vae
    pixels_each = latents.shape[-2] * latents.shape[-1] * models.vae_scale_factor**2
    batch_size = min(batch_size, max(2, _PIXELS_AT_ONCE // pixels_each))
    with evaluating(models), together(models):
        for start in range(0, len(latents), batch_size):
            batch = latents[start : start + batch_size].to(vae.device, vae.dtype) / vae.config.scaling_factor
            pixels = vae.decode(batch).sample.float()  # (B, 3, H, W) in about [-1, 1]
            finite = pixels.isfinite().flatten(1).all(1).tolist()
            if not all(finite):
                prompt, seed = requests[start + finite.index(False)]
                raise TisserandError(
                    f"the picture of '{prompt}' with seed {seed} is not finite; the weights have diverged, or the "
                    "number format is too small for this model: try float32, or an earlier checkpoint"
                )
            pictures.append(_levels(pixels))
    return np.concatenate(pictures)


@torch.no_grad()
def round_trip(vae: AutoencoderKL, slices: NDArray[np.uint8], *, batch_size: int = 32) -> NDArray[np.uint8]:
    """Send grey slices (N, H, W) through a VAE and back, without noise: the best any latent model can do.

    Sides that the VAE cannot divide are mirrored up to the next multiple and cut again.

    Returns:
        (N, H, W) uint8, the mean of the channels.
    """
    count, height, width = slices.shape
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    padded = np.pad(slices, ((0, 0), (0, -height % factor), (0, -width % factor)), mode="reflect")
    parts = []
    for start in range(0, count, batch_size):
        mean = encode(vae, _pixels(padded[start : start + batch_size]), batch_size=batch_size).mean
        colour = _levels(vae.decode(mean.to(vae.dtype)).sample.float())
        parts.append(np.stack([np.rint(picture.mean(axis=-1)).astype(np.uint8) for picture in colour]))
    return np.concatenate(parts)[:, :height, :width]


def _pixels(slices: NDArray[np.uint8]) -> Tensor:
    """Return grey slices (N, H, W) as the VAE reads them, (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(slices).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1


def _levels(pixels: Tensor) -> NDArray[np.uint8]:
    """Return pixels (B, 3, H, W) in about [-1, 1] as pictures (B, H, W, 3)."""
    levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()  # in C order, or whoever saves them must copy
