"""What is cut from which volume: grey levels, split, slices and tiles, before anything is written.

    python -m data_prep.slice --volumes dry=dry.tif dry_compacted=dc.tif injected=inj.tif --output_dir data/weave

A slice is named by the direction it is perpendicular to: thickness slices show warp and weft (Y, X), warp slices show
thickness and weft (Z, X), weft slices show thickness and warp (Z, Y); rows first.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UsageError
from data_prep.folders.manifest import TRAIN, VALIDATION, SliceRow
from data_prep.folders.window import Window
from data_prep.readers.info import VolumeInfo, VolumeSource
from data_prep.readers.open import open_volume
from data_prep.readers.places import Place, identity, is_below, place_of
from data_prep.slicing import fit
from data_prep.slicing.config import AXES, SliceConfig
from data_prep.slicing.extent import Box, extent_of, part_of
from data_prep.slicing.fit import Cut
from data_prep.slicing.intensity import WindowEstimate, estimate, sampled_planes, window_of_dataset
from data_prep.slicing.planes import BLOCK, plan_passes
from data_prep.slicing.split import Region, correlation_length, cut_region
from prompts.captions import caption
from prompts.vocabulary import PLACE, Vocabulary

_GB = 10**9
# What the interpreter and the libraries hold before the first plane is read, and what copies of a plane need.
_BASE_BYTES = 200_000_000
_COPIES_OF_A_PLANE = 24
# Pillow, and with it most loaders, warns above this many pixels and refuses twice as many.
_LARGEST_PICTURE = 89_478_485
# Planes and lines per plane that the correlation length is measured on.
_CORRELATION_PLANES, _CORRELATION_LINES = 16, 128
_GUIDE = "docs/another_material.md"
_OTHER_STATES = f"other states are named in a file: --vocabulary ({_GUIDE})"


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A volume and what is to be cut from it.

    Attributes:
        name: unique among the volumes of a call.
        state: key of the vocabulary.
        stem: first part of its file names.
        source: where its planes come from.
        window: its grey levels.
        region: its split; None without one.
        wanted: stored axis -> slice numbers, counted within the part that is cut.
        voxel_um: edges of a voxel along (Z, Y, X); None if unknown.
        box: the part that is cut, in stored voxels.
        stored_shape: (Z, Y, X) of the whole volume.
        blocks: split by index: stored axis -> its parts. Like ``region``, within the part that is cut.
        split: where slices go that neither a region nor a block decides on.
    """

    name: str
    state: str
    stem: str
    source: VolumeSource
    window: WindowEstimate
    region: Region | None
    wanted: dict[int, list[int]]
    voxel_um: tuple[float, float, float] | None
    box: Box
    stored_shape: tuple[int, int, int]
    blocks: dict[int, Region]
    split: str

    @property
    def origin(self) -> tuple[int, int, int]:
        """Where the part that is cut begins, in stored voxels."""
        z, y, x = (first for first, _ in self.box)
        return z, y, x

    @property
    def info(self) -> VolumeInfo:
        """What the reader knows of the part that is cut."""
        return self.source.info


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One file to write: its split, the rectangle of the slice it shows, and its row."""

    split: str
    cut: Cut
    row: SliceRow


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is cut from one volume.

    Attributes:
        volume: the volume.
        pictures: (stored axis, index) of each slice -> its pictures, in the order they are listed.
        budget: bytes of slices that may be gathered at a time.
    """

    volume: Volume
    pictures: dict[tuple[int, int], list[Picture]]
    budget: int

    @property
    def all_pictures(self) -> list[Picture]:
        """The pictures of all slices."""
        return [picture for several in self.pictures.values() for picture in several]

    @property
    def num_passes(self) -> int:
        """How often the file is read through."""
        return len(plan_passes(self.volume.info.shape, self.volume.wanted, self.budget))


