"""The tiles of a search for copies: those of the training slices, held-out ones, and generated ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from configs.errors import InputError
from data_prep.folders.manifest import METADATA_NAME, is_inside, read_records
from eval.tiles.config import SlicesConfig
from eval.tiles.features import TileCut, Tiles, draw_cuts, read_tiles, tile_corners
from eval.tiles.sets import Generated, RealSlices, choose_tile, generated_cuts, split_cuts
from prompts.captions import parse_caption
from prompts.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class SearchTiles:
    """The tiles of one search; ``reference`` are those searched, of what the model was trained on."""

    reference: Tiles
    held_out: Tiles
    generated: Tiles


@dataclass(frozen=True, kw_only=True)
class MostTiles:
    """How many tiles of a caption are drawn, at most, of each set."""

    reference: int
    held_out: int
    generated: int


def draw_search_tiles(
    slices: SlicesConfig,
    real: RealSlices,
    generated: Generated,
    vocabulary: Vocabulary,
    train_data_dir: Path | None,
    most: MostTiles,
) -> SearchTiles:
    """Draw and read the tiles of every set, by seed; captions without training tiles are left out.

    Args:
        slices: what is compared; its seed draws the tiles.
        real: the slices of the dataset.
        generated: the generated slices.
        vocabulary: the words of the captions.
        train_data_dir: folder that the model was trained on, if that is not all of the training split.
        most: tiles of a caption.

    Raises:
        InputError: the tile does not fit, or nothing is left of the training slices.
    """
    tile = choose_tile(slices, real, generated)
    learned = split_cuts(real, "train", tile)
    if train_data_dir is not None:
        learned = few_cuts(train_data_dir, vocabulary, tile)
    reference = read_tiles(draw_cuts(learned, most.reference, slices.seed), tile)
    labels = {cut.label for cut in reference.cuts}

    def drawn(cuts: Sequence[TileCut], count: int, *, keep_flat: bool) -> Tiles:
        kept = [cut for cut in cuts if cut.label in labels]
        return read_tiles(draw_cuts(kept, count, slices.seed), tile, keep_flat=keep_flat)

    made = drawn(generated_cuts(generated.pictures, tile), most.generated, keep_flat=True)
    if not len(reference) or not len(made):
        raise InputError(f"--generated {slices.generated}: no picture has a caption of the training slices")
    held_out = drawn(split_cuts(real, "validation", tile), most.held_out, keep_flat=False)
    return SearchTiles(reference=reference, held_out=held_out, generated=made)


def few_cuts(folder: Path, vocabulary: Vocabulary, tile: int) -> list[TileCut]:
    """Return the tiles of a folder of few training slices, whose captions are those of the dataset.

    Raises:
        InputError: no readable rows, a picture outside the folder, or no caption of the dataset.
    """
    cuts = []
    for number, record in read_records(folder / METADATA_NAME):
        name = str(record.get("file_name"))
        if not is_inside(name) or not (folder / name).is_file():
            raise InputError(f"{folder / METADATA_NAME}:{number}: no file_name inside this folder")
        label = parse_caption(str(record.get("text")), vocabulary)
        if label is None and isinstance(record.get("state"), str) and isinstance(record.get("axis"), str):
            label = str(record["state"]), str(record["axis"])
        if label is None:
            continue
        with Image.open(folder / name) as picture:
            width, height = picture.size
        if min(width, height) >= tile:
            cuts += [
                TileCut(path=folder / name, row=row, column=column, label=label, block=f"{name} {row} {column}")
                for row, column in tile_corners(height, width, tile)
            ]
    if not cuts:
        raise InputError(f"--train_data_dir {folder}: no slice of at least {tile} px whose caption the dataset has")
    return cuts


def num_trained(real: RealSlices, train_data_dir: Path | None) -> int:
    """Return how many slices the model was trained on."""
    return len(read_records(train_data_dir / METADATA_NAME)) if train_data_dir else len(real.train)
