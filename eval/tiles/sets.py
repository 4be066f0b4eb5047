"""The sets of tiles that a fidelity check compares: real for learning, real set aside, real held out, generated.

A tile's block is the slab of neighbouring slices it was cut from, or the seed it was generated from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError, NothingLeftError
from data_prep.folders.hashes import sha256_of
from data_prep.folders.manifest import (
    MANIFEST_NAME,
    METADATA_NAME,
    SliceRow,
    is_inside,
    read_manifest,
    read_records,
    read_rows,
)
from eval.tiles.config import LARGEST_TILE, SMALLEST_TILE, SlicesConfig
from eval.tiles.features import TileCut, tile_corners
from prompts.captions import all_captions, parse_caption
from prompts.vocabulary import DEFAULT, Vocabulary, read_vocabulary

SLAB_SLICES = 24
"""Neighbouring slices that count as one block, where the manifest gives no correlation length of the volume."""
CORRELATION_LENGTHS = 3
"""Slices this many correlation lengths apart count as independent."""
ASIDE_EVERY = 4
"""Of so many training blocks of a caption, one is kept from the classifier, for the real-against-real floor."""
RECORDS_NAME = "records.jsonl"


@dataclass(frozen=True, kw_only=True)
class GeneratedSlice:
    """A generated picture whose prompt is one of the dataset's captions."""

    path: Path
    prompt: str
    seed: int
    state: str
    axis: str
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What a folder of generated pictures holds.

    Attributes:
        pictures: those asked for with a caption of the dataset.
        num_other: pictures of other prompts, left out.
        base_model: name of the model as it was typed, empty if the records do not say.
        base_hash: its hash, empty if unknown.
        adapters: path and strength of each adapter, as the records have them.
        adapter_hashes: hashes of the files of the adapters.
    """

    pictures: tuple[GeneratedSlice, ...]
    num_other: int
    base_model: str
    base_hash: str
    adapters: tuple[tuple[Path, float], ...] = ()
    adapter_hashes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RealCuts:
    """Where real tiles may be cut, by use."""

    learning: tuple[TileCut, ...]
    aside: tuple[TileCut, ...]
    held_out: tuple[TileCut, ...]


@dataclass(frozen=True, kw_only=True)
class RealSlices:
    """The rows of a dataset folder, with the states and axes that occur.

    Attributes:
        folder: the dataset.
        train: rows of the training split.
        validation: rows of the held-out split; empty if the dataset has none.
        states: states of the training rows, in the vocabulary's order.
        axes: axes of the training rows, in the vocabulary's order.
        slabs: volume -> neighbouring slices that count as one block; those missing have the default.
    """

    folder: Path
    train: tuple[SliceRow, ...]
    validation: tuple[SliceRow, ...]
    states: tuple[str, ...]
    axes: tuple[str, ...]
    slabs: dict[str, int]

    @property
    def shortest_side(self) -> int:
        """Shortest side of any slice, in px."""
        return min(min(row.height, row.width) for row in (*self.train, *self.validation))


def read_both(config: SlicesConfig) -> tuple[Vocabulary, RealSlices, Generated]:
    """Read the words, the dataset and the generated slices that are compared.

    Raises:
        InputError, NothingLeftError: as for ``read_real`` and ``read_generated``.
    """
    vocabulary = read_vocabulary(config.vocabulary) if config.vocabulary else DEFAULT
    real = read_real(config.real, vocabulary)
    return vocabulary, real, read_generated(config.generated, real, vocabulary)


def choose_tile(config: SlicesConfig, real: RealSlices, generated: Generated) -> int:
    """Return the side of the tiles: as asked for, or the largest that fits every slice, at most 196 px.

    Raises:
        InputError: the tile does not fit, or the slices are too small to read.
    """
    shortest = min(real.shortest_side, *(min(picture.height, picture.width) for picture in generated.pictures))
    if shortest < SMALLEST_TILE:
        raise InputError(
            f"slices of {shortest} px are too small to read; at least {SMALLEST_TILE} px on each side are needed"
        )
    if config.tile_size is not None and config.tile_size > shortest:
        raise InputError(
            f"--tile_size {config.tile_size}: the shortest side of a slice is {shortest} px; at most {shortest}"
        )
    return config.tile_size or min(LARGEST_TILE, shortest)


def hashes_of(config: SlicesConfig, base_hash: str, train: Path | None = None) -> dict[str, str]:
    """Return the hashes of the lists of slices compared and of the model; ``train`` if that is another folder."""
    files = {
        "train": (train or config.real / "train") / METADATA_NAME,
        "validation": config.real / "validation" / METADATA_NAME,
        "records": config.generated / RECORDS_NAME,
    }
    hashes = {name: sha256_of(path) for name, path in files.items() if path.is_file()}
    return {**hashes, "base_model": base_hash} if base_hash else hashes


def read_real(folder: Path, vocabulary: Vocabulary) -> RealSlices:
    """Read the rows of both splits; a dataset without validation is read, with that side empty.

    Raises:
        InputError: no training rows, or a state or axis that the vocabulary does not know.
    """
    if not (folder / "train" / METADATA_NAME).is_file():
        hint = f"; did you mean {folder.parent}?" if (folder / METADATA_NAME).is_file() else ""
        raise InputError(
            f"--real {folder}: no train/{METADATA_NAME}; give a folder written by python -m data_prep.slice{hint}"
        )
    train = read_rows(folder / "train")
    has_validation = (folder / "validation" / METADATA_NAME).is_file()
    validation = read_rows(folder / "validation") if has_validation else []
    if not train:
        raise InputError(f"--real {folder}: train/{METADATA_NAME} has no rows")
    for row in (*train, *validation):
        if row.state not in vocabulary.states or row.axis not in vocabulary.axes:
            raise InputError(
                f"--real {folder}: {row.file_name} is '{row.state}', '{row.axis}'; the vocabulary knows "
                f"{', '.join(vocabulary.states)} and {', '.join(vocabulary.axes)}; pass --vocabulary"
            )
    return RealSlices(
        folder=folder,
        train=tuple(train),
        validation=tuple(validation),
        states=tuple(state for state in vocabulary.states if any(row.state == state for row in train)),
        axes=tuple(axis for axis in vocabulary.axes if any(row.axis == axis for row in train)),
        slabs=_slabs(folder),
    )


def read_generated(folder: Path, real: RealSlices, vocabulary: Vocabulary) -> Generated:
    """Read the records of a generated folder and keep the pictures whose prompt is a caption of the dataset.

    Raises:
        InputError: no records, or a record without what is needed.
        NothingLeftError: no prompt is a caption of the dataset.
    """
    path = folder / RECORDS_NAME
    if not path.is_file():
        raise InputError(f"--generated {folder}: no {RECORDS_NAME}; give a folder written by python -m eval.generate")
    pictures, other, base, adapters = list[GeneratedSlice](), list[str](), dict[str, object](), list[object]()
    for number, record in read_records(path):
        try:
            name, prompt = str(record["file_name"]), str(record["prompt"])
            seed, height, width = (int(str(record[key])) for key in ("seed", "height", "width"))
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}:{number}: no usable {error}; generate the folder again") from None
        if not is_inside(name):
            raise InputError(f"{path}:{number}: file_name {name!r} leaves its folder")
        named = record.get("base_model")
        base = named if isinstance(named, dict) else base
        listed = record.get("adapters")
        adapters = listed if isinstance(listed, list) else adapters
        asked = parse_caption(prompt, vocabulary)
        if asked is None or asked[0] not in real.states or asked[1] not in real.axes:
            other.append(prompt)
            continue
        pictures.append(
            GeneratedSlice(
                path=folder / name, prompt=prompt, seed=seed, state=asked[0], axis=asked[1], height=height, width=width
            )
        )
    if not pictures:
        first = f" (the first: '{other[0]}')" if other else ""
        raise NothingLeftError(
            f"--generated {folder}: none of {len(other)} prompts is a caption of {real.folder}{first}; "
            f"generate with prompts such as '{all_captions(vocabulary)[0]}'"
        )
    return Generated(
        pictures=tuple(pictures),
        num_other=len(other),
        base_model=str(base.get("name", "")),
        base_hash=str(base.get("hash", "")),
        adapters=tuple(
            (Path(str(item["name"])), float(item.get("scale", 1.0)))
            for item in adapters
            if isinstance(item, dict) and "name" in item and isinstance(item.get("scale", 1.0), int | float)
        ),
        adapter_hashes=tuple(str(item.get("hash", "")) for item in adapters if isinstance(item, dict)),
    )


def split_cuts(real: RealSlices, split: str, tile: int) -> list[TileCut]:
    """Return every tile of one split, ``train`` or ``validation``."""
    return _cuts_of(real, split, real.train if split == "train" else real.validation, tile)


def real_cuts(real: RealSlices, tile: int) -> RealCuts:
    """Return every tile of the dataset, by use.

    Without a validation split, the blocks set aside stand in for the held-out ones as well, half each: the numbers
    can then be computed, but not trusted, since neighbouring slices may sit on both sides.
    """
    train = _cuts_of(real, "train", real.train, tile)
    by_label: dict[tuple[str, str], list[str]] = {}
    for cut in train:
        blocks = by_label.setdefault(cut.label, [])
        if cut.block not in blocks:
            blocks.append(cut.block)
    aside = {block for blocks in by_label.values() for block in sorted(blocks)[1::ASIDE_EVERY]}
    learning, kept = [cut for cut in train if cut.block not in aside], [cut for cut in train if cut.block in aside]
    if real.validation:
        held_out = _cuts_of(real, "validation", real.validation, tile)
    else:
        kept, held_out = kept[::2], kept[1::2]
    return RealCuts(learning=tuple(learning), aside=tuple(kept), held_out=tuple(held_out))


def generated_cuts(pictures: Sequence[GeneratedSlice], tile: int) -> list[TileCut]:
    """Return every tile of the generated pictures, picture after picture."""
    return [
        TileCut(
            path=picture.path, row=row, column=column, label=(picture.state, picture.axis), block=f"seed {picture.seed}"
        )
        for picture in pictures
        for row, column in tile_corners(picture.height, picture.width, tile)
    ]


def _cuts_of(real: RealSlices, split: str, rows: Sequence[SliceRow], tile: int) -> list[TileCut]:
    """Return every tile of the rows; slabs are counted in slices of the volume."""
    return [
        TileCut(
            path=real.folder / split / row.file_name,
            row=top,
            column=left,
            label=(row.state, row.axis),
            block=f"{row.volume} {row.axis} {row.index // real.slabs.get(row.volume, SLAB_SLICES):04d}",
        )
        for row in rows
        for top, left in tile_corners(row.height, row.width, tile)
    ]


def _slabs(folder: Path) -> dict[str, int]:
    """Return how many slices of each volume make a block, where its manifest knows the correlation length."""
    if not (folder / MANIFEST_NAME).is_file():
        return {}
    volumes = read_manifest(folder).get("volumes")
    slabs = {}
    for volume in volumes if isinstance(volumes, list) else []:
        length = (volume.get("split") or {}).get("correlation_length") if isinstance(volume, dict) else None
        if isinstance(length, int | float) and length > 0:
            slabs[str(volume.get("name"))] = math.ceil(CORRELATION_LENGTHS * length)
    return slabs