def make_plans(config: SliceConfig, words: Vocabulary) -> list[Plan]:
    """Look at every volume and decide what is cut from it.

    Raises:
        UsageError: the settings do not suit each other or the volumes.
        InputError: a file is missing, damaged, or not a volume.
    """
    volumes = survey(config, words)
    has_size = all(volume.voxel_um is not None for volume in volumes)
    return [
        Plan(
            volume=volume,
            pictures=plan_pictures(volume, config, words, has_size=has_size),
            budget=buffer_budget(volume.info, config),
        )
        for volume in volumes
    ]


def survey(config: SliceConfig, words: Vocabulary) -> list[Volume]:
    """Open every volume, estimate its window and decide on its split and slices, before anything is written.

    Raises:
        UsageError: a volume is not written as state=path, has an unknown state, lies in the output folder, or is too
            small for the split or the tiles.
        InputError: a file is missing, damaged, or not a volume.
    """
    if missing := [axis for axis in AXES if axis not in words.axes]:
        raise UsageError(
            f"--vocabulary {config.vocabulary}: no word for the axes {', '.join(missing)}; the keys of axes are "
            f"{', '.join(AXES)}, whatever words they are written with ({_GUIDE})"
        )
    pairs = [_state_and_path(text, words) for text in config.volumes]
    sources = [open_volume(path, config.read) for _, path in pairs]
    seen = set[object]()
    for _, path in pairs:
        if is_below(path, config.output_dir):
            raise UsageError(f"--volumes {path}: lies inside --output_dir {config.output_dir}, which is replaced")
        if identity(path) in seen:
            raise UsageError(f"--volumes {path}: the same file is given twice; name each file once")
        seen.add(identity(path))
    names = _names(pairs)
    stems = {state: _ascii(state) for state, _ in pairs}
    is_alone = len(set(stems.values())) == len(pairs)
    for source in sources:
        # A file may declare planes of any size: refuse them before memory is taken for one.
        buffer_budget(source.info, config)
    if unknown := sorted(set(config.validation_volumes) - set(names)):
        raise UsageError(f"--validation_volumes {' '.join(unknown)}: no such volume; named are {', '.join(names)}")
    if config.split == "volume" and set(config.validation_volumes) == set(names):
        raise UsageError("--validation_volumes: all volumes are held out, and none is left to train on")
    boxes = [extent_of(whole, config.extent, name) for name, whole in zip(names, sources, strict=True)]
    parts = [part_of(whole, box) for whole, box in zip(sources, boxes, strict=True)]
    shared = _campaign_window(parts, config) if config.grey.window_scope == "campaign" else None
    volumes = []
    for (state, _), name, whole, box, source in zip(pairs, names, sources, boxes, parts, strict=True):
        voxel_um = _voxel_um(whole.info, config)
        cut_axes = _cut_axes(source.info, config)
        earlier = config.grey.window_manifest
        known = window_of_dataset(earlier, name, state) if earlier is not None else shared
        window, correlations = _statistics(source, config, cut_axes, known)
        regions = {
            axis: cut_region(
                axis,
                source.info.shape[axis],
                tile=config.tile_size if config.fit == "tile" and config.split == "region" else 0,
                fraction=config.validation_fraction,
                correlation=correlations.get(axis, 1),
                guard_voxels=_guard_voxels(axis, voxel_um, name, config),
                name=name,
                kind=config.split,
            )
            for axis in cut_axes
        }
        region = next(iter(regions.values())) if config.split == "region" else None
        blocks = regions if config.split == "index" else {}
        volumes.append(
            Volume(
                name=name,
                state=state,
                stem=stems[state] if is_alone else f"{stems[state]}-{name}",
                source=source,
                window=window,
                region=region,
                wanted={
                    axis: _wanted(axis, source.info.shape[axis], region, blocks, config)
                    if AXES[config.roles.index(axis)] in config.slice_axes
                    else []
                    for axis in range(3)
                },
                voxel_um=voxel_um,
                box=box,
                stored_shape=whole.info.shape,
                blocks=blocks,
                split=VALIDATION if name in config.validation_volumes else TRAIN,
            )
        )
    return volumes


