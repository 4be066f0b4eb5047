"""The noise schedule as a value, and the random draws of one image as a function of its place in the stream.

Shapes: images B, training timesteps T, latents (B, 4, h, w). Notation: Ho et al. 2020 (arXiv:2006.11239).
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from configs.errors import UsageError
from finetune.core.config import EPSILON_OF_PURE_NOISE, NoiseConfig

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


@dataclass(frozen=True)
class Draws:
    """Everything random about one image in one update.

    Attributes:
        position: the place in the shuffled stream that it was drawn for.
        crop: two numbers in [0, 1): where a random crop sits, from top to bottom and from left to right.
        drop_caption: whether the caption is replaced by the empty one.
        timestep: in [0, T).
        latent_noise: (4, h, w) float32, standard normal, for the sample of the VAE's posterior.
        noise: (4, h, w) float32, the noise to predict; variance 1 + noise_offset^2.
        input_noise: (4, h, w) float32, the noise to add; with input perturbation, ``noise`` and more.
    """

    position: int
    crop: tuple[float, float]
    drop_caption: bool
    timestep: int
    latent_noise: Tensor
    noise: Tensor
    input_noise: Tensor


def draw(
    seed: int,
    position: int,
    *,
    shape: tuple[int, int, int],
    num_timesteps: int,
    noise_offset: float = 0.0,
    input_perturbation: float = 0.0,
    caption_dropout: float = 0.0,
) -> Draws:
    """Draw what is random about the image at ``position`` of the stream; the same arguments give the same draws.

    Nothing else enters: not the batch, the process, the device, or what was drawn before. The order of the draws is
    fixed, and each is made whether or not it is used, so that switching an option leaves the others as they were.

    Noise offset adds one normal number per channel to the whole channel
    (Guttenberg 2023, https://www.crosslabs.org/blog/diffusion-with-offset-noise). Input perturbation adds a second
    normal tensor of that strength to what the model sees, not to what it should predict (Ning et al. 2023,
    arXiv:2301.11706, algorithm 1); it is drawn last, so it may be left out.
    """
    generator = torch.Generator().manual_seed(counter_seed(seed, "image", position))
    down, right = torch.rand(2, generator=generator).tolist()
    dropped = bool(torch.rand((), generator=generator) < caption_dropout)
    timestep = int(torch.randint(num_timesteps, (), generator=generator))
    offset = torch.randn(shape[0], 1, 1, generator=generator)
    latent_noise, noise = torch.randn(2, *shape, generator=generator)
    if noise_offset:
        noise = noise + noise_offset * offset
    input_noise = noise
    if input_perturbation:
        input_noise = noise + input_perturbation * torch.randn(shape, generator=generator)
    return Draws(position, (down, right), dropped, timestep, latent_noise, noise, input_noise)


def permutation(seed: int, epoch: int, length: int) -> Tensor:
    """Return the order of the images in an epoch, (length,) int64."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(counter_seed(seed, "epoch", epoch)))


def counter_seed(seed: int, stream: str, counter: int) -> int:
    """Mix a seed, the name of a stream and a counter into 32 well-spread bits (torch's CPU generator reads no more)."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{counter}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")
