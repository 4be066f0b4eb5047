"""The loss of a batch: one value per image, from the denoiser's prediction."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from finetune.core.run import Batch
from finetune.core.settings.training import ObjectiveConfig
from finetune.diffusion.noise import NoiseSchedule, add_noise
from finetune.diffusion.objective import min_snr_weight, target

Loss = Callable[[nn.Module, Batch], Tensor]
"""``loss(denoiser, batch) -> (B,)``, one value per image, not yet weighted by ``batch.weights``."""


def loss_of(config: ObjectiveConfig, schedule: NoiseSchedule) -> Loss:
    """Return the loss that a run minimises, with the weights its settings ask for."""
    return partial(denoising_loss, schedule=schedule, snr_gamma=config.snr_gamma)


def noisy_latents(schedule: NoiseSchedule, batch: Batch) -> Tensor:
    """Return what the model sees of a batch, (B, 4, h, w)."""
    return add_noise(schedule, batch.latents, batch.input_noise, batch.timesteps)


def denoising_loss(
    denoiser: nn.Module, batch: Batch, *, schedule: NoiseSchedule, snr_gamma: float | None = None
) -> Tensor:
    """Return the squared error of the prediction, averaged over each image, (B,), at least float32.

    Args:
        denoiser: predicts from noisy latents, timesteps and prompts.
        batch: latents, noise to add and to predict, timesteps and conditions of B images; ``targets`` win where given.
        schedule: on the batch's device.
        snr_gamma: limit of min-SNR weighting; None for none.
    """
    prediction = denoiser(noisy_latents(schedule, batch), batch.timesteps, **batch.conditions.arguments)
    wanted = batch.targets
    if wanted is None:
        wanted = target(schedule, batch.latents, batch.noise, batch.timesteps)
    losses = (prediction.to(wanted.dtype) - wanted).square().mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        losses = losses * min_snr_weight(schedule, batch.timesteps, snr_gamma).to(losses.dtype)
    return losses
