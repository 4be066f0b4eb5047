"""How much of a picture looks like a training slice although its prompt asked for something else.

A small network learns to tell patches of real training slices from patches of the base model's own probe pictures. Both
are grey, since colour would be too easy a cue and is measured elsewhere. The slices come as they are and once through
the model's own VAE: the traces a decoder leaves are then on both sides and tell nothing.
Shapes: N pictures, M patches of p x p px.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from configs.errors import InputError
from data_prep.folders.manifest import is_inside, read_records
from eval.forgetting.picture_scores import is_leaked
from eval.stats.arrays import Floats, Grey
from eval.tiles.features import cover, read_grey, to_grey
from finetune.diffusion.models import Models
from finetune.diffusion.vae import decode, slice_latents

MIN_RECALL = 0.9
MAX_FALSE_ALARM = 0.1  # of 48 pictures, 5 % would be two; the base's own share is the floor of each score anyway
PATCH_RECALL = 0.9
MOST_LOG_ODDS = 3.0  # a probability of 95 %
LARGEST_PATCH = 64
PATCHES_PER_SIDE = 8
TRAINING_STEPS = 400
TRAINING_BATCH = 64


class PatchNet(nn.Module):
    """Three strided convolutions and a mean over places: about 15,000 weights, for texture rather than layout."""

    def __init__(self) -> None:
        """Build the layers with the current random state."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """Return the log-odds of being a slice, (M, 1, p, p) in [0, 1] -> (M,)."""
        places = self.layers((patches - 0.5) * 4)
        return self.head(torch.cat([places.mean((2, 3)), places.amax((2, 3))], dim=1)).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class LeakNet:
    """A trained patch network, the side of its patches in px, and the log-odds above which a patch is a slice."""

    net: PatchNet
    patch: int
    threshold: float = 0.0

    def patch_shares(self, pictures: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> Floats:
        """Return the share of slice-like patches of each picture, (H, W) or (H, W, 3) uint8 -> (N,), in [0, 1]."""
        return np.array([float((self._log_odds(picture) > self.threshold).mean()) for picture in pictures])

    def calibrated(self, slices: Sequence[Grey]) -> LeakNet:
        """Return the network with the strictest threshold that finds ``PATCH_RECALL`` of the patches of ``slices``.

        The slices must be others than it was trained on. A picture is found by 30 % of its patches, so a few lost ones
        cost nothing, and each patch of an innocent grey texture that is not called a slice is a false alarm less. The
        threshold stays below ``MOST_LOG_ODDS``: what leaks is rarely as clear as a real slice.
        """
        odds = np.concatenate([self._log_odds(picture) for picture in slices])
        return replace(self, threshold=float(np.quantile(odds, 1 - PATCH_RECALL).clip(0.0, MOST_LOG_ODDS)))

    @torch.no_grad()
    def _log_odds(self, picture: NDArray[np.uint8]) -> Floats:
        """Return the log-odds of each patch of one picture."""
        grey = to_grey(picture)
        rows, columns = (_places(side, self.patch) for side in grey.shape)
        patches = np.stack([grey[r : r + self.patch, c : c + self.patch] for r in rows for c in columns])
        return self.net(_as_tensor(patches)).double().numpy()


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A network that recognises training slices, and how it does on what it has not seen.

    Attributes:
        net: the network.
        found: of each held-out slice, 1 if it was found, else 0.
        alarms: of each picture the base made of a probe, 1 if it was taken for a slice, else 0.
    """

    net: LeakNet
    found: Floats
    alarms: Floats

    @property
    def recall(self) -> float:
        """Share of held-out slices that it finds."""
        return float(self.found.mean())

    @property
    def false_alarm(self) -> float:
        """Share of the base's pictures that it takes for slices."""
        return float(self.alarms.mean())

    @property
    def is_blind(self) -> bool:
        """Whether it cannot be trusted."""
        return self.recall < MIN_RECALL or self.false_alarm > MAX_FALSE_ALARM


def learn_slices(
    slices: Sequence[Grey],
    others: Sequence[NDArray[np.uint8]],
    *,
    held_out: Sequence[Grey],
    base: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    seed: int = 0,
) -> Learned:
    """Train the network that recognises training slices, set its threshold, and test it.

    Args:
        slices: real training slices, as they are and after the VAE, (H, W) uint8.
        others: pictures the base model made, (H, W, 3) uint8.
        held_out: slices after the VAE that are not trained on; every other one sets the threshold, the rest test it.
        base: other pictures of the base model, (N, H, W, 3) uint8, to count false alarms on.
        seed: of the training.
    """
    net = train_leak_net(slices, others, seed=seed).calibrated(held_out[::2])
    found, alarms = (is_leaked(net.patch_shares(pictures)) for pictures in (held_out[1::2], base))
    return Learned(net=net, found=found, alarms=alarms)


