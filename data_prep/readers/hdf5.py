"""HDF5 and NeXus: one array of three axes inside a file, read in slabs as thick as its chunks; needs h5py."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from data_prep.readers.info import ReadConfig, Unopened, VolumeInfo
from data_prep.readers.places import Place, one_line, open_place, size_of
from data_prep.readers.slabs import select_one, slab_depth, slabs
from data_prep.readers.tiff_metadata import UNITS_UM, plausible

_MAGIC = b"\x89HDF\r\n\x1a\n"
# How many objects of a file are looked at for arrays; a file of links can hold more than memory does.
_MOST_OBJECTS = 100_000


@dataclass(frozen=True, kw_only=True)
class Hdf5Volume:
    """An array of a file; ``index`` chooses among axes before the last three, ``depth`` planes are read at a time."""

    info: VolumeInfo
    dataset: str
    index: tuple[int, ...]
    depth: int

    def planes(self, indices: Sequence[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield (z, plane of shape (Y, X) in native byte order), in the order asked for, each read once."""
        with _opened(self.info.path) as file:
            stored = file[self.dataset]
            yield from slabs(
                lambda first, end: stored[(*self.index, slice(first, end))], indices, self.depth, self.info
            )


def is_hdf5(at: Unopened) -> bool:
    """Tell HDF5 by its first bytes."""
    return at.head.startswith(_MAGIC)


def open_hdf5(path: Place, config: ReadConfig) -> Hdf5Volume:
    """Open an array of an HDF5 file after checking that all of it was written.

    Raises:
        InputError: h5py is missing, the file is damaged, no array of three axes or several of a size are in it, or
            parts of the array were never written.
    """
    with _opened(path) as file:
        try:
            name = config.dataset_path or _largest(path, file)
            stored = file.get(name)
            if stored is None or not hasattr(stored, "dtype"):
                raise InputError(f"{path}: --dataset_path {name}: no such array; the file has {_listed(file)}")
            return _describe(path, file, stored, config)
        except (OSError, RuntimeError, KeyError) as error:
            raise InputError(f"{path}: is truncated or damaged ({one_line(error)})") from error


@contextlib.contextmanager
def _opened(path: Place) -> Iterator[Any]:
    """Open a file with h5py, and with the codecs of hdf5plugin where it is installed."""
    try:
        import h5py
    except ImportError:
        raise InputError(f"{path}: HDF5 needs h5py; pip install 'tisserand[hdf5]'") from None
    with contextlib.suppress(ImportError):
        import hdf5plugin  # noqa: F401  registers its codecs
    with open_place(path) as raw:
        try:
            file = h5py.File(raw, "r")
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise InputError(f"{path}: is no whole HDF5 file ({one_line(error)}); copy it again") from error
        with file:
            yield file


def _arrays(file: Any) -> dict[str, Any]:
    """Return the arrays of real numbers with three axes, by path; links that lead nowhere are left out."""
    found: dict[str, Any] = {}
    count = 0

    def look(name: str, item: Any) -> bool | None:
        nonlocal count
        count += 1
        if hasattr(item, "dtype") and len(item.shape) >= 3 and item.dtype.kind in "buif":
            found[f"/{name}"] = item
        return True if count > _MOST_OBJECTS else None

    file.visititems(look)
    return found


def _listed(file: Any) -> str:
    """Name the arrays of a file with their sizes."""
    arrays = _arrays(file)
    words = [f"{name} {'x'.join(map(str, item.shape))} {item.dtype.name}" for name, item in list(arrays.items())[:6]]
    return (", ".join(words) or "no array of three axes") + (" ..." if len(arrays) > 6 else "")


def _largest(path: Place, file: Any) -> str:
    """Return the path of the largest array, if there is one."""
    sizes = sorted(((math.prod(item.shape), name) for name, item in _arrays(file).items()), reverse=True)
    if not sizes:
        raise InputError(f"{path}: holds no array of three axes; is it a raw scan before reconstruction?")
    if len(sizes) > 1 and sizes[0][0] == sizes[1][0]:
        raise InputError(f"{path}: holds several arrays of a size ({_listed(file)}); choose one by --dataset_path")
    return sizes[0][1]


