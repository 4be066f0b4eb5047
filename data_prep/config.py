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
    """Threads that encode; by default the number of cores, at most 16. The pictures do not depend on it."""
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