def train_leak_net(slices: Sequence[Grey], others: Sequence[NDArray[np.uint8]], *, seed: int = 0) -> LeakNet:
    """Train the patch network on random crops with random contrast, brightness, blur, noise, flips.

    Args:
        slices: real training slices, as they are and after the VAE, (H, W) uint8.
        others: pictures the base model made of the probes, (H, W) or (H, W, 3) uint8.
        seed: of the weights and the crops; the same inputs and seed give the same network.
    """
    sides = [side for picture in (*slices, *others) for side in picture.shape[:2]]
    patch = max(8, min(LARGEST_PATCH, min(sides) // 2))
    random = np.random.default_rng(seed)
    groups = [list(slices), [to_grey(picture) for picture in others]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = PatchNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=TRAINING_STEPS)
    truth = torch.tensor([1.0, 0.0]).repeat_interleave(TRAINING_BATCH // 2)
    for _ in range(TRAINING_STEPS):
        crops = [_crop(group, patch, random) for group in groups for _ in range(TRAINING_BATCH // 2)]
        patches = _jittered(np.stack(crops), random)
        loss = nn.functional.binary_cross_entropy_with_logits(net(_as_tensor(patches)), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return LeakNet(net=net.eval(), patch=patch)


def read_slices(split: Path, size: tuple[int, int], *, limit: int, seed: int = 0) -> list[Grey]:
    """Read training slices the way training sees them: the shorter side resized to cover ``size``, the centre kept.

    Args:
        split: folder with pictures and ``metadata.jsonl``, such as ``data/weave/train``.
        size: (height, width) in px of the generated pictures.
        limit: read at most this many, the same number of each caption, drawn by ``seed``.
        seed: of the draw.

    Raises:
        InputError: the folder has no such rows, or a picture is missing.
    """
    by_caption: dict[str, list[Path]] = {}
    for number, row in read_records(split / "metadata.jsonl"):
        name = row.get("file_name")
        if not isinstance(name, str) or not is_inside(name):
            raise InputError(f"{split / 'metadata.jsonl'}:{number}: no file_name inside this folder")
        by_caption.setdefault(str(row.get("text")), []).append(split / name)
    random = np.random.default_rng(seed)
    each = max(1, limit // max(1, len(by_caption)))
    chosen = [
        paths[index]
        for _, paths in sorted(by_caption.items())
        for index in sorted(random.choice(len(paths), min(each, len(paths)), replace=False))
    ]
    return [cover(read_grey(path), size) for path in chosen[:limit]]


@torch.no_grad()
def round_trip(models: Models, slices: Sequence[Grey], *, batch_size: int = 16) -> list[Grey]:
    """Return the slices as the model would give them: as latents at the scale it samples at, decoded, grey again."""
    latents = slice_latents(models, np.stack(slices), batch_size=batch_size)
    requests = [("VAE round trip of a slice", index) for index in range(len(slices))]
    return [to_grey(picture) for picture in decode(models, latents, requests, batch_size=batch_size)]


def _places(side: int, patch: int) -> NDArray[np.int64]:
    """Return evenly spread patch corners along one side: half overlapping, at most ``PATCHES_PER_SIDE``."""
    number = min(PATCHES_PER_SIDE, max(1, 2 * side // patch - 1))
    return np.linspace(0, side - patch, number).round().astype(np.int64)


def _crop(pictures: Sequence[Grey], patch: int, random: np.random.Generator) -> Grey:
    """Cut one random patch out of one random picture, flipped or not."""
    picture = pictures[int(random.integers(len(pictures)))]
    row, column = random.integers(0, np.array(picture.shape) - patch + 1)
    up, left = random.choice([1, -1], 2)
    return picture[row : row + patch, column : column + patch][::up, ::left]


def _jittered(patches: Grey, random: np.random.Generator) -> NDArray[np.float32]:
    """Vary what a model may change without changing the texture: sharpness, contrast, brightness, noise; (M, p, p)."""
    changed = patches.astype(np.float32)
    blurred = random.random(len(changed)) < 0.3
    changed[blurred] = ndimage.gaussian_filter(changed[blurred], (0, *[random.uniform(0.3, 0.9)] * 2))
    each = (len(changed), 1, 1)
    mean = changed.mean(axis=(1, 2), keepdims=True)
    changed = (changed - mean) * random.uniform(0.6, 1.4, each) + mean + random.uniform(-40, 40, each)
    changed += random.standard_normal(changed.shape) * random.uniform(0.0, 6.0, each)
    return np.asarray(changed.clip(0, 255), dtype=np.float32)


def _as_tensor(patches: NDArray[np.generic]) -> Tensor:
    """Return (M, p, p) grey levels as (M, 1, p, p) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(patches, dtype=np.float32)).unsqueeze(1) / 255
