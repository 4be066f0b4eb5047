"""Volumes on disk as planes along the first stored axis; one small file per kind of storage.

A reader says what is in a file (``VolumeInfo``) and hands out its planes in order. Nothing else is asked of it, because
planes are the one thing that every kind of storage yields cheaply. A new reader is a file beside this one and a line in
``READERS``; it imports an optional package when it opens a file, since not everybody has it.
"""

from __future__ import annotations

from collections.abc import Callable

from configs.errors import InputError
from data_prep.readers.hdf5 import is_hdf5, open_hdf5
from data_prep.readers.info import ReadConfig, Unopened, VolumeSource
from data_prep.readers.places import Place, is_folder, names_in, open_place
from data_prep.readers.raw import has_header, is_described, is_raw, open_header, open_raw
from data_prep.readers.tiff import is_tiff, open_tiff
from data_prep.readers.tiff_folder import open_tiff_folder
from data_prep.readers.zarr import is_zarr, open_zarr

_LONGEST_HEAD = 352  # bytes; the header of NIfTI ends there
_TO_TIFF = "save the volume as a multi-page grey TIFF"
_OTHERS = {
    b"\x89PNG": ("a PNG picture", "python -m data_prep.images takes pictures"),
    b"\xff\xd8\xff": ("a JPEG picture", "python -m data_prep.images takes pictures"),
    b"GIF8": ("a GIF picture", "python -m data_prep.images takes pictures"),
    b"BM": ("a BMP picture", "python -m data_prep.images takes pictures"),
    b"PK\x03\x04": ("a zip archive", "unpack it first"),
    b"\x1f\x8b": ("a gzip archive", "unpack it first"),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", "unpack it first"),
    b"\x93NUMPY": ("a NumPy array", _TO_TIFF),
    b"\xd0\xcf\x11\xe0": ("an OLE file, such as Zeiss TXM", "export it as TIFF from the scanner's program"),
    b"\x00\x00\x00\x0cjP": ("a JPEG 2000 picture", "convert it to TIFF, with imagecodecs or OpenJPEG"),
    b"NRRD": ("an NRRD volume", "save it as .mhd and .raw, for which SimpleITK has a command"),
}

READERS: tuple[tuple[Callable[[Unopened], bool], Callable[[Unopened], VolumeSource]], ...] = (
    (is_zarr, lambda at: open_zarr(at.path, at.config)),
    (lambda at: at.is_folder, lambda at: open_tiff_folder(at.path, at.names, at.config)),
    (is_described, lambda at: open_raw(at.path, at.config)),
    (is_tiff, lambda at: open_tiff(at.path, at.config)),
    (is_hdf5, lambda at: open_hdf5(at.path, at.config)),
    (has_header, lambda at: open_header(at.path, at.config)),
    (is_raw, lambda at: open_raw(at.path, at.config)),
)
"""Whether a reader takes what lies there, and how it opens it; the first that does is asked."""

_PLAIN = ReadConfig()


def open_volume(path: Place, config: ReadConfig = _PLAIN) -> VolumeSource:
    """Open a volume with the reader that its first bytes, or else its name, ask for.

    Args:
        path: a file, a folder of slices, or a Zarr folder.
        config: what the file may leave open.

    Raises:
        InputError: there is no such file, it is of an unknown kind, it is damaged, or it leaves something open.
    """
    at = _look(path, config)
    for takes, opened in READERS:
        if takes(at):
            return opened(at)
    said, advice = _what_else(at.head)
    raise InputError(f"{path}: {said}; {advice}")


def _look(path: Place, config: ReadConfig) -> Unopened:
    """Return what a reader is chosen by."""
    try:
        # A web server lists no folders.
        if path.suffix == ".zarr":
            return Unopened(path=path, config=config)
        if is_folder(path):
            return Unopened(path=path, config=config, names=tuple(names_in(path)), is_folder=True)
        with open_place(path) as file:
            return Unopened(path=path, config=config, head=file.read(_LONGEST_HEAD))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _what_else(head: bytes) -> tuple[str, str]:
    """Say what a file that no reader takes is, and what to do."""
    if not head:
        return "is empty", _TO_TIFF
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, not a volume", "name a file; a web server lists no folders"
    if head[344:348] in (b"n+1\0", b"ni1\0"):
        return "is a NIfTI volume, not a TIFF volume", _TO_TIFF
    if head[128:132] == b"DICM":
        return "is a DICOM slice, not a TIFF volume", "convert the series to TIFF, with dcm2niix or Fiji"
    for magic, (kind, advice) in _OTHERS.items():
        if head.startswith(magic):
            return f"is {kind}, not a TIFF volume", advice
    return "is not a TIFF file", f"{_TO_TIFF}, or describe a raw file by --raw_shape and --raw_dtype"
