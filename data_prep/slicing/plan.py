"""What is cut from which volume: grey levels, split, slices and tiles, before anything is written.

    python -m data_prep.slice --volumes dry=dry.tif dry_compacted=dc.tif injected=inj.tif --output_dir data/weave

A slice is named by the direction it is perpendicular to: thickness slices show warp and weft (Y, X), warp slices show
thickness and weft (Z, X), weft slices show thickness and warp (Z, Y); rows first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from configs.errors import UsageError
from data_prep.folders.manifest import SliceRow
from data_prep.slicing import fit
from data_prep.slicing.config import AXES, SliceConfig
from data_prep.slicing.fit import Cut
from data_prep.slicing.planes import buffer_budget, plan_passes
from data_prep.slicing.survey import Volume, survey
from prompts.captions import caption
from prompts.vocabulary import Vocabulary

# Pillow, and with it most loaders, warns above this many pixels and refuses twice as many.
_LARGEST_PICTURE = 89_478_485


@dataclass(frozen=True, kw_only=True)
class PlannedPicture:
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
    pictures: dict[tuple[int, int], list[PlannedPicture]]
    budget: int

    @property
    def all_pictures(self) -> list[PlannedPicture]:
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


def plan_pictures(
    volume: Volume, config: SliceConfig, words: Vocabulary, *, has_size: bool
) -> dict[tuple[int, int], list[PlannedPicture]]:
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
            pictures = planned[axis, index] = list[PlannedPicture]()
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
                    pictures.append(PlannedPicture(split=split, cut=cut, row=row))
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
