"""Volumes on disk as planes along the first stored axis; one small file per kind of storage.

A reader says what is in a file (``VolumeInfo``) and hands out its planes in order. Nothing else is asked of it, because
planes are the one thing that every kind of storage yields cheaply.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from configs.errors import InputError
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


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """What a file may leave open about the volume in it."""

    dataset_path: str | None = None
    """HDF5 and Zarr: array inside the file, such as /entry/data/data; by default the largest one of three axes."""
    raw_shape: tuple[int, int, int] | None = None
    """Raw file: voxels along z y x, the fastest last."""
    raw_dtype: (
        Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"] | None
    ) = None
    """Raw file: type of a voxel."""
    raw_offset: int = 0
    """Raw file: bytes before the first voxel."""
    raw_byteorder: Literal["little", "big"] = "little"
    """Raw file: order of the bytes of a voxel."""
    pattern: str | None = None
    """Folder of slices: which files of it, such as 'recon_*.tif'."""
    series: int | None = None
    """TIFF with several stacks: which one, counted from 0."""
    level: int = 0
    """TIFF or OME-Zarr with smaller copies: which one; 0 is the full size."""
    select: dict[str, int] | None = None
    """Volume with channels or time steps: which one of each, such as c=0 t=3."""
    force_axes: Literal["ZYX"] | None = None
    """TIFF that calls itself one colour picture: its three stored axes are z, y and x, whatever it says."""
    allow_truncated: bool = False
    """TIFF or raw file that was cut off: take the planes that are whole, as a shorter volume."""
    skip_bad_planes: bool = False
    """TIFF with planes that cannot be decoded: drop every slice that touches one. Reads the file once more."""

    def __post_init__(self) -> None:
        if self.raw_shape is not None and min(self.raw_shape) < 1:
            raise ValueError(f"--raw_shape {' '.join(map(str, self.raw_shape))}: give three positive numbers, z y x")
        for name in ("raw_offset", "series", "level"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"--{name} {value}: must not be negative")
        for axis, index in (self.select or {}).items():
            if index < 0 or len(axis) != 1:
                raise ValueError(
                    f"--select {axis}={index}: name an axis by its letter and a number from 0, such as c=0"
                )


@dataclass(frozen=True, kw_only=True)
class VolumeInfo:
    """What a volume is, known before any voxel is read.

    Attributes:
        path: the file or folder.
        shape: (Z, Y, X) in stored order, in voxels.
        dtype: NumPy name of the voxel type, native byte order.
        storage: how it is stored, in words for people.
        num_bytes: size of the file, or of the files together.
        files: the files it is made of, if there are several or ``path`` is a folder.
        voxel_um: edge lengths of a voxel along (Z, Y, X) in micrometres; None if the file does not say.
        is_inverted: the file declares that low values are bright.
        warnings: what was decided that a user should know, a line each.
        notes: what was decided that the manifest should tell, a line each.
        bad_planes: planes that cannot be decoded and are handed out as zeros; no picture may touch one.
        slab_bytes: memory for planes that have to be read together, beyond one plane.
    """

    path: Place
    shape: tuple[int, int, int]
    dtype: str
    storage: str
    num_bytes: int
    files: tuple[Place, ...] = ()
    voxel_um: tuple[float, float, float] | None = None
    is_inverted: bool = False
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    bad_planes: tuple[int, ...] = ()
    slab_bytes: int = 0


class VolumeSource(Protocol):
    """What a reader offers."""

    @property
    def info(self) -> VolumeInfo:
        """Return what is known of the volume."""
        ...

    def planes(self, indices: Sequence[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield (z, plane of shape (Y, X) in native byte order), in the order asked for, each read once.

        Raises:
            InputError: a plane cannot be read or decoded.
        """
        ...


def open_volume(path: Place, config: ReadConfig = ReadConfig()) -> VolumeSource:
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


def without(info: VolumeInfo, bad_planes: Sequence[int]) -> VolumeInfo:
    """Return what is known of a volume some of whose planes cannot be decoded."""
    if not bad_planes:
        return info
    words = ", ".join(map(str, sorted(bad_planes)[:10])) + (" ..." if len(bad_planes) > 10 else "")
    warning = f"{len(bad_planes)} planes cannot be decoded ({words}); every slice that touches one is dropped"
    return replace(info, bad_planes=tuple(sorted(bad_planes)), warnings=(*info.warnings, warning))


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
