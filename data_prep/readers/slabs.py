"""Planes of arrays that are stored in chunks: as many planes are read together as a chunk is deep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from data_prep.readers.info import ReadConfig, VolumeInfo
from data_prep.readers.places import Place, one_line
from data_prep.readers.tiff_pages import native

# Memory for one slab; deeper chunks are decoded more than once.
SLAB_BYTES = 256_000_000


def slab_depth(chunk: int, length: int, plane_bytes: int) -> int:
    """Return how many planes to read together: a chunk's depth, or what memory allows of it."""
    return max(1, min(chunk, length, SLAB_BYTES // max(1, plane_bytes)))


def slabs(
    read: Callable[[int, int], Any], indices: Sequence[int], depth: int, info: VolumeInfo
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (z, plane) in the order asked for, reading each slab once as long as the order rises.

    Args:
        read: returns the planes from a first to an end, half-open.
        indices: planes.
        depth: planes of a slab; slabs begin at its multiples.
        info: the volume.

    Raises:
        InputError: a slab cannot be read or decoded.
    """
    first, slab = 0, np.empty((0, *info.shape[1:]))
    for z in indices:
        if not first <= z < first + len(slab):
            first = z // depth * depth
            end = min(first + depth, info.shape[0])
            if depth > 1 and len(indices) < info.shape[0]:
                # Some planes only: those of the slab that are asked for.
                some = [one for one in indices if first <= one < end]
                first, end = min(some), max(some) + 1
            try:
                slab = np.asarray(read(first, end))
            # Each codec and file system raises errors of its own kind; whichever it is, the planes are lost.
            except Exception as error:
                raise InputError(f"{info.path}: planes {first} to {end} cannot be read ({one_line(error)})") from error
            if slab.shape != (end - first, *info.shape[1:]):
                raise InputError(f"{info.path}: planes {first} to {end} are damaged ({slab.shape})")
        yield z, native(slab[z - first])


def select_one(path: Place, shape: Sequence[int], names: str, config: ReadConfig) -> tuple[int, ...]:
    """Return the index of every axis before the last three: chosen, or 0 where there is no choice.

    Raises:
        InputError: an array of fewer than three axes, or a choice that is missing or out of range.
    """
    if len(shape) < 3:
        raise InputError(f"{path}: the array has {len(shape)} axes ({'x'.join(map(str, shape))}), not three")
    chosen = config.select or {}
    index = []
    for name, size in zip(names.lower(), shape[:-3], strict=True):
        if name not in chosen and size > 1:
            raise InputError(
                f"{path}: holds more than one volume ({'x'.join(map(str, shape))}); choose with --select {name}=0"
            )
        if chosen.get(name, 0) >= size:
            raise InputError(f"{path}: --select {name}={chosen[name]}: the array has {size}")
        index.append(chosen.get(name, 0))
    if unknown := set(chosen) - set(names.lower()):
        raise InputError(f"{path}: --select {min(unknown)}: the array has no such axis ({'x'.join(map(str, shape))})")
    return tuple(index)
