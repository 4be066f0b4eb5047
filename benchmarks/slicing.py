"""Measure the slicer on three volumes of full size against the naive way, interleaved in one run.

    python benchmarks/slicing.py --volumes dry=dry.tif dry_compacted=dc.tif injected=inj.tif

Naive: one memory map per slice, grey levels, Pillow with its own settings, in RGB as many scripts do and in grey, one
process; on evenly spaced slices of each volume and direction, scaled to all of them. The slicer starts with the files
evicted from the page cache, the naive way with the files in it, because a cold start would be scaled with the sample.
Without ``--volumes``, phantoms are made first.
"""

from __future__ import annotations

import io
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from configs.load import command
from data_prep.folders.hashes import sha256_of
from data_prep.folders.manifest import read_manifest, read_rows
from data_prep.folders.window import window_from

SHAPES = {"dry": (359, 702, 970), "dry_compacted": (197, 863, 773), "injected": (287, 701, 633)}
MODES = ("RGB", "L")


@dataclass(frozen=True, kw_only=True)
class SlicingConfig:
    """Settings of the measurement."""

    volumes: dict[str, Path] | None = None
    """Volumes as state=path, contiguous TIFF; phantoms are made if not given."""
    memory_gb: float = 1.0
    """Budget handed to the slicer, in 10^9 bytes."""
    sample: int = 10
    """Slices per volume and direction that the naive way is timed on."""
    rounds: int = 3
    """How often each way runs, in turn."""
    checked: int = 300
    """Pictures compared with the voxels after the first round, drawn with a fixed seed."""
    work_dir: Path | None = None
    """Folder on the disk to measure; a temporary one by default. Its contents are removed at the end."""
    output: Path = Path("benchmarks/results/slicing.json")
    """Where the figures go."""
    naive: bool = False
    """Only cut the sample the naive way; the measurement calls itself so."""


def main(config: SlicingConfig) -> None:
    """Run both ways in turn, check the pictures, print and write the figures."""
    if config.naive:
        assert config.volumes is not None
        assert config.work_dir is not None
        print(json.dumps(cut_naively(config.volumes, config.sample, config.work_dir)))
        return
    with tempfile.TemporaryDirectory(dir=config.work_dir, prefix="slicing-") as name:
        work = Path(name)
        volumes = config.volumes or make_phantoms(work)
        words = [f"{state}={path}" for state, path in volumes.items()]
        ours_command = [sys.executable, "-m", "data_prep.slice", "--volumes", *words, "--split", "none"]
        ours_command += ["--memory_gb", str(config.memory_gb), "--output_dir", str(work / "ours"), "--overwrite"]
        naive_command = [sys.executable, __file__, "--naive", "--volumes", *words, "--sample", str(config.sample)]
        naive_command += ["--work_dir", str(work)]
        rounds: list[dict[str, Any]] = []
        for number in range(config.rounds):
            evict(volumes)
            ours = measure(ours_command)
            for path in volumes.values():
                sha256_of(path)
            naive = measure(naive_command)
            seconds = json.loads(naive.pop("printed"))
            for mode, clocks in seconds.items():
                naive[mode] = {f"scaled_{name}": scaled(clocks[name], volumes, config.sample) for name in clocks}
            del ours["printed"]
            rounds.append({"ours": ours, "naive": naive})
            shown = ", ".join(f"naive {mode} {naive[mode]['scaled_wall_s']:.0f} s (scaled)" for mode in MODES)
            print(f"round {number + 1}: slicer {ours['wall_s']:.1f} s, {shown}")
        # Only now: the voxels this maps would count as memory of the commands started after it.
        checked, size_ratio = check(work / "ours", volumes, config.checked)
        result = summary(config, volumes, rounds, work / "ours", checked, size_ratio)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("ours", "naive", "naive_over_ours")}, indent=2))
    print(f"written to {config.output}")


def make_phantoms(folder: Path) -> dict[str, Path]:
    """Write the three volumes."""
    volumes = {state: folder / f"{state}.tif" for state in SHAPES}
    for state, path in volumes.items():
        made = [sys.executable, "-m", "data_prep.phantom", "--state", state, "--shape", *map(str, SHAPES[state])]
        subprocess.run([*made, "--dtype", "uint16", "--seed", "0", "--output", str(path)], check=True)
    return volumes


def evict(volumes: dict[str, Path]) -> None:
    """Drop the files from the page cache."""
    for path in volumes.values():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(arguments: list[str]) -> dict[str, Any]:
    """Run a command and return its time, processor time, peak memory and bytes read from disk."""
    load = os.getloadavg()[0]
    start = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"failed: {' '.join(arguments)}")
    return {
        "wall_s": wall,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_mb": usage.ru_maxrss / 1000,
        "read_from_disk_mb": usage.ru_inblock * 512 / 1e6,
        "load_before": load,
        "printed": printed,
    }


