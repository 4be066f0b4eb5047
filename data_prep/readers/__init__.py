"""Volumes on disk as planes along the first stored axis; one small file per kind of storage.

A reader says what is in a file (``VolumeInfo``) and hands out its planes in order. Nothing else is asked of it, because
planes are the one thing that every kind of storage yields cheaply.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from configs.errors import InputError

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OTHERS = {
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"\x93NUMPY": "a NumPy array",
}


@dataclass(frozen=True, kw_only=True)
class VolumeInfo:
    """What a volume is, known before any voxel is read.

    Attributes:
        path: the file.
        shape: (Z, Y, X) in stored order, in voxels.
        dtype: NumPy name of the voxel type, native byte order.
        storage: how it is stored, in words for people.
        num_bytes: size of the file.
        voxel_um: edge lengths of a voxel along (Z, Y, X) in micrometres; None if the file does not say.
        is_inverted: the file declares that low values are bright.
        warnings: what was decided that a user should know, a line each.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: str
    storage: str
    num_bytes: int
    voxel_um: tuple[float, float, float] | None = None
    is_inverted: bool = False
    warnings: tuple[str, ...] = ()


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


def open_volume(path: Path) -> VolumeSource:
    """Open a volume with the reader that its first bytes ask for.

    Raises:
        InputError: there is no such file, it is of an unknown kind, or it is damaged.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; a volume is one multi-page TIFF file") from None
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if head.startswith(_TIFF):
        # Readers are imported when a file asks for them: some will need packages that not everybody has.
        from data_prep.readers.tiff import open_tiff

        return open_tiff(path)
    kind = next((words for magic, words in _OTHERS.items() if head.startswith(magic)), None)
    said = "is empty" if not head else f"is {kind}, not a TIFF volume" if kind else "is not a TIFF file"
    raise InputError(f"{path}: {said}; save the volume as a multi-page grey TIFF")
