"""What is known of a volume, and how it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from data_prep.readers.places import Place


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
class Unopened:
    """What a reader is chosen by.

    Attributes:
        path: the file or folder.
        config: what was said about it.
        head: the first bytes of a file, 352 of them where there are as many; empty for a folder.
        names: what a folder holds; empty for a file.
        is_folder: whether it is a folder that can be listed.
    """

    path: Place
    config: ReadConfig
    head: bytes = b""
    names: tuple[str, ...] = ()
    is_folder: bool = False


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


def without(info: VolumeInfo, bad_planes: Sequence[int]) -> VolumeInfo:
    """Return what is known of a volume some of whose planes cannot be decoded."""
    if not bad_planes:
        return info
    words = ", ".join(map(str, sorted(bad_planes)[:10])) + (" ..." if len(bad_planes) > 10 else "")
    warning = f"{len(bad_planes)} planes cannot be decoded ({words}); every slice that touches one is dropped"
    return replace(info, bad_planes=tuple(sorted(bad_planes)), warnings=(*info.warnings, warning))
