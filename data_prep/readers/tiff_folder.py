"""A folder of per-slice TIFF files, as reconstruction programs write them: in natural order, and complete."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from configs.errors import InputError
from data_prep.readers.info import ReadConfig, VolumeInfo, without
from data_prep.readers.places import Place, UnreachableError, inside, one_line, open_place, read_into
from data_prep.readers.tiff_pages import TiffPage, check_lzw, check_values, log_records, native, open_page

_SUFFIXES = (".tif", ".tiff")
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp")


@dataclass(frozen=True, kw_only=True)
class TiffFolder:
    """Files that were all looked into; ``starts`` is the first byte of each plane, -1 where it is decoded."""

    info: VolumeInfo
    stored_dtype: np.dtype[Any]
    starts: tuple[int, ...]

    def planes(self, indices: Sequence[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield (z, plane of shape (Y, X) in native byte order), in the order asked for, each read once."""
        bad = set(self.info.bad_planes)
        for z in indices:
            path = self.info.files[z]
            if z in bad:
                yield z, np.zeros(self.info.shape[1:], self.info.dtype)
            elif self.starts[z] >= 0:
                plane = np.empty(self.info.shape[1:], self.stored_dtype)
                with open_place(path) as file:
                    if read_into(file, self.starts[z], plane) < plane.nbytes:
                        raise InputError(f"{path}: ends early; did the file change while it was read?")
                yield z, native(plane)
            else:
                yield z, self._decoded(z)

    def _decoded(self, z: int) -> NDArray[Any]:
        """Return the plane of a file that is compressed or tiled."""
        path = self.info.files[z]
        with log_records() as records, open_place(path) as file:
            try:
                with tifffile.TiffFile(file) as tif:
                    if tif.pages.first.compression == tifffile.COMPRESSION.LZW:
                        check_lzw(tif.pages.first)
                    plane = tif.pages.first.asarray(maxworkers=1)
            except UnreachableError:
                raise
            # Each codec raises errors of its own kind; whichever it is, the plane is lost.
            except Exception as error:
                raise InputError(
                    f"{path}: cannot be decoded ({one_line(error)}); --skip_bad_planes drops the slices it is in"
                ) from error
        if records or plane.shape != self.info.shape[1:] or plane.dtype.name != self.info.dtype:
            raise InputError(f"{path}: is damaged ({' '.join(records) or (plane.shape, plane.dtype.name)})")
        return native(plane)


def open_tiff_folder(folder: Place, names: Sequence[str], config: ReadConfig) -> TiffFolder:
    """Open the slices of a folder after looking into each of them.

    Args:
        folder: the folder.
        names: the files in it.
        config: ``pattern`` chooses among them; ``skip_bad_planes`` goes on without those that cannot be read.

    Raises:
        InputError: no TIFF files, files of several names, holes in the numbering, a file of several pages, or files
            that differ in size or type.
    """
    names = in_order(folder, names, config)
    files = tuple(inside(folder, name) for name in names)
    pages: list[TiffPage | None] = []
    num_bytes, bad = 0, list[int]()
    for z, path in enumerate(files):
        try:
            page, size = open_page(path)
        except UnreachableError:
            raise
        except InputError as error:
            if not config.skip_bad_planes:
                raise InputError(f"{error} (slice {z + 1} of {len(files)})") from None
            bad.append(z)
            pages.append(None)
            continue
        pages.append(page)
        num_bytes += size
    kinds = {page.kind: name for name, page in zip(reversed(names), reversed(pages), strict=True) if page is not None}
    if len(kinds) != 1:
        several = ", ".join(f"{name} is {kind.rows}x{kind.columns} {kind.dtype.name}" for kind, name in kinds.items())
        raise InputError(f"{folder}: {several or 'no file can be read'}; keep one kind, or choose with --pattern")
    (kind,) = kinds
    if kind.samples > 1 or kind.depth > 1:
        raise InputError(f"{files[0]}: holds a colour picture or a volume; save the slices as single grey pages")
    check_values(files[0], kind.dtype, kind.photometric, kind.samples)
    is_inverted = kind.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    compressed = {page.compression for page in pages if page is not None} - {"none"}
    info = VolumeInfo(
        path=folder,
        shape=(len(files), kind.rows, kind.columns),
        dtype=kind.dtype.name,
        storage=", ".join([f"folder of {len(files)} TIFF files", *sorted(compressed)]),
        num_bytes=num_bytes,
        files=files,
        is_inverted=is_inverted,
        notes=(f"first file {names[0]}, last {names[-1]}", *["low values are white (MinIsWhite)"] * is_inverted),
        bad_planes=tuple(bad),
    )
    starts = tuple(-1 if page is None or page.start is None else page.start for page in pages)
    volume = TiffFolder(info=info, stored_dtype=kind.dtype, starts=starts)
    return _without_bad_planes(volume) if config.skip_bad_planes else volume


