"""Which training tile is a tile closest to, whatever its shift, flip or quarter turn?

The similarity is the normalised cross-correlation (NCC) of the tile's centre with every place of the training tile it
fits, the best of the eight flips and turns, as a mean over two scales: the coarse one finds the candidates, the fine
one tells texture from layout. Shapes: Q is the number of tiles asked
about, R that of tiles searched, each of t x t px; m px are the margin for the shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from eval.stats.arrays import Floats, Grey, Ints
from eval.stats.distances import block_bootstrap

Small = NDArray[np.float32]

SYMMETRIES = 8
COARSE_PX = 32
"""Side in px that tiles are reduced to for the first search."""
CANDIDATES = 6
FINE_SIGMA = 0.7
"""Px of smoothing at the fine scale: grain that a VAE cannot carry tells nothing."""
MARGIN_SHARE = 6
SMALLEST_MARGIN = 8
QUANTILE = 0.95


@dataclass(frozen=True, kw_only=True)
class Matches:
    """The best match of each tile.

    Attributes:
        similarity: how alike the two are, in [-1, 1], (Q,).
        index: number of the tile that it was found in, (Q,).
        symmetry: which flip or turn of the query fits, from 0 to 7, (Q,).
        offset: rows and columns that the turned query moves by to lie on the tile found, (Q, 2).
    """

    similarity: Floats
    index: Ints
    symmetry: Ints
    offset: Ints


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Where a match counts as a copy.

    Similarities are centred and scaled by the held-out tiles of their caption first, since some weaves resemble
    themselves more than others.

    Attributes:
        centre: mean similarity of the held-out tiles of each caption, by its number.
        spread: standard deviation of the same, by the caption's number.
        value: the 95 % quantile of the held-out tiles, in units of the spread.
        conservative: the upper end of its block-bootstrap interval, which is what counts.
    """

    centre: dict[int, float]
    spread: dict[int, float]
    value: float
    conservative: float

    def scores(self, similarity: Floats, cells: Ints) -> Floats:
        """Return similarities in units of the caption's spread, (Q,); captions without held-out tiles give NaN."""
        centre = np.array([self.centre.get(int(cell), np.nan) for cell in cells])
        spread = np.array([self.spread.get(int(cell), np.nan) for cell in cells])
        return np.asarray((similarity - centre) / spread)

    def flags(self, similarity: Floats, cells: Ints) -> Floats:
        """Return 1 for matches that count as copies, else 0."""
        return np.asarray(self.scores(similarity, cells) > self.conservative, dtype=np.float64)


def turned(tile: NDArray[np.generic], symmetry: int) -> NDArray[np.generic]:
    """Return one of the eight flips and quarter turns of a square, (..., t, t); 0 is the tile itself."""
    flipped = tile[..., ::-1] if symmetry >= 4 else tile
    return np.rot90(flipped, symmetry % 4, axes=(-2, -1))


