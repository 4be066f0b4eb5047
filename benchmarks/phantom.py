"""Measure the time and memory that a full-size phantom takes, and draw ``docs/phantom.png``.

    python benchmarks/phantom.py

Time of the command from start to end, on a shared machine better read as CPU seconds; peak resident memory of its
process. The picture shows three states (rows) by three axes (columns) of small phantoms, with the command's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from configs.load import command
from data_prep.worlds.config import PhantomConfig
from data_prep.worlds.looks import State


@dataclass(frozen=True, kw_only=True)
class PhantomBenchmarkConfig:
    """Settings of ``benchmarks/phantom.py``."""

    shape: tuple[int, int, int] = (359, 702, 970)
    """Voxels along Z, Y and X."""
    output: Path = Path("benchmarks/results/phantom.json")
    """Where the figures go."""
    picture: Path = Path("docs/phantom.png")
    """Where the picture goes."""


def main(config: PhantomBenchmarkConfig) -> None:
    """Time the command for each state in a process of its own, then draw the picture."""
    import json
    import os
    import tempfile

    figures = {"shape": list(config.shape), "dtype": "uint16", "cores": len(os.sched_getaffinity(0)), "states": {}}
    with tempfile.TemporaryDirectory() as folder:
        for state in get_args(State):
            figures["states"][state] = _measure(state, config.shape, Path(folder) / f"{state}.tif")
            print(state, figures["states"][state])
        _draw(config.picture, Path(folder))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _measure(state: str, shape: tuple[int, int, int], output: Path) -> dict[str, float]:
    """Run the command once and return its times, peak memory and load of the machine at the start."""
    import os
    import subprocess
    import sys
    import time

    words = ["--state", state, "--shape", *map(str, shape), "--output", str(output)]
    load, start = os.getloadavg()[0], time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "data_prep.phantom", *words], stdout=subprocess.DEVNULL)
    # The usage of this one child; that of all children keeps the largest peak of any.
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.monotonic() - start
    output.unlink()
    if status:
        raise RuntimeError(f"the command failed with status {status}")
    return {
        "wall_s": round(wall_s, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_mib": round(usage.ru_maxrss / 1024),
        "load_at_start": round(load, 1),
    }


def _draw(picture: Path, folder: Path) -> None:
    """Draw slices near the middle of three small phantoms, windowed as the slicer does."""
    import matplotlib
    import numpy as np
    import tifffile

    from data_prep.worlds.writing import write

    matplotlib.use("agg")
    from matplotlib import pyplot

    planes, rows, columns = 112, 208, 240
    figure, axes = pyplot.subplots(
        3, 3, figsize=(9, 4.6), width_ratios=(columns, columns, rows), layout="constrained", squeeze=False
    )
    for row, state in enumerate(get_args(State)):
        output = folder / f"small-{state}.tif"
        write(PhantomConfig(state=state, shape=(planes, rows, columns), output=output, seed=1))
        volume = tifffile.imread(output)
        low, high = np.percentile(volume, [0.1, 99.9])
        middle = (volume[planes // 2 + 5], volume[:, rows // 2], volume[:, :, columns // 2])
        for column, (name, plane) in enumerate(zip(("thickness", "warp", "weft"), middle, strict=True)):
            axis = axes[row, column]
            # One height for all, so that a voxel is as large in every picture of the figure.
            axis.imshow(plane[:planes], cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(name)
            if column == 0:
                axis.set_ylabel(state)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    command(PhantomBenchmarkConfig, main)
