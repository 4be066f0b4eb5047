"""A small network that learns from the training slices alone when two tiles are the same place.

Two views of a tile, shifted, blurred and noisy, should lie together and those of other tiles apart; flips and turns are
tried one by one. It forgives what pixel-by-pixel comparison does not, and needs no weights from elsewhere.
Source: Chen et al. 2020, A simple framework for contrastive learning (NT-Xent); for medical images Dar et al. 2025.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from eval.copying.copies import SYMMETRIES, Matches, turned
from eval.stats.arrays import Grey

SIDE_PX = 32
"""Tiles are reduced to about this."""
TEMPERATURE = 0.1
BATCH = 48
LEARNING_RATE = 2e-3
DIMENSIONS = 64


class CopyNet(nn.Module):
    """Three convolutions that see two thirds of a tile, and a mean over places: a shift changes only what comes in."""

    def __init__(self) -> None:
        """Build the layers with the current random state."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 96, 5, padding=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(96, DIMENSIONS),
        )

    def forward(self, tiles: Tensor) -> Tensor:
        """Return unit vectors, (N, 1, s, s) standardised -> (N, D)."""
        return functional.normalize(self.layers(tiles), dim=1)


def train_copy_net(tiles: Grey, *, num_steps: int, shift_px: int, seed: int = 0) -> CopyNet:
    """Train on tiles (N, t, t); the same tiles, seed and thread count give the same network on a CPU.

    Args:
        tiles: the training tiles.
        num_steps: number of optimizer updates.
        shift_px: the largest shift of a view, in px.
        seed: seed of the weights, of the order of the tiles, and of the views.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = CopyNet()
    random = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps, pct_start=0.2)
    count = min(BATCH, len(tiles))
    for _ in tqdm(range(num_steps), desc="copy net", disable=None):
        chosen = tiles[random.choice(len(tiles), count, replace=False)]
        views = torch.cat([_prepared(_view(chosen, shift_px, random)) for _ in range(2)])
        vectors = net(views)
        logits = vectors @ vectors.T / TEMPERATURE
        logits.fill_diagonal_(-torch.inf)
        partner = torch.arange(2 * count).roll(count)
        loss = functional.cross_entropy(logits, partner)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return net.eval()


@torch.no_grad()
def net_matches(net: CopyNet, queries: Grey, references: Grey) -> Matches:
    """Find the reference whose vector is closest to that of any flip or turn of each query; similarity is a cosine."""
    known = net(_prepared(references))
    turns = np.stack([turned(queries, symmetry) for symmetry in range(SYMMETRIES)], axis=1)
    cosines = torch.stack([net(_prepared(np.ascontiguousarray(own))) @ known.T for own in turns])  # (Q, 8, R)
    best = cosines.flatten(1).argmax(dim=1).numpy()
    symmetry, index = np.divmod(best, len(references))
    values = cosines.flatten(1).max(dim=1).values.double().numpy()
    return Matches(similarity=values, index=index, symmetry=symmetry, offset=np.zeros((len(queries), 2), np.int64))


def _prepared(tiles: NDArray[np.generic]) -> Tensor:
    """Reduce tiles (N, t, t) to about ``SIDE_PX`` and take grey level and contrast out, (N, 1, s, s)."""
    pixels = torch.from_numpy(np.ascontiguousarray(tiles, dtype=np.float32))[:, None]
    factor = max(1, round(pixels.shape[-1] / SIDE_PX))
    pixels = functional.avg_pool2d(pixels, factor)
    mean, spread = pixels.mean(dim=(2, 3), keepdim=True), pixels.std(dim=(2, 3), keepdim=True)
    return (pixels - mean) / (spread + 4.0)


def _view(tiles: Grey, shift_px: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Return tiles as a generator might copy them: moved, softer, noisier."""
    side = tiles.shape[1]
    moved = []
    for tile in np.pad(tiles, ((0, 0), (shift_px,) * 2, (shift_px,) * 2), mode="reflect"):
        row, column = random.integers(0, 2 * shift_px + 1, 2)
        moved.append(tile[row : row + side, column : column + side])
    pixels = torch.from_numpy(np.stack(moved).astype(np.float32))
    if random.random() < 0.5:
        soft = functional.avg_pool2d(pixels[:, None], 3, stride=1, padding=1, count_include_pad=False)[:, 0]
        pixels = torch.lerp(pixels, soft, float(random.uniform(0.3, 1.0)))
    noise = random.standard_normal(pixels.shape, dtype=np.float32) * np.float32(random.uniform(0, 12))
    return np.asarray(pixels.numpy() + noise, dtype=np.float32)
