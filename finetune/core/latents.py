"""Images to latents, encoded once: what is kept is the posterior (mean and spread), and each use draws a new sample.

Shapes: images N, pixels (N, 3, H, W) in [-1, 1], moments and latents (N, 4, h, w).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_SHARD = 512  # images in a file of the cache: few files, and an interrupted run loses little
_BATCH = 16  # images encoded together


@dataclass(frozen=True)
class Moments:
    """The VAE's posterior of N images: ``mean`` and ``std``, (N, 4, h, w) float32, not scaled."""

    mean: Tensor
    std: Tensor


def sample(mean: Tensor, std: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """Return scaled latents, (mean + std * noise) * scaling_factor, as the U-Net reads them."""
    return (mean + std * noise) * scaling_factor


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Moments:
    """Return the posterior of pixels in [-1, 1], computed in the VAE's dtype, on its device."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return Moments(posterior.mean.float(), posterior.std.float())


def cache_folder(root: Path, vae_hash: str, preprocessing: Mapping[str, object]) -> Path:
    """Return the folder within the cache that belongs to one VAE and one way of preparing images."""
    text = json.dumps({"vae": vae_hash, **preprocessing}, sort_keys=True)
    return root / f"moments-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def module_hash(module: nn.Module) -> str:
    """Return a SHA-256 over the names, dtypes and values of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cached_moments(
    folder: Path, keys: Sequence[str], pixels: Callable[[Sequence[int]], Tensor], vae: AutoencoderKL
) -> tuple[Moments, int]:
    """Return the posterior of every image, from the cache where it is there, else encoded and kept for the next run.

    Args:
        folder: from ``cache_folder``; made if needed.
        keys: one per image, the hash of its content; a changed image has a new key and is encoded anew.
        pixels: reads images by their places in ``keys``, as (n, 3, H, W) in [-1, 1].
        vae: encodes what is missing.

    Returns:
        the moments in the order of ``keys``, on the CPU, and how many images had to be encoded.
    """
    found = _read_shards(folder, set(keys))
    missing = {key: place for place, key in enumerate(keys) if key not in found}
    folder.mkdir(parents=True, exist_ok=True)
    names, places = list(missing), list(missing.values())
    with tqdm(total=len(places), desc="encoding images", unit="img", disable=None) as bar:
        for start in range(0, len(places), _SHARD):
            shard: dict[str, Tensor] = {}
            for first in range(start, min(start + _SHARD, len(places)), _BATCH):
                last = min(first + _BATCH, start + _SHARD, len(places))
                moments = encode(vae, pixels(places[first:last]))
                for name, mean, std in zip(names[first:last], moments.mean.cpu(), moments.std.cpu(), strict=True):
                    shard[name] = torch.stack([mean, std])
                bar.update(last - first)
            _write_shard(folder, shard)
            found |= shard
    both = torch.stack([found[key] for key in keys])  # (N, 2, 4, h, w)
    return Moments(both[:, 0].contiguous(), both[:, 1].contiguous()), len(missing)


def _read_shards(folder: Path, wanted: set[str]) -> dict[str, Tensor]:
    """Return the wanted entries of the cache; a file that is damaged counts as absent."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as reader:
                for key in wanted.intersection(reader.keys()) - found.keys():
                    found[key] = reader.get_tensor(key)
        except (SafetensorError, OSError):
            continue
    return found


def _write_shard(folder: Path, shard: dict[str, Tensor]) -> None:
    """Write one file of the cache beside its place and rename it, so that a reader never sees half of it."""
    name = hashlib.sha256("".join(sorted(shard)).encode()).hexdigest()[:16]
    partial = folder / f"{name}.{os.getpid()}.partial"
    save_file({key: value.contiguous() for key, value in shard.items()}, partial)
    partial.replace(folder / f"{name}.safetensors")
