"""The noise schedule as a value: how much of an image is left at each timestep, and noise added to it.

Shapes: B is the number of images, T that of training timesteps, latents are (B, 4, h, w). Notation: Ho et al. 2020
(arXiv:2006.11239).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from configs.errors import UsageError
from finetune.diffusion.config import EPSILON_OF_PURE_NOISE, NoiseConfig

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True)
class NoiseSchedule:
    """How much of an image is left at each timestep.

    Attributes:
        alphas_cumprod: (T,) float64, the share of signal variance, falling from near 1 to near (or exactly) 0.
        prediction_type: what the model predicts, ``epsilon`` or ``v_prediction``.
    """

    alphas_cumprod: Tensor
    prediction_type: str

    @property
    def num_timesteps(self) -> int:
        """Number of training timesteps T."""
        return len(self.alphas_cumprod)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha / (1 - alpha), (T,) float64; 0 at the end of a zero-terminal schedule."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """Return the same schedule on another device."""
        return dataclasses.replace(self, alphas_cumprod=self.alphas_cumprod.to(device))


def from_scheduler(config: Mapping[str, Any], prediction_type: str | None = None) -> NoiseSchedule:
    """Make the schedule a diffusers scheduler config describes; the betas are computed by diffusers itself.

    Args:
        config: the config of any diffusers scheduler of the model, such as ``models.scheduler.config``.
        prediction_type: what the model predicts, where it is not what the config says.

    Raises:
        UsageError: a prediction type that is not trained here, or epsilon with a schedule that ends in pure noise.
    """
    from diffusers import DDPMScheduler

    kind = prediction_type or config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise UsageError(
            f"--prediction_type {kind}: the model's scheduler asks for it; trained are epsilon, v_prediction"
        )
    schedule = NoiseSchedule(DDPMScheduler.from_config(dict(config)).alphas_cumprod.double(), kind)
    if kind == "epsilon" and schedule.snr[-1] < 1e-6:
        raise UsageError(f"--prediction_type epsilon: {EPSILON_OF_PURE_NOISE}")
    return schedule


def trained_scheduler(scheduler: SchedulerMixin, config: NoiseConfig) -> SchedulerMixin:
    """Return the model's scheduler as it is after training: what is saved with the weights, and sampled with.

    A zero-terminal schedule (Lin et al. 2024, arXiv:2305.08891, section 3.1) is sampled from its last timestep on
    (section 3.3): trailing spacing, or the pure noise it was trained on would never be seen. Samplers that do not know
    such schedules (PNDM) give way to DDIM.
    """
    from diffusers import DDIMScheduler

    changes: dict[str, Any] = {}
    if config.prediction_type is not None:
        changes["prediction_type"] = config.prediction_type
    kind = type(scheduler)
    if config.rescale_betas_zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if "rescale_betas_zero_snr" not in inspect.signature(kind).parameters:
            kind = DDIMScheduler
    return kind.from_config(scheduler.config, **changes)


def add_noise(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return sqrt(alpha) x + sqrt(1 - alpha) epsilon (Ho et al. 2020, equation 4), shaped and typed as ``latents``."""
    signal, spread = _signal_and_spread(schedule, latents, timesteps)
    return signal * latents + spread * noise


def velocity(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return v = sqrt(alpha) epsilon - sqrt(1 - alpha) x (Salimans and Ho 2022, arXiv:2202.00512, appendix D)."""
    signal, spread = _signal_and_spread(schedule, latents, timesteps)
    return signal * noise - spread * latents


def _signal_and_spread(schedule: NoiseSchedule, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(alpha) and sqrt(1 - alpha) of each image, (B, 1, 1, 1), in the latents' dtype."""
    alpha = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt().to(latents.dtype), (1 - alpha).sqrt().to(latents.dtype)
