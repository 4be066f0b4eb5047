"""The tiles of a likeness check: real ones to learn from, set aside and held out, and generated ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from configs.errors import InputError
from eval.likeness.rows import Head, Naming
from eval.stats.arrays import Ints
from eval.tiles.config import SlicesConfig
from eval.tiles.features import Tiles, draw_cuts, read_tiles
from eval.tiles.sets import Generated, RealSlices, choose_tile, generated_cuts, real_cuts


@dataclass(frozen=True, kw_only=True)
class TileSets:
    """The tiles of one check; ``owners`` gives the generated picture each generated tile belongs to."""

    learning: Tiles
    aside: Tiles
    held_out: Tiles
    generated: Tiles
    owners: Sequence[int]


def draw_tile_sets(
    slices: SlicesConfig, real: RealSlices, generated: Generated, *, train_tiles: int, held_out_tiles: int
) -> TileSets:
    """Draw and read the tiles of every set, by seed.

    Args:
        slices: what is compared; its seed draws the tiles.
        real: the slices of the dataset.
        generated: the generated slices.
        train_tiles: tiles of a caption that the classifier learns from, at most.
        held_out_tiles: held-out tiles of a caption, at least; as many as generated ones if those are more.

    Raises:
        InputError: a state or axis of the dataset has nothing to learn from, or the tile does not fit.
    """
    tile = choose_tile(slices, real, generated)
    cuts = real_cuts(real, tile)
    made = read_tiles(generated_cuts(generated.pictures, tile), tile, keep_flat=True)
    most = max(sum(cut.label == label for cut in made.cuts) for label in {cut.label for cut in made.cuts})
    each = max(held_out_tiles, most)
    learning = read_tiles(draw_cuts(cuts.learning, train_tiles, slices.seed), tile)
    for kind, position, names in (("state", 0, real.states), ("axis", 1, real.axes)):
        for name in names:
            if not any(cut.label[position] == name for cut in learning.cuts):
                raise InputError(
                    f"--real {slices.real}: no training tile of the {kind} '{name}' shows anything but one grey level"
                )
    numbers = {picture.path: number for number, picture in enumerate(generated.pictures)}
    return TileSets(
        learning=learning,
        aside=read_tiles(draw_cuts(cuts.aside, most, slices.seed), tile),
        held_out=read_tiles(draw_cuts(cuts.held_out, each, slices.seed), tile),
        generated=made,
        owners=[numbers[cut.path] for cut in made.cuts],
    )


def remarks(real: RealSlices, generated: Generated, tiles: TileSets) -> Iterable[str]:
    """Say how much is compared, what was left out, and what cannot be trusted."""
    shapes = sorted({(picture.height, picture.width) for picture in generated.pictures})
    yield (
        f"{len(generated.pictures)} generated slices of {', '.join(f'{h} x {w}' for h, w in shapes)} px, "
        f"{len(tiles.held_out)} held-out real tiles, {len(tiles.learning)} to learn from; "
        f"tiles of {tiles.learning.pixels.shape[1]} px at native scale"
    )
    if not {(row.height, row.width) for row in real.train} & set(shapes):
        yield (
            "note: real slices have another size than generated ones; both are read pixel for pixel; that is wrong if "
            "training resized its pictures: slice with --fit tile at the training size"
        )
    if generated.num_other:
        yield f"note: {generated.num_other} pictures whose prompt is not a caption of the dataset are left out"
    flat = tiles.learning.num_flat + tiles.aside.num_flat + tiles.held_out.num_flat
    if flat:
        yield f"note: {flat} real tiles of a single grey level are left out"
    if why := leak_unchecked(real):
        yield f"note: {why}"


def leak_unchecked(real: RealSlices) -> str:
    """Return why nothing may be judged on a dataset without held-out slices, or an empty string."""
    if real.validation:
        return ""
    return f"leak unchecked: {real.folder} has no validation split, so all comparisons are with what was trained on"


def class_numbers(labels: Iterable[tuple[str, str]], naming: Naming) -> dict[Head, Ints]:
    """Return the class numbers of the states and of the axes of (state, axis) labels, (N,) each."""
    listed = list(labels)
    return {
        "state": np.array([naming.states.index(state) for state, _ in listed], dtype=np.int64),
        "axis": np.array([naming.axes.index(axis) for _, axis in listed], dtype=np.int64),
    }


def block_numbers(blocks: Iterable[str]) -> Ints:
    """Return names of blocks as numbers from 0, (N,)."""
    return np.unique(list(blocks), return_inverse=True)[1].astype(np.int64)
