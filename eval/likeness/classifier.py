"""A small network that reads state and axis off a tile of a slice.

State, specimen and scan are one and the same in most campaigns, so grey level would be a perfect shortcut. Training
takes it away: two tiles in five get the histogram of another tile, whatever its state, two a random monotone curve;
blur and noise follow.

Shapes: N is the number of tiles, h x w their pixels, S and A the numbers of states and axes, F that of features.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

WIDTHS = (16, 32, 64, 96)
LEARNING_RATE = 3e-3
LABEL_SMOOTHING = 0.05  # keeps the features of easy tiles from running away, which would swell their distances


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the classifier sees in tiles.

    Attributes:
        states: (N, S) probabilities.
        axes: (N, A) probabilities.
        features: (N, F) the pooled features that both heads read.
    """

    states: NDArray[np.float64]
    axes: NDArray[np.float64]
    features: NDArray[np.float64]


class SliceClassifier(nn.Module):
    """Four strided convolutions, global mean and spread, and two linear heads; any tile of at least 16 px will do."""

    def __init__(self, num_states: int, num_axes: int) -> None:
        super().__init__()
        channels = (1, *WIDTHS)
        self.body = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(
                        before, after, 5 if before == 1 else 3, stride=2, padding=2 if before == 1 else 1, bias=False
                    ),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                )
                for before, after in pairwise(channels)
            )
        )
        self.state_head = nn.Linear(2 * WIDTHS[-1], num_states)
        self.axis_head = nn.Linear(2 * WIDTHS[-1], num_axes)

    def features(self, tiles: Tensor) -> Tensor:
        """Return mean and standard deviation over the tile of the last channels, (N, 1, h, w) in [0, 1] -> (N, F)."""
        maps = self.body(2 * tiles - 1).flatten(2)  # (N, C, h/16 * w/16)
        spread = (maps.var(dim=2, unbiased=False) + 1e-5).sqrt()
        return torch.cat([maps.mean(dim=2), spread], dim=1)

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of state (N, S) and axis (N, A) of tiles (N, 1, h, w) in [0, 1]."""
        features = self.features(tiles)
        return self.state_head(features), self.axis_head(features)


def train_classifier(
    tiles: NDArray[np.uint8],
    states: NDArray[np.int64],
    axes: NDArray[np.int64],
    *,
    num_steps: int = 500,
    batch_size: int = 64,
    seed: int = 0,
    device: str = "cpu",
) -> SliceClassifier:
    """Train both heads together; the same seed and thread count give the same weights on a CPU.

    Args:
        tiles: grey values, (N, h, w).
        states: class number of the state of each tile, from 0, (N,).
        axes: class number of the axis of each tile, from 0, (N,).
        num_steps: number of optimizer updates.
        batch_size: number of tiles in an update.
        seed: seed of the initial weights, of the order of the tiles, and of the augmentation.
        device: where the classifier is trained.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SliceClassifier(int(states.max()) + 1, int(axes.max()) + 1).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(seed)
    pixels, state, axis = (torch.from_numpy(array) for array in (tiles, states, axes))
    order = torch.empty(0, dtype=torch.long)
    model.train()
    for _ in tqdm(range(num_steps), desc="slice classifier", disable=None):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(pixels), generator=generator)])
        batch, order = order[:batch_size], order[batch_size:]
        augmented = augment(pixels[batch].float() / 255, generator).to(device)
        state_logits, axis_logits = model(augmented[:, None])
        loss = functional.cross_entropy(state_logits, state[batch].to(device), label_smoothing=LABEL_SMOOTHING)
        loss = loss + functional.cross_entropy(axis_logits, axis[batch].to(device), label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model.eval()


@torch.no_grad()
def read_slices(model: SliceClassifier, tiles: NDArray[np.uint8], *, batch_size: int = 256) -> Reading:
    """Return probabilities and features of tiles (N, h, w) uint8."""
    device = model.state_head.weight.device
    parts = []
    for batch in torch.from_numpy(np.ascontiguousarray(tiles)).split(batch_size):
        features = model.features((batch.float() / 255).to(device)[:, None])
        parts.append([model.state_head(features).softmax(1), model.axis_head(features).softmax(1), features])
    joined = [torch.cat(part).double().cpu().numpy() for part in zip(*parts, strict=True)]
    return Reading(states=joined[0], axes=joined[1], features=joined[2])


def augment(tiles: Tensor, generator: torch.Generator) -> Tensor:
    """Return tiles (N, h, w) in [0, 1] flipped, with grey levels that say nothing, then blurred and noisy, at random.

    Never turned by 90 degrees: the rows of a warp or weft slice run along the thickness, and that is what the axis
    head reads.
    """

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    count = len(tiles)
    for dimension in (1, 2):
        tiles = torch.where((drawn(count) < 0.5)[:, None, None], tiles.flip(dimension), tiles)
    partner = tiles[torch.randperm(count, generator=generator)]
    first, second = count * 2 // 5, count * 4 // 5  # the batch comes shuffled
    borrowed = give_histogram(tiles[:first], partner[:first], generator)
    tiles = torch.cat([borrowed, _monotone_curves(tiles[first:second], generator), tiles[second:]])
    tiles = torch.where((drawn(count) < 0.5)[:, None, None], _blur(tiles, 0.4 + 0.9 * float(drawn(1))), tiles)
    sigma = 0.06 * drawn(count)[:, None, None]
    return (tiles + sigma * torch.randn(tiles.shape, generator=generator)).clamp(0, 1)


def give_histogram(tiles: Tensor, donors: Tensor, generator: torch.Generator) -> Tensor:
    """Return tiles (N, h, w) with their own order of pixels and exactly the grey values of ``donors`` (N, h, w).

    Equal pixels are ordered by chance, so that no trace of the tile's own levels is left.
    """
    dither = torch.rand(tiles.shape, generator=generator) / 512
    order = (tiles + dither).flatten(1).argsort(dim=1)
    values = donors.flatten(1).sort(dim=1).values
    return torch.empty_like(values).scatter_(1, order, values).view_as(tiles)


def _monotone_curves(tiles: Tensor, generator: torch.Generator) -> Tensor:
    """Send each tile through its own rising curve between two random ends."""
    count = len(tiles)
    rises = torch.rand(count, 8, generator=generator) ** 2 + 0.05
    knots = torch.cat([torch.zeros(count, 1), rises.cumsum(1)], dim=1)
    knots = knots / knots[:, -1:]
    ends = torch.rand(count, 2, generator=generator)
    low, high = 0.4 * ends[:, :1], 0.6 + 0.4 * ends[:, 1:]
    curve = functional.interpolate((low + (high - low) * knots)[:, None], 256, mode="linear", align_corners=True)[:, 0]
    return curve.gather(1, (tiles * 255).round().long().flatten(1)).view_as(tiles)


def _blur(tiles: Tensor, sigma: float) -> Tensor:
    """Blur by a Gaussian of ``sigma`` px."""
    taps = torch.exp(-0.5 * (torch.arange(-3, 4) / sigma) ** 2)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    return functional.conv2d(functional.pad(tiles[:, None], (3, 3, 3, 3), mode="reflect"), kernel[None, None])[:, 0]
