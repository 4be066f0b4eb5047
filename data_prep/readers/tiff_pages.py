"""The directories of a TIFF file, each read in full and checked against the bytes that are there."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import tifffile
from numpy.typing import NDArray

from configs.errors import InputError
from data_prep.readers.places import Place, one_line, open_place, size_of

# A directory has a few dozen tags; tifffile, too, takes more than these for damage.
_MOST_TAGS = 4096
# Bytes of a value by the number of its type (TIFF 6.0 and BigTIFF).
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_WHOLE = (1, 3, 4, 16, 17, 18, 13)
# Writers that align strips to words count up to 3 bytes that hold nothing.
_ALIGNMENT = 3
_FAX = (2, 3, 4)
_GREY = (tifffile.PHOTOMETRIC.MINISWHITE, tifffile.PHOTOMETRIC.MINISBLACK)


class Kind(NamedTuple):
    """What the pages of one volume have in common.

    ``dtype`` has the byte order of the file; ``samples`` are values per voxel, ``is_planar`` says that each has a plane
    of its own; ``depth`` is above 1 where a page is a volume of three-dimensional tiles.
    """

    rows: int
    columns: int
    depth: int
    samples: int
    is_planar: bool
    dtype: np.dtype[Any]
    bits: int
    photometric: int
    orientation: int

    @property
    def plane_bytes(self) -> int:
        """Bytes of one plane without compression."""
        return self.rows * self.columns * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class TiffPage:
    """One directory.

    Attributes:
        number: its place in the chain of directories.
        level: 0 in the chain, above 0 below a directory, as a smaller copy.
        kind: what its planes must have in common with the others.
        start: first byte of its voxels if they are one run without compression, else None.
        compression: name of the method, in lower case.
        is_tiled: tiles rather than strips.
        is_reduced: marked as a smaller copy of another page.
        tile_depth: planes that share a tile.
        head: offset and size of the directory itself.
        offsets: first byte of each strip or tile.
        counts: bytes of each.
    """

    number: int
    level: int
    kind: Kind
    start: int | None
    compression: str
    is_tiled: bool
    is_reduced: bool
    tile_depth: int
    head: tuple[int, int]
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]

    def sub_pages(self, tif: tifffile.TiffFile) -> list[TiffPage]:
        """Return the smaller copies below this page, largest first as stored."""
        below = tif.pages[self.number].pages or ()
        found = []
        for level, page in enumerate(below, start=1):
            if page is not None:
                found.append(_page(page, self.number, tif.filehandle.size, level=level))
        return found


class PagesFound(NamedTuple):
    """The pages of a file; ``lost`` says what is missing after them, None if nothing is."""

    pages: list[TiffPage]
    lost: str | None


class _LostError(Exception):
    """Bytes that a directory speaks of are not there."""


def read_pages(path: Place, tif: tifffile.TiffFile, file: BinaryIO, num_bytes: int, *, is_partial: bool) -> PagesFound:
    """Read every directory of the chain.

    Args:
        path: for messages.
        tif: the file as tifffile sees it, before its series were looked at.
        file: the same, open.
        num_bytes: its size.
        is_partial: stop where something is missing, instead of raising.

    Raises:
        InputError: a directory or a strip lies beyond the end, directories form a circle, or strips do not hold what
            the size of the page asks for.
    """
    offsets, lost = _chain(file, num_bytes)
    if lost and not is_partial:
        raise InputError(f"{path}: is truncated or damaged: {lost}; copy it again from its source")
    pages: list[TiffPage] = []
    for number in range(len(offsets)):
        try:
            page = tif.pages[number]
            pages.append(_page(page, number, num_bytes, level=0, of=len(offsets)))
        except _LostError as error:
            if not is_partial:
                raise InputError(f"{path}: is truncated: {error}") from None
            return PagesFound(pages, str(error))
        except (InputError, tifffile.TiffFileError) as error:
            if not is_partial:
                raise InputError(f"{path}: page {number} of {len(offsets)} is damaged ({error})") from None
            return PagesFound(pages, f"page {number}: {error}")
    return PagesFound(pages, lost)


def _chain(file: BinaryIO, num_bytes: int) -> tuple[list[int], str | None]:
    """Follow the directories; return their offsets, and why the chain ends early if it does.

    tifffile looks for a circle only once, at the hundredth directory, and follows a larger one for ever.
    """
    head = _bytes(file, 0, 16)
    order = {b"II": "<", b"MM": ">"}[head[:2]]
    is_big = len(head) == 16 and head[2:4] == struct.pack(f"{order}H", 43)
    count_format, tag_size, offset_format = ("Q", 20, "Q") if is_big else ("H", 12, "I")
    count_size, offset_size = struct.calcsize(count_format), struct.calcsize(offset_format)
    at = 8 if is_big else 4
    if len(head) < at + offset_size:
        return [], f"{len(head)} bytes are no header"
    offset = struct.unpack_from(order + offset_format, head, at)[0]
    offsets, seen = list[int](), set[int]()
    while offset:
        number = len(offsets)
        if offset + count_size > num_bytes:
            return offsets, f"directory {number} would lie at byte {offset} of {num_bytes}"
        if offset in seen:
            return offsets, f"directory {number} leads back to an earlier one"
        count = struct.unpack(order + count_format, _bytes(file, offset, count_size))[0]
        end = offset + count_size + count * tag_size
        if not 0 < count <= _MOST_TAGS:
            return offsets, f"directory {number} claims {count} entries"
        if end + offset_size > num_bytes:
            return offsets, f"directory {number} ends at byte {end + offset_size} of {num_bytes}"
        entries = _bytes(file, offset + count_size, count * tag_size)
        if (last := _last_byte(entries, order, is_big)) > num_bytes:
            return offsets, f"directory {number} keeps values up to byte {last} of {num_bytes}"
        offsets.append(offset)
        seen.add(offset)
        offset = struct.unpack(order + offset_format, _bytes(file, end, offset_size))[0]
    return offsets, None if offsets else "there is no directory"


def _last_byte(entries: bytes, order: str, is_big: bool) -> int:
    """Return where the last value of a directory ends that does not fit into the directory itself."""
    room, last = (8, 0) if is_big else (4, 0)
    for _, kind, count, where in struct.iter_unpack(f"{order}HH{'QQ' if is_big else 'II'}", entries):
        size = count * _TYPE_BYTES.get(kind, 0)
        if size > room:
            last = max(last, where + size)
    return last


def _bytes(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


def _page(page: Any, number: int, num_bytes: int, *, level: int, of: int = 1) -> TiffPage:
    """Check one directory and keep what is needed of it."""
    what = f"plane {number}"
    if page.dtype is None or page.photometric is None or not isinstance(page.bitspersample, int):
        raise InputError("the type of its values is missing or unknown; the file is damaged")
    if min(page.imagelength, page.imagewidth, page.imagedepth, page.samplesperpixel) < 1:
        raise InputError("its size is missing")
    _check_once(page)
    orientation = page.tags.valueof(274)
    kind = Kind(
        rows=int(page.imagelength),
        columns=int(page.imagewidth),
        depth=int(page.imagedepth),
        samples=int(page.samplesperpixel),
        is_planar=int(page.planarconfig) == 2 and page.samplesperpixel > 1,
        dtype=np.dtype(page.parent.byteorder + page.dtype.str[1:]),
        bits=int(page.bitspersample),
        photometric=int(page.photometric),
        orientation=orientation if isinstance(orientation, int) else 1,
    )
    offsets, counts = (np.array(some, np.int64).reshape(-1) for some in (page.dataoffsets, page.databytecounts))
    if page.compression in _FAX and page.bitspersample != 1:
        raise InputError(f"{kind.bits} bits a voxel cannot be packed as a fax")
    if not offsets.size or not counts.all():
        raise InputError(f"{what} of {of} holds no data")
    _check_sizes(page, kind, offsets, counts)
    if (end := int((offsets + counts).max())) > num_bytes or offsets.min() < 8:
        raise _LostError(f"{what} ends at byte {end} of {num_bytes}")
    tags = len(page.tags)
    return TiffPage(
        number=number,
        level=level,
        kind=kind,
        start=int(offsets[0]) if page.is_final and kind.samples == 1 and kind.depth == 1 else None,
        compression=str(getattr(page.compression, "name", page.compression)).lower().replace("_", " "),
        is_tiled=bool(page.is_tiled),
        is_reduced=bool(page.is_reduced),
        tile_depth=int(page.tiledepth) if page.is_tiled else 1,
        head=(page.offset, 20 * tags + 16 if page.parent.is_bigtiff else 12 * tags + 6),
        offsets=offsets,
        counts=counts,
    )


def _check_once(page: Any) -> None:
    """Refuse a directory that gives its size or type twice, or not at all: readers would choose differently."""
    for code in (256, 257, 262):
        if code not in page.tags:
            raise InputError(f"tag {code} is missing")
    for code in (256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 322, 323, 324, 325, 339):
        if len(page.tags.getall(code) or ()) > 1:
            raise InputError(f"tag {code} is given twice")
        if code in page.tags and int(page.tags[code].dtype) not in _WHOLE:
            raise InputError(f"tag {code} is no whole number")


def _check_sizes(page: Any, kind: Kind, offsets: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
    """Check that there are as many strips or tiles, of as many bytes, as the size of the page asks for."""
    together = 1 if kind.is_planar else kind.samples
    if page.is_tiled:
        depth, rows, columns = page.tiledepth, page.tilelength, page.tilewidth
        if min(depth, rows, columns) < 1:
            raise InputError("its tiles have no size")
        number = math.ceil(kind.depth / depth) * math.ceil(kind.rows / rows) * math.ceil(kind.columns / columns)
        full = last = depth * rows * math.ceil(columns * together * kind.bits / 8)
    else:
        rows = int(page.rowsperstrip)
        if rows < 1:
            raise InputError("its strips have no rows")
        row_bytes = math.ceil(kind.columns * together * kind.bits / 8)
        per_plane = math.ceil(kind.rows / rows)
        number = per_plane * kind.depth
        full, last = rows * row_bytes, (kind.rows - (per_plane - 1) * rows) * row_bytes
    number *= kind.samples if kind.is_planar else 1
    given = [page.tags[code].count for code in ((324, 325) if page.is_tiled else (273, 279)) if code in page.tags]
    if not given == [number] * 2 == [len(offsets), len(counts)]:
        raise InputError(f"{number} strips or tiles are needed, and offsets and sizes of {given} are given")
    if page.compression != 1:
        return
    needed = np.full(number, full, np.int64)
    if not page.is_tiled:
        needed[per_plane - 1 :: per_plane] = last
    # The last strip may be stored as long as the others.
    allowed = (counts >= needed) & ((counts <= needed + _ALIGNMENT) | (counts == full))
    if not allowed.all():
        worst = int(np.argmin(allowed))
        raise InputError(f"strip {worst} holds {counts[worst]} bytes, and its rows need {needed[worst]}")


def check_lzw(page: Any) -> None:
    """Refuse LZW data that begin with a reference to what is not there: imagecodecs decodes them to anything.

    Raises:
        InputError: the first code of a strip or tile, after a reset, is neither a byte nor the end.
    """
    file = page.parent.filehandle
    for number, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
        file.seek(offset)
        head = file.read(min(count, 3)).ljust(3, b"\0")
        bits = int.from_bytes(head, "big")
        first, second = bits >> 15, (bits >> 6) & 0x1FF
        if (second if first == 256 else first) > 257:
            raise InputError(f"strip {number} begins with an invalid code")


def check_apart(path: Place, pages: Sequence[TiffPage]) -> None:
    """Check that no byte belongs to two strips or directories, as the offsets of a damaged file claim.

    Raises:
        InputError: some bytes do.
    """
    starts = np.concatenate([page.offsets for page in pages] + [np.array([page.head[0] for page in pages], np.int64)])
    sizes = np.concatenate([page.counts for page in pages] + [np.array([page.head[1] for page in pages], np.int64)])
    order = np.argsort(starts, kind="stable")
    ends = (starts + sizes)[order]
    shared = np.flatnonzero(ends[:-1] > starts[order][1:])
    if shared.size:
        where = int(starts[order][shared[0] + 1])
        raise InputError(f"{path}: is damaged: two strips or directories claim byte {where}")


def open_page(path: Place) -> tuple[TiffPage, int]:
    """Return the only page of a file, and the size of the file.

    Raises:
        InputError: the file is damaged or cut, or holds several pages.
    """
    num_bytes = size_of(path)
    with log_records() as records, open_place(path) as file:
        try:
            with tiff_of(path, file) as tif:
                found = read_pages(path, tif, file, num_bytes, is_partial=False)
        except InputError:
            raise
        # A damaged header surfaces as whatever the parser stumbled over.
        except Exception as error:
            raise InputError(f"{path}: is not a readable TIFF file ({one_line(error)})") from error
    if records:
        raise InputError(f"{path}: is truncated or damaged ({one_line(records[0])}); copy it again from its source")
    full = [page for page in found.pages if not page.is_reduced] or found.pages
    if len(full) != 1:
        raise InputError(f"{path}: holds {len(full)} pages, and a folder of slices has one in each file")
    check_apart(path, full)
    return full[0], num_bytes


def check_values(path: Place, dtype: np.dtype[Any], photometric: int, samples: int) -> None:
    """Refuse values that are not grey levels."""
    if dtype.kind not in "buif":
        raise InputError(f"{path}: values of type {dtype.name} are not grey levels; save real numbers")
    if photometric == tifffile.PHOTOMETRIC.PALETTE:
        raise InputError(f"{path}: holds palette pictures, whose values are not grey levels; save it again as grey")
    if samples == 1 and photometric not in _GREY:
        raise InputError(f"{path}: holds colour pictures (photometric {photometric}); save it again as grey")
    if samples > 1 and not (samples in (3, 4) and photometric == tifffile.PHOTOMETRIC.RGB):
        raise InputError(f"{path}: holds colour pictures of {samples} samples a pixel; save it again as grey")


def tiff_of(path: Place, file: BinaryIO) -> tifffile.TiffFile:
    """Hand a file to tifffile, which finds the files beside it by its path."""
    return tifffile.TiffFile(path if isinstance(path, Path) else file)


def native(plane: NDArray[Any]) -> NDArray[Any]:
    """Return the plane in the byte order of this machine."""
    return plane.astype(plane.dtype.newbyteorder("="), copy=False)


class _Keep(logging.Handler):
    """Keeps what tifffile logs about lost data: errors, and warnings on series that are not whole."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record as a line."""
        message = re.sub(r"^<[^>]*> *", "", one_line(record.getMessage()))  # without the name of the object
        # Other warnings are about tags that do not touch the voxels.
        if record.levelno >= logging.ERROR or " series " in message:
            self.messages.append(message)


@contextlib.contextmanager
def log_records() -> Iterator[list[str]]:
    """Collect what tifffile logs, and keep it off the terminal."""
    logger, handler = logging.getLogger("tifffile"), _Keep()
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield handler.messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
