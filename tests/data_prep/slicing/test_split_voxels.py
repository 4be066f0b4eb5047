"""Both sides of a split, voxel by voxel: what is in neither, how far apart they are, and that nothing else is missing.

The voxels of all planned pictures are listed one by one, and the guard is measured between them by a distance
transform; nothing here asks the planner where it cut.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_cdt

from configs.load import load
from data_prep.folders.manifest import SliceRow, read_manifest
from data_prep.slice import main
from data_prep.slicing.config import SliceConfig
from data_prep.slicing.plan import make_plans
from prompts.vocabulary import DEFAULT

Shape = tuple[int, int, int]
SIDEWAYS = "--thickness_axis x --weft_axis z"
AXES = ("thickness", "warp", "weft")


def settings(folder: Path, shape: Shape, words: str) -> SliceConfig:
    """Write a volume of noise and return the settings that cut it."""
    volume = np.random.default_rng(2).integers(0, 60000, shape, dtype=np.uint16)
    tifffile.imwrite(folder / "a.tif", volume, photometric="minisblack")
    return load(
        SliceConfig, ["--volumes", f"dry={folder / 'a.tif'}", "--output_dir", str(folder / "out"), *words.split()]
    )


def planned(config: SliceConfig) -> dict[str, list[SliceRow]]:
    """Return the rows of the planned pictures, by split."""
    (plan,) = make_plans(config, DEFAULT)
    rows: dict[str, list[SliceRow]] = {"train": [], "validation": []}
    for picture in plan.all_pictures:
        rows[picture.split].append(picture.row)
    return rows


def voxels(rows: list[SliceRow], shape: Shape) -> NDArray[np.bool_]:
    """Return which voxels some pictures show."""
    listed = {
        (z, y, x)
        for z0, z1, y0, y1, x0, x1 in (row.box for row in rows)
        for z in range(z0, z1)
        for y in range(y0, y1)
        for x in range(x0, x1)
    }
    shown = np.zeros(shape, bool)
    shown[tuple(np.array(sorted(listed)).T)] = True
    return shown


def guard_between(train: NDArray[np.bool_], held_out: NDArray[np.bool_]) -> int:
    """Return the voxels between the two where they are closest, a step in any direction counting as one."""
    return int(distance_transform_cdt(~train, metric="chessboard")[held_out].min()) - 1


@pytest.mark.parametrize(
    ("shape", "words", "axis", "guard", "held_out"),
    [
        ((12, 26, 40), "--guard_voxels 0", 2, 0, 6),
        ((12, 26, 40), "--guard_voxels 1", 2, 1, 6),
        ((12, 40, 26), "--guard_voxels 5", 1, 5, 6),
        ((40, 26, 12), f"--guard_voxels 3 {SIDEWAYS}", 0, 3, 6),
        ((41, 26, 12), f"--guard_voxels 0 {SIDEWAYS}", 0, 0, 7),
        ((12, 26, 40), "--guard_voxels 2 --validation_fraction 0.3", 2, 2, 12),
        ((12, 30, 61), "--guard_voxels 2 --fit tile --tile_size 16", 2, 2, 20),
        ((12, 30, 61), "--guard_voxels 0 --fit tile --tile_size 24 --tile_overlap 0", 2, 0, 30),
        ((12, 26, 40), "--guard_voxels 4 --fit pad --pad_multiple 16", 2, 4, 6),
        ((12, 26, 40), "--guard_voxels 4 --fit resize --resize_voxels_per_px 1.5", 2, 4, 6),
        ((12, 26, 40), "--guard_voxels 3 --stride 4", 2, 3, 6),
    ],
)
def test_a_region_is_held_out_to_the_plane(
    tmp_path: Path, shape: Shape, words: str, axis: int, guard: int, held_out: int
) -> None:
    config = settings(tmp_path, shape, f"--split region {words}")
    rows = planned(config)
    train, validation = (voxels(rows[split], shape) for split in ("train", "validation"))
    assert not (train & validation).any()
    assert guard_between(train, validation) == guard
    # What is in neither is the guard, whole planes of it, and nothing else: no plane is lost at either edge.
    others = tuple(other for other in range(3) if other != axis)
    end = shape[axis] - held_out
    expected = {"train": range(end - guard), "validation": range(end, shape[axis])}
    for shown, split in ((train, "train"), (validation, "validation")):
        assert np.flatnonzero(shown.any(axis=others)).tolist() == list(expected[split])
        whole = len(expected[split]) * np.prod([shape[other] for other in others])
        assert shown.sum() == whole or config.stride > 1
    # Every direction has every slice that the stride leaves, in each part it crosses.
    for name, across in zip(AXES, config.roles, strict=True):
        for split, planes in expected.items():
            numbers = planes if across == axis else range(shape[across])
            found = {row.index for row in rows[split] if row.axis == name}
            assert found == {number for number in numbers if number % config.stride == 0}


@pytest.mark.parametrize("guard", [0, 1, 4])
@pytest.mark.parametrize("words", ["", "--fit tile --tile_size 16", SIDEWAYS, "--slice_axes warp"])
def test_an_index_split_holds_out_the_last_planes_of_each_direction(tmp_path: Path, guard: int, words: str) -> None:
    shape = (20, 26, 40)
    config = settings(tmp_path, shape, f"--split index --guard_voxels {guard} {words}")
    rows = planned(config)
    for name in config.slice_axes:
        across = config.roles[AXES.index(name)]
        of = {split: [row for row in some if row.axis == name] for split, some in rows.items()}
        train, validation = (voxels(of[split], shape) for split in ("train", "validation"))
        assert not (train & validation).any()
        assert guard_between(train, validation) == guard
        assert train.sum() + validation.sum() == train.size - guard * train.size // shape[across]
        end = shape[across] - math.ceil(0.15 * shape[across])
        found = {split: sorted({row.index for row in some}) for split, some in of.items()}
        assert found == {"train": [*range(end - guard)], "validation": [*range(end, shape[across])]}


@pytest.mark.parametrize("split", ["region", "index"])
def test_every_plane_that_is_not_cut_is_told_with_its_reason(tmp_path: Path, split: str) -> None:
    main(settings(tmp_path, (12, 26, 40), f"--split {split} --guard_voxels 3"))
    (entry,) = read_manifest(tmp_path / "out")["volumes"]  # type: ignore[misc]  # JSON
    told = {reason: found for reason, found in entry["left_out"].items() if found}
    assert told == {"guard slab": {"weft": 3} if split == "region" else dict.fromkeys(AXES, 3)}
    # The report on independent slices is of those that were cut.
    cut = {name: one["num_slices"] for name, one in entry["audit"].items()}
    assert cut == {"thickness": 12, "warp": 26, "weft": 37} | (
        {} if split == "region" else {"thickness": 9, "warp": 23}
    )