def directions(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (stored axis, number of slices) of a volume."""
    with tifffile.TiffFile(path) as file:
        yield from enumerate(file.series[0].shape)


def cut_naively(volumes: dict[str, Path], sample: int, folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Cut a sample of slices one by one; return seconds by mode, clock, volume and direction."""
    spent: dict[str, dict[str, dict[str, float]]] = {mode: {"wall_s": {}, "cpu_s": {}} for mode in MODES}
    for state, path in volumes.items():
        with tifffile.TiffFile(path) as file:
            low, high = np.percentile(file.series[0].asarray()[:: max(1, file.series[0].shape[0] // 16)], [0.1, 99.9])
        for axis, count in directions(path):
            for mode in MODES:
                start, start_cpu = time.perf_counter(), time.process_time()
                for index in sampled(count, sample):
                    volume = tifffile.memmap(path, mode="r")
                    chosen = (slice(None),) * axis + (index,)
                    grey = np.clip((volume[chosen].astype(np.float32) - low) * (255 / (high - low)), 0, 255)
                    Image.fromarray(grey.astype(np.uint8)).convert(mode).save(folder / "naive.png")
                spent[mode]["wall_s"][f"{state} {axis}"] = time.perf_counter() - start
                spent[mode]["cpu_s"][f"{state} {axis}"] = time.process_time() - start_cpu
    return spent


def sampled(count: int, sample: int) -> list[int]:
    """Return evenly spaced slice numbers."""
    return [int((i + 0.5) * count / sample) for i in range(sample)]


def scaled(seconds: dict[str, float], volumes: dict[str, Path], sample: int) -> float:
    """Scale the sample to all slices, each direction by its own number."""
    return sum(
        seconds[f"{state} {axis}"] * count / sample
        for state, path in volumes.items()
        for axis, count in directions(path)
    )


def check(folder: Path, volumes: dict[str, Path], count: int) -> tuple[int, float]:
    """Compare pictures with the windowed voxels, and their files with Pillow's.

    Returns:
        How many pictures were equal (it stops at the first that is not), and the bytes of their files over those that
        Pillow writes at level 6.
    """
    entries: list[Any] = read_manifest(folder)["volumes"]  # type: ignore[assignment]  # JSON
    windows = {entry["state"]: window_from(entry["window"]) for entry in entries}
    stored = {state: tifffile.memmap(path, mode="r") for state, path in volumes.items()}
    rows = read_rows(folder / "train")
    ours, pillow = 0, 0
    for number in np.random.default_rng(0).choice(len(rows), min(count, len(rows)), replace=False):
        row = rows[int(number)]
        z0, z1, y0, y1, x0, x1 = row.box
        voxels = stored[row.state][z0:z1, y0:y1, x0:x1].reshape(row.height, row.width)
        with Image.open(folder / "train" / row.file_name) as picture:
            if not np.array_equal(np.asarray(picture), windows[row.state].to_uint8(voxels)):
                raise SystemExit(f"{row.file_name} differs from its voxels")
            stream = io.BytesIO()
            picture.save(stream, "png", compress_level=6)
        ours += (folder / "train" / row.file_name).stat().st_size
        pillow += len(stream.getvalue())
    return min(count, len(rows)), ours / pillow


def summary(
    config: SlicingConfig,
    volumes: dict[str, Path],
    rounds: list[dict[str, Any]],
    folder: Path,
    checked: int,
    size_ratio: float,
) -> dict[str, Any]:
    """Return the figures with what they were measured on."""
    rows = read_rows(folder / "train")
    voxels = sum(math.prod(count for _, count in directions(path)) for path in volumes.values())
    in_bytes = sum(path.stat().st_size for path in volumes.values())
    best = min(one["ours"]["wall_s"] for one in rounds)
    return {
        "command": f"python benchmarks/slicing.py --rounds {config.rounds} --sample {config.sample}",
        "note": f"other work was running: load {rounds[0]['ours']['load_before']:.1f} at the start"
        if rounds[0]["ours"]["load_before"] > 0.5
        else "nothing else was running",
        "volumes": {state: [count for _, count in directions(path)] for state, path in volumes.items()},
        "ours": {
            "pictures": len(rows),
            "pictures_equal_to_their_voxels": checked,
            "wall_s": spread([one["ours"]["wall_s"] for one in rounds]),
            "cpu_s": spread([one["ours"]["cpu_s"] for one in rounds]),
            "input_mb_per_s": in_bytes / 1e6 / best,
            "pixels_mb_per_s": 3 * voxels / 1e6 / best,
            "memory_budget_mb": config.memory_gb * 1000,
            "peak_rss_mb": max(one["ours"]["peak_rss_mb"] for one in rounds),
            "read_from_disk_mb": max(one["ours"]["read_from_disk_mb"] for one in rounds),
            "input_mb": in_bytes / 1e6,
            "file_size_over_pillow_level_6": size_ratio,
            "output_mb": sum(path.stat().st_size for path in (folder / "train").iterdir()) / 1e6,
        },
        "naive": {
            "what": "one memory map per slice, warm cache, Pillow as it comes, one process, scaled from the sample",
            "sampled_slices_per_volume_and_direction": config.sample,
            **{
                mode: {
                    "wall_s": spread([one["naive"][mode]["scaled_wall_s"] for one in rounds]),
                    "cpu_s": spread([one["naive"][mode]["scaled_cpu_s"] for one in rounds]),
                }
                for mode in MODES
            },
            "peak_rss_mb": max(one["naive"]["peak_rss_mb"] for one in rounds),
        },
        "naive_over_ours": {
            mode: {
                "wall": spread([one["naive"][mode]["scaled_wall_s"] / one["ours"]["wall_s"] for one in rounds]),
                "cpu": spread([one["naive"][mode]["scaled_cpu_s"] / one["ours"]["cpu_s"] for one in rounds]),
            }
            for mode in MODES
        },
        "rounds": rounds,
        "hardware": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9,
            "load_at_the_end": os.getloadavg()[0],
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "tifffile", "pillow", "tisserand")},
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return the least, the median and the largest value."""
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


def cpu_name() -> str:
    """Return what the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    command(SlicingConfig, main)
