"""Measure every kind of storage: are the planes those of direct indexing, how long do they take, how much memory.

    python benchmarks/storage.py

Each case writes one volume, evicts it from the page cache, and reads it in a process of its own through the reader
that the slicer uses, from the first plane to the last; on a second pass, whose bytes are counted, the planes are
compared with the array they came from. Memory is what the reading adds to the interpreter and the libraries.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from configs.load import command
from data_prep.readers.info import ReadConfig
from data_prep.readers.open import open_volume
from data_prep.readers.places import all_files

Writer = Callable[[Path, NDArray[Any]], Path]


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Settings of the measurement."""

    shape: tuple[int, int, int] = (120, 512, 640)
    """Voxels of the volume, z y x."""
    dtypes: tuple[str, ...] = ("uint8", "uint16", "float32")
    """Types of a voxel."""
    work_dir: Path | None = None
    """Folder on the disk to measure; a temporary one by default. Its contents are removed at the end."""
    output: Path = Path("benchmarks/results/storage.json")
    """Where the figures go."""


def main(config: StorageConfig) -> None:
    """Write, read and compare every kind and type; print and write the table."""
    cases = []
    for library in ("imagecodecs", "h5py", "zarr"):
        with contextlib.suppress(ImportError):
            import_module(library)  # here, so that it does not count as memory of a reader
    with tempfile.TemporaryDirectory(dir=config.work_dir, prefix="storage-") as name:
        for dtype in config.dtypes:
            for kind, write in KINDS.items():
                folder = Path(name) / "case"
                folder.mkdir()
                written = in_child(partial(write_case, write, folder, config.shape, dtype))
                if "path" not in written:
                    print(f"{kind:<28} {dtype:<8} left out: {written['error']}")
                    shutil.rmtree(folder)
                    continue
                path = Path(written["path"])
                cases.append({"kind": kind, "dtype": dtype} | measured(path))
                print(row(cases[-1]), flush=True)
                shutil.rmtree(folder)
    packages = ("numpy", "tifffile", "imagecodecs", "h5py", "zarr")
    result = {
        "command": "python benchmarks/storage.py",
        "shape": list(config.shape),
        "cases": cases,
        "load_at_the_end": os.getloadavg()[0],
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version()} | {name: version_of(name) for name in packages},
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {config.output}")
    if bad := [case for case in cases if not case["equal"]]:
        raise SystemExit(f"{len(bad)} cases differ from direct indexing")


def in_child(task: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a task in a fork of this process, whose memory begins small and whose threads are its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            result = task()
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(writer, "w") as pipe:
            pipe.write(json.dumps(result))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text)


def write_case(write: Writer, folder: Path, shape: tuple[int, int, int], dtype: str) -> dict[str, Any]:
    """Write the volume, and the array beside it; return its path."""
    volume = drawn(shape, dtype)
    np.save(folder / "expected.npy", volume)
    return {"path": str(write(folder, volume))}


def drawn(shape: tuple[int, int, int], dtype: str) -> NDArray[Any]:
    """Return a volume of smooth waves and a little noise, which compresses as a scan does."""
    z, y, x = (np.arange(size, dtype=np.float32) for size in shape)
    waves = np.sin(x / 9)[None, None] * np.cos(y / 7)[None, :, None] + np.sin(z / 5)[:, None, None]
    waves += 0.2 * np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    if dtype == "float32":
        return (waves * 1e-3).astype(np.float32)
    limit = np.iinfo(dtype).max
    return np.clip((waves + 3) * (limit / 6), 0, limit).astype(dtype)


def measured(path: Path) -> dict[str, Any]:
    """Read a volume in a fresh process, from the disk, and return what it took."""
    files = [place for place in all_files(path) if isinstance(place, Path)] if path.is_dir() else [path]
    for file in [*files, *path.parent.glob("scan.*")]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found = in_child(partial(read_twice, path))
    if "error" in found:
        raise SystemExit(f"{path}: {found['error']}")
    return found


def read_twice(path: Path) -> dict[str, Any]:
    """Read all planes, timed; then read them again, counted, and compare them with the array beside the volume."""
    expected = np.load(path.with_name("expected.npy"), mmap_mode="r")
    options = ReadConfig()
    if path.suffix == ".raw":
        options = ReadConfig(raw_shape=expected.shape, raw_dtype=expected.dtype.name)
    base, start = memory("VmRSS"), time.perf_counter()
    source = open_volume(path, options)
    opened = time.perf_counter() - start
    for _ in source.planes(range(source.info.shape[0])):
        pass
    seconds, peak, before = time.perf_counter() - start, memory("VmHWM"), bytes_read()
    equal = source.info.shape == expected.shape and all(
        np.array_equal(plane, expected[z]) and plane.dtype == expected.dtype
        for z, plane in source.planes(range(source.info.shape[0]))
    )
    figures = {"open_s": opened, "read_s": seconds, "bytes_read_mb": (bytes_read() - before) / 1e6}
    figures |= {"memory_mb": (peak - base) / 1e6, "stored_mb": source.info.num_bytes / 1e6}
    return {"equal": equal, "storage": source.info.storage} | figures


