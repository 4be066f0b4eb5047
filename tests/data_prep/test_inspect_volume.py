"""A look into a volume: true numbers, true slices, and nothing left behind."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from configs.errors import UsageError
from configs.load import load
from data_prep.inspect_volume import InspectConfig, main, next_command
from data_prep.page.inspection import look_at
from data_prep.slice import main as slice_main
from data_prep.slicing.config import SliceConfig
from data_prep.slicing.plan import make_plans
from prompts.vocabulary import DEFAULT

SHAPE = (12, 40, 60)
VOLUME = np.random.default_rng(3).integers(1000, 60000, SHAPE, dtype=np.uint16)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "scan $a_b$ \u00fc.tif"
    metadata = {"axes": "ZYX", "spacing": 5.0, "unit": "um"}
    tifffile.imwrite(path, VOLUME, imagej=True, metadata=metadata, resolution=(0.2, 0.2))
    return path


def config(volume: Path, *arguments: str) -> InspectConfig:
    return load(InspectConfig, [str(volume), "--output", str(volume.parent / "look.png"), *arguments])


def test_it_says_what_the_file_is_and_draws_it(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(config(volume))
    out = capsys.readouterr().out
    assert "12x40x60 uint16 (z y x), 0.1 MB, ImageJ TIFF, one block" in out
    assert "voxel (z y x, um): 5 x 5 x 5" in out
    assert "112 pictures (12 thickness of 40x60, 40 warp of 12x60, 60 weft of 12x40)" in out
    assert "passes 1" in out
    with Image.open(volume.parent / "look.png") as picture:
        assert min(picture.size) > 1000
        assert np.asarray(picture.convert("L")).std() > 20


@pytest.mark.parametrize("order", ["zyx", "yxz"])
def test_the_slices_shown_are_those_of_the_volume(volume: Path, order: str) -> None:
    flags = [
        word
        for role, axis in zip(("thickness", "warp", "weft"), order, strict=True)
        for word in (f"--{role}_axis", axis)
    ]
    settings = config(volume, *flags)
    (plan,) = make_plans(settings.slicing, DEFAULT)
    look = look_at(plan, settings.slicing.roles)
    grey = plan.volume.window.window.to_uint8(VOLUME)
    for axis, shown in look.slices.items():
        assert list(shown) == [SHAPE[axis] // 4, SHAPE[axis] // 2, SHAPE[axis] * 3 // 4]
        for number, picture in shown.items():
            assert np.array_equal(picture, grey.take(number, axis))
    assert look.counts.sum() == VOLUME.size


def test_a_long_volume_is_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.page.inspection._MOST_PLANES", 5)
    tifffile.imwrite(tmp_path / "scan.tif", VOLUME, photometric="minisblack")
    settings = config(tmp_path / "scan.tif")
    (plan,) = make_plans(settings.slicing, DEFAULT)
    look = look_at(plan, settings.slicing.roles)
    grey = plan.volume.window.window.to_uint8(VOLUME)
    assert np.array_equal(look.slices[1][20], grey[::3, 20])
    assert np.array_equal(look.slices[0][9], grey[9])


def test_the_forecast_is_what_slicing_gives(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(config(volume, "--stride", "3"))
    promised = capsys.readouterr().out
    out = volume.parent / "out"
    slice_main(
        load(
            type(config(volume).slicing),
            ["--volumes", f"dry={volume}", "--output_dir", str(out), "--split", "none", "--stride", "3"],
        )
    )
    count = len(list((out / "train").glob("*.png")))
    assert f"slicing gives {count} pictures" in promised


def test_a_dry_run_reads_headers_alone(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(config(volume, "--dry_run"))
    assert "12x40x60 uint16" in capsys.readouterr().out
    assert [path.name for path in volume.parent.iterdir()] == [volume.name]


def test_a_dry_run_warns_of_what_the_headers_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tifffile.imwrite(tmp_path / "scan.tif", VOLUME, photometric="minisblack", metadata={"axes": "TYX"})
    main(config(tmp_path / "scan.tif", "--dry_run"))
    assert "warning: the file calls its 12 planes time steps" in capsys.readouterr().err


def test_the_next_command_slices_what_was_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "my scan.raw"
    path.write_bytes(VOLUME.tobytes())
    flags = ["--raw_shape", "12", "40", "60", "--raw_dtype", "uint16", "--window", "minmax", "--warp_axis", "x"]
    looked = config(path, *flags, "--weft_axis", "y", "--select", "c=0", "--allow_truncated", "--stride", "2")
    words = shlex.split(next_command(looked, "my-scan").replace("STATE=", "dry="))
    assert words[:3] == ["python", "-m", "data_prep.slice"]
    slicing = load(SliceConfig, words[3:])
    assert dataclasses.replace(slicing, output_dir=looked.slicing.output_dir, split="none") == looked.slicing
    assert "--split" not in words


def test_a_picture_is_not_replaced_unasked(volume: Path) -> None:
    (volume.parent / "look.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"--output \S+look.png: exists"):
        main(config(volume))
    assert (volume.parent / "look.png").read_bytes() == b"mine"


def test_what_the_slicer_would_refuse_is_refused_by_name(volume: Path) -> None:
    with pytest.raises(UsageError, match="--stride 0"):
        config(volume, "--stride", "0")
    with pytest.raises(UsageError, match=r"--output look\.tif"):
        load(InspectConfig, [str(volume), "--output", "look.tif"])
