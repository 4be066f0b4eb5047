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
from typing import Any, NamedTuple

import numpy as np
import tifffile
from numpy.typing import NDArray

from configs.errors import InputError
from data_prep.readers.info import ReadConfig, VolumeInfo, without
from data_prep.readers.places import Place, UnreachableError, one_line, open_place, read_into, size_of
from data_prep.readers.tiff_metadata import Axes, axes_of, voxel_um_of
from data_prep.readers.tiff_pages import (
    Page,
    check_apart,
    check_lzw,
    check_values,
    log_records,
    native,
    read_pages,
    tiff_of,
)

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


class _Stack(NamedTuple):
    """The pages that are the planes of a volume; ``num_planes`` follow one another from a single page if 1 page."""

    pages: list[Page]
    num_planes: int
    warnings: tuple[str, ...]
    label: str
    start_plane: int = 0  # first plane and distance between planes within a block that one directory heads
    step: int = 1


def _describe(
    path: Place, tif: tifffile.TiffFile, pages: list[Page], num_bytes: int, config: ReadConfig, *, lost: str | None
) -> TiffVolume:
    """Check that the pages are one volume and say what is in it."""
    if lost is not None:
        # The metadata of a file that was cut speaks of more than there is.
        whole = [page for page in pages if page.kind == pages[0].kind] if pages else []
        stack = _Stack(whole, len(whole), (f"is cut off ({lost}); {len(whole)} whole planes are taken",), "")
    else:
        stack = _stack(path, tif, pages, num_bytes, config)
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


def _stack(path: Place, tif: tifffile.TiffFile, pages: list[Page], num_bytes: int, config: ReadConfig) -> _Stack:
    """Return the pages that are the planes of the volume, or say why they are not one volume."""
    full = [page for page in pages if not page.is_reduced] or pages
    runs: list[list[Page]] = []
    for page in full:
        if runs and runs[-1][-1].kind == page.kind:
            runs[-1].append(page)
        else:
            runs.append([page])
    declared = axes_of(path, tif)
    if len(runs) == 1 and len(declared) > 1 and sum(one.num_planes for one in declared) == len(full) > len(declared):
        ends = np.cumsum([one.num_planes for one in declared])
        runs = [full[end - one.num_planes : end] for one, end in zip(declared, ends.tolist(), strict=True)]
    warnings = []
    if config.series is not None:
        if config.series >= max(len(runs), len(declared)):
            raise InputError(f"{path}: --series {config.series}: the file has {_listed(runs)}")
        chosen = config.series if config.series < len(runs) else 0
    else:
        chosen = _largest(path, runs)
    run = runs[chosen]
    if len(runs) > 1:
        warnings.append(f"{_listed([one for one in runs if one is not run])} in the file are left out")
    if len(full) < len(pages) and not config.level:
        warnings.append(f"{len(pages) - len(full)} smaller copies in the file are left out")
    axes = _declared(path, declared, runs, chosen, config)
    if run[0].kind.samples > 1 and not config.force_axes and len(run) == 1:
        sizes = run[0].kind
        raise InputError(
            f"{path}: this file says it is one RGB picture ({sizes.rows}x{sizes.columns}, {sizes.samples} samples), "
            f"not {sizes.samples} slices: holds colour pictures; save it again with photometric='minisblack', or pass "
            "--force_axes ZYX if its three axes are z, y and x"
        )
    stack = _Stack(run, len(run), (), "") if axes is None else _declared_stack(path, axes, run, num_bytes, config)
    stack = stack._replace(warnings=(*warnings, *stack.warnings))
    return _smaller(path, tif, stack, pages, config.level) if config.level else stack


def _largest(path: Place, runs: list[list[Page]]) -> int:
    """Return the run of pages that is the volume, beside thumbnails; all others must be clearly smaller."""
    if len(runs) == 1:
        return 0
    chosen = max(range(len(runs)), key=lambda number: sum(page.kind.rows * page.kind.columns for page in runs[number]))
    volume = runs[chosen][0].kind
    for number, run in enumerate(runs):
        is_thumbnail = 3 * run[0].kind.rows <= 2 * volume.rows and 3 * run[0].kind.columns <= 2 * volume.columns
        if number != chosen and not is_thumbnail:
            is_alike = len({run[0].kind for run in runs}) == 1
            what = "holds more than one volume" if is_alike else "pages differ in size or type"
            raise InputError(f"{path}: {what} ({_listed(runs)}); keep one per file, or choose by --series")
    return chosen


def _listed(runs: Sequence[Sequence[Page]]) -> str:
    """Name stacks of pages, with the numbers --series takes."""
    words = [f"{len(run)} of {run[0].kind.rows}x{run[0].kind.columns} {run[0].kind.dtype.name}" for run in runs[:6]]
    return ", ".join(words) + (" ..." if len(runs) > 6 else "")


def _declared(
    path: Place, declared: list[Axes], runs: list[list[Page]], chosen: int, config: ReadConfig
) -> Axes | None:
    """Return what the metadata says of the chosen pages, after checking it against what is there."""
    if not declared:
        return None
    if all(one.num_planes == 1 for one in declared) and len(declared) > 1:
        return None  # pages that each claim to be a series of their own
    if len(declared) == 1 and len(runs) == 1:
        return declared[0]
    if len(declared) == len(runs) and [one.num_planes for one in declared] == [len(run) for run in runs]:
        return declared[chosen]
    if len(declared) > 1 and config.series is None:
        several = ", ".join(one.words for one in declared)
        raise InputError(
            f"{path}: holds more than one volume ({len(declared)} series: {several}); choose one with --series"
        )
    if len(declared) > 1:
        return declared[config.series or 0]
    return None if len(runs) > 1 and declared[0].num_planes == 1 else declared[0]


