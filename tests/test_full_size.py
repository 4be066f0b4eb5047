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

from data_prep.intensity import window_from
from data_prep.manifest import read_manifest, read_rows

SHAPES = {"dry": (359, 702, 970), "dry_compacted": (197, 863, 773), "injected": (287, 701, 633)}
AXES = {"thickness": 0, "warp": 1, "weft": 2}


@pytest.mark.slow
def test_three_full_size_volumes_give_5485_slices_within_a_gigabyte(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for state, shape in SHAPES.items():
        tifffile.imwrite(tmp_path / f"{state}.tif", random.integers(0, 4096, shape, dtype=np.uint16))
    volumes = [f"{state}={tmp_path / state}.tif" for state in SHAPES]
    command = ["data_prep.slice", "--volumes", *volumes, "--split", "none", "--fit", "native", "--memory_gb", "1"]
    inside = "import resource,runpy,sys;sys.argv=sys.argv[1:];m=sys.argv[0];"
    inside += "\ntry: runpy.run_module(m,run_name='__main__')\nfinally: "
    inside += "print('peak_kib',resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    words = [sys.executable, "-c", inside, *command, "--output_dir", str(tmp_path / "out")]
    output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert int(output.rsplit("peak_kib", 1)[1]) * 1024 < 1e9

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
