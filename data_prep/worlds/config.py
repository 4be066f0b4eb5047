"""Draw a synthetic 3D-woven volume of known geometry and write it as TIFF.

    python -m data_prep.phantom --state dry --shape 359 702 970 --dtype uint16 --seed 0 --output dry.tif

Writes ``dry.tif``, ``dry.truth.json`` and, with ``--labels``, ``dry.labels.tif`` (uint8: 0 matrix, air or void, 1 warp,
2 weft, 3 outside the field of view).

The weave is a layer-to-layer interlock. Z is the thickness, Y the warp direction, X the weft direction. Weft yarns are
nearly straight and lie in layers. Each warp yarn waves along Y, over one weft column and under the next, and so binds
its layer to the two neighbours; neighbouring warp yarns are in opposite phase. A slice perpendicular to Y (a warp
slice) shows the cross-sections of the warp, one perpendicular to X those of the weft between waving warp.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data_prep.worlds.looks import LOOKS, Look, State

# From nano tomography to hand-sized voxels; and the longest of the weave's lengths, which numbers can still hold.
VOXEL_UM = (1e-3, 1e5)
MOST_VOXELS = 100_000


@dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """A synthetic woven volume. Options left unset take the value of the state."""

    state: State
    """dry: loose, dark gaps; dry_compacted: thinner, nested, small gaps; injected: bright matrix, low contrast."""
    shape: tuple[int, int, int]
    """Voxels along Z (thickness), Y (warp direction) and X (weft direction)."""
    output: Path
    """The .tif file to write; the truth goes beside it as <stem>.truth.json."""
    dtype: Literal["uint8", "uint16", "float32"] = "uint16"
    """Type of the voxels. float32 holds grey levels of 255 over 255, not clipped."""
    seed: int = 0
    """Same seed and options, same bytes."""
    voxel_um: float = 80.0
    """Edge of a voxel."""
    warp_pitch_um: float = 2080.0
    """Distance between neighbouring warp yarns, along X."""
    weft_pitch_um: float = 3200.0
    """Distance between neighbouring weft columns, along Y."""
    layer_height_um: float = 1440.0
    """Distance between weft layers of the loose fabric, along Z, before compaction."""
    compaction: float | None = None
    """Layer height over that of the loose fabric, 0.3 to 1.5 (dry 1, dry_compacted 0.64, injected 0.8)."""
    crimp: float = 0.8
    """Amplitude of the warp's wave over half a layer height, 0 to 1.5; about 1 binds neighbouring layers."""
    weft_crimp: float = 0.08
    """Amplitude of the weft's wave over half a layer height, 0 to 1.5."""
    streak_grey: float | None = None
    """Spread of the fibre texture inside yarns, in grey levels of 255, before blur."""
    streak_width_um: float = 96.0
    """Width of the streaks of the fibre texture, as the standard deviation of a Gaussian."""
    streak_length_um: float = 1600.0
    """Length of the streaks along the yarn, as the standard deviation of a Gaussian."""
    blur_px: float | None = None
    """Standard deviation of the point spread, in voxels, 0 to 5."""
    noise_sigma: float = 8.0
    """Standard deviation of the white noise, in grey levels of 255; a percentile window can only raise it."""
    void_fraction: float | None = None
    """Voids over matrix, 0 to 0.3."""
    rings: float = 0.0
    """Spread of ring artefacts about the centre of the plane, in grey levels of 255."""
    cylinder: bool = False
    """Set voxels outside the circle inscribed in the plane to 0, as a reconstruction does."""
    labels: bool = False
    """Write <stem>.labels.tif too."""
    overwrite: bool = False
    """Replace an output that exists."""

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"--shape {' '.join(map(str, self.shape))}: every side must be at least 1 voxel")
        if self.output.suffix.lower() not in {".tif", ".tiff"}:
            raise ValueError(f"--output {self.output}: the name must end in .tif or .tiff")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must be 0 or more")
        low, high = VOXEL_UM
        if not low <= self.voxel_um <= high:
            raise ValueError(f"--voxel_um {self.voxel_um:g}: must lie in [{low:g}, {high:g}] um")
        for name, low in (
            ("warp_pitch_um", 4),
            ("weft_pitch_um", 4),
            ("layer_height_um", 4),
            ("streak_width_um", 0.01),
            ("streak_length_um", 0.01),
        ):
            value, voxels = getattr(self, name), getattr(self, name) / self.voxel_um
            if not low <= voxels <= MOST_VOXELS:
                ends = f"{low * self.voxel_um:g} to {MOST_VOXELS * self.voxel_um:g} um"
                raise ValueError(f"--{name} {value:g}: must be {low:g} to {MOST_VOXELS} voxels, {ends}")
        for name, low, high in (
            ("compaction", 0.3, 1.5),
            ("crimp", 0.0, 1.5),
            ("weft_crimp", 0.0, 1.5),
            ("streak_grey", 0.0, 128.0),
            ("blur_px", 0.0, 5.0),
            ("noise_sigma", 0.0, 128.0),
            ("void_fraction", 0.0, 0.3),
            ("rings", 0.0, 128.0),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name} {value:g}: must lie in [{low:g}, {high:g}]")

    def look(self) -> Look:
        """Return the look of the state with the options that were set put in."""
        chosen = {
            "compaction": self.compaction,
            "streak_grey": self.streak_grey,
            "blur_px": self.blur_px,
            "void_fraction": self.void_fraction,
        }
        return replace(LOOKS[self.state], **{name: value for name, value in chosen.items() if value is not None})
