"""A woven volume on disk: a TIFF, the truth about it, and its labels."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile
from numpy.typing import NDArray
from tqdm import tqdm

from configs.errors import TisserandError, UsageError
from configs.load import as_dict
from data_prep.folders.hashes import sha256_of
from data_prep.folders.publish import check_writable
from data_prep.worlds.config import PhantomConfig
from data_prep.worlds.flaws import VOID_GREY
from data_prep.worlds.geometry import crimp, geometry_of
from data_prep.worlds.volume import CALIBRATION, draw, to_counts
from data_prep.worlds.yarns import OUTSIDE, Floats


class Tally:
    """Counts of labels and grey levels, for the truth."""

    def __init__(self) -> None:
        self.labels = np.zeros(4, np.int64)
        self._levels = np.zeros(384 * 8, np.int64)  # eighths of a grey level from -64 to 320

    def add(self, grey: Floats, labels: NDArray[np.uint8]) -> None:
        """Count one plane; every fourth row is enough for the window."""
        self.labels += np.bincount(labels.ravel(), minlength=4)
        seen = grey[::4][labels[::4] != OUTSIDE]
        level = np.clip((seen + 64) * 8, 0, self._levels.size - 1).astype(np.int64)
        self._levels += np.bincount(level, minlength=self._levels.size)

    def percentile(self, percent: float) -> float:
        """Return the grey level below which ``percent`` of the voxels lie."""
        total = np.cumsum(self._levels)
        return float(np.searchsorted(total, percent / 100 * total[-1]) / 8 - 64)


def write(config: PhantomConfig, *, workers: int = 1) -> dict[str, object]:
    """Write the volume, its truth and, if asked, its labels; return the truth.

    Everything is written under temporary names and renamed at the end, the truth last.

    Raises:
        UsageError: an output exists, or its folder cannot be written to.
        TisserandError: the disk filled up or failed.
    """
    every = {
        "labels": config.output.with_suffix(".labels.tif"),
        "volume": config.output,
        "truth": config.output.with_suffix(".truth.json"),
    }
    check_writable(config.output, "--output")
    for path in every.values():
        if path.is_dir() or (path.exists() and not config.overwrite):
            raise UsageError(f"--output {config.output}: {path.name} exists; name another file or pass --overwrite")
    paths = {name: path for name, path in every.items() if name != "labels" or config.labels}
    try:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f"{config.output.stem}.partial-", dir=config.output.parent, ignore_cleanup_errors=True
        ) as room:
            parts = {name: Path(room) / path.name for name, path in paths.items()}
            tally = _write_planes(config, parts, workers)
            truth = _truth(config, tally, {name: parts[name] for name in paths if name != "truth"})
            parts["truth"].write_text(json.dumps(truth, indent=2) + "\n", encoding="utf-8")
            # A truth always belongs to the volume beside it, also when this stops half-way.
            for name in ("truth", "labels"):
                every[name].unlink(missing_ok=True)
            for name, part in parts.items():
                part.replace(paths[name])
    except OSError as error:
        raise TisserandError(f"--output {config.output}: writing failed ({error.strerror or error})") from error
    return truth


def _write_planes(config: PhantomConfig, parts: dict[str, Path], workers: int) -> Tally:
    """Draw the volume plane by plane into empty TIFF files of the right size."""
    tally = Tally()
    with contextlib.ExitStack() as files:
        volume = files.enter_context(_empty_tiff(parts["volume"], config.shape, config.dtype, config.voxel_um))
        stored = None
        if "labels" in parts:
            stored = files.enter_context(_empty_tiff(parts["labels"], config.shape, "uint8", config.voxel_um))
        planes = draw(config, workers=workers)
        for grey, labels in tqdm(planes, total=config.shape[0], desc=config.output.name, unit="plane", disable=None):
            tally.add(grey, labels)
            volume.write(to_counts(grey, labels, config.dtype).tobytes())
            if stored is not None:
                stored.write(labels.tobytes())
    return tally


@contextlib.contextmanager
def _empty_tiff(path: Path, shape: tuple[int, int, int], dtype: str, voxel_um: float) -> Iterator[BinaryIO]:
    """Open a contiguous TIFF of zeros at its first voxel; tifffile cannot fill two files plane by plane at once."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if (free := shutil.disk_usage(path.parent).free) < size:
        raise OSError(f"{size / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free")
    # ImageJ's flavour carries the voxel size along Z, but ends at 4 GB.
    is_imagej = size < 2**32 - 2**25
    tifffile.imwrite(
        path,
        shape=shape,
        dtype=dtype,
        byteorder="<",
        imagej=is_imagej,
        photometric="minisblack",
        resolution=(1 / voxel_um, 1 / voxel_um) if is_imagej else (1e4 / voxel_um, 1e4 / voxel_um),
        resolutionunit="NONE" if is_imagej else "CENTIMETER",
        metadata={"axes": "ZYX", "spacing": voxel_um, "unit": "um"},
    )
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.series[0].dataoffset
    with path.open("r+b") as file:
        file.seek(offset)
        yield file


def _truth(config: PhantomConfig, tally: Tally, files: dict[str, Path]) -> dict[str, object]:
    """Describe what was drawn: geometry, fractions counted from the labels, grey levels, options, hashes."""
    geometry, look = geometry_of(config), config.look()
    scale, offset = CALIBRATION[config.dtype]
    voxels = dict(zip(("matrix", "warp", "weft", "outside"), map(int, tally.labels), strict=True))
    inside = max(sum(voxels.values()) - voxels["outside"], 1)
    yarn = (voxels["warp"] + voxels["weft"]) / inside
    low, high = tally.percentile(0.1), tally.percentile(99.9)
    lengths_px = {
        "warp_pitch": geometry.warp_pitch,
        "weft_pitch": geometry.weft_pitch,
        "layer_height": geometry.layer_height,
        "warp_wave_amplitude": geometry.warp_wave,
        "warp_wave_length": 2 * geometry.weft_pitch,
        "weft_wave_amplitude": geometry.weft_wave,
        "weft_wave_length": 2 * geometry.warp_pitch,
    }
    return {
        "format": 1,
        "state": config.state,
        "shape": list(config.shape),
        "axes": {"z": "thickness", "y": "warp direction", "x": "weft direction"},
        "voxel_um": config.voxel_um,
        **{f"{name}_px": value for name, value in lengths_px.items()},
        **{f"{name}_um": value * config.voxel_um for name, value in lengths_px.items()},
        "orientation_zyx": {"warp": [0, 1, 0], "weft": [0, 0, 1]},
        "warp_crimp": crimp(geometry.warp_wave, 2 * geometry.weft_pitch),
        "weft_crimp": crimp(geometry.weft_wave, 2 * geometry.warp_pitch),
        "voxels": voxels,
        "yarn_fraction": yarn,
        "warp_fraction": voxels["warp"] / inside,
        "weft_fraction": voxels["weft"] / inside,
        "matrix_fraction": voxels["matrix"] / inside,
        "fibre_fraction": yarn * look.packing,
        "grey": {
            "matrix": look.matrix_grey,
            "yarn": look.yarn_grey,
            "void": VOID_GREY,
            "counts_per_level": scale,
            "counts_at_0": offset,
        },
        "noise_sigma": config.noise_sigma,
        "window_0.1_99.9_percent": [low, high],
        "noise_sigma_windowed": config.noise_sigma * 255 / max(high - low, 1e-6),
        "look": asdict(look),
        "options": {name: value for name, value in as_dict(config).items() if name not in {"output", "overwrite"}},
        "sha256": {name: sha256_of(path) for name, path in files.items()},
    }
