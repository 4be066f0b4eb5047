"""Cut volumes into captioned slices of three directions: a training folder, split without leaks and verified.

    python -m data_prep.slice --volumes dry=dry.tif dry_compacted=dc.tif injected=inj.tif --output_dir data/weave

A slice is named by the direction it is perpendicular to: thickness slices show warp and weft (Y, X), warp slices show
thickness and weft (Z, X), weft slices show thickness and warp (Z, Y); rows first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.readers.info import ReadConfig
from data_prep.slicing.extent import ExtentConfig
from data_prep.slicing.filters import FilterConfig
from data_prep.slicing.intensity import WindowConfig
from prompts.vocabulary import template_problem

AXES = ("thickness", "warp", "weft")
_STORED = {"z": 0, "y": 1, "x": 2}


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
    identifier: str | None = None
    """Rare word that stands for the material, for captions that have the field {identifier}; the built-in ones do."""
    caption_template: str | None = None
    """Caption as one line of free text with the fields {identifier}, {state}, {axis}, and of each slice {position} in
    percent, {index}, {volume}, {um_per_px}."""
    caption_tokenizer: str | None = None
    """Model whose tokenizer counts the pieces of every caption: a pipeline folder, or a name on the hub."""
    thickness_axis: Literal["z", "y", "x"] = "z"
    """Stored axis that runs through the thickness of the material."""
    warp_axis: Literal["z", "y", "x"] = "y"
    """Stored axis along the warp."""
    weft_axis: Literal["z", "y", "x"] = "x"
    """Stored axis along the weft."""
    voxel_size_um: tuple[float, ...] | None = None
    """Edge of a voxel in micrometres, one number or three for z y x; what the files say if not given."""
    read: ReadConfig = ReadConfig()
    grey: WindowConfig = WindowConfig()
    split: Literal["region", "volume", "index", "none"] = "region"
    """region holds out one end of the longest in-plane axis, behind a guard slab, for all three directions; volume
    holds out whole volumes; index holds out the last slices of each direction, which cross slices of the others."""
    validation_volumes: tuple[str, ...] = ()
    """--split volume: names of the volumes that are held out, as the plan prints them."""
    validation_fraction: float = 0.15
    """Least share of an axis that is held out."""
    guard_voxels: int | None = None
    """Width of the guard slab; by default the larger of 3 correlation lengths and 2 %. A weave period is safest."""
    guard_um: float | None = None
    """The same in micrometres, where the voxel size is known."""
    slice_axes: tuple[Literal["thickness", "warp", "weft"], ...] = ("thickness", "warp", "weft")
    """Directions that slices are taken of."""
    stride: int = 1
    """Take every n-th slice of each direction."""
    max_per_axis: int | None = None
    """Widen the stride until at most this many slices are taken per volume and direction."""
    extent: ExtentConfig = ExtentConfig()
    filters: FilterConfig = FilterConfig()
    fit: Literal["native", "tile", "pad", "resize"] = "native"
    """native writes whole slices; tile cuts squares at the same scale; pad reflects at the edges up to a multiple;
    resize changes the scale, and every row says so."""
    tile_size: int = 512
    """Edge of a tile in px; a multiple of 8."""
    tile_overlap: float = 0.25
    """Share of a tile that it has in common with the next."""
    pad_multiple: int = 64
    """--fit pad: both edges of a picture become multiples of this, in px."""
    resize_um_per_px: tuple[float, ...] | None = None
    """--fit resize: size of a pixel in micrometres, one number or three (thickness warp weft slices)."""
    resize_voxels_per_px: tuple[float, ...] | None = None
    """--fit resize: the same in voxels, where their size is unknown or makes no difference."""
    memory_gb: float | None = None
    """Memory all processes may use, in 10^9 bytes; by default 4 or a quarter of the machine's, if that is less."""
    workers: int | None = None
    """Threads that encode; by default the number of cores, at most 16. The pictures do not depend on it."""
    processes: int = 1
    """Processes that read and cut; more help where decompression is slow. The pictures do not depend on it."""
    scheduler: str | None = None
    """Address of a dask scheduler, such as tcp://host:8786, whose workers cut; they must see the same folders,
    and each may use --memory_gb."""
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
            raise ValueError(f"--voxel_size_um {' '.join(map(str, sizes))}: give one or three (z y x) positive numbers")
        if not 0 < self.validation_fraction < 0.5:
            raise ValueError(f"--validation_fraction {self.validation_fraction}: must lie between 0 and 0.5")
        for name in ("stride", "max_per_axis", "workers", "processes", "pad_multiple"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")
        if self.guard_voxels is not None and self.guard_voxels < 0:
            raise ValueError(f"--guard_voxels {self.guard_voxels}: must not be negative")
        if self.guard_um is not None and not 0 <= self.guard_um < math.inf:
            raise ValueError(f"--guard_um {self.guard_um}: must be a number of micrometres, 0 or more")
        if self.guard_um is not None and self.guard_voxels is not None:
            raise ValueError(f"--guard_um {self.guard_um}: --guard_voxels is given too; give one of them")
        if not self.slice_axes or len(set(self.slice_axes)) < len(self.slice_axes):
            raise ValueError(
                f"--slice_axes {' '.join(self.slice_axes)}: name each direction at most once, and one at least"
            )
        if bool(self.validation_volumes) != (self.split == "volume"):
            raise ValueError(
                f"--validation_volumes: goes with --split volume, which needs it; --split is {self.split}"
                f"{' and no volume is named' if not self.validation_volumes else ''}"
            )
        if self.caption_template is not None and (problem := template_problem(self.caption_template)):
            raise ValueError(f"--caption_template {self.caption_template!r}: {problem}")
        if self.identifier is not None and (not self.identifier.isprintable() or set(self.identifier) & set("{}")):
            raise ValueError(f"--identifier {self.identifier!r}: must be plain words on one line")
        sizes_given = [name for name in ("resize_um_per_px", "resize_voxels_per_px") if getattr(self, name)]
        if len(sizes_given) != (self.fit == "resize"):
            raise ValueError(
                f"--fit {self.fit}: resize takes one of --resize_um_per_px and --resize_voxels_per_px, the others none "
                f"of them; got {' and '.join(f'--{name}' for name in sizes_given) or 'none'}"
            )
        for name in sizes_given:
            scale = getattr(self, name)
            if len(scale) not in (1, 3) or not all(0 < size < math.inf for size in scale):
                raise ValueError(
                    f"--{name} {' '.join(map(str, scale))}: give one or three (thickness warp weft) positive numbers"
                )
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
