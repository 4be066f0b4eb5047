"""Cut volumes into captioned slices of three directions: a training folder, split without leaks and verified.

    python -m data_prep.slice --volumes dry=dry.tif dry_compacted=dc.tif injected=inj.tif --output_dir data/weave

A slice is named by the direction it is perpendicular to: thickness slices show warp and weft (Y, X), warp slices show
thickness and weft (Z, X), weft slices show thickness and warp (Z, Y); rows first.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from configs.errors import TisserandError, UsageError
from configs.load import as_dict, command, save
from data_prep import fit, manifest, png
from data_prep.filters import count_near_duplicates, is_blank, thumbnail
from data_prep.fit import Cut
from data_prep.intensity import WindowEstimate, estimate, sampled_planes
from data_prep.manifest import SliceRow
from data_prep.planes import BLOCK, plan_passes, scan
from data_prep.readers import VolumeInfo, VolumeSource, open_volume
from data_prep.split import TRAIN, Region, correlation_length, cut_region
from data_prep.verify import verify
from prompts.captions import caption
from prompts.vocabulary import DEFAULT, Vocabulary, read_vocabulary

AXES = ("thickness", "warp", "weft")
_STORED = {"z": 0, "y": 1, "x": 2}
_GB = 10**9
# What the interpreter and the libraries hold before the first plane is read, and what copies of a plane need.
_BASE_BYTES = 200_000_000
_COPIES_OF_A_PLANE = 24
# Pillow, and with it most loaders, warns above this many pixels and refuses twice as many.
_LARGEST_PICTURE = 89_478_485
# Planes and lines per plane that the correlation length is measured on.
_CORRELATION_PLANES, _CORRELATION_LINES = 16, 128


@dataclass(frozen=True, kw_only=True)
class SliceConfig:
    """Settings of the slicer."""

    volumes: tuple[str, ...]
    """State and file of each volume, as state=path; a state may be given several times."""
    output_dir: Path
    """Dataset folder to make; it appears when it is whole and verified."""
    overwrite: bool = False
    """Replace a dataset that is already there, once the new one is whole."""
    vocabulary: Path | None = None
    """YAML file with prefix, states and axes, for other words than the built-in ones."""
    thickness_axis: Literal["z", "y", "x"] = "z"
    """Stored axis that runs through the thickness of the material."""
    warp_axis: Literal["z", "y", "x"] = "y"
    """Stored axis along the warp."""
    weft_axis: Literal["z", "y", "x"] = "x"
    """Stored axis along the weft."""
    voxel_size_um: tuple[float, ...] | None = None
    """Edge of a voxel in micrometres, one number or three for z y x; what the files say if not given."""
    window_percentile: tuple[float, float] = (0.1, 99.9)
    """Percentiles of a volume's voxels that become black and white."""
    split: Literal["region", "none"] = "region"
    """region holds out one end of the longest in-plane axis, behind a guard slab, for all three directions."""
    validation_fraction: float = 0.15
    """Least share of that axis that is held out."""
    guard_voxels: int | None = None
    """Width of the guard slab; by default the larger of 3 correlation lengths and 2 %. A weave period is safest."""
    stride: int = 1
    """Take every n-th slice of each direction."""
    max_per_axis: int | None = None
    """Widen the stride until at most this many slices are taken per volume and direction."""
    fit: Literal["native", "tile"] = "native"
    """native writes whole slices; tile cuts squares at the same scale."""
    tile_size: int = 512
    """Edge of a tile in px; a multiple of 8."""
    tile_overlap: float = 0.25
    """Share of a tile that it has in common with the next."""
    memory_gb: float | None = None
    """Memory the process may use, in 10^9 bytes; by default 4 or a quarter of the machine's, if that is less."""
    workers: int | None = None
    """Threads that encode; by default the number of cores. The pictures do not depend on it."""
    dry_run: bool = False
    """Print what would be done and stop."""

    def __post_init__(self) -> None:
        if not self.volumes:
            raise ValueError("--volumes: give at least one volume as state=path")
        if sorted(self.roles) != [0, 1, 2]:
            named = f"--thickness_axis {self.thickness_axis} --warp_axis {self.warp_axis} --weft_axis {self.weft_axis}"
            raise ValueError(f"{named}: each of z, y and x must be given once")
        sizes = self.voxel_size_um
        if sizes is not None and (len(sizes) not in (1, 3) or not all(0 < size < math.inf for size in sizes)):
            raise ValueError(f"--voxel_size_um {_words(sizes)}: give one or three (z y x) positive numbers")
        low, high = self.window_percentile
        if not 0 <= low < high <= 100:
            raise ValueError(f"--window_percentile {low} {high}: give two rising numbers within 0 and 100")
        if not 0 < self.validation_fraction < 0.5:
            raise ValueError(f"--validation_fraction {self.validation_fraction}: must lie between 0 and 0.5")
        for name in ("stride", "max_per_axis", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")
        if self.guard_voxels is not None and self.guard_voxels < 0:
            raise ValueError(f"--guard_voxels {self.guard_voxels}: must not be negative")
        if not 16 <= self.tile_size <= 4096 or self.tile_size % 8:
            raise ValueError(f"--tile_size {self.tile_size}: must be a multiple of 8 from 16 to 4096")
        if not 0 <= self.tile_overlap <= 0.9:
            raise ValueError(f"--tile_overlap {self.tile_overlap}: must lie between 0 and 0.9")
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise ValueError(f"--memory_gb {self.memory_gb}: must be positive")

    @property
    def roles(self) -> tuple[int, int, int]:
        """The stored axes along thickness, warp and weft."""
        return _STORED[self.thickness_axis], _STORED[self.warp_axis], _STORED[self.weft_axis]


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
        wanted: stored axis -> slice numbers.
        voxel_um: edges of a voxel along (Z, Y, X); None if unknown.
    """

    name: str
    state: str
    stem: str
    source: VolumeSource
    window: WindowEstimate
    region: Region | None
    wanted: dict[int, list[int]]
    voxel_um: tuple[float, float, float] | None

    @property
    def info(self) -> VolumeInfo:
        """What the reader knows of it."""
        return self.source.info


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One file to write: its split, the rectangle of the slice it shows, and its row."""

    split: str
    cut: Cut
    row: SliceRow


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What encoding a slice showed: blank pictures among its own, and the slice in small."""

    num_blank: int
    thumbnail: NDArray[np.float32]


def main(config: SliceConfig) -> None:
    """Plan, cut, verify and publish."""
    manifest.check_free(config.output_dir, overwrite=config.overwrite)
    words = read_vocabulary(config.vocabulary) if config.vocabulary else DEFAULT
    volumes = survey(config, words)
    has_size = all(volume.voxel_um is not None for volume in volumes)
    pictures = [plan_pictures(volume, config, words, has_size=has_size) for volume in volumes]
    budgets = [buffer_budget(volume, config) for volume in volumes]
    for warning in _warnings(volumes, pictures, config):
        print(f"warning: {warning}", file=sys.stderr)
    print(_plan_text(volumes, pictures, budgets))
    if config.dry_run:
        print(f"dry run: nothing was written to {config.output_dir}")
        return
    _check_disk(config.output_dir, pictures)
    with manifest.publish(config.output_dir, overwrite=config.overwrite) as folder:
        rows: dict[str, list[SliceRow]] = {}
        entries = []
        for volume, planned, budget in zip(volumes, pictures, budgets, strict=True):
            entries.append(_cut(volume, planned, budget, folder, config))
            for picture in (one for several in planned.values() for one in several):
                rows.setdefault(picture.split, []).append(picture.row)
        for split, some in rows.items():
            manifest.write_rows(folder / split, some)
        _write_papers(folder, entries, rows, config, words)
        verdict = verify(folder, decode=False)
        if verdict.problems:
            raise TisserandError(f"the written folder failed its own check: {verdict.problems[0]}")
    print(_counts_text(rows))
    out = shlex.quote(str(config.output_dir / TRAIN))
    print(f"{config.output_dir}: {sum(map(len, rows.values()))} slices written and verified. Next:\n")
    print(
        "  accelerate launch finetune/lora.py --pretrained_model_name_or_path assets/tiny-sd "
        f"--train_data_dir {out} --output_dir runs/lora"
    )


# ---- What is there, and what is asked of it ----


def survey(config: SliceConfig, words: Vocabulary) -> list[Volume]:
    """Open every volume, estimate its window and decide on its split and slices, before anything is written.

    Raises:
        UsageError: a volume is not written as state=path, has an unknown state, lies in the output folder, or is too
            small for the split or the tiles.
        InputError: a file is missing, damaged, or not a volume.
    """
    pairs = [_state_and_path(text, words) for text in config.volumes]
    for _, path in pairs:
        if path.resolve().is_relative_to(config.output_dir.resolve()):
            raise UsageError(f"--volumes {path}: lies inside --output_dir {config.output_dir}, which is replaced")
    names = _names(pairs)
    stems = {state: _ascii(state) for state, _ in pairs}
    is_alone = len(set(stems.values())) == len(pairs)
    sources = [open_volume(path) for _, path in pairs]
    volumes = []
    for (state, _), name, source in zip(pairs, names, sources, strict=True):
        region_axis = _region_axis(source.info, config)
        window, correlation = _statistics(source, config, region_axis)
        region = None
        if region_axis is not None:
            region = cut_region(
                region_axis,
                source.info.shape[region_axis],
                tile=config.tile_size if config.fit == "tile" else 0,
                fraction=config.validation_fraction,
                correlation=correlation,
                guard_voxels=config.guard_voxels,
                name=name,
            )
        volumes.append(
            Volume(
                name=name,
                state=state,
                stem=stems[state] if is_alone else f"{stems[state]}-{name}",
                source=source,
                window=window,
                region=region,
                wanted={axis: _wanted(axis, source.info.shape[axis], region, config) for axis in range(3)},
                voxel_um=_voxel_um(source.info, config),
            )
        )
    return volumes


def _state_and_path(text: str, words: Vocabulary) -> tuple[str, Path]:
    """Read state=path."""
    state, equals, path = text.partition("=")
    if not equals or not state or not path:
        allowed = ", ".join(words.states)
        raise UsageError(f"--volumes {text}: the state is missing; write state=path with a state of {allowed}")
    try:
        caption(state, AXES[0], words)
    except UsageError as error:
        raise UsageError(f"--volumes {text}: {error}") from None
    return state, Path(path)


def _names(pairs: Sequence[tuple[str, Path]]) -> list[str]:
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


def _region_axis(info: VolumeInfo, config: SliceConfig) -> int | None:
    """Return the longest stored axis in the plane of the material, or None without a split."""
    in_plane = config.roles[1:]
    return max(in_plane, key=lambda axis: (info.shape[axis], axis)) if config.split == "region" else None


def _statistics(source: VolumeSource, config: SliceConfig, region_axis: int | None) -> tuple[WindowEstimate, int]:
    """Estimate the window, and the correlation length along an axis if it is asked for, from sampled planes."""
    numbers = sampled_planes(source.info.shape[0])
    lines: list[NDArray[Any]] = []
    every = -(-len(numbers) // _CORRELATION_PLANES)
    measures = region_axis in (1, 2) and config.guard_voxels is None

    def planes() -> Iterator[NDArray[Any]]:
        for count, (_, plane) in enumerate(source.planes(numbers)):
            if measures and count % every == 0:
                turned = plane if region_axis == 2 else plane.T
                lines.append(turned[:: max(1, turned.shape[0] // _CORRELATION_LINES)].copy())
            yield plane

    window = estimate(
        planes(), percentiles=config.window_percentile, is_inverted=source.info.is_inverted, path=source.info.path
    )
    if region_axis == 0 and config.guard_voxels is None:
        # Along the planes' own axis neighbours are on different planes: all are read once more, thinned.
        step = max(1, source.info.shape[1] * source.info.shape[2] // (_CORRELATION_PLANES * _CORRELATION_LINES))
        thinned = [plane.ravel()[::step].copy() for _, plane in source.planes(range(source.info.shape[0]))]
        lines = [np.stack(thinned, axis=1)]
    # Grey levels rather than counts: a few very bright voxels would outweigh the weave, and NaN would spread.
    return window, correlation_length([window.window.to_uint8(one) for one in lines]) if lines else 1


def _wanted(axis: int, length: int, region: Region | None, config: SliceConfig) -> list[int]:
    """Return the numbers of the slices perpendicular to a stored axis, without those in the guard."""
    step = max(config.stride, -(-length // config.max_per_axis) if config.max_per_axis else 1)
    numbers = range(0, length, step)
    if region is None or axis != region.axis:
        return list(numbers)
    return [number for number in numbers if any(first <= number < end for first, end in region.parts.values())]


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
        text = caption(volume.state, name, words)
        rows_axis, columns_axis = (other for other in config.roles if other != axis)
        for index in volume.wanted[axis]:
            pictures = planned[axis, index] = list[Picture]()
            for split, extent in _extents(volume, axis, index).items():
                for cut in _cuts(extent[rows_axis], extent[columns_axis], f"{volume.name} {name}", config):
                    box = dict(extent) | {rows_axis: cut.rows, columns_axis: cut.columns}
                    tile = f"-r{cut.rows[0]:04d}-c{cut.columns[0]:04d}" if config.fit == "tile" else ""
                    edges = volume.voxel_um
                    row = SliceRow(
                        file_name=f"{volume.stem}-{name}-{index:05d}{tile}.png",
                        text=text,
                        volume=volume.name,
                        state=volume.state,
                        axis=name,
                        index=index,
                        box=(*box[0], *box[1], *box[2]),
                        width=cut.width,
                        height=cut.height,
                        um_per_px=(edges[rows_axis], edges[columns_axis]) if has_size and edges else None,
                    )
                    pictures.append(Picture(split=split, cut=cut, row=row))
    return planned


def _extents(volume: Volume, axis: int, index: int) -> dict[str, dict[int, tuple[int, int]]]:
    """Return, by split, what a slice may show: stored axis -> (first, end)."""
    whole = {other: (0, length) for other, length in enumerate(volume.info.shape)} | {axis: (index, index + 1)}
    if volume.region is None:
        return {TRAIN: whole}
    cut = volume.region.axis
    if cut != axis:
        return {split: whole | {cut: part} for split, part in volume.region.parts.items()}
    return {split: whole for split, (first, end) in volume.region.parts.items() if first <= index < end}


def _cuts(rows: tuple[int, int], columns: tuple[int, int], what: str, config: SliceConfig) -> list[Cut]:
    """Divide the rectangle a slice may show into pictures."""
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    if config.fit == "native":
        if height * width > _LARGEST_PICTURE:
            raise UsageError(
                f"--fit native: {what} slices of {height}x{width} are too large for loaders; use --fit tile"
            )
        return fit.native(rows, columns)
    if config.tile_size > max(height, width):
        raise UsageError(
            f"--tile_size {config.tile_size}: {what} slices are {height} rows x {width} columns and smaller both ways; "
            f"allowed up to {max(height, width) // 8 * 8}"
        )
    return fit.tiles(rows, columns, size=config.tile_size, overlap=config.tile_overlap)


# ---- What it costs ----


def buffer_budget(volume: Volume, config: SliceConfig) -> int:
    """Return how many bytes of slices may be gathered at a time, so that the process stays under ``memory_gb``.

    Raises:
        UsageError: not even one slice fits.
    """
    if config.memory_gb is None:
        total = min(4 * _GB, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    else:
        total = int(config.memory_gb * _GB)
    z, y, x = volume.info.shape
    largest = max(z * y, z * x, y * x)
    # Slices that wait for an encoder keep what they were gathered in, a block at most, and are padded and filtered.
    reserved = _BASE_BYTES + _COPIES_OF_A_PLANE * y * x + 3 * _queue_length(config) * largest
    budget = total - reserved - BLOCK * max(z * y, z * x)
    if budget < max(z * y, z * x):
        budget = max(total - reserved, 0) // 2
    if budget < max(z * y, z * x):
        needed = math.ceil(10 * (reserved + 2 * max(z * y, z * x)) / _GB) / 10
        raise UsageError(f"--memory_gb {total / _GB:g}: volume '{volume.name}' needs at least {needed:g}")
    return budget


def _queue_length(config: SliceConfig) -> int:
    """Return how many slices may wait for an encoder."""
    return 2 * _num_workers(config)


def _num_workers(config: SliceConfig) -> int:
    return config.workers or len(os.sched_getaffinity(0))


def _check_disk(output_dir: Path, pictures: Sequence[Mapping[tuple[int, int], Sequence[Picture]]]) -> None:
    """Fail before the work is done if the pictures cannot fit; noisy slices hardly compress."""
    existing = next(path for path in (output_dir.resolve(), *output_dir.resolve().parents) if path.exists())
    needed, free = _num_bytes(pictures), shutil.disk_usage(existing).free
    if needed > free:
        raise TisserandError(
            f"{existing}: {needed / _GB:.1f} GB are needed and {free / _GB:.1f} GB are free on the disk"
        )


def _num_bytes(pictures: Sequence[Mapping[tuple[int, int], Sequence[Picture]]]) -> int:
    """Return the bytes of all pictures, uncompressed."""
    return sum(
        one.row.width * one.row.height for planned in pictures for several in planned.values() for one in several
    )


# ---- Cutting ----


def _cut(
    volume: Volume,
    planned: Mapping[tuple[int, int], Sequence[Picture]],
    budget: int,
    folder: Path,
    config: SliceConfig,
) -> dict[str, object]:
    """Write the pictures of one volume and return its entry of the manifest."""
    for split in {picture.split for several in planned.values() for picture in several}:
        (folder / split).mkdir(exist_ok=True)
    num_non_finite: dict[int, int] = {}
    window = volume.window.window

    def to_uint8(z: int, plane: NDArray[Any]) -> NDArray[np.uint8]:
        if plane.dtype.kind == "f":
            num_non_finite[z] = plane.size - int(np.count_nonzero(np.isfinite(plane)))
        return window.to_uint8(plane)

    seen: dict[tuple[int, int], Seen] = {}
    waiting: deque[tuple[tuple[int, int], Future[Seen]]] = deque()
    bar = tqdm(total=len(planned), desc=f"slicing {volume.name}", unit="slice", disable=None)
    stop = threading.Event()
    with bar, ThreadPoolExecutor(_num_workers(config)) as pool:
        digest = pool.submit(manifest.sha256_of, volume.info.path)
        try:
            for axis, index, stored in scan(volume.source, to_uint8, volume.wanted, budget):
                picture = stored if _is_in_order(axis, config) else stored.T
                job = pool.submit(_encode, picture, planned[axis, index], folder, stop)
                waiting.append(((axis, index), job))
                while len(waiting) > _queue_length(config):
                    key, job = waiting.popleft()
                    seen[key] = job.result()
                    bar.update()
            for key, job in waiting:
                seen[key] = job.result()
                bar.update()
        except BaseException:
            stop.set()
            raise
    return _entry(volume, planned, seen, digest.result(), sum(num_non_finite.values()), config)


def _is_in_order(axis: int, config: SliceConfig) -> bool:
    """Return whether a slice's rows and columns, in the order thickness, warp, weft, are in stored order too."""
    rows, columns = (other for other in config.roles if other != axis)
    return rows < columns


def _encode(slice_: NDArray[np.uint8], pictures: Sequence[Picture], folder: Path, stop: threading.Event) -> Seen:
    """Write the pictures of one slice."""
    num_blank = 0
    for picture in pictures:
        if stop.is_set():
            break
        pixels = picture.cut.apply(slice_)
        (folder / picture.split / picture.row.file_name).write_bytes(png.encode(pixels))
        num_blank += is_blank(pixels)
    return Seen(num_blank=num_blank, thumbnail=thumbnail(slice_))


# ---- What is written beside the pictures ----


def _entry(
    volume: Volume,
    planned: Mapping[tuple[int, int], Sequence[Picture]],
    seen: Mapping[tuple[int, int], Seen],
    digest: str,
    num_non_finite: int,
    config: SliceConfig,
) -> dict[str, object]:
    """Return what the manifest says of one volume; nothing in it depends on machine, time or folder."""
    info, region = volume.info, volume.region
    by_axis = zip(AXES, config.roles, strict=True)
    pictures = [picture for several in planned.values() for picture in several]
    entry: dict[str, object] = {
        "name": volume.name,
        "file": info.path.name,
        "sha256": digest,
        "num_bytes": info.num_bytes,
        "state": volume.state,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "storage": info.storage,
        "voxel_um": None if volume.voxel_um is None else list(volume.voxel_um),
        "window": volume.window.as_dict(),
        "num_non_finite_voxels": num_non_finite,
        "split": None,
        "num_padded_pictures": sum(picture.cut.is_padded for picture in pictures),
        "num_blank_pictures": sum(one.num_blank for one in seen.values()),
        "num_near_duplicate_slices": {
            name: count_near_duplicates([seen[axis, index].thumbnail for index in volume.wanted[axis]])
            for name, axis in by_axis
        },
        "warnings": list(info.warnings),
    }
    if region is not None:
        entry["split"] = {
            "axis": "zyx"[region.axis],
            "train": list(region.train),
            "guard": list(region.guard),
            "validation": list(region.validation),
            "correlation_length": region.correlation_length,
        }
    return entry


def _write_papers(
    folder: Path,
    entries: Sequence[dict[str, object]],
    rows: Mapping[str, Sequence[SliceRow]],
    config: SliceConfig,
    words: Vocabulary,
) -> None:
    """Write manifest, card and settings."""
    # Where things lie and how fast they are made is no property of the data.
    local = {"volumes", "output_dir", "overwrite", "vocabulary", "memory_gb", "workers", "dry_run"}
    options = {name: value for name, value in as_dict(config).items() if name not in local}
    counts = {split: dict(sorted(_counts(some).items())) for split, some in rows.items()}
    manifest.write_manifest(
        folder,
        {
            "schema": 1,
            "kind": "slices",
            "volumes": list(entries),
            "options": options,
            "vocabulary": {"prefix": words.prefix, "states": words.states, "axes": words.axes},
            "counts": {split: {f"{s} {a}": n for (s, a), n in some.items()} for split, some in counts.items()},
        },
    )
    manifest.write_card(
        folder, body=_card(entries, rows, config), splits=rows, num_pictures=sum(map(len, rows.values()))
    )
    save(config, folder / "config.yaml")


def _card(entries: Sequence[dict[str, Any]], rows: Mapping[str, Sequence[SliceRow]], config: SliceConfig) -> str:
    """Return the text of the card."""
    lines = ["# Slices of tomography volumes", ""]
    lines += ["Made by `python -m data_prep.slice`; every option is in `config.yaml`, every measured value in", ""]
    lines[-2] += " `manifest.json`."
    lines += ["| volume | state | shape (Z, Y, X) | type | voxel (um) | black | white | file |", "|" + " --- |" * 8]
    for entry in entries:
        shape = " x ".join(map(str, entry["shape"]))
        voxel = "unknown" if entry["voxel_um"] is None else " x ".join(f"{edge:g}" for edge in entry["voxel_um"])
        window = entry["window"]
        # A file may be called anything; only plain characters reach the table.
        file = re.sub(r"[^\w.+-]+", "_", entry["file"], flags=re.ASCII)
        cells = [entry["name"], entry["state"], shape, entry["dtype"], voxel]
        cells += [f"{window['low']:g}", f"{window['high']:g}", f"`{file}`"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Counts", "", "| state | axis | " + " | ".join(rows) + " |", "|" + " --- |" * (2 + len(rows))]
    counts = {split: _counts(some) for split, some in rows.items()}
    for state, axis in sorted(set().union(*counts.values())):
        numbers = " | ".join(str(counts[split][state, axis]) for split in rows)
        lines.append(f"| {state} | {axis} | {numbers} |")
    lines += ["", "## Split", ""]
    if config.split == "none":
        lines.append("None: all slices are in `train`.")
    for entry in entries:
        if entry["split"] is not None:
            cut = entry["split"]
            parts = ", ".join(f"{part} [{cut[part][0]}, {cut[part][1]})" for part in ("train", "guard", "validation"))
            lines.append(f"- {entry['name']}, along {cut['axis']}, in voxels: {parts}")
    if config.split == "region":
        lines += [
            "",
            "No voxel of `validation` is in `train`, and nothing is written from the guard slab between them.",
        ]
    lines += [
        "",
        "A slice is named by the direction it is perpendicular to; `box` is [z0, z1, y0, y1, x0, x1], half-open.",
    ]
    lines += [
        "Train on the folder `train` alone: some scripts search a folder for pictures and would mix the splits.",
        "",
    ]
    return "\n".join(lines)


# ---- What is printed ----


def _counts(rows: Sequence[SliceRow]) -> Counter[tuple[str, str]]:
    return Counter((row.state, row.axis) for row in rows)


def _counts_text(rows: Mapping[str, Sequence[SliceRow]]) -> str:
    """Return pictures per state, axis and split, a line each."""
    counts = {split: _counts(some) for split, some in rows.items()}
    lines = []
    for key in dict.fromkeys((row.state, row.axis) for some in rows.values() for row in some):
        numbers = "  ".join(f"{split} {counts[split][key]:5d}" for split in rows)
        lines.append(f"  {key[0]:<14} {key[1]:<10} {numbers}")
    return "\n".join(lines)


def _plan_text(
    volumes: Sequence[Volume],
    pictures: Sequence[Mapping[tuple[int, int], Sequence[Picture]]],
    budgets: Sequence[int],
) -> str:
    """Return what will be read and written."""
    lines = []
    for volume, planned, budget in zip(volumes, pictures, budgets, strict=True):
        info, window = volume.info, volume.window.window
        num_passes = len(plan_passes(info.shape, volume.wanted, budget))
        splits = Counter(one.split for several in planned.values() for one in several)
        shape = "x".join(map(str, info.shape))
        lines.append(
            f"{volume.name}: {shape} {info.dtype}, {info.num_bytes / 1e6:.0f} MB, {info.storage}; "
            f"window {window.low:g} to {window.high:g}, "
            f"{volume.window.clipped_low + volume.window.clipped_high:.2%} clipped; "
            f"{num_passes} pass{'es' * (num_passes > 1)}; {', '.join(f'{s} {n}' for s, n in splits.items())}"
        )
        if volume.region is not None:
            region = volume.region
            parts = f"train [0, {region.train[1]}), guard {region.guard[1] - region.guard[0]}, held out "
            parts += f"[{region.validation[0]}, {region.validation[1]})"
            lines.append(f"  cut along {'zyx'[region.axis]}: {parts}")
    total = sum(len(several) for planned in pictures for several in planned.values())
    lines.append(f"{total} pictures, {_num_bytes(pictures) / _GB:.2f} GB before compression")
    return "\n".join(lines)


def _warnings(
    volumes: Sequence[Volume],
    pictures: Sequence[Mapping[tuple[int, int], Sequence[Picture]]],
    config: SliceConfig,
) -> list[str]:
    """Return what a user should know before the slices are used, a line each."""
    found = []
    for volume, planned in zip(volumes, pictures, strict=True):
        found += [f"{volume.name}: {warning}" for warning in volume.info.warnings]
        shape = volume.info.shape
        if shape[config.roles[0]] > min(shape):
            found.append(
                f"{volume.name}: --thickness_axis {config.thickness_axis} is {shape[config.roles[0]]} voxels long and "
                "not the shortest axis; check the three --*_axis options"
            )
        padded: Counter[str] = Counter()
        for picture in (one for several in planned.values() for one in several if one.cut.is_padded):
            padded[picture.row.axis] += 1
        found += [
            f"{volume.name}: {count} {axis} tiles are wider than their slice and padded by reflection"
            for axis, count in padded.items()
        ]
        if volume.window.non_finite > 0:
            found.append(f"{volume.name}: {volume.window.non_finite:.1%} of the voxels are not finite and become black")
    if len({volume.voxel_um is None for volume in volumes}) > 1:
        unknown = ", ".join(volume.name for volume in volumes if volume.voxel_um is None)
        found.append(f"no voxel size is known for {unknown}; um_per_px is left out of all rows")
    return found


def _words(values: Sequence[object]) -> str:
    return " ".join(map(str, values))


if __name__ == "__main__":
    command(SliceConfig, main)