def _describe(path: Place, file: Any, stored: Any, config: ReadConfig) -> Hdf5Volume:
    """Check an array and say what is in it."""
    if stored.dtype.kind not in "buif":
        raise InputError(f"{path}: {stored.name}: values of type {stored.dtype} are not grey levels; save real numbers")
    index = select_one(path, stored.shape, "TC"[-max(0, len(stored.shape) - 3) :] if stored.ndim > 3 else "", config)
    z, y, x = (int(size) for size in stored.shape[-3:])
    if min(z, y, x) < 1 or z == 1:
        raise InputError(f"{path}: {stored.name} is {'x'.join(map(str, stored.shape))}, not a volume")
    _check_written(path, stored)
    chunk = stored.chunks[-3] if stored.chunks else 1
    plane_bytes = y * x * stored.dtype.itemsize
    depth = slab_depth(chunk, z, plane_bytes)
    warnings, notes = list[str](), [f"array {stored.name}"]
    if depth < min(chunk, z):
        reads = -(-min(chunk, z) // depth)
        warnings.append(f"chunks are {chunk} planes deep and are decoded {reads} times; planes cost more time")
    if any(name in file for name in ("exchange/theta", "exchange/data_white", "entry/data/rotation_angle")):
        warnings.append(f"the file holds projection angles; is {stored.name} a reconstructed volume?")
    packing = f", {stored.compression}" if stored.compression else ""
    info = VolumeInfo(
        path=path,
        shape=(z, y, x),
        dtype=stored.dtype.newbyteorder("=").name,
        storage=f"HDF5, {'chunks' if stored.chunks else 'one block'}{packing}",
        num_bytes=size_of(path),
        voxel_um=_voxel_um(stored),
        warnings=tuple(warnings),
        notes=tuple(notes),
        slab_bytes=depth * plane_bytes if depth > 1 else 0,
    )
    return Hdf5Volume(info=info, dataset=stored.name, index=index, depth=depth)


def _check_written(path: Place, stored: Any) -> None:
    """Check that all of an array is there: HDF5 hands out its fill value for what is not, and says nothing."""
    if stored.external:
        raise InputError(f"{path}: {stored.name} keeps its voxels in other files; copy them into one file (h5repack)")
    if stored.is_virtual:
        missing = [source.file_name for source in stored.virtual_sources() if source.file_name != "."]
        if missing:
            raise InputError(
                f"{path}: {stored.name} is put together from other files ({missing[0]}); copy them into one (h5repack)"
            )
    if stored.chunks:
        needed = math.prod(-(-size // chunk) for size, chunk in zip(stored.shape, stored.chunks, strict=True))
        if (there := stored.id.get_num_chunks()) < needed:
            raise InputError(
                f"{path}: is truncated: {needed - there} of {needed} chunks of {stored.name} were never written"
            )
    elif stored.id.get_storage_size() < stored.nbytes:
        raise InputError(
            f"{path}: is truncated: {stored.name} has {stored.id.get_storage_size()} of {stored.nbytes} bytes"
        )


def _voxel_um(stored: Any) -> tuple[float, float, float] | None:
    """Return the edges of a voxel: an attribute in micrometres, or the axes that NeXus names beside the array."""
    given = stored.attrs.get("element_size_um")
    if given is not None and np.size(given) >= 3:
        return plausible(*(float(edge) for edge in np.ravel(given)[-3:]))
    axes = stored.parent.attrs.get("axes")
    if axes is None or np.size(axes) < 3:
        return None
    edges = []
    for name in [item.decode() if isinstance(item, bytes) else str(item) for item in np.ravel(axes)[-3:]]:
        axis = stored.parent.get(name)
        unit = axis.attrs.get("units") if axis is not None else None
        factor = UNITS_UM.get((unit.decode() if isinstance(unit, bytes) else str(unit)).lower())
        if axis is None or factor is None or np.ndim(axis) != 1 or np.size(axis) < 2:
            return None
        steps = np.diff(np.asarray(axis, np.float64))
        if not np.allclose(steps, steps[0], rtol=1e-3):
            return None
        edges.append(abs(float(steps[0])) * factor)
    return plausible(*edges)