def names_of_tiffs(names: Sequence[str]) -> list[str]:
    """Return the names that end like a TIFF file and are not hidden."""
    return [name for name in names if PurePosixPath(name).suffix.lower() in _SUFFIXES and not name.startswith(".")]


def in_order(folder: Place, names: Sequence[str], config: ReadConfig) -> list[str]:
    """Return the names of the slices in the order of their numbers.

    Raises:
        InputError: there are none, they have more than one name before or after the number, or numbers are missing.
    """
    found = names_of_tiffs(names)
    if config.pattern is not None:
        found = [name for name in found if fnmatch.fnmatchcase(name, config.pattern)]
        if not found:
            raise InputError(f"{folder}: no TIFF file is called like --pattern {config.pattern}")
    if not found:
        pictures = sum(PurePosixPath(name).suffix.lower() in _PICTURES for name in names)
        advice = "python -m data_prep.images takes pictures" if pictures else "a volume is a folder of one file a plane"
        raise InputError(f"{folder}: holds no TIFF files ({len(names)} files); {advice}")
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in found:
        groups[tuple(re.split(r"\d+", name))].append(name)
    if len(groups) > 1:
        several = ", ".join(f"{len(some)} like {some[0]}" for some in list(groups.values())[:6])
        raise InputError(f"{folder}: holds files of several names ({several}); choose with --pattern")
    numbers = {name: [int(digits) for digits in re.findall(r"\d+", name)] for name in found}
    varying = [place for place, some in enumerate(zip(*numbers.values(), strict=True)) if len(set(some)) > 1]
    if len(found) == 1:
        raise InputError(f"{folder}: holds one slice ({found[0]}), not a volume")
    if len(varying) != 1:
        raise InputError(
            f"{folder}: {len(varying)} numbers change from name to name ({found[0]}, {found[-1]}); choose the slices "
            "of one volume with --pattern"
        )
    ordered = sorted(found, key=lambda name: numbers[name][varying[0]])
    places = [numbers[name][varying[0]] for name in ordered]
    for name, before, after in zip(ordered[1:], places, places[1:], strict=False):
        if after == before:
            raise InputError(f"{folder}: two files have the number {after}, one of them {name}; keep one")
        if after != before + 1:
            missing = f"{before + 1}" if after == before + 2 else f"{before + 1} to {after - 1}"
            raise InputError(
                f"{folder}: slices {missing} are missing before {name}; copy them, number the files without holes, or "
                "choose a part with --pattern"
            )
    return ordered


def _without_bad_planes(volume: TiffFolder) -> TiffFolder:
    """Decode every compressed plane once and note those that cannot be."""
    bad = list(volume.info.bad_planes)
    for z in range(volume.info.shape[0]):
        if z not in bad and volume.starts[z] < 0:
            try:
                list(volume.planes([z]))
            except UnreachableError:
                raise
            except InputError:
                bad.append(z)
    return dataclasses.replace(volume, info=without(volume.info, bad))
