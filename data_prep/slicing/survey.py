"""Look at every volume before anything is written: its name, its grey levels, its split, the slices it can give."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UsageError
from data_prep.folders.manifest import TRAIN, VALIDATION
from data_prep.folders.window import Window
from data_prep.readers.info import VolumeInfo, VolumeSource
from data_prep.readers.open import open_volume
from data_prep.readers.places import Place, identity, is_below, place_of
from data_prep.slicing.config import AXES, SliceConfig
from data_prep.slicing.extent import Box, extent_of, part_of
from data_prep.slicing.intensity import WindowEstimate, estimate, sampled_planes, window_of_dataset
from data_prep.slicing.planes import buffer_budget
from data_prep.slicing.split import Region, correlation_length, cut_region
from prompts.captions import caption
from prompts.vocabulary import PLACE, Vocabulary

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
                who=f"--split {config.split}: volume '{name}'",
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