def bytes_read() -> int:
    """Return the bytes that this process has asked the system for."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def memory(what: str) -> int:
    """Return the bytes this process holds (VmRSS) or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(what)))


def row(case: dict[str, Any]) -> str:
    """Return a line of the table."""
    return (
        f"| {case['kind']} | {case['dtype']} | {'yes' if case['equal'] else 'NO'} | {case['read_s']:.2f} s | "
        f"{case['memory_mb']:.0f} MB | {case['bytes_read_mb'] / case['stored_mb']:.2f} |"
    )


def version_of(name: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# ---- Writers ----


def tiff(**options: Any) -> Writer:
    """Return a writer of one TIFF file."""

    def write(folder: Path, volume: NDArray[Any]) -> Path:
        said = ({} if options.get("imagej") else {"photometric": "minisblack"}) | options
        if said.get("predictor") and volume.dtype.kind == "f":
            said["predictor"] = 3  # floating-point differences
        tifffile.imwrite(folder / "scan.tif", volume, **said)
        return folder / "scan.tif"

    return write


def pages(folder: Path, volume: NDArray[Any]) -> Path:
    """Write a directory before each plane."""
    with tifffile.TiffWriter(folder / "scan.tif") as file:
        for plane in volume:
            file.write(plane, contiguous=False, photometric="minisblack", metadata=None)
    return folder / "scan.tif"


def pyramid(folder: Path, volume: NDArray[Any]) -> Path:
    """Write tiles, each plane with a smaller copy below it."""
    with tifffile.TiffWriter(folder / "scan.tif") as file:
        options: dict[str, Any] = {"photometric": "minisblack", "tile": (128, 128), "compression": "deflate"}
        file.write(volume, subifds=1, metadata={"axes": "ZYX"}, **options)
        file.write(volume[:, ::2, ::2], subfiletype=1, **options)
    return folder / "scan.tif"


def folder_of_slices(compression: str | None) -> Writer:
    """Return a writer of one file a plane."""

    def write(folder: Path, volume: NDArray[Any]) -> Path:
        (folder / "slices").mkdir()
        for z, plane in enumerate(volume):
            name = folder / "slices" / f"recon_{z:05d}.tif"
            tifffile.imwrite(name, plane, photometric="minisblack", compression=compression, metadata=None)
        return folder / "slices"

    return write


def raw(folder: Path, volume: NDArray[Any]) -> Path:
    """Write voxels alone."""
    volume.tofile(folder / "scan.raw")
    return folder / "scan.raw"


def metaimage(folder: Path, volume: NDArray[Any]) -> Path:
    """Write voxels and a header."""
    kind = {"uint8": "MET_UCHAR", "uint16": "MET_USHORT", "float32": "MET_FLOAT"}[volume.dtype.name]
    volume.tofile(folder / "scan.raw")
    z, y, x = volume.shape
    text = f"NDims = 3\nDimSize = {x} {y} {z}\nElementType = {kind}\nElementDataFile = scan.raw\n"
    (folder / "scan.mhd").write_text(text, encoding="ascii")
    return folder / "scan.mhd"


def hdf5(**options: Any) -> Writer:
    """Return a writer of one HDF5 file."""

    def write(folder: Path, volume: NDArray[Any]) -> Path:
        import h5py

        with h5py.File(folder / "scan.h5", "w") as file:
            file.create_dataset("entry/data/data", data=volume, **options)
        return folder / "scan.h5"

    return write


def zarr_store(version_number: int) -> Writer:
    """Return a writer of one Zarr store."""

    def write(folder: Path, volume: NDArray[Any]) -> Path:
        import zarr

        path = folder / "scan.zarr"
        zarr.create_array(str(path), data=volume, chunks=(16, 128, 128), zarr_format=version_number)
        return path

    return write


KINDS: dict[str, Writer] = {
    "TIFF, one block": tiff(),
    "TIFF, one block, big-endian": tiff(byteorder=">"),
    "BigTIFF, one block": tiff(bigtiff=True),
    "ImageJ": tiff(imagej=True, metadata={"axes": "ZYX"}),
    "OME-TIFF": tiff(ome=True, metadata={"axes": "ZYX"}),
    "TIFF, one directory a page": pages,
    "TIFF, deflate + predictor": tiff(compression="deflate", predictor=True),
    "TIFF, LZW + predictor": tiff(compression="lzw", predictor=True),
    "TIFF, zstd + predictor": tiff(compression="zstd", predictor=True),
    "TIFF, tiles": tiff(tile=(128, 128)),
    "TIFF, tiled pyramid, deflate": pyramid,
    "TIFF, tiles of 16 planes": tiff(tile=(16, 128, 128)),
    "TIFF, MinIsWhite": tiff(photometric="miniswhite"),
    "folder of TIFF": folder_of_slices(None),
    "folder of TIFF, deflate": folder_of_slices("deflate"),
    "raw": raw,
    "MetaImage": metaimage,
    "HDF5, one block": hdf5(),
    "HDF5, chunks, gzip": hdf5(chunks=(16, 128, 128), compression="gzip"),
    "Zarr 2": zarr_store(2),
    "Zarr 3": zarr_store(3),
}


if __name__ == "__main__":
    command(StorageConfig, main)
