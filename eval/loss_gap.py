"""What a model's own denoising loss says of real slices: which it has seen, and which caption it thinks they have.

Noise and timesteps are fixed, so that two models, or two captions, differ in nothing else.
Shapes: N pictures, T timesteps, latents (N, 4, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.features import Grey
from eval.sampling import evaluating
from finetune.core.models import Models, encode_prompts
from finetune.core.noise import add_noise, from_scheduler
from finetune.core.objective import target

Floats = NDArray[np.float64]

SHARES = (0.1, 0.8)
"""Timesteps from here to here, as shares of the schedule: below, all is plain; above, nothing is left to recognise."""


@torch.no_grad()
def slice_latents(models: Models, slices: Grey, *, batch_size: int = 16) -> Tensor:
    """Return the scaled latents of grey slices (N, H, W) uint8: the mean of the VAE's posterior, without noise."""
    pixels = torch.from_numpy(slices).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    with evaluating(models):
        parts = [
            models.vae.encode(batch.to(models.vae.device, models.vae.dtype)).latent_dist.mean
            for batch in pixels.split(batch_size)
        ]
    return torch.cat(parts) * models.vae.config.scaling_factor


@torch.no_grad()
def denoising_losses(
    models: Models,
    latents: Tensor,
    captions: Sequence[str],
    *,
    num_timesteps: int = 8,
    seed: int = 0,
    batch_size: int = 32,
) -> Floats:
    """Return the denoising loss of each picture at each timestep, (N, T).

    Args:
        models: with whatever adapter is active.
        latents: (N, 4, h, w), scaled.
        captions: one per picture.
        num_timesteps: T, evenly spread over the part of the schedule where slices can be told apart.
        seed: of the noise, one for each timestep and the same for all pictures.
        batch_size: forward passes done together.
    """
    schedule = from_scheduler(models.scheduler.config)
    low, high = SHARES
    share = low + (high - low) * (torch.arange(num_timesteps) + 0.5) / num_timesteps
    timesteps = (share * schedule.num_timesteps).long()
    shape = tuple(latents.shape[1:])
    noise = torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed + index)) for index in range(num_timesteps)]
    )
    device, dtype = models.unet.device, models.unet.dtype
    places = [(n, t) for n in range(len(latents)) for t in range(num_timesteps)]
    found = []
    with evaluating(models):
        embeds = encode_prompts(models, captions)
        for start in range(0, len(places), batch_size):
            n, t = (torch.tensor(index) for index in zip(*places[start : start + batch_size], strict=True))
            clean, steps = latents[n].float().cpu(), timesteps[t]
            noisy = add_noise(schedule, clean, noise[t], steps).to(device, dtype)
            output = models.unet(noisy, steps.to(device), encoder_hidden_states=embeds[n.to(embeds.device)]).sample
            wanted = target(schedule, clean, noise[t], steps)
            found.append((output.float().cpu() - wanted).square().mean(dim=(1, 2, 3)))
    return torch.cat(found).view(len(latents), num_timesteps).double().numpy()