def _state_and_path(text: str, words: Vocabulary) -> tuple[str, Place]:
    """Read state=path."""
    state, equals, path = text.partition("=")
    if not equals or not state or not path:
        allowed = ", ".join(words.states)
        raise UsageError(
            f"--volumes {text}: the state is missing; write state=path with a state of {allowed}; {_OTHER_STATES}"
        )
    try:
        caption(state, AXES[0], words, place=dict.fromkeys(PLACE, ""))
    except UsageError as error:
        raise UsageError(f"--volumes {text}: {error}; {_OTHER_STATES}") from None
    return state, place_of(path)


def _names(pairs: Sequence[tuple[str, Place]]) -> list[str]:
    """Name each volume by its file, with its state where two files are called the same."""
    names = [_ascii(path.name.split(".")[0]) for _, path in pairs]
    twice = {name for name, count in Counter(names).items() if count > 1}
    names = [
        f"{_ascii(state)}-{name}" if name in twice else name for name, (state, _) in zip(names, pairs, strict=True)
    ]
    for name, count in Counter(names).items():
        if count > 1:
            same = ", ".join(str(path) for other, (_, path) in zip(names, pairs, strict=True) if other == name)
            raise UsageError(f"--volumes: {same} would both be called '{name}'; rename one file")
    return names


