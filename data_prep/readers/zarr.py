"""Zarr and OME-Zarr (NGFF 0.4, 0.5): one array of a store, read in slabs as thick as its chunks; needs zarr."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from data_prep.readers.info import ReadConfig, Unopened, VolumeInfo
from data_prep.readers.places import Place, all_files, one_line, size_of
from data_prep.readers.slabs import select_one, slab_depth, slabs
from data_prep.readers.tiff_metadata import UNITS_UM, plausible

_MARKS = ("zarr.json", ".zarray", ".zgroup")


@dataclass(frozen=True, kw_only=True)
class ZarrVolume:
    """An array of a store; ``index`` chooses among axes before the last three, ``depth`` planes are read at a time."""

    info: VolumeInfo
    dataset: str
    index: tuple[int, ...]
    depth: int

    def planes(self, indices: Sequence[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield (z, plane of shape (Y, X) in native byte order), in the order asked for, each read once."""
        stored = _opened(self.info.path)
        stored = stored[self.dataset] if self.dataset else stored
        yield from slabs(lambda first, end: stored[(*self.index, slice(first, end))], indices, self.depth, self.info)


def is_zarr(at: Unopened) -> bool:
    """Tell a Zarr store by its name, or by the files in it."""
    return at.path.suffix == ".zarr" or any(name in at.names for name in _MARKS)


def open_zarr(path: Place, config: ReadConfig) -> ZarrVolume:
    """Open an array of a Zarr store; of OME-Zarr the level asked for.

    Raises:
        InputError: zarr is missing, the store is damaged, or no array of three axes or several of a size are in it.
    """
    root = _opened(path)
    try:
        return _describe(path, root, config)
    # zarr and its file systems raise errors of many kinds.
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: is no whole Zarr store ({one_line(error)})") from error


def _opened(path: Place) -> Any:
    """Open the store."""
    try:
        import zarr
    except ImportError:
        raise InputError(f"{path}: Zarr needs the package zarr; pip install 'tisserand[zarr]'") from None
    try:
        return zarr.open(store=str(path), mode="r")
    except Exception as error:
        raise InputError(f"{path}: is no readable Zarr store ({one_line(error)})") from error


def _describe(path: Place, root: Any, config: ReadConfig) -> ZarrVolume:
    """Choose an array, check it, and say what is in it."""
    is_array = hasattr(root, "dtype")
    attributes = dict(root.attrs)
    image = _multiscales(attributes)
    names, scale, units = "", None, [""] * 3
    if config.dataset_path:
        name = config.dataset_path.strip("/")
    elif image is not None:
        levels = image["datasets"]
        if config.level >= len(levels):
            raise InputError(f"{path}: --level {config.level}: the store has {len(levels)} levels, from 0")
        name = str(levels[config.level]["path"])
        axes = [axis if isinstance(axis, Mapping) else {"name": axis} for axis in image.get("axes", [])]
        names = "".join(str(axis.get("name", "?"))[:1] for axis in axes).upper()
        units = [str(axis.get("unit", "")) for axis in axes[-3:]]
        scale = _scale(levels[config.level], image)
    else:
        name = "" if is_array else _largest(path, root)
    stored = root[name] if name else root
    if not hasattr(stored, "dtype"):
        raise InputError(f"{path}: --dataset_path {name}: is a group, not an array")
    if np.dtype(stored.dtype).kind not in "buif":
        raise InputError(f"{path}: values of type {stored.dtype} are not grey levels; save real numbers")
    shape = tuple(map(int, stored.shape))
    if names and (len(names) != len(shape) or names[-3:] != "ZYX"):
        raise InputError(f"{path}: its axes {names.lower()} do not end in z, y, x")
    index = select_one(path, shape, names[:-3] or "TC"[-max(0, len(shape) - 3) :] * (len(shape) > 3), config)
    z, y, x = shape[-3:]
    if min(z, y, x) < 1 or z == 1:
        raise InputError(f"{path}: the array is {'x'.join(map(str, shape))}, not a volume")
    chunk = int((getattr(stored, "shards", None) or stored.chunks)[-3])
    dtype = np.dtype(stored.dtype)
    depth = slab_depth(chunk, z, y * x * dtype.itemsize)
    files = tuple(all_files(path)) if isinstance(path, Path) or path.text.startswith("memory:") else ()
    factors = [UNITS_UM.get(unit.lower()) for unit in units]
    voxel_um = None
    if scale is not None and all(factor is not None for factor in factors):
        voxel_um = plausible(*(edge * (factor or 0) for edge, factor in zip(scale[-3:], factors, strict=True)))
    info = VolumeInfo(
        path=path,
        shape=(z, y, x),
        dtype=dtype.newbyteorder("=").name,
        storage="OME-Zarr, chunks" if image is not None else "Zarr, chunks",
        num_bytes=sum(map(size_of, files)) if files else math.prod(shape) * dtype.itemsize,
        files=files,
        voxel_um=voxel_um,
        warnings=tuple(_absent(stored)),
        notes=(f"array {name}",) if name else (),
        slab_bytes=depth * y * x * dtype.itemsize if depth > 1 else 0,
    )
    return ZarrVolume(info=info, dataset=name, index=index, depth=depth)


def _absent(stored: Any) -> list[str]:
    """Say how many chunks are not stored: writers leave out those of one value, and a broken copy looks the same."""
    whole, there = int(stored.nchunks), int(stored.nchunks_initialized)
    if there >= whole:
        return []
    return [f"{whole - there} of {whole} chunks are not in the store and read as {stored.fill_value}; is it complete?"]


def _multiscales(attributes: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the first image that OME metadata describe, if they do."""
    ome = attributes.get("ome", attributes)
    images = ome.get("multiscales") if isinstance(ome, Mapping) else None
    return images[0] if isinstance(images, Sequence) and images else None


def _scale(level: Mapping[str, Any], image: Mapping[str, Any]) -> list[float] | None:
    """Multiply the scales of a level and of its image."""
    scale: list[float] | None = None
    for change in (*level.get("coordinateTransformations", ()), *image.get("coordinateTransformations", ())):
        if change.get("type") == "scale":
            now = [float(edge) for edge in change["scale"]]
            scale = now if scale is None else [a * b for a, b in zip(scale, now, strict=True)]
    return scale


def _largest(path: Place, root: Any) -> str:
    """Return the path of the largest array of three axes."""
    found = [(math.prod(item.shape), name) for name, item in root.members(max_depth=None) if _is_volume(item)]
    found.sort(reverse=True)
    if not found:
        raise InputError(f"{path}: holds no array of three axes")
    if len(found) > 1 and found[0][0] == found[1][0]:
        several = ", ".join(name for _, name in found[:6])
        raise InputError(f"{path}: holds several arrays of a size ({several}); choose one by --dataset_path")
    return found[0][1]


def _is_volume(item: Any) -> bool:
    return hasattr(item, "dtype") and len(item.shape) >= 3