def _declared_stack(path: Place, axes: Axes, run: list[Page], num_bytes: int, config: ReadConfig) -> _Stack:
    """Put the pages in the order that the metadata gives, and choose among channels and time steps."""
    stacked = {name: size for name, size in zip(axes.names, axes.sizes, strict=True) if name not in "YXS"}
    plane = [size for name, size in zip(axes.names, axes.sizes, strict=True) if name in "YX"]
    if axes.names[-1:] != "S" and axes.names[-2:] != "YX" and axes.sizes[-1] == 1:
        raise InputError(
            f"{path}: the last axis has one voxel ({'x'.join(map(str, axes.sizes))}), so there are no planes"
        )
    kind = run[0].kind
    if kind.depth > 1 or kind.samples > 1:
        return _Stack(run, len(run), (), axes.names)
    if sorted(plane) != sorted((kind.rows, kind.columns)) or axes.names.rstrip("S")[-2:] != "YX":
        raise InputError(f"{path}: the metadata says {axes.words} and the pages are {kind.rows}x{kind.columns}")
    numbers = np.arange(math.prod(stacked.values())).reshape(tuple(stacked.values()))
    chosen = {name.upper(): index for name, index in (config.select or {}).items()}
    for name, index in chosen.items():
        if index >= stacked.get(name, 0):
            have = ", ".join(f"{axis.lower()} {size}" for axis, size in stacked.items())
            raise InputError(f"{path}: --select {name.lower()}={index}: the file has {have}")
    numbers = numbers[tuple(chosen.get(name, slice(None)) for name in stacked)]
    left = {name: size for name, size in stacked.items() if name not in chosen}
    long = [name for name, size in left.items() if size > 1]
    if len(long) > 1:
        sizes = ", ".join(f"{name.lower()} {size}" for name, size in left.items() if size > 1)
        other = next((name for name in long if name != "Z"), long[0]).lower()
        raise InputError(f"{path}: holds more than one volume ({sizes}); choose with --select {other}=0")
    warnings: tuple[str, ...] = ()
    if long and long[0] in "TC":
        what = {"T": "time steps", "C": "channels"}[long[0]]
        warnings = (f"the file calls its {left[long[0]]} planes {what}; they are taken as z",)
    order = [int(number) for number in numbers.ravel()]
    total = math.prod(stacked.values())
    pages = run if axes.pages is None else _by_number(path, axes.pages, run)
    label = "".join(name for name in axes.names if name != "S")
    if len(pages) == total:
        return _Stack([pages[number] for number in order], len(order), warnings, label)
    if len(pages) == 1:
        # One directory heads a block of planes, as ImageJ writes beyond 4 GB.
        page, size = pages[0], kind.rows * kind.columns * kind.dtype.itemsize
        if page.start is None:
            raise InputError(f"{path}: is truncated: {total} planes are declared and one page is there")
        if page.start + total * size > num_bytes:
            raise InputError(
                f"{path}: is truncated: {page.start + total * size} bytes are declared and {num_bytes} are there"
            )
        step = order[1] - order[0] if len(order) > 1 else 1
        return _Stack([page], len(order), warnings, label, start_plane=order[0], step=step)
    raise InputError(
        f"{path}: the metadata says {axes.words}, {total} planes, and {len(pages)} pages are there; the file is "
        "truncated or damaged"
    )


def _by_number(path: Place, numbers: Sequence[int | None], run: list[Page]) -> list[Page]:
    """Return pages in the order that OME metadata gives."""
    pages = {page.number: page for page in run}
    if None in numbers or len(set(numbers)) < len(numbers) or set(numbers) != set(pages):
        raise InputError(f"{path}: is truncated or damaged: its OME metadata names other pages than are there")
    return [pages[number] for number in numbers if number is not None]


def _smaller(path: Place, tif: tifffile.TiffFile, stack: _Stack, pages: list[Page], level: int) -> _Stack:
    """Return the same planes at a smaller size: from the sub-directories, or from pages marked as reduced."""
    full = stack.pages[0].kind
    below = [page.sub_pages(tif) for page in stack.pages]
    sizes = sorted({page.kind for page in pages if page.is_reduced}, key=lambda kind: -kind.rows * kind.columns)
    if min(map(len, below)) >= level:
        smaller = [several[level - 1] for several in below]
    elif not any(below) and len(sizes) >= level:
        smaller = [page for page in pages if page.kind == sizes[level - 1] and page.is_reduced]
    else:
        raise InputError(
            f"{path}: --level {level}: the file has {max(min(map(len, below)), len(sizes))} smaller copies"
        )
    kind = smaller[0].kind
    if len(smaller) != stack.num_planes or any(page.kind != kind for page in smaller) or kind.rows > full.rows:
        raise InputError(f"{path}: --level {level}: the smaller copies are not one for each plane")
    return stack._replace(pages=smaller)


def _starts(path: Place, stack: _Stack, num_bytes: int) -> NDArray[np.int64] | None:
    """Return the first byte of every plane, or None if a plane is not one run of bytes."""
    if any(page.start is None for page in stack.pages):
        return None
    if len(stack.pages) == stack.num_planes:
        return np.array([page.start for page in stack.pages], np.int64)
    kind, first = stack.pages[0].kind, stack.pages[0].start
    assert first is not None
    return first + kind.plane_bytes * (stack.start_plane + stack.step * np.arange(stack.num_planes, dtype=np.int64))


def _storage(tif: tifffile.TiffFile, page: Page, starts: NDArray[np.int64] | None) -> str:
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


def _forced(path: Place, page: Page, num_pages: int, num_bytes: int) -> TiffVolume:
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
