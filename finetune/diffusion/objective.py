"""What is minimised: the target of the prediction, and one loss per image.

Shapes: images B, latents (B, 4, h, w). A batch is plain tensors, so every loss here can be checked by hand.
"""

from __future__ import annotations

from torch import Tensor

from finetune.diffusion.noise import NoiseSchedule, velocity


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
