"""Every set of tiles as its descriptors, with the caption and the block of each tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from eval.likeness.descriptors import as_vectors, describe, phase_threshold
from eval.likeness.round_trips import RoundTrips
from eval.likeness.rows import Naming
from eval.likeness.tile_sets import TileSets, block_numbers, class_numbers
from eval.stats.arrays import Floats, Grey, Ints
from eval.stats.distances import Sample, one_a_block
from eval.tiles.features import Tiles

MOST_FOR_THRESHOLD = 200
"""Tiles of a state whose pixels are enough to find the threshold between its phases."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """The descriptors of one set of tiles.

    Attributes:
        values: name -> (N, ...), as from ``describe``.
        cells: (N,) number of the caption.
        blocks: (N,) block number.
    """

    values: Mapping[str, Floats]
    cells: Ints
    blocks: Ints

    def __len__(self) -> int:
        return len(self.cells)

    def take(self, index: Ints) -> Described:
        """Return the tiles at ``index``."""
        return Described(
            values={name: values[index] for name, values in self.values.items()},
            cells=self.cells[index],
            blocks=self.blocks[index],
        )

    @staticmethod
    def joined(first: Described, second: Described) -> Described:
        """Return both together; blocks keep apart."""
        return Described(
            values={name: np.concatenate([first.values[name], second.values[name]]) for name in first.values},
            cells=np.concatenate([first.cells, second.cells]),
            blocks=np.concatenate([first.blocks, second.blocks + first.blocks.max(initial=0) + 1]),
        )

    def sample(self, scale: tuple[Floats, Floats]) -> Sample:
        """Return all descriptors as feature vectors, less a mean and over a spread, (D,) each."""
        vectors = (as_vectors(dict(self.values)) - scale[0]) / scale[1]
        return Sample(features=vectors, strata=self.cells, blocks=self.blocks)

    @property
    def num_blocks(self) -> int:
        """Blocks, counted within each caption."""
        return len(one_a_block(self.cells, self.blocks))


@dataclass(frozen=True, kw_only=True)
class DescribedSets:
    """The sets that are compared; ``vae`` is None without a round trip."""

    generated: Described
    held_out: Described
    aside: Described
    vae: Described | None


def describe_sets(tiles: TileSets, naming: Naming, through: RoundTrips) -> DescribedSets:
    """Describe every set, state by state with the threshold between its phases from the learning tiles."""
    states = np.array([cut.label[0] for cut in tiles.learning.cuts])
    threshold = {
        state: phase_threshold(tiles.learning.pixels[states == state][:MOST_FOR_THRESHOLD]) for state in naming.states
    }

    def described(part: Tiles, pixels: Grey) -> Described:
        truth = class_numbers((cut.label for cut in part.cuts), naming)
        by_state = [np.flatnonzero(truth["state"] == number) for number in range(len(naming.states))]
        found = [
            describe(pixels[members], threshold[state])
            for state, members in zip(naming.states, by_state, strict=True)
            if len(members)
        ]
        order = np.concatenate(by_state).argsort()
        return Described(
            values={name: np.concatenate([one[name] for one in found])[order] for name in found[0]},
            cells=truth["state"] * 1000 + truth["axis"],
            blocks=block_numbers(cut.block for cut in part.cuts),
        )

    return DescribedSets(
        generated=described(tiles.generated, tiles.generated.pixels),
        held_out=described(tiles.held_out, tiles.held_out.pixels),
        aside=described(tiles.aside, tiles.aside.pixels),
        vae=None if through.aside is None else described(tiles.aside, through.aside),
    )
