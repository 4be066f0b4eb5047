"""Volumes on disk as planes along the first stored axis; one small file per kind of storage.

A reader says what is in a file (``VolumeInfo``) and hands out its planes in order. Nothing else is asked of it, because
planes are the one thing that every kind of storage yields cheaply.
"""

from __future__ import annotations

from configs.errors import InputError
from data_prep.readers.info import ReadConfig, VolumeSource
from data_prep.readers.places import Place, is_folder, names_in, open_place

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HDF5 = b"\x89HDF\r\n\x1a\n"
_HEADERS = (".mhd", ".mha", ".vgi", ".xtekct")
_ZARR = ("zarr.json", ".zarray", ".zgroup")
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


_PLAIN = ReadConfig()


def open_volume(path: Place, config: ReadConfig = _PLAIN) -> VolumeSource:
    """Open a volume with the reader that its first bytes, or else its name, ask for.

    Readers are imported when a file asks for them: some need packages that not everybody has.

    Args:
        path: a file, a folder of slices, or a Zarr folder.
        config: what the file may leave open.

    Raises:
        InputError: there is no such file, it is of an unknown kind, it is damaged, or it leaves something open.
    """
    try:
        if path.suffix == ".zarr" or is_folder(path):
            return _open_folder(path, config)
        with open_place(path) as file:
            head = file.read(_LONGEST_HEAD)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if config.raw_shape is not None and path.suffix.lower() not in _HEADERS:
        from data_prep.readers.raw import open_raw

        return open_raw(path, config)
    if head.startswith(_TIFF):
        from data_prep.readers.tiff import open_tiff

        return open_tiff(path, config)
    if head.startswith(_HDF5):
        from data_prep.readers.hdf5 import open_hdf5

        return open_hdf5(path, config)
    if path.suffix.lower() in _HEADERS and head:
        from data_prep.readers.raw import open_header

        return open_header(path, config)
    if head and path.suffix.lower() in (".raw", ".vol", ".bin", ".dat"):
        from data_prep.readers.raw import open_raw

        return open_raw(path, config)
    said, advice = _what_else(head)
    raise InputError(f"{path}: {said}; {advice}")


def _open_folder(path: Place, config: ReadConfig) -> VolumeSource:
    """Open a Zarr store or a folder of slices."""
    # A web server lists no folders.
    names = [] if path.suffix == ".zarr" else names_in(path)
    if path.suffix == ".zarr" or any(name in names for name in _ZARR):
        from data_prep.readers.zarr import open_zarr

        return open_zarr(path, config)
    from data_prep.readers.tiff_folder import open_tiff_folder

    return open_tiff_folder(path, names, config)


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