def margin_of(tile: int) -> int:
    """Return the largest shift in px that is looked for in tiles of this side."""
    return min(max(SMALLEST_MARGIN, tile // MARGIN_SHARE), tile // 4)


def best_matches(
    queries: Grey, references: Grey, query_blocks: Ints | None = None, reference_blocks: Ints | None = None
) -> Matches:
    """Find the most similar reference of each query.

    Args:
        queries: tiles that are searched for, (Q, t, t).
        references: tiles that are searched, (R, t, t).
        query_blocks: block of each query, (Q,); pairs of tiles of the same block are left out.
        reference_blocks: block of each reference, (R,).
    """
    tile = queries.shape[1]
    factor = max(2, -(-tile // COARSE_PX))
    coarse, fine = (_Search(_reduced(references, size), _margin(tile, size)) for size in (factor, 1))
    found: list[tuple[float, int, int, int, int]] = []
    for number, query in enumerate(queries):
        first = coarse.best(_turns(_reduced(query[None], factor)[0]), np.arange(len(references)))[0]  # (8, R)
        if query_blocks is not None and reference_blocks is not None:
            first[:, reference_blocks == query_blocks[number]] = -1.0
        symmetries, places = np.unravel_index(np.argsort(-first, axis=None)[:CANDIDATES], first.shape)
        turns = _turns(_reduced(query[None], 1)[0])
        best = (-1.0, int(places[0]), int(symmetries[0]), 0, 0)
        for symmetry, place in zip(symmetries, places, strict=True):
            second, offsets = fine.best(turns[[symmetry]], np.array([place]))
            value = float(first[symmetry, place] + second[0, 0]) / 2
            if first[symmetry, place] > -1.0 and value > best[0]:
                best = (value, int(place), int(symmetry), int(offsets[0, 0, 0]), int(offsets[0, 0, 1]))
        found.append(best)
    values = np.array(found).reshape(len(found), 5)
    whole = values[:, 1:].astype(np.int64)
    return Matches(similarity=values[:, 0], index=whole[:, 0], symmetry=whole[:, 1], offset=whole[:, 2:])


def aligned(query: Grey, symmetry: int, offset: Ints) -> Grey:
    """Return the query turned and moved onto its match, (t, t), its edge mirrored where nothing is known."""
    moved = ndimage.shift(turned(query, symmetry).astype(np.float64), offset, order=0, mode="reflect")
    return np.asarray(moved.round().clip(0, 255), dtype=np.uint8)


def calibrate(similarity: Floats, cells: Ints, blocks: Ints, *, draws: int = 500, seed: int = 0) -> Threshold:
    """Set the threshold from held-out tiles, which cannot be copies.

    Args:
        similarity: similarity of each held-out tile to the nearest training tile, (N,).
        cells: number of the caption of each, (N,).
        blocks: number of the slab of each, (N,); whole slabs are drawn again.
        draws: number of bootstrap resamples.
        seed: seed of the resampling.

    One slab alone would set a threshold by chance: the upper end of the quantile's interval is what counts.
    """
    centre = {int(cell): float(similarity[cells == cell].mean()) for cell in np.unique(cells)}
    pooled = float(np.std([value - centre[int(cell)] for value, cell in zip(similarity, cells, strict=True)]))
    spread = {}
    for cell in centre:
        own = similarity[cells == cell]
        # A few tiles do not know their spread: they borrow from all captions.
        spread[cell] = float(np.sqrt((len(own) * own.var() + 8 * pooled**2) / (len(own) + 8))) or 1e-6
    scores = Threshold(centre=centre, spread=spread, value=0.0, conservative=0.0).scores(similarity, cells)
    order = np.argsort(scores)

    def quantile(weights: Floats) -> float:
        share = np.cumsum(weights[order]) / weights.sum()
        return float(scores[order[min(int(np.searchsorted(share, QUANTILE)), len(order) - 1)]])

    interval = block_bootstrap(quantile, cells, blocks, draws=draws, seed=seed)
    return Threshold(centre=centre, spread=spread, value=interval.value, conservative=interval.high)


def planted(tiles: Grey, shift_px: int) -> Grey:
    """Return tiles (N, t, t) moved down and to the right, what comes in at the edge mirrored."""
    padded = np.pad(tiles, ((0, 0), (shift_px, 0), (shift_px, 0)), mode="reflect")
    return padded[:, : tiles.shape[1], : tiles.shape[2]]


class _Search:
    """References of one scale, ready to be searched."""

    def __init__(self, references: Small, margin: int) -> None:
        self.margin = margin
        self.window = references.shape[1] - 2 * margin
        self.spectra = fft.rfft2(references)
        places = 2 * margin + 1
        sums = _window_sums(references.astype(np.float64), self.window)[:, :places, :places]
        squares = _window_sums(references.astype(np.float64) ** 2, self.window)[:, :places, :places]
        deviation = np.sqrt(np.maximum(squares - sums**2 / self.window**2, 1e-6 * self.window**2))
        self.inverse = (1 / deviation).astype(np.float32)
        self.side = references.shape[1]

    def best(self, turns: Small, chosen: Ints) -> tuple[Small, Ints]:
        """Return the best NCC of each turn (S, t, t) in each chosen reference, (S, R), and its offset, (S, R, 2)."""
        edge, end = self.margin, self.side - self.margin
        centre = turns[:, edge:end, edge:end]
        centre = centre - centre.mean(axis=(1, 2), keepdims=True)
        centre = centre / np.maximum(np.sqrt(np.square(centre).sum(axis=(1, 2), keepdims=True)), 1e-3)
        spectrum = np.conj(fft.rfft2(centre, s=(self.side, self.side)))
        places = 2 * edge + 1
        found = fft.irfft2(self.spectra[chosen] * spectrum[:, None], s=(self.side, self.side))[..., :places, :places]
        flat = (found * self.inverse[chosen]).reshape(*found.shape[:2], -1)
        best = flat.argmax(axis=2)
        offset = np.stack(np.unravel_index(best, (places, places)), axis=-1) - edge
        return np.take_along_axis(flat, best[..., None], axis=2)[..., 0], offset


def _turns(tile: Small) -> Small:
    """Return the eight flips and turns of a tile, (8, t, t)."""
    return np.stack([turned(tile, symmetry) for symmetry in range(SYMMETRIES)]).astype(np.float32)


def _margin(tile: int, factor: int) -> int:
    """Return the margin at a scale that is coarser by ``factor``."""
    return -(-margin_of(tile) // factor)


def _reduced(tiles: Grey, factor: int) -> Small:
    """Return tiles (N, t, t) smoothed, or as means of ``factor`` x ``factor`` px; what does not divide is cut off."""
    if factor == 1:
        return ndimage.gaussian_filter(tiles.astype(np.float32), (0, FINE_SIGMA, FINE_SIGMA))
    side = tiles.shape[1] // factor
    cut = tiles[:, : side * factor, : side * factor].astype(np.float32)
    return np.asarray(cut.reshape(len(tiles), side, factor, side, factor).mean(axis=(2, 4)), dtype=np.float32)


def _window_sums(tiles: Floats, window: int) -> Floats:
    """Return the sum over every window of ``window`` px a side, (N, t - window + 1, t - window + 1)."""
    total = np.pad(tiles, ((0, 0), (1, 0), (1, 0))).cumsum(axis=1).cumsum(axis=2)
    return np.asarray(
        total[:, window:, window:]
        - total[:, :-window, window:]
        - total[:, window:, :-window]
        + total[:, :-window, :-window]
    )
