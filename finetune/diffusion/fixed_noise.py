"""Denoising at fixed noise: what a model predicts, and its loss on given pictures.

Noise and timesteps are fixed, so that two models, or two captions, differ in nothing else.
Shapes: N pictures, T timesteps, latents (N, 4, h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from torch import Tensor

from finetune.diffusion.denoiser import Denoiser
from finetune.diffusion.models import Models, evaluating
from finetune.diffusion.noise import NoiseSchedule, add_noise, from_scheduler
from finetune.diffusion.objective import target
from finetune.diffusion.text import Conditions, encode_prompts

Floats = NDArray[np.float64]

SHARES = (0.1, 0.8)
"""Timesteps from here to here, as shares of the schedule: below, all is plain; above, nothing is left to recognise."""


@dataclass(frozen=True, kw_only=True)
class FixedNoise:
    """Latents of one forward pass with the noise to put on them.

    Attributes:
        latents: (B, 4, h, w), scaled.
        noise: (B, 4, h, w).
        timesteps: (B,) int64.
        conditions: on the U-Net's device.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditions: Conditions


AddNoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``add(latents, noise, timesteps) -> (B, 4, h, w)``"""


@torch.no_grad()
def denoise(denoiser: Denoiser, batches: Iterable[FixedNoise], add: AddNoise) -> Iterator[tuple[FixedNoise, Tensor]]:
    """Yield each batch with what the model predicts of it, (B, 4, h, w) on the U-Net's device, in its dtype."""
    weight = next(denoiser.unet.parameters())
    for batch in batches:
        noisy = add(batch.latents, batch.noise, batch.timesteps).to(weight.device, weight.dtype)
        yield batch, denoiser(noisy, batch.timesteps.to(weight.device), **batch.conditions.arguments)


@torch.no_grad()
def squared_errors(denoiser: Denoiser, batches: Iterable[FixedNoise], schedule: NoiseSchedule) -> Iterator[Tensor]:
    """Yield the denoising loss of each batch, (B,), computed where its latents are."""
    for batch, prediction in denoise(denoiser, batches, partial(add_noise, schedule)):
        wanted = target(schedule, batch.latents, batch.noise, batch.timesteps)
        yield (prediction.to(wanted.device, wanted.dtype) - wanted).square().mean(dim=(1, 2, 3))


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
    places = [(n, t) for n in range(len(latents)) for t in range(num_timesteps)]
    with evaluating(models):
        embeds = Conditions(prompts=encode_prompts(models, captions))
        batches = (
            FixedNoise(
                latents=latents[n].float().cpu(),
                noise=noise[t],
                timesteps=timesteps[t],
                conditions=embeds.rows(n.tolist()),
            )
            for n, t in _in_batches(places, batch_size)
        )
        found = list(squared_errors(Denoiser(None, models.unet), batches, schedule))
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
    places = [(p, k, t) for p in range(num_prompts) for k in range(num_latents) for t in range(num_timesteps)]
    with evaluating(models):
        embeds = Conditions(prompts=encode_prompts(models, prompts))
        batches = (
            FixedNoise(
                latents=latents[p, k].float().cpu(),
                noise=noise[k, t],
                timesteps=timesteps[t],
                conditions=embeds.rows(p.tolist()),
            )
            for p, k, t in _in_batches(places, batch_size)
        )
        # Moved one by one: all of them at once may not fit beside the model.
        outputs = [
            predicted.float().cpu()
            for _, predicted in denoise(Denoiser(None, models.unet), batches, schedule.add_noise)
        ]
    return torch.cat(outputs).view(num_prompts, num_latents, num_timesteps, *shape)


def _in_batches(places: Sequence[tuple[int, ...]], batch_size: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield places as many at a time, coordinate by coordinate, (B,) int64 each."""
    for start in range(0, len(places), batch_size):
        yield tuple(torch.tensor(column) for column in zip(*places[start : start + batch_size], strict=True))
