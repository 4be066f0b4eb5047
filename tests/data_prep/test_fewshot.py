"""A few slices for DreamBooth: how many, from where, and the same ones for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import NothingLeftError, UsageError
from data_prep.fewshot import FewshotConfig, draw, main
from data_prep.folders.manifest import SliceRow, read_rows, write_manifest, write_rows

LENGTHS = {"thickness": 30, "warp": 61, "weft": 80}


def row(state: str, axis: str, index: int, tile: int = 0) -> SliceRow:
    return SliceRow(
        file_name=f"{state}-{axis}-{index:05d}-{tile}.png", text=f"sf_{state} sf_{axis}", volume=state, state=state,
        axis=axis, index=index, box=(0, 1, 0, 8, 8 * tile, 8 * tile + 8), width=8, height=8,
    )  # fmt: skip


ROWS = [row(state, axis, i) for state in ("dry", "injected") for axis, n in LENGTHS.items() for i in range(n)]


def config(**settings: object) -> FewshotConfig:
    return FewshotConfig(dataset=Path("data"), output_dir=Path("few"), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_three_of_each_direction_are_nine_and_far_apart(seed: int) -> None:
    (chosen,) = draw(ROWS, config(states=("dry",), seed=seed)).values()
    assert [one.axis for one in chosen] == ["thickness"] * 3 + ["warp"] * 3 + ["weft"] * 3
    for axis, length in LENGTHS.items():
        numbers = [one.index for one in chosen if one.axis == axis]
        assert np.diff(numbers).min() >= length // 3


def test_the_seed_decides() -> None:
    assert draw(ROWS, config(seed=4)) == draw(ROWS, config(seed=4))
    assert draw(ROWS, config(seed=4)) != draw(ROWS, config(seed=5))


def test_of_a_slice_in_tiles_one_tile_is_drawn() -> None:
    rows = [row("dry", "warp", index, tile) for index in range(9) for tile in range(4)]
    (chosen,) = draw(rows, config(num_per_axis=9)).values()
    assert [one.index for one in chosen] == list(range(9))
    assert len({one.box for one in chosen}) > 1


def test_volumes_of_a_state_stand_in_a_row() -> None:
    rows = [
        SliceRow(**{**vars(row("dry", "warp", index)), "volume": volume, "file_name": f"{volume}-{index}.png"})
        for volume in ("a", "b")
        for index in range(10)
    ]
    (chosen,) = draw(rows, config(num_per_axis=2)).values()
    assert {one.volume for one in chosen} == {"a", "b"}


def test_too_few_slices_are_refused_with_the_number() -> None:
    with pytest.raises(NothingLeftError, match=r"--num_per_axis 31: data has 30 thickness slices of dry"):
        draw(ROWS, config(num_per_axis=31))


def test_an_unknown_state_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--states wet: not in data; there are dry, injected"):
        draw(ROWS, config(states=("wet",)))


def test_each_state_becomes_an_instance_folder_with_captions(tmp_path: Path) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    rows = [row(state, axis, i) for state in ("dry", "dry_compacted") for axis in LENGTHS for i in range(3)]
    write_rows(tmp_path / "data" / "train", rows)
    write_manifest(tmp_path / "data", {"volumes": [{"name": "dry", "sha256": "0"}]})
    for number, one in enumerate(rows):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "train" / one.file_name)
    main(FewshotConfig(dataset=tmp_path / "data", output_dir=tmp_path / "few"))
    for name in ("dry", "dry-compacted"):
        found = read_rows(tmp_path / "few" / name)
        assert len(found) == 9
        assert {path.name for path in (tmp_path / "few" / name).glob("*.png")} == {one.file_name for one in found}
    manifest = json.loads((tmp_path / "few" / "manifest.json").read_text())
    assert manifest["volumes"] == [{"name": "dry", "sha256": "0"}]
    assert manifest["drawn"]["seed"] == 0
