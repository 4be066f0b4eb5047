"""Images to latents, encoded once: what is kept is the posterior (mean and spread), and each use draws a new sample.

Shapes: images N, pixels (N, 3, H, W) in [-1, 1], moments and latents (N, 4, h, w).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from configs.errors import InputError
from finetune.core.pictures.pictures import Place, Shape, TrainingPicture, check_decodable, load_pixels
from finetune.core.run import Run
from finetune.core.settings.images import PictureConfig
from finetune.diffusion.vae import Moments, encode

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_SHARD = 512  # images in a file of the cache: few files, and an interrupted run loses little
_BATCH = 16  # images read together
_MOST_ON_DEVICE = 4 << 30  # bytes of latents kept beside the model on a GPU
_MOST_IN_MEMORY = 256 << 20  # and on a CPU; more stay in the files of the cache, at some 50 us a picture


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


@dataclass(frozen=True, kw_only=True)
class StoredLatents:
    """The posteriors of pictures, read from the cache at each use: memory does not grow with their number.

    Attributes:
        files: for each shape, the file of the cache that holds each key.
    """

    files: dict[Shape, dict[str, Path]]

    def of(self, shape: Shape, keys: Sequence[str], device: torch.device) -> Moments:
        """Return the posteriors of some pictures of one shape."""
        paths = [self.files[shape][key] for key in keys]
        readers = [_reader(path, path.stat().st_mtime_ns) for path in paths]
        both = torch.stack([reader.get_tensor(key) for reader, key in zip(readers, keys, strict=True)]).to(device)
        return Moments(both[:, 0], both[:, 1])


Latents = CachedLatents | StoredLatents


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
    files, encoded = fill_cache(folder, keys, pixels, vae)
    return read_moments(files, keys), encoded


def fill_cache(
    folder: Path, keys: Sequence[str], pixels: Callable[[Sequence[int]], Tensor], vae: AutoencoderKL
) -> tuple[dict[str, Path], int]:
    """Encode what the cache lacks; arguments as ``cached_moments``.

    Returns:
        the file of the cache that holds each key, and how many images had to be encoded.
    """
    found = _index_shards(folder, set(keys))
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
            found |= dict.fromkeys(shard, _write_shard(folder, shard))
    return found, len(missing)


def read_moments(files: Mapping[str, Path], keys: Sequence[str]) -> Moments:
    """Return the posteriors of images, in the order of ``keys``, on the CPU."""
    places = defaultdict(list)
    for place, key in enumerate(keys):
        places[files[key]].append(place)
    moments = Moments(*(torch.empty(len(keys), *_stored_shape(files)[1:]) for _ in range(2)))
    for path, members in places.items():
        with safe_open(path, framework="pt") as reader:
            for place in members:
                moments.mean[place], moments.std[place] = reader.get_tensor(keys[place])
    return moments


def cached_latents(pictures: Sequence[TrainingPicture], vae: AutoencoderKL, config: PictureConfig, run: Run) -> Latents:
    """Return the posteriors of all pictures at all their places, from the cache; processes share what is missing.

    Raises:
        InputError: naming the images that do not decode.
    """
    root = config.latent_cache_dir or run.folder / "cache"
    vae_hash = module_hash(vae)
    wanted: dict[Shape, dict[str, tuple[TrainingPicture, Place]]] = defaultdict(dict)
    for picture in pictures:
        for place in picture.places(config.cache_crops):
            wanted[picture.shape][picture.key(place)] = (picture, place)
    rank, processes = run.accelerator.process_index, run.accelerator.num_processes
    # Each process encodes its share, then all read the whole; without a common file system they encode the rest.
    shares = [slice(rank, None, processes)] if processes > 1 else []
    found: dict[Shape, dict[str, Path]] = {}
    encoded = 0
    for share in (*shares, slice(None)):
        for shape in sorted(wanted):
            keys = list(wanted[shape])[share]
            cuts = list(wanted[shape].values())[share]
            folder = cache_folder(root, vae_hash, {"shape": shape, "interpolation": config.image_interpolation_mode})

            def pixels(places: Sequence[int], cuts: list[tuple[TrainingPicture, Place]] = cuts) -> Tensor:
                chosen = [cuts[place] for place in places]
                return load_pixels([picture for picture, _ in chosen], [place for _, place in chosen], config)

            try:
                if keys:
                    found[shape], number = fill_cache(folder, keys, pixels, vae)
                    encoded += number
            except InputError:
                check_decodable([picture.image for picture in pictures], config)  # names the others, too
                raise
        run.accelerator.wait_for_everyone()
    total = sum(map(len, wanted.values()))
    run.say(f"latents: {encoded} pictures encoded here, {total - encoded} from {root}")
    device = run.accelerator.device
    size = sum(4 * len(files) * math.prod(_stored_shape(files)) for files in found.values())
    if size > (_MOST_IN_MEMORY if device.type == "cpu" else _MOST_ON_DEVICE):
        return StoredLatents(files=found)
    whole = {shape: read_moments(files, list(wanted[shape])) for shape, files in found.items()}
    return CachedLatents(
        moments={shape: Moments(moments.mean.to(device), moments.std.to(device)) for shape, moments in whole.items()},
        rows={shape: {key: row for row, key in enumerate(cuts)} for shape, cuts in wanted.items()},
    )


def _index_shards(folder: Path, wanted: set[str]) -> dict[str, Path]:
    """Return the files of the cache that hold the wanted keys; one that is damaged counts as absent."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as reader:
                found |= dict.fromkeys(wanted.intersection(reader.keys()) - found.keys(), path)
        except (SafetensorError, OSError):
            continue
    return found


def _stored_shape(files: Mapping[str, Path]) -> tuple[int, ...]:
    """Return the shape of an entry of the cache, (2, 4, h, w): mean and spread."""
    key, path = next(iter(files.items()))
    with safe_open(path, framework="pt") as reader:
        return tuple(reader.get_slice(key).get_shape())


@lru_cache(maxsize=1024)
def _reader(path: Path, written: int) -> Any:
    """Return an open file of the cache, as it was written then: its header is read once, its tensors when asked for."""
    return safe_open(path, framework="pt").__enter__()  # type: ignore[no-untyped-call]


def _write_shard(folder: Path, shard: dict[str, Tensor]) -> Path:
    """Write one file of the cache beside its place and rename it, so that a reader never sees half of it."""
    name = hashlib.sha256("".join(sorted(shard)).encode()).hexdigest()[:16]
    partial = folder / f"{name}.{os.getpid()}.partial"
    save_file({key: value.contiguous() for key, value in shard.items()}, partial)
    return partial.replace(folder / f"{name}.safetensors")
