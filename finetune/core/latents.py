"""Images to latents, encoded once: what is kept is the posterior (mean and spread), and each use draws a new sample.

Shapes: images N, pixels (N, 3, H, W) in [-1, 1], moments and latents (N, 4, h, w).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from configs.errors import InputError
from finetune.core.config import PictureConfig
from finetune.core.pictures import Picture, Place, Shape, check_decodable, load_pixels

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from finetune.core.run import Run

_SHARD = 512  # images in a file of the cache: few files, and an interrupted run loses little
_BATCH = 16  # images encoded together
_MOST_ON_DEVICE = 4 << 30  # bytes of latents kept beside the model; more stay in the memory of the host


@dataclass(frozen=True)
class Moments:
    """The VAE's posterior of N images: ``mean`` and ``std``, (N, 4, h, w) float32, not scaled."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True, kw_only=True)
class CachedLatents:
    """The posteriors of pictures: those of one shape together, each under its key."""

    moments: dict[Shape, Moments]
    rows: dict[Shape, dict[str, int]]

    def of(self, shape: Shape, keys: Sequence[str], device: torch.device) -> Moments:
        """Return the posteriors of some pictures of one shape."""
        moments = self.moments[shape]
        index = torch.tensor([self.rows[shape][key] for key in keys], device=moments.mean.device)
        return Moments(moments.mean[index].to(device), moments.std[index].to(device))


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


def cached_latents(pictures: Sequence[Picture], vae: AutoencoderKL, config: PictureConfig, run: Run) -> CachedLatents:
    """Return the posteriors of all pictures at all their places, from the cache; processes share what is missing.

    Raises:
        InputError: naming the images that do not decode.
    """
    root = config.latent_cache_dir or run.folder / "cache"
    vae_hash = module_hash(vae)
    wanted: dict[Shape, dict[str, tuple[Picture, Place]]] = defaultdict(dict)
    for picture in pictures:
        for place in picture.places(config.cache_crops):
            wanted[picture.shape][picture.key(place)] = (picture, place)
    rank, processes = run.accelerator.process_index, run.accelerator.num_processes
    # Each process encodes its share, then all read the whole; without a common file system they encode the rest.
    shares = [slice(rank, None, processes)] if processes > 1 else []
    found, encoded = {}, 0
    for share in (*shares, slice(None)):
        for shape in sorted(wanted):
            keys = list(wanted[shape])[share]
            cuts = list(wanted[shape].values())[share]
            folder = cache_folder(root, vae_hash, {"shape": shape, "interpolation": config.image_interpolation_mode})

            def pixels(places: Sequence[int], cuts: list[tuple[Picture, Place]] = cuts) -> Tensor:
                chosen = [cuts[place] for place in places]
                return load_pixels([picture for picture, _ in chosen], [place for _, place in chosen], config)

            try:
                if keys:
                    found[shape], number = cached_moments(folder, keys, pixels, vae)
                    encoded += number
            except InputError:
                check_decodable([picture.image for picture in pictures], config)  # names the others, too
                raise
        run.accelerator.wait_for_everyone()
    total = sum(map(len, wanted.values()))
    run.say(f"latents: {encoded} pictures encoded here, {total - encoded} from {root}")
    size = sum(moments.mean.nbytes + moments.std.nbytes for moments in found.values())
    device = run.accelerator.device if size <= _MOST_ON_DEVICE else torch.device("cpu")
    return CachedLatents(
        moments={shape: Moments(moments.mean.to(device), moments.std.to(device)) for shape, moments in found.items()},
        rows={shape: {key: row for row, key in enumerate(cuts)} for shape, cuts in wanted.items()},
    )


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
