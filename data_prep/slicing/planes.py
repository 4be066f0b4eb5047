"""One pass over the planes of a volume, scattered into slices of all three directions, within a memory budget.

Cutting a slice that crosses all planes straight from a file reads the whole file for every slice once the file is
larger than memory. Here every plane is read once, turned into grey levels, and its rows and columns are copied into the
slices that are open; slices that do not fit into the budget wait for the next pass.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UsageError
from data_prep.readers.info import VolumeInfo, VolumeSource
from data_prep.slicing.config import SliceConfig

# Slices that share one array. It is freed when the last of them has been used, so a small number keeps memory flat,
# and a large one makes the copies long.
BLOCK = 64
_GB = 10**9
# What the interpreter and the libraries hold before the first plane is read, and what copies of a plane need.
_BASE_BYTES = 200_000_000
_COPIES_OF_A_PLANE = 24


@dataclass(frozen=True, kw_only=True)
class Block:
    """Neighbouring slices perpendicular to one stored axis (1 for Y, 2 for X), gathered in one array."""

    axis: int
    indices: tuple[int, ...]


def plan_passes(shape: tuple[int, int, int], wanted: Mapping[int, Sequence[int]], budget: int) -> list[list[Block]]:
    """Divide the wanted slices among as few passes over the planes as the budget allows.

    Args:
        shape: (Z, Y, X) of the volume.
        wanted: stored axis (0, 1, 2) -> slice numbers. Slices of axis 0 are planes and need no buffer.
        budget: bytes for buffers, one byte a voxel. At least one slice is gathered per pass, whatever it says.

    Returns:
        For each pass its blocks; one pass without blocks if only planes are wanted.
    """
    passes: list[list[Block]] = []
    left = 0
    for axis in (1, 2):
        slice_bytes = shape[0] * shape[3 - axis]
        waiting = list(wanted.get(axis, ()))
        while waiting:
            room = left // slice_bytes
            if not room:
                passes.append([])
                left = max(budget, slice_bytes)
                continue
            count = min(room, BLOCK, len(waiting))
            passes[-1].append(Block(axis=axis, indices=tuple(waiting[:count])))
            del waiting[:count]
            left -= count * slice_bytes
    return passes or [[]]


def scan(
    source: VolumeSource,
    to_uint8: Callable[[int, NDArray[Any]], NDArray[np.uint8]],
    wanted: Mapping[int, Sequence[int]],
    budget: int,
) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    """Yield (stored axis, index, slice) for every wanted slice, reading each plane once per pass.

    Args:
        source: the volume.
        to_uint8: makes grey levels of plane z; called before anything is gathered, so that buffers hold bytes.
        wanted: stored axis (0, 1, 2) -> slice numbers.
        budget: bytes for buffers.

    Yields:
        Slices with their two remaining axes in stored order: axis 0 (Y, X), axis 1 (Z, X), axis 2 (Z, Y). Planes come
        first, as they are read; the others follow at the end of their pass. A slice may be kept as long as needed.
    """
    num_planes = source.info.shape[0]
    streamed = set(wanted.get(0, ()))
    for blocks in plan_passes(source.info.shape, wanted, budget):
        gathered = [(block, _empty(source.info.shape, block)) for block in blocks]
        for z, plane in source.planes(range(num_planes) if blocks else sorted(streamed)):
            grey = to_uint8(z, plane)
            if z in streamed:
                yield 0, z, grey
            for block, slices in gathered:
                chosen = _index(block.indices)
                slices[:, z] = grey[chosen] if block.axis == 1 else grey[:, chosen].T
        streamed = set()
        while gathered:
            block, slices = gathered.pop(0)
            for position, index in enumerate(block.indices):
                yield block.axis, index, slices[position]
            del slices


def _empty(shape: tuple[int, int, int], block: Block) -> NDArray[np.uint8]:
    """Return the array a block is gathered in, (slice, Z, X) or (slice, Z, Y)."""
    return np.empty((len(block.indices), shape[0], shape[3 - block.axis]), np.uint8)


def _index(indices: Sequence[int]) -> slice | list[int]:
    """Return evenly spaced numbers as a slice, which numpy copies without a detour."""
    steps = set(np.diff(indices).tolist())
    return slice(indices[0], indices[-1] + 1, steps.pop() if steps else 1) if len(steps) <= 1 else list(indices)


def buffer_budget(info: VolumeInfo, config: SliceConfig) -> int:
    """Return how many bytes of slices may be gathered at a time, so that the process stays under ``memory_gb``.

    Raises:
        UsageError: not even one slice fits.
    """
    if config.memory_gb is None:
        total = min(4 * _GB, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    else:
        total = int(config.memory_gb * _GB)
    total //= config.processes
    z, y, x = info.shape
    one_slice = max(z * y, z * x)
    # Slices that wait for an encoder are padded and filtered there; they keep the block they were gathered in.
    reserved = (
        _BASE_BYTES + info.slab_bytes + _COPIES_OF_A_PLANE * y * x + 3 * queue_length(config) * max(one_slice, y * x)
    )
    left = total - reserved
    if left < 2 * one_slice:
        needed = math.ceil(10 * (reserved + 2 * one_slice) / _GB) / 10
        raise UsageError(
            f"--memory_gb {total / _GB:g}: {info.path} with planes of {y}x{x} needs at least {needed:g}; "
            "fewer --workers need less"
        )
    return max(left - BLOCK * one_slice, left // 2)


def queue_length(config: SliceConfig) -> int:
    """Return how many slices may wait for an encoder."""
    return 2 * num_workers(config)


def num_workers(config: SliceConfig) -> int:
    """Return how many threads of a process encode."""
    # More than these wait for the planes to be read.
    return max(1, (config.workers or min(16, len(os.sched_getaffinity(0)))) // config.processes)
