"""What a row says of its picture, against the voxels: which volume, which direction, which place.

The volumes are cubes of noise, so that neither the shape nor the smoothness of a picture tells where it is from; it is
searched for in the volumes, in every direction and both ways round. Nothing here asks the slicer how it turns names
into axes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from configs.load import load
from data_prep.folders.manifest import SliceRow, read_rows
from data_prep.slice import main
from data_prep.slicing.config import SliceConfig

EDGE = 24
NOISE = np.random.default_rng(3)
VOLUMES = {name: NOISE.integers(0, 256, (EDGE, EDGE, EDGE), dtype=np.uint8) for name in ("one", "two", "three")}
STATES = {"one": "dry", "two": "dry_compacted", "three": "injected"}
WORDS = {"dry": "sf_dry", "dry_compacted": "sf_dry sf_compacted", "injected": "sf_injected"}
ORDERS = list(itertools.permutations("zyx"))


@dataclass(frozen=True)
class Place:
    """Where the voxels of a picture were found: its rows and columns run along these stored axes, from this voxel."""

    volume: str
    rows: str
    columns: str
    first: tuple[int, int, int]

    @property
    def across(self) -> str:
        """The stored axis that the picture is perpendicular to."""
        (axis,) = set("zyx") - {self.rows, self.columns}
        return axis


def places_of(picture: NDArray[np.uint8]) -> list[Place]:
    """Search the volumes for a picture."""
    found = []
    for name, volume in VOLUMES.items():
        for first in np.argwhere(volume == picture[0, 0]).tolist():
            for rows, columns in itertools.permutations(range(3), 2):
                box = [slice(at, at + 1) for at in first]
                box[rows] = slice(first[rows], first[rows] + picture.shape[0])
                box[columns] = slice(first[columns], first[columns] + picture.shape[1])
                there = volume[tuple(box)].squeeze()
                if np.array_equal(there if rows < columns else there.T, picture):
                    z, y, x = first
                    found.append(Place(name, "zyx"[rows], "zyx"[columns], (z, y, x)))
    return found


def sliced(folder: Path, order: tuple[str, ...], *words: str) -> dict[str, list[tuple[SliceRow, NDArray[np.uint8]]]]:
    """Cut the three volumes, whose thickness, warp and weft lie along these stored axes; return rows and pictures."""
    paths = []
    for name, volume in VOLUMES.items():
        tifffile.imwrite(folder / f"{name}.tif", volume, photometric="minisblack")
        paths.append(f"{STATES[name]}={folder / name}.tif")
    roles = [f"--{role}_axis={axis}" for role, axis in zip(("thickness", "warp", "weft"), order, strict=True)]
    grey = ["--window", "range", "--window_range", "0", "255", "--stride", "7"]
    main(load(SliceConfig, ["--volumes", *paths, "--output_dir", str(folder / "out"), *grey, *roles, *words]))
    found = {}
    for path in (folder / "out").glob("*/metadata.jsonl"):
        rows = read_rows(path.parent)
        found[path.parent.name] = [(row, np.asarray(Image.open(path.parent / row.file_name))) for row in rows]
    return found


def check(row: SliceRow, inside: NDArray[np.uint8], order: tuple[str, ...]) -> Place:
    """Hold a row against the one place where its voxels are."""
    (place,) = places_of(inside)
    state, axis = STATES[place.volume], ("thickness", "warp", "weft")[order.index(place.across)]
    across = place.first["zyx".index(place.across)]
    extent = {place.rows: inside.shape[0], place.columns: inside.shape[1], place.across: 1}
    box = [edge for first, letter in zip(place.first, "zyx", strict=True) for edge in (first, first + extent[letter])]
    assert (row.volume, row.state, row.axis) == (place.volume, state, axis)
    assert row.text == f"{WORDS[state]} sf_{axis}"
    assert (row.index, list(row.box)) == (across, box)
    assert row.file_name.startswith(f"{state.replace('_', '-')}-{axis}-{across:05d}")
    # Thickness before warp before weft, rows before columns.
    assert order.index(place.rows) < order.index(place.columns)
    return place


@pytest.mark.parametrize("order", ORDERS, ids="".join)
@pytest.mark.parametrize("words", ["", "--fit tile --tile_size 16", "--fit pad --pad_multiple 32"])
def test_a_row_tells_the_volume_the_direction_and_the_voxels_of_its_picture(
    tmp_path: Path, order: tuple[str, ...], words: str
) -> None:
    found = sliced(tmp_path, order, "--split", "none", *words.split())
    seen = set()
    for row, picture in found["train"]:
        assert (row.height, row.width) == picture.shape
        margin = (picture.shape[0] - EDGE) // 2 if "pad" in words else 0
        inside = picture[margin:-margin, margin:-margin] if margin else picture
        place = check(row, inside, order)
        seen.add((place.volume, place.across, row.index))
    assert seen == set(itertools.product(VOLUMES, "zyx", range(0, EDGE, 7)))


@pytest.mark.parametrize("order", [ORDERS[0], ORDERS[3]], ids="".join)
@pytest.mark.parametrize("words", ["--split region", "--split index --slice_axes warp", "--split volume"])
def test_rows_of_both_splits_tell_it_too(tmp_path: Path, order: tuple[str, ...], words: str) -> None:
    more = ["--validation_volumes", "two"] if "volume" in words else ["--guard_voxels", "2"]
    found = sliced(tmp_path, order, *words.split(), *more, "--roi_y", "1", "23")
    for rows in found.values():
        axes = {check(row, picture, order) and row.axis for row, picture in rows}
        assert axes == ({"warp"} if "index" in words else {"thickness", "warp", "weft"})
    assert set(found) == {"train", "validation"}
