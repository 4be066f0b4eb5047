"""TIFF volumes: one block or one directory per page, compressed, tiled, BigTIFF, ImageJ, OME; real numbers of any type.

tifffile reports a truncated file as a shorter, valid volume and only logs what it met; it takes the type of every page
from the first one, and joins what the metadata says without asking whether the pages agree. Here every directory is
read, and every record in the log, every count that does not match, every strip that is too short, too long, shared or
beyond the end of the file is an error, before a voxel is read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from configs.errors import InputError
from data_prep.readers.info import ReadConfig, Unopened, VolumeInfo, without
from data_prep.readers.places import Place, UnreachableError, one_line, open_place, read_into, size_of
from data_prep.readers.tiff_metadata import voxel_um_of
from data_prep.readers.tiff_pages import (
    TiffPage,
    check_apart,
    check_lzw,
    check_values,
    log_records,
    native,
    read_pages,
    tiff_of,
)
from data_prep.readers.tiff_stack import Stack, stack_of

_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Planes whose colours are compared before a volume of grey colour pictures is believed.
_COLOUR_SAMPLES = 16
# Memory for planes that share three-dimensional tiles.
_SLAB_BYTES = 256_000_000


@dataclass(frozen=True, kw_only=True)
class TiffVolume:
    """A TIFF volume whose structure was checked.

    Attributes:
        info: what is known of it.
        stored_dtype: type of a voxel with its byte order.
        starts: first byte of each plane, where each is one run of bytes; None if planes are decoded.
        pages: (directory, level) that each plane is decoded from.
        channels: samples of a voxel that all hold the same value; 1 for grey pages.
        is_split: one page holds all planes: in samples, in three-dimensional tiles, or as columns.
    """

    info: VolumeInfo
    stored_dtype: np.dtype[Any]
    starts: NDArray[np.int64] | None
    pages: tuple[tuple[int, int], ...] = ()
    channels: int = 1
    is_split: bool = False

    def planes(self, indices: Sequence[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield (z, plane of shape (Y, X) in native byte order), in the order asked for, each read once."""
        if self.starts is not None:
            return self._read_runs(indices, self.starts)
        return self._read_split(indices) if self.is_split else self._read_pages(indices)

    def _read_runs(self, indices: Sequence[int], starts: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Read plane-sized runs of bytes; no memory map, so resident memory stays flat."""
        with open_place(self.info.path) as file:
            for z in indices:
                plane = np.empty(self.info.shape[1:], self.stored_dtype)
                if read_into(file, int(starts[z]), plane) < plane.nbytes:
                    raise InputError(f"{self.info.path}: plane {z} ends early; did the file change while it was read?")
                yield z, native(plane)

    def _read_pages(self, indices: Sequence[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Decode page by page."""
        bad = set(self.info.bad_planes)
        with log_records() as records, open_place(self.info.path) as file, tiff_of(self.info.path, file) as tif:
            for z in indices:
                if z in bad:
                    yield z, np.zeros(self.info.shape[1:], self.info.dtype)
                    continue
                yield z, self._decoded(tif, z, records)

    def _decoded(self, tif: tifffile.TiffFile, z: int, records: list[str]) -> NDArray[Any]:
        """Return one plane, of one channel if all are equal."""
        path, (number, level) = self.info.path, self.pages[z]
        try:
            page = tif.pages[number] if level == 0 else tif.pages[number].pages[level - 1]
            if page.compression == tifffile.COMPRESSION.LZW:
                check_lzw(page)
            plane = page.asarray(maxworkers=1)
        except UnreachableError:
            raise
        # Each codec raises errors of its own kind; whichever it is, the plane is lost.
        except Exception as error:
            raise InputError(
                f"{path}: plane {z} cannot be decoded ({one_line(error)}); --skip_bad_planes drops the slices it is in"
            ) from error
        if self.channels > 1:
            channel = plane.shape.index(self.channels) if plane.ndim == 3 else 0
            colours = np.moveaxis(plane, channel, 0)[:3]
            if not all(np.array_equal(colours[0], other) for other in colours[1:]):
                raise InputError(f"{path}: plane {z} is coloured (red, green and blue differ); save the volume as grey")
            plane = colours[0]
        if records or plane.shape != self.info.shape[1:] or plane.dtype.name != self.info.dtype:
            raise InputError(f"{path}: plane {z} is damaged ({' '.join(records) or (plane.shape, plane.dtype.name)})")
        return native(plane)

    def _read_split(self, indices: Sequence[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Read planes that lie in one page, as many at a time as one layer of its tiles holds."""
        path, (number, _) = self.info.path, self.pages[0]
        first, slab = -1, np.empty((0, *self.info.shape[1:]), self.info.dtype)
        with log_records() as records, open_place(path) as file, tiff_of(path, file) as tif:
            page = tif.pages[number]
            for z in indices:
                if not first <= z < first + len(slab) or first < 0:
                    try:
                        first, slab = _layer(page, z, self.info.shape)
                    except Exception as error:
                        raise InputError(f"{path}: plane {z} cannot be decoded ({one_line(error)})") from error
                    if records:
                        raise InputError(f"{path}: plane {z} is damaged ({records[0]})")
                yield z, native(slab[z - first])


def _layer(page: Any, z: int, shape: tuple[int, int, int]) -> tuple[int, NDArray[Any]]:
    """Decode the layer of three-dimensional tiles that plane ``z`` lies in; return its first plane and its planes."""
    if page.imagedepth == 1:
        return 0, page.asarray(maxworkers=1).reshape(shape)
    depth, rows, columns = (page.tiledepth, page.tilelength, page.tilewidth)
    per_layer = -(-shape[1] // rows) * -(-shape[2] // columns)
    number = z // depth
    layer = np.zeros((min(depth, shape[0] - number * depth), *shape[1:]), page.dtype)
    for index in range(number * per_layer, (number + 1) * per_layer):
        file = page.parent.filehandle
        file.seek(page.dataoffsets[index])
        tile, (_, _, y, x, _), _ = page.decode(file.read(page.databytecounts[index]), index)
        part = tile[: layer.shape[0], : shape[1] - y, : shape[2] - x, 0]
        layer[: part.shape[0], y : y + part.shape[1], x : x + part.shape[2]] = part
    return number * depth, layer


def is_tiff(at: Unopened) -> bool:
    """Tell TIFF and BigTIFF by their first bytes."""
    return at.head.startswith(_MAGICS)


def open_tiff(path: Place, config: ReadConfig) -> TiffVolume:
    """Open a TIFF volume after checking that all of it is there.

    Raises:
        InputError: the file is truncated or damaged, holds colour pictures, one picture, several stacks or more than
            three dimensions without a choice among them, or values that are not real numbers.
    """
    num_bytes = size_of(path)
    with log_records() as records:
        try:
            with open_place(path) as file, tiff_of(path, file) as tif:
                found = read_pages(path, tif, file, num_bytes, is_partial=config.allow_truncated)
                volume = _describe(path, tif, found.pages, num_bytes, config, lost=found.lost)
        except InputError as error:
            # What looks like one picture or two volumes may be what a cut left over: then the record says more.
            if not records or "truncated" in str(error):
                raise
            raise InputError(_damaged(path, records)) from error
        # A damaged header surfaces as whatever the parser stumbled over.
        except Exception as error:
            raise InputError(f"{path}: is not a readable TIFF file ({one_line(error)})") from error
    if records and not config.allow_truncated:
        raise InputError(_damaged(path, records))
    return _without_bad_planes(volume) if config.skip_bad_planes and volume.starts is None else volume


def _damaged(path: Place, records: Sequence[str]) -> str:
    return f"{path}: is truncated or damaged ({one_line(records[0])}); copy it again from its source"


def _describe(
    path: Place, tif: tifffile.TiffFile, pages: list[TiffPage], num_bytes: int, config: ReadConfig, *, lost: str | None
) -> TiffVolume:
    """Check that the pages are one volume and say what is in it."""
    if lost is not None:
        # The metadata of a file that was cut speaks of more than there is.
        whole = [page for page in pages if page.kind == pages[0].kind] if pages else []
        stack = Stack(whole, len(whole), (f"is cut off ({lost}); {len(whole)} whole planes are taken",), "")
    else:
        stack = stack_of(path, tif, pages, num_bytes, config)
    first = stack.pages[0]
    if config.force_axes:
        return _forced(path, first, len(pages), num_bytes)
    kind = first.kind
    check_values(path, kind.dtype, kind.photometric, kind.samples)
    warnings, notes = list(stack.warnings), [f"axes {stack.label}"] if stack.label else []
    rows, columns, depth = kind.rows, kind.columns, kind.depth
    channels = kind.samples if kind.samples > 1 else 1
    shape = (depth if depth > 1 else stack.num_planes, rows, columns)
    if shape[0] == 1:
        raise InputError(
            f"{path}: holds one picture of {rows}x{columns}, not a volume; python -m data_prep.images takes pictures"
        )
    check_apart(path, stack.pages)
    starts = _starts(path, stack, num_bytes) if channels == 1 and depth == 1 else None
    if starts is None and len(stack.pages) < stack.num_planes:
        raise InputError(
            f"{path}: is truncated: {stack.num_planes} planes are declared and {len(stack.pages)} pages are there"
        )
    if kind.dtype.kind == "b":
        warnings.append("one bit per voxel looks like a mask, not a scan")
    if kind.orientation != 1:
        warnings.append(f"the file asks for its rows to be turned (orientation {kind.orientation}); they are as stored")
    if channels > 1:
        warnings.append("colour pictures whose red, green and blue are equal are taken as grey")
    voxel_um = voxel_um_of(tif)
    if voxel_um is not None and config.level:
        z, y, x = voxel_um
        voxel_um = (z, y * pages[0].kind.rows / rows, x * pages[0].kind.columns / columns)
    if kind.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        notes.append("low values are white (MinIsWhite)")
    if tif.byteorder == ">":
        notes.append("big-endian")
    if kind.bits % 8 and kind.bits > 1:
        notes.append(f"{kind.bits} bits a voxel")
    if calibration := _calibration(tif):
        notes.append(calibration)
    info = VolumeInfo(
        path=path,
        shape=shape,
        dtype=kind.dtype.name,
        storage=_storage(tif, first, starts),
        num_bytes=num_bytes,
        voxel_um=voxel_um,
        is_inverted=kind.photometric == tifffile.PHOTOMETRIC.MINISWHITE,
        warnings=tuple(warnings),
        notes=tuple(notes),
        slab_bytes=0 if depth == 1 else first.tile_depth * rows * columns * kind.dtype.itemsize,
    )
    if info.slab_bytes > _SLAB_BYTES:
        raise InputError(
            f"{path}: {first.tile_depth} planes share their tiles and take {info.slab_bytes / 1e6:.0f} MB together; "
            "save the volume as plain pages"
        )
    volume = TiffVolume(
        info=info,
        stored_dtype=kind.dtype,
        starts=starts,
        pages=tuple((page.number, page.level) for page in stack.pages),
        channels=channels,
        is_split=depth > 1,
    )
    if channels > 1:
        sampled = {int((i + 0.5) * shape[0] / min(shape[0], _COLOUR_SAMPLES)) for i in range(_COLOUR_SAMPLES)}
        try:
            for _ in volume.planes(sorted(z for z in sampled if z < shape[0])):
                pass
        except InputError as error:
            raise InputError(f"{path}: holds colour pictures (axes {stack.label}): {one_line(error)}") from error
    return volume


def _starts(path: Place, stack: Stack, num_bytes: int) -> NDArray[np.int64] | None:
    """Return the first byte of every plane, or None if a plane is not one run of bytes."""
    if any(page.start is None for page in stack.pages):
        return None
    if len(stack.pages) == stack.num_planes:
        return np.array([page.start for page in stack.pages], np.int64)
    kind, first = stack.pages[0].kind, stack.pages[0].start
    assert first is not None
    return first + kind.plane_bytes * (stack.start_plane + stack.step * np.arange(stack.num_planes, dtype=np.int64))


def _storage(tif: tifffile.TiffFile, page: TiffPage, starts: NDArray[np.int64] | None) -> str:
    """Say how a volume is stored."""
    if starts is not None:
        is_block = bool(np.all(np.diff(starts) == page.kind.plane_bytes))
        words = "one block" if is_block else "page by page"
    elif page.tile_depth > 1:
        words = "three-dimensional tiles"
    else:
        words = "page by page, tiles" if page.is_tiled else "page by page"
    flavour = "OME-" if tif.is_ome else "ImageJ " if tif.is_imagej else ""
    packing = "" if page.compression == "none" else f", {page.compression}"
    return f"{flavour}{'BigTIFF' if tif.is_bigtiff else 'TIFF'}, {words}{packing}"


def _calibration(tif: tifffile.TiffFile) -> str | None:
    """Return ImageJ's line from stored to real values; signed 16 bit data are stored as unsigned with such a line."""
    said = tif.imagej_metadata or {}
    if "c0" not in said or "c1" not in said:
        return None
    return f"ImageJ calibration: value = {said['c0']} + {said['c1']} x stored; windows are in stored values"


def _forced(path: Place, page: TiffPage, num_pages: int, num_bytes: int) -> TiffVolume:
    """Take the three stored axes of a single page as Z, Y, X."""
    kind = page.kind
    if num_pages > 1 or kind.samples == 1:
        raise InputError(f"{path}: --force_axes ZYX is for a file of one page with several samples a pixel")
    check_values(path, kind.dtype, tifffile.PHOTOMETRIC.MINISBLACK, 1)
    shape = (kind.samples, kind.rows, kind.columns) if kind.is_planar else (kind.rows, kind.columns, kind.samples)
    info = VolumeInfo(
        path=path,
        shape=shape,
        dtype=kind.dtype.name,
        storage="TIFF, one page read as z, y, x",
        num_bytes=num_bytes,
        warnings=("the file calls itself one colour picture; its stored axes are taken as z, y, x",),
        notes=("axes forced to ZYX",),
        slab_bytes=math.prod(shape) * kind.dtype.itemsize,
    )
    return TiffVolume(
        info=info, stored_dtype=kind.dtype, starts=None, pages=((page.number, page.level),), is_split=True
    )


def _without_bad_planes(volume: TiffVolume) -> TiffVolume:
    """Decode every plane once and note those that cannot be."""
    bad = []
    for z in range(volume.info.shape[0]):
        try:
            list(volume.planes([z]))
        except UnreachableError:
            raise
        except InputError:
            bad.append(z)
    return dataclasses.replace(volume, info=without(volume.info, bad))
