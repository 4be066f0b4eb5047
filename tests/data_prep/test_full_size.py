"""Volumes of the size laboratories have; minutes, not seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from data_prep.folders.manifest import read_manifest, read_rows
from data_prep.folders.window import window_from

SHAPES = {"dry": (359, 702, 970), "dry_compacted": (197, 863, 773), "injected": (287, 701, 633)}
AXES = {"thickness": 0, "warp": 1, "weft": 2}

# The peak of this program alone: ru_maxrss would begin with that of the process that started it.
_MEASURED = """
import re, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__")
finally:
    peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)
    print("rchar", open("/proc/self/io").read().split()[1], peak)
"""


def _measured(output: str) -> tuple[int, int]:
    """Return the bytes read and the peak memory in KiB that a program run by ``_MEASURED`` printed."""
    read, peak_kib = output.rsplit("rchar ", 1)[1].split()
    return int(read), int(peak_kib)


@pytest.mark.slow
def test_three_full_size_volumes_give_5485_slices_within_a_gigabyte(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for state, shape in SHAPES.items():
        tifffile.imwrite(tmp_path / f"{state}.tif", random.integers(0, 4096, shape, dtype=np.uint16))
    volumes = [f"{state}={tmp_path / state}.tif" for state in SHAPES]
    command = ["data_prep.slice", "--volumes", *volumes, "--split", "none", "--fit", "native", "--memory_gb", "1"]
    words = [sys.executable, "-c", _MEASURED, *command, "--output_dir", str(tmp_path / "out")]
    output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert _measured(output)[1] * 1024 < 1e9

    rows = read_rows(tmp_path / "out" / "train")
    counts = {state: sum(row.state == state for row in rows) for state in SHAPES}
    assert counts == {"dry": 2031, "dry_compacted": 1833, "injected": 1621}
    manifest = read_manifest(tmp_path / "out")
    windows = {entry["state"]: window_from(entry["window"]) for entry in manifest["volumes"]}
    stacks = {state: tifffile.memmap(tmp_path / f"{state}.tif", mode="r") for state in SHAPES}
    for row in [rows[place] for place in random.choice(len(rows), 200, replace=False)]:
        voxels = np.take(stacks[row.state], row.index, axis=AXES[row.axis])
        written = np.asarray(Image.open(tmp_path / "out" / "train" / row.file_name))
        assert np.array_equal(written, windows[row.state].to_uint8(voxels)), json.dumps(row.file_name)


@pytest.mark.slow
def test_a_volume_of_twenty_gigabytes_is_sliced_within_one(tmp_path: Path) -> None:
    shape = (1200, 2900, 2900)
    path = tmp_path / "dry.tif"
    tifffile.imwrite(path, shape=shape, dtype=np.uint16, bigtiff=True, photometric="minisblack")
    size = path.stat().st_size
    assert size > 20e9
    assert path.stat().st_blocks * 512 < 1e9  # holes cost no disk
    # Something to see: a slab of voxels in some of the planes.
    random = np.random.default_rng(0)
    volume = tifffile.memmap(path, mode="r+")
    for z in range(0, 1200, 40):
        volume[z, 1400:1500] = random.integers(1, 60000, (100, 2900), dtype=np.uint16)
    volume.flush()
    del volume
    command = ["data_prep.slice", "--volumes", f"dry={path}", "--split", "none", "--max_per_axis", "3"]
    command += ["--window", "range", "--window_range", "0", "60000", "--memory_gb", "1"]
    words = [sys.executable, "-c", _MEASURED, *command, "--output_dir", str(tmp_path / "out")]
    output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    read, peak_kib = _measured(output)
    print(f"{size / 1e9:.1f} GB: {read / size:.2f} times its size read, {peak_kib / 1024:.0f} MiB at the most")
    assert peak_kib < 1 << 20
    # Once for the slices, once for the hash, and the planes that the statistics look at.
    assert "passes 1;" in output
    assert read < (1.1 + 1.0 + 64 / shape[0]) * size
    rows = read_rows(tmp_path / "out" / "train")
    assert [sum(row.axis == axis for row in rows) for axis in AXES] == [3, 3, 3]
    stored = tifffile.memmap(path, mode="r")
    for row in rows:
        voxels = np.take(stored, row.index, axis=AXES[row.axis])
        with Image.open(tmp_path / "out" / "train" / row.file_name) as picture:
            assert np.array_equal(np.asarray(picture), np.rint(voxels * (255 / 60000)).astype(np.uint8))
