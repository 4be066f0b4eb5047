"""What is minimised: the target of the prediction, and one loss per image.

Shapes: images B, latents (B, 4, h, w). A batch is plain tensors, so every loss here can be checked by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from finetune.core.noise import NoiseSchedule, add_noise, velocity

if TYPE_CHECKING:
    from finetune.core.batches import Batch

Loss = Callable[[nn.Module, "Batch"], Tensor]
"""``loss(denoiser, batch) -> (B,)``, one value per image, not yet weighted by ``batch.weights``."""


def target(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the model should predict, (B, 4, h, w): the noise, or v."""
    if schedule.prediction_type == "v_prediction":
        return velocity(schedule, latents, noise, timesteps)
    return noise


def min_snr_weight(schedule: NoiseSchedule, timesteps: Tensor, gamma: float) -> Tensor:
    """Return the min-SNR weight of each image, (B,) float64 (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    min(SNR, gamma) / SNR for epsilon and min(SNR, gamma) / (SNR + 1) for v. The division is carried out as
    min(1, gamma / SNR), so that an SNR of 0 gives 1 and not 0/0. For v an SNR of 0 weighs 0, as the formula has it: the
    last timestep of a zero-terminal schedule then learns from its neighbours alone.
    """
    snr = schedule.snr[timesteps]
    if schedule.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1.0)


def noisy_latents(schedule: NoiseSchedule, batch: Batch) -> Tensor:
    """Return what the model sees of a batch, (B, 4, h, w)."""
    return add_noise(schedule, batch.latents, batch.input_noise, batch.timesteps)


def denoising_loss(
    denoiser: nn.Module, batch: Batch, *, schedule: NoiseSchedule, snr_gamma: float | None = None
) -> Tensor:
    """Return the squared error of the prediction, averaged over each image, (B,), at least float32.

    Args:
        denoiser: predicts from noisy latents, timesteps and prompts.
        batch: latents, noise to add and to predict, timesteps and prompts of B images; ``targets`` win where given.
        schedule: on the batch's device.
        snr_gamma: limit of min-SNR weighting; None for none.
    """
    shared = {} if batch.distinct is None else {"distinct": batch.distinct}
    prediction = denoiser(noisy_latents(schedule, batch), batch.timesteps, batch.prompts, **shared)
    wanted = batch.targets
    if wanted is None:
        wanted = target(schedule, batch.latents, batch.noise, batch.timesteps)
    losses = (prediction.to(wanted.dtype) - wanted).square().mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        losses = losses * min_snr_weight(schedule, batch.timesteps, snr_gamma).to(losses.dtype)
    return losses
