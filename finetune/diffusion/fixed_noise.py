"""What a model's own denoising loss says of real slices: which it has seen, and which caption it thinks they have.

Noise and timesteps are fixed, so that two models, or two captions, differ in nothing else.
Shapes: N pictures, T timesteps, latents (N, 4, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from torch import Tensor

from finetune.diffusion.models import Models, evaluating
from finetune.diffusion.noise import add_noise, from_scheduler
from finetune.diffusion.objective import target
from finetune.diffusion.text import encode_prompts

Floats = NDArray[np.float64]

SHARES = (0.1, 0.8)
"""Timesteps from here to here, as shares of the schedule: below, all is plain; above, nothing is left to recognise."""


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


@torch.no_grad()
def predictions(
    models: Models,
    prompts: Sequence[str],
    latents: Tensor,
    *,
    num_timesteps: int = 8,
    seed: int = 0,
    batch_size: int = 32,
) -> Tensor:
    """Predict epsilon or v, without guidance, for fixed latents, noise and timesteps.

    Args:
        models: base or tuned; the prompts go through its own text encoder.
        prompts: P of them.
        latents: (P, K, 4, h, w), scaled; K pictures the base model made of each prompt.
        num_timesteps: T timesteps at the middle of T equal parts of the schedule.
        seed: of the noise, which depends on (seed, k) and is shared by the prompts.
        batch_size: forward passes done together; base and tuned must use the same to be compared bit by bit.

    Returns:
        (P, K, T, 4, h, w) float32 on the CPU.
    """
    schedule = DDPMScheduler.from_config(models.scheduler.config)  # whose add_noise does not depend on inference steps
    total = schedule.config.num_train_timesteps
    timesteps = ((torch.arange(num_timesteps) + 0.5) * total / num_timesteps).long()
    num_prompts, num_latents, *shape = latents.shape
    noise = torch.stack(
        [
            torch.randn(num_timesteps, *shape, generator=torch.Generator().manual_seed(seed + index))
            for index in range(num_latents)
        ]
    )  # (K, T, 4, h, w)
    device, dtype = models.unet.device, models.unet.dtype
    places = [(p, k, t) for p in range(num_prompts) for k in range(num_latents) for t in range(num_timesteps)]
    outputs = []
    with evaluating(models):
        embeds = encode_prompts(models, prompts)
        for start in range(0, len(places), batch_size):
            p, k, t = (list(column) for column in zip(*places[start : start + batch_size], strict=True))
            noisy = schedule.add_noise(latents[p, k].float().cpu(), noise[k, t], timesteps[t])
            output = models.unet(noisy.to(device, dtype), timesteps[t].to(device), encoder_hidden_states=embeds[p])
            outputs.append(output.sample.float().cpu())
    return torch.cat(outputs).view(num_prompts, num_latents, num_timesteps, *shape)
