"""One share of the work: read planes, gather slices, write pictures. It can be done in any process on any machine.

What a share needs is in a ``Task``, what it found in ``Found``; shares joined in any order give the same dataset.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from data_prep.folders import png
from data_prep.folders.window import Window
from data_prep.readers.info import VolumeSource
from data_prep.readers.places import sha256_of
from data_prep.slicing.audit import Samples
from data_prep.slicing.filters import FilterConfig, is_blank, thumbnail
from data_prep.slicing.intensity import WindowEstimate
from data_prep.slicing.plan import Plan, PlannedPicture
from data_prep.slicing.planes import scan

# (stored axis, index) of a slice, counted within the part that is cut.
Slice = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Some slices of one volume.

    Attributes:
        volume: position of the volume in the call.
        source: where its planes come from.
        window: its grey levels.
        roles: the stored axes along thickness, warp and weft.
        pictures: slice -> what is made of it.
        wanted: stored axis -> slice numbers.
        budget: bytes of slices that may be gathered at a time.
        filters: what counts as blank.
        padding_levels: of ``filters.is_blank``.
        folder: where the folders of the splits are.
        num_threads: threads that encode.
        is_first: this share reads the file's hash.
    """

    volume: int
    source: VolumeSource
    window: Window
    roles: tuple[int, int, int]
    pictures: dict[Slice, list[PlannedPicture]]
    wanted: dict[int, list[int]]
    budget: int
    filters: FilterConfig
    padding_levels: tuple[int, ...]
    folder: Path
    num_threads: int
    is_first: bool


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a share found on its way.

    Attributes:
        volume: position of the volume in the call.
        thumbnails: slice -> the slice in small.
        blank: names of the pictures that show nothing.
        samples: what was kept of the planes.
        digest: SHA-256 of the volume, from the share that read it.
    """

    volume: int
    thumbnails: dict[Slice, NDArray[np.float32]]
    blank: set[str]
    samples: Samples
    digest: str


def tasks_of(
    plans: Sequence[Plan],
    folder: Path,
    *,
    roles: tuple[int, int, int],
    num_parts: int,
    num_threads: int,
    filters: FilterConfig,
) -> list[Task]:
    """Divide the slices of every volume into shares, neighbours together.

    Args:
        plans: a plan per volume.
        folder: where the folders of the splits are, on every machine that takes a share.
        roles: the stored axes along thickness, warp and weft.
        num_parts: shares there should be at least; each reads its volume through.
        num_threads: threads per share.
        filters: what counts as blank.
    """
    per_volume = -(-num_parts // len(plans))
    tasks = []
    for number, plan in enumerate(plans):
        for part in range(per_volume):
            wanted = {axis: _share(numbers, part, per_volume) for axis, numbers in plan.volume.wanted.items()}
            tasks.append(
                Task(
                    volume=number,
                    source=plan.volume.source,
                    window=plan.volume.window.window,
                    roles=roles,
                    pictures={(axis, i): plan.pictures[axis, i] for axis, numbers in wanted.items() for i in numbers},
                    wanted=wanted,
                    budget=plan.budget,
                    filters=filters,
                    padding_levels=_padding_levels(plan.volume.window),
                    folder=folder,
                    num_threads=num_threads,
                    is_first=part == 0,
                )
            )
    return tasks


def _padding_levels(found: WindowEstimate) -> tuple[int, ...]:
    """Return the grey levels that padding and voxels that are not finite become."""
    levels = {found.window.fill} if found.non_finite else set[int]()
    if found.padding is not None:
        levels.add(int(found.window.to_uint8(np.array([found.padding]))[0]))
    return tuple(sorted(levels))


def _share(numbers: Sequence[int], part: int, count: int) -> list[int]:
    """Return one of ``count`` runs of neighbours."""
    return list(numbers[len(numbers) * part // count : len(numbers) * (part + 1) // count])


def cut(task: Task, progress: Callable[[], object] | None = None) -> Found:
    """Write the pictures of one share.

    Raises:
        InputError: the volume cannot be read, or the folder is not there, as on a machine without it.
    """
    if not task.folder.is_dir():
        raise InputError(f"{task.folder}: is not there on the machine that should cut; share the folder between them")
    samples = Samples(depth=task.source.info.shape[0])
    thumbnails: dict[Slice, NDArray[np.float32]] = {}
    blank: set[str] = set()
    waiting: deque[tuple[Slice, Future[tuple[set[str], NDArray[np.float32]]]]] = deque()
    stop = threading.Event()

    def collect(limit: int) -> None:
        while len(waiting) > limit:
            key, job = waiting.popleft()
            found, thumbnails[key] = job.result()
            blank.update(found)
            if progress is not None:
                progress()

    with ThreadPoolExecutor(task.num_threads) as pool:
        digest = pool.submit(sha256_of, task.source.info.path, task.source.info.files) if task.is_first else None
        try:
            for key, picture in _slices(task, samples):
                waiting.append((key, pool.submit(_encode, picture, task, task.pictures[key], stop)))
                collect(2 * task.num_threads)
            collect(0)
        except BaseException:
            stop.set()
            raise
    return Found(
        volume=task.volume,
        thumbnails=thumbnails,
        blank=blank,
        samples=samples,
        digest=digest.result() if digest else "",
    )


def _slices(task: Task, samples: Samples) -> Iterator[tuple[Slice, NDArray[np.uint8]]]:
    """Yield the slices of a share as they are looked at, rows first."""

    def to_uint8(z: int, plane: NDArray[Any]) -> NDArray[np.uint8]:
        grey = task.window.to_uint8(plane)
        samples.keep(z, plane, grey)
        return grey

    for axis, index, stored in scan(task.source, to_uint8, task.wanted, task.budget):
        rows_axis, columns_axis = (other for other in task.roles if other != axis)
        yield (axis, index), stored if rows_axis < columns_axis else stored.T


def _encode(
    whole: NDArray[np.uint8], task: Task, pictures: Sequence[PlannedPicture], stop: threading.Event
) -> tuple[set[str], NDArray[np.float32]]:
    """Write the pictures of one slice; return which of them are blank, and the slice in small."""
    blank = set()
    for picture in pictures:
        if stop.is_set():
            break
        pixels = picture.cut.apply(whole)
        (task.folder / picture.split / picture.row.file_name).write_bytes(png.encode(pixels))
        if is_blank(pixels, task.filters, task.padding_levels):
            blank.add(picture.row.file_name)
    return blank, thumbnail(whole)


def joined(found: Sequence[Found]) -> Mapping[int, Found]:
    """Join the shares of each volume."""
    whole: dict[int, Found] = {}
    for one in found:
        before = whole.get(one.volume)
        if before is None:
            whole[one.volume] = one
            continue
        before.samples.add(one.samples)
        whole[one.volume] = Found(
            volume=one.volume,
            thumbnails=before.thumbnails | one.thumbnails,
            blank=before.blank | one.blank,
            samples=before.samples,
            digest=before.digest or one.digest,
        )
    return whole
