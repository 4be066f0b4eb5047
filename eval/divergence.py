"""How far the predictions of a tuned denoiser are from those of its base, on inputs the base itself made.

Shapes: P prompts, K latents per prompt, T timesteps, latents (P, K, 4, h, w). It costs a few pictures' worth of forward
passes and is exactly zero where nothing changed. It says how far, not whether that is bad.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from torch import Tensor

from eval.sampling import evaluating
from finetune.core.models import Models, encode_prompts

Floats = NDArray[np.float64]


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


def divergence_parts(tuned: Tensor, base: Tensor) -> tuple[Floats, Floats]:
    """Return the squared difference and the squared base prediction, each a mean over pixels and timesteps, (P, K).

    Args:
        tuned: predictions of the tuned model, (P, K, T, 4, h, w).
        base: those of the base model, the same shape.
    """
    if tuned.shape != base.shape:
        raise ValueError(f"predictions of different shape: {tuple(tuned.shape)} and {tuple(base.shape)}")
    difference = (tuned.double() - base.double()).square().flatten(2).mean(2)
    scale = base.double().square().flatten(2).mean(2)
    return difference.numpy(), scale.numpy()


def divergence(difference: Floats, scale: Floats) -> float:
    """Return the relative mean squared difference: 0 for no change, 1 for a change as large as the prediction."""
    return float(difference.sum() / scale.sum())
