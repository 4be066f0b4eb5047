"""The random draws of one image, as a function of its place in the stream."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


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