def _ascii(text: str) -> str:
    """Return a name that is safe in file names everywhere: lower case, digits, hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "volume"


def _voxel_um(info: VolumeInfo, config: SliceConfig) -> tuple[float, float, float] | None:
    """Return the edges of a voxel along (Z, Y, X): as typed, or as the file says."""
    if config.voxel_size_um is None:
        return info.voxel_um
    z, y, x = config.voxel_size_um * (3 // len(config.voxel_size_um))
    return z, y, x


def _cut_axes(info: VolumeInfo, config: SliceConfig) -> list[int]:
    """Return the stored axes that the split cuts: the longest in the plane of the material, or those of the slices."""
    if config.split == "region":
        return [max(config.roles[1:], key=lambda axis: (info.shape[axis], axis))]
    if config.split == "index":
        return [axis for name, axis in zip(AXES, config.roles, strict=True) if name in config.slice_axes]
    return []


def _guard_voxels(axis: int, voxel_um: tuple[float, float, float] | None, name: str, config: SliceConfig) -> int | None:
    """Return the width of the guard if it is given, in voxels."""
    if config.guard_um is None:
        return config.guard_voxels
    if voxel_um is None:
        raise UsageError(
            f"--guard_um {config.guard_um:g}: the voxel size of volume '{name}' is unknown; give --voxel_size_um"
        )
    return math.ceil(config.guard_um / voxel_um[axis])


def _looked_at(source: VolumeSource, config: SliceConfig) -> list[int]:
    """Return the planes that statistics are made of."""
    return [z for z in sampled_planes(source.info.shape[0], config.grey) if z not in source.info.bad_planes]


def _campaign_window(sources: Sequence[VolumeSource], config: SliceConfig) -> Window:
    """Estimate one window for all volumes, each with the same weight a plane."""
    kinds = {source.info.dtype: source.info.path for source in sources}
    if len(kinds) > 1 or len({source.info.is_inverted for source in sources}) > 1:
        several = ", ".join(f"{path} is {dtype}" for dtype, path in kinds.items())
        raise UsageError(f"--window_scope campaign: the volumes differ in type or direction of grey ({several})")
    planes = (plane for source in sources for _, plane in source.planes(_looked_at(source, config)[:: len(sources)]))
    return estimate(
        planes, config=config.grey, is_inverted=sources[0].info.is_inverted, path="the volumes together"
    ).window


def _statistics(
    source: VolumeSource, config: SliceConfig, cut_axes: Sequence[int], known: Window | None
) -> tuple[WindowEstimate, dict[int, int]]:
    """Estimate the window, and the correlation length along the axes that are cut, from sampled planes."""
    numbers = _looked_at(source, config)
    lines: dict[int, list[NDArray[Any]]] = {}
    every = -(-len(numbers) // _CORRELATION_PLANES)
    measured = cut_axes if config.guard_voxels is None and config.guard_um is None else []

    def planes() -> Iterator[NDArray[Any]]:
        for count, (_, plane) in enumerate(source.planes(numbers)):
            for axis in measured:
                if axis and count % every == 0:
                    turned = plane if axis == 2 else plane.T
                    thinned = turned[:: max(1, turned.shape[0] // _CORRELATION_LINES)].copy()
                    lines.setdefault(axis, []).append(thinned)
            yield plane

    info = source.info
    window = estimate(planes(), config=config.grey, is_inverted=info.is_inverted, window=known, path=info.path)
    if 0 in measured:
        # Along the planes' own axis neighbours are on different planes: all are read once more, thinned.
        step = max(1, source.info.shape[1] * source.info.shape[2] // (_CORRELATION_PLANES * _CORRELATION_LINES))
        points = [plane.ravel()[::step].copy() for _, plane in source.planes(range(source.info.shape[0]))]
        lines[0] = [np.stack(points, axis=1)]
    # Grey levels rather than counts: a few very bright voxels would outweigh the weave, and NaN would spread.
    to_uint8 = window.window.to_uint8
    return window, {axis: correlation_length([to_uint8(one) for one in some]) for axis, some in lines.items()}


def _wanted(
    axis: int, length: int, region: Region | None, blocks: Mapping[int, Region], config: SliceConfig
) -> list[int]:
    """Return the numbers of the slices perpendicular to a stored axis, without those in the guard."""
    numbers = range(0, length, slice_step(length, config))
    cut = region if region is not None and region.axis == axis else blocks.get(axis)
    if cut is None:
        return list(numbers)
    return [number for number in numbers if any(first <= number < end for first, end in cut.parts.values())]


def slice_step(length: int, config: SliceConfig) -> int:
    """Return the distance between slices along an axis."""
    return max(config.stride, -(-length // config.max_per_axis) if config.max_per_axis else 1)


def plan_pictures(
    volume: Volume, config: SliceConfig, words: Vocabulary, *, has_size: bool
) -> dict[tuple[int, int], list[Picture]]:
    """Return the pictures of every slice, by (stored axis, index), in the order of axes and indices.

    Args:
        volume: what to cut.
        config: how.
        words: the words of the captions.
        has_size: write the size of a pixel, which must be known for every volume then.

    Raises:
        UsageError: a slice is shorter than the tiles both ways, or too large for one picture.
    """
    planned = {}
    for name, axis in zip(AXES, config.roles, strict=True):
        rows_axis, columns_axis = (other for other in config.roles if other != axis)
        for index in volume.wanted[axis]:
            place = index + volume.origin[axis]
            pictures = planned[axis, index] = list[Picture]()
            for split, extent in _extents(volume, axis, index).items():
                for cut in _cuts(extent[rows_axis], extent[columns_axis], volume, name, config):
                    box = dict(extent) | {rows_axis: cut.rows, columns_axis: cut.columns}
                    # What a reader could not decode is in no picture.
                    if any(box[0][0] <= z < box[0][1] for z in volume.info.bad_planes):
                        continue
                    stored = [edge + volume.origin[of] for of in range(3) for edge in box[of]]
                    tile = _tile(stored, rows_axis, columns_axis, config)
                    um_per_px = None
                    if volume.voxel_um is not None:
                        scale = cut.voxels_per_px
                        um_per_px = volume.voxel_um[rows_axis] * scale[0], volume.voxel_um[columns_axis] * scale[1]
                    row = SliceRow(
                        file_name=f"{volume.stem}-{name}-{place:05d}{tile}.png",
                        text=_text(volume, name, place, um_per_px, words, config),
                        volume=volume.name,
                        state=volume.state,
                        axis=name,
                        index=place,
                        box=(stored[0], stored[1], stored[2], stored[3], stored[4], stored[5]),
                        width=cut.width,
                        height=cut.height,
                        um_per_px=um_per_px if has_size else None,
                        voxels_per_px=cut.voxels_per_px if config.fit == "resize" else None,
                    )
                    pictures.append(Picture(split=split, cut=cut, row=row))
    return planned


def _tile(stored: Sequence[int], rows_axis: int, columns_axis: int, config: SliceConfig) -> str:
    """Return what a file name says of a tile: where it begins, in stored voxels."""
    return f"-r{stored[2 * rows_axis]:04d}-c{stored[2 * columns_axis]:04d}" if config.fit == "tile" else ""


def _text(
    volume: Volume, axis: str, index: int, um_per_px: tuple[float, float] | None, words: Vocabulary, config: SliceConfig
) -> str:
    """Return the caption of a slice; ``index`` in stored voxels."""
    if not words.has_place:
        return caption(volume.state, axis, words)
    length = volume.stored_shape[config.roles[AXES.index(axis)]]
    place: dict[str, object] = {"index": index, "position": round(100 * (index + 0.5) / length), "volume": volume.name}
    if um_per_px is not None:
        sizes = dict.fromkeys(f"{size:.4g}" for size in um_per_px)
        place["um_per_px"] = "x".join(sizes)
    return caption(volume.state, axis, words, place=place)


def _extents(volume: Volume, axis: int, index: int) -> dict[str, dict[int, tuple[int, int]]]:
    """Return, by split, what a slice may show: stored axis -> (first, end)."""
    whole = {other: (0, length) for other, length in enumerate(volume.info.shape)} | {axis: (index, index + 1)}
    cut = volume.region or volume.blocks.get(axis)
    if cut is None:
        return {volume.split: whole}
    if cut.axis != axis:
        return {split: whole | {cut.axis: part} for split, part in cut.parts.items()}
    return {split: whole for split, (first, end) in cut.parts.items() if first <= index < end}


def _cuts(rows: tuple[int, int], columns: tuple[int, int], volume: Volume, axis: str, config: SliceConfig) -> list[Cut]:
    """Divide the rectangle a slice may show into pictures."""
    height, width, what = rows[1] - rows[0], columns[1] - columns[0], f"{volume.name} {axis}"
    if config.fit == "tile":
        if config.tile_size > max(height, width):
            raise UsageError(
                f"--tile_size {config.tile_size}: {what} slices are {height} rows x {width} columns and smaller both "
                f"ways; allowed up to {max(height, width) // 8 * 8}"
            )
        return fit.tiles(rows, columns, size=config.tile_size, overlap=config.tile_overlap)
    if config.fit == "native":
        cuts = fit.native(rows, columns)
    elif config.fit == "pad":
        cuts = fit.padded(rows, columns, multiple=config.pad_multiple)
    else:
        cuts = fit.resized(rows, columns, voxels_per_px=_voxels_per_px(volume, axis, config))
    for cut in cuts:
        if cut.height * cut.width > _LARGEST_PICTURE:
            raise UsageError(
                f"--fit {config.fit}: {what} pictures of {cut.height}x{cut.width} are too large for loaders; "
                "use --fit tile"
            )
        if min(cut.height, cut.width) < 8 <= min(height, width):
            raise UsageError(
                f"--fit {config.fit}: {what} slices of {height}x{width} would become {cut.height}x{cut.width} px; "
                "choose smaller pixels"
            )
    return cuts


def _voxels_per_px(volume: Volume, axis: str, config: SliceConfig) -> tuple[float, float]:
    """Return the (row, column) size of a resized pixel in voxels."""
    sizes = config.resize_voxels_per_px or config.resize_um_per_px or (1.0,)
    size = sizes[AXES.index(axis) if len(sizes) == 3 else 0]
    if config.resize_um_per_px is None:
        return size, size
    if volume.voxel_um is None:
        raise UsageError(
            f"--resize_um_per_px: the voxel size of volume '{volume.name}' is unknown; give --voxel_size_um, or "
            "--resize_voxels_per_px"
        )
    across = config.roles[AXES.index(axis)]
    rows_axis, columns_axis = (other for other in config.roles if other != across)
    return size / volume.voxel_um[rows_axis], size / volume.voxel_um[columns_axis]


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
