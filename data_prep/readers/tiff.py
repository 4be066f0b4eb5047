"""TIFF volumes: contiguous, one directory per page, compressed, tiled, BigTIFF; 8 to 64 bit integers and floats.

tifffile reports a truncated file as a shorter, valid volume and only logs what it met. Here every such record, every
count that does not match and every strip that ends beyond the file is an error, before a voxel is read.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from configs.errors import InputError
from data_prep.readers import VolumeInfo

# Factor to micrometres by the spellings that microscopes, scanners and ImageJ write.
_UNITS_UM = {"nm": 1e-3, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0, "\u00b5m": 1.0, "\u03bcm": 1.0}
_UNITS_UM |= {"\\u00b5m": 1.0, "mm": 1e3, "millimeter": 1e3, "cm": 1e4, "m": 1e6}
# How far an edge may differ from another before a picture would look stretched.
_ISOTROPIC_WITHIN = 0.01


@dataclass(frozen=True, kw_only=True)
class TiffVolume:
    """A TIFF volume whose structure was checked; ``offset`` is where its voxels start if they lie in one block."""

    info: VolumeInfo
    stored_dtype: np.dtype[Any]
    offset: int | None

    def planes(self, indices: Sequence[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield (z, plane of shape (Y, X) in native byte order), in the order asked for, each read once."""
        return self._read_pages(indices) if self.offset is None else self._read_block(indices, self.offset)

    def _read_block(self, indices: Sequence[int], offset: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Read plane-sized runs of bytes; no memory map, so resident memory stays flat."""
        _, rows, columns = self.info.shape
        count = rows * columns
        with self.info.path.open("rb") as file:
            for z in indices:
                file.seek(offset + z * count * self.stored_dtype.itemsize)
                plane = np.fromfile(file, self.stored_dtype, count)
                if plane.size != count:
                    raise InputError(f"{self.info.path}: plane {z} ends early; did the file change while it was read?")
                yield z, _native(plane.reshape(rows, columns))

    def _read_pages(self, indices: Sequence[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Decode page by page."""
        path = self.info.path
        with _records() as records, tifffile.TiffFile(path) as tif:
            pages = _volume_pages(path, tif)
            for z in indices:
                try:
                    plane = pages[z].asarray(maxworkers=1)
                # Each codec raises errors of its own kind; whichever it is, the plane is lost.
                except Exception as error:
                    raise InputError(f"{path}: plane {z} cannot be decoded ({_one_line(error)})") from error
                if records or plane.shape != self.info.shape[1:]:
                    raise InputError(f"{path}: plane {z} is damaged ({' '.join(records) or plane.shape})")
                yield z, _native(plane)


def open_tiff(path: Path) -> TiffVolume:
    """Open a TIFF volume after checking that all of it is there.

    Raises:
        InputError: the file is truncated or damaged, holds colour pictures, one picture, pages of several sizes, more
            than three dimensions, or values that are not real numbers.
    """
    num_bytes = path.stat().st_size
    with _records() as records:
        try:
            with tifffile.TiffFile(path) as tif:
                volume = _describe(path, tif, num_bytes)
        except InputError:
            # What looks like one picture or two volumes may be what a cut left over: then the record says more.
            if not records:
                raise
        # A damaged header surfaces as whatever the parser stumbled over.
        except Exception as error:
            raise InputError(f"{path}: is not a readable TIFF file ({_one_line(error)})") from error
    if records:
        raise InputError(f"{path}: is truncated or damaged ({_one_line(records[0])}); copy it again from its source")
    return volume


def _describe(path: Path, tif: tifffile.TiffFile, num_bytes: int) -> TiffVolume:
    """Check the structure of an open file and say what is in it."""
    pages = _volume_pages(path, tif)
    series, first = tif.series[0], pages[0]
    if first.photometric is None or first.dtype is None:
        raise InputError(f"{path}: the first page lacks its type; the file is damaged")
    dtype = np.dtype(tif.byteorder + first.dtype.str[1:])
    if dtype.kind not in "buif":
        raise InputError(f"{path}: values of type {dtype.name} are not grey levels; save real numbers")
    is_block = len(tif.series) == 1 and series.dataoffset is not None and first.is_final
    shape = (_num_planes(tif, pages), first.imagelength, first.imagewidth)
    if is_block:
        needed = int(series.dataoffset) + math.prod(shape) * dtype.itemsize
        if needed > num_bytes:
            raise InputError(f"{path}: is truncated: {needed} bytes are declared and {num_bytes} are there")
    else:
        _check_strips(path, pages, num_bytes)
    compression = first.compression.name.lower().replace("_", " ")
    kind = "one block" if is_block else "page by page" if compression == "none" else f"page by page, {compression}"
    warnings = []
    if first.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        warnings.append("the file says that low values are white; grey levels are turned round")
    if dtype.kind == "b":
        warnings.append("one bit per voxel looks like a mask, not a scan")
    voxel_um = _voxel_um(tif)
    if voxel_um is not None and max(voxel_um) > min(voxel_um) * (1 + _ISOTROPIC_WITHIN):
        warnings.append(f"voxels are not cubes, {voxel_um} um; slices are not resampled")
    info = VolumeInfo(
        path=path,
        shape=shape,
        dtype=dtype.name,
        storage=("BigTIFF, " if tif.is_bigtiff else "TIFF, ") + kind,
        num_bytes=num_bytes,
        voxel_um=voxel_um,
        is_inverted=first.photometric == tifffile.PHOTOMETRIC.MINISWHITE,
        warnings=tuple(warnings),
    )
    return TiffVolume(info=info, stored_dtype=dtype, offset=int(series.dataoffset) if is_block else None)


def _volume_pages(path: Path, tif: tifffile.TiffFile) -> Sequence[Any]:
    """Return the pages that are the planes of the volume, or say why they are not one volume."""
    series = [one for one in tif.series if not one.keyframe.is_reduced] or list(tif.series)
    axes, sizes = series[0].axes, dict(zip(series[0].axes, series[0].shape, strict=True))
    keyframe = series[0].keyframe
    if "S" in axes or keyframe.samplesperpixel > 1:
        raise InputError(
            f"{path}: holds colour pictures (axes {axes}, sizes {'x'.join(map(str, series[0].shape))}), not grey "
            "planes; save it again as grey, with photometric 'minisblack'"
        )
    if keyframe.photometric == tifffile.PHOTOMETRIC.PALETTE:
        raise InputError(f"{path}: holds palette pictures, whose values are not grey levels; save it again as grey")
    if any(one.is_multifile for one in series):
        raise InputError(f"{path}: is one of several files of a volume; save the volume as a single file")
    if keyframe.is_volumetric:
        raise InputError(f"{path}: is stored in three-dimensional tiles, which are not read; save it as plain pages")
    if len({(one.keyframe.imagelength, one.keyframe.imagewidth, one.dtype) for one in series}) > 1:
        kinds = ", ".join(f"{len(one.pages)} of {one.keyframe.shape} {one.dtype}" for one in series[:4])
        raise InputError(f"{path}: pages differ in size or type ({kinds}); keep one kind per file")
    if axes[-2:] != "YX" and len(series) == 1 and sizes[axes[-1]] == 1:
        raise InputError(
            f"{path}: the last axis has one voxel ({'x'.join(map(str, series[0].shape))}), so there are no planes"
        )
    stacked = [axis for axis in axes if axis not in "YX" and sizes[axis] > 1]
    if len(series) > 1 and all(len(one.pages) == 1 for one in series):
        return [one.pages[0] for one in series]
    if len(series) > 1 or len(stacked) > 1 or axes[-2:] != "YX":
        several = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise InputError(
            f"{path}: holds more than one volume ({len(series)} series, {several}); save one of them alone"
        )
    if not stacked:
        raise InputError(f"{path}: holds one picture of {keyframe.imagelength}x{keyframe.imagewidth}, not a volume")
    return series[0].pages


def _num_planes(tif: tifffile.TiffFile, pages: Sequence[Any]) -> int:
    """Return the number of planes, which is more than the pages where one directory heads a whole block."""
    series = tif.series[0]
    return len(pages) if len(tif.series) > 1 else math.prod(series.shape[:-2])


def _check_strips(path: Path, pages: Sequence[Any], num_bytes: int) -> None:
    """Check that every page is there and ends within the file."""
    for z, page in enumerate(pages):
        if page is None:
            raise InputError(f"{path}: is truncated: plane {z} of {len(pages)} is missing")
        ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if not ends or not all(page.databytecounts):
            raise InputError(f"{path}: plane {z} of {len(pages)} holds no data")
        if max(ends) > num_bytes:
            raise InputError(f"{path}: is truncated: plane {z} ends at byte {max(ends)} of {num_bytes}")


def _voxel_um(tif: tifffile.TiffFile) -> tuple[float, float, float] | None:
    """Return the voxel's edges along (Z, Y, X) if the file gives all three with a unit, else None."""
    if tif.ome_metadata:
        return _voxel_um_of_ome(tif.ome_metadata)
    said = tif.imagej_metadata or (tif.shaped_metadata[0] if tif.shaped_metadata else {})
    factor = _UNITS_UM.get(str(said.get("unit", "")).strip().lower())
    spacing, page = said.get("spacing"), tif.pages.first
    if factor is None or not isinstance(spacing, int | float):
        return None
    try:
        per_unit = [page.tags[name].value for name in ("YResolution", "XResolution")]
        in_plane = [denominator / numerator for numerator, denominator in per_unit]
        tag = {2: 25400.0, 3: 1e4}.get(int(page.tags["ResolutionUnit"].value), factor)  # inch, centimetre
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    # Some writers mean the unit in words and leave the tag at inch; the spacing tells which of the two is meant.
    for factor_in_plane in (factor, tag):
        edges = _plausible(float(spacing) * factor, *(edge * factor_in_plane for edge in in_plane))
        if edges is not None and max(edges) < 10 * min(edges):
            return edges
    return None


def _voxel_um_of_ome(xml: str) -> tuple[float, float, float] | None:
    """Read PhysicalSizeZ, Y, X from OME metadata."""
    pixels: Any = tifffile.xml2dict(xml).get("OME", {}).get("Image", {})
    pixels = pixels[0] if isinstance(pixels, list) else pixels
    pixels = pixels.get("Pixels", {})
    edges = []
    for axis in "ZYX":
        size = pixels.get(f"PhysicalSize{axis}")
        factor = _UNITS_UM.get(str(pixels.get(f"PhysicalSize{axis}Unit", "um")).lower())
        if not isinstance(size, int | float) or factor is None:
            return None
        edges.append(float(size) * factor)
    return _plausible(*edges)


def _plausible(*edges: float) -> tuple[float, float, float] | None:
    """Return the three edges if they are positive and finite."""
    z, y, x = edges
    return (z, y, x) if all(math.isfinite(edge) and edge > 0 for edge in edges) else None


def _native(plane: NDArray[Any]) -> NDArray[Any]:
    """Return the plane in the byte order of this machine."""
    return plane.astype(plane.dtype.newbyteorder("="), copy=False)


def _one_line(error: object) -> str:
    """Return a message of a library as one bounded line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


class _Keep(logging.Handler):
    """Keeps what tifffile logs about lost data: errors, and warnings on series that are not whole."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record as a line."""
        message = re.sub(r"^<[^>]*> *", "", _one_line(record.getMessage()))  # without the name of the object
        # Other warnings are about tags that do not touch the voxels.
        if record.levelno >= logging.ERROR or " series " in message:
            self.messages.append(message)


@contextlib.contextmanager
def _records() -> Iterator[list[str]]:
    """Collect what tifffile logs, and keep it off the terminal."""
    logger, handler = logging.getLogger("tifffile"), _Keep()
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield handler.messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
