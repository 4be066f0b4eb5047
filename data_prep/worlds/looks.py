"""What a woven volume looks like in each state: the shapes of its yarns, its grey levels, its point spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["dry", "dry_compacted", "injected"]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What distinguishes a state: shares of the pitch or of the compacted layer height, and grey levels of 255.

    Attributes:
        compaction: layer height over that of the loose fabric.
        warp_width, weft_width: yarn width over pitch.
        warp_thickness, weft_thickness: yarn thickness over layer height; a sum above 1 presses yarns into each other.
        flatness: exponent of the cross-section, 2 an ellipse, more a flattened one.
        nesting: shift of odd layers along the warp, over the weft pitch.
        wander: spread of yarn paths, over the pitch and the layer height.
        matrix_grey, yarn_grey: level between the yarns and in them.
        streak_grey: spread of the fibre texture inside yarns.
        edge_px: depth over which a yarn reaches its own level.
        blur_px: standard deviation of the point spread.
        void_fraction: voids over matrix.
        packing: fibres over yarn volume.
    """

    compaction: float
    warp_width: float
    warp_thickness: float
    weft_width: float
    weft_thickness: float
    flatness: float
    nesting: float
    wander: float
    matrix_grey: float
    yarn_grey: float
    streak_grey: float
    edge_px: float
    blur_px: float
    void_fraction: float
    packing: float


# One calibration for all: air near 28, resin near 150, and a yarn brighter the more fibre and resin it holds. The greys
# span most of 0 to 255, so that a percentile window hardly stretches them and the noise keeps its level.
LOOKS: dict[str, Look] = {
    "dry": Look(
        compaction=1.0,
        warp_width=0.76,
        warp_thickness=0.46,
        weft_width=0.72,
        weft_thickness=0.48,
        flatness=2.0,
        nesting=0.0,
        wander=0.035,
        matrix_grey=26.0,
        yarn_grey=182.0,
        streak_grey=24.0,
        edge_px=1.5,
        blur_px=0.7,
        void_fraction=0.0,
        packing=0.52,
    ),
    "dry_compacted": Look(
        compaction=0.64,
        warp_width=0.96,
        warp_thickness=0.66,
        weft_width=0.94,
        weft_thickness=0.64,
        flatness=3.5,
        nesting=0.25,
        wander=0.025,
        matrix_grey=26.0,
        yarn_grey=188.0,
        streak_grey=20.0,
        edge_px=1.5,
        blur_px=0.7,
        void_fraction=0.0,
        packing=0.62,
    ),
    "injected": Look(
        compaction=0.80,
        warp_width=0.9,
        warp_thickness=0.56,
        weft_width=0.86,
        weft_thickness=0.56,
        flatness=2.5,
        nesting=0.12,
        wander=0.03,
        matrix_grey=142.0,
        yarn_grey=206.0,
        streak_grey=12.0,
        edge_px=2.5,
        blur_px=0.9,
        void_fraction=0.04,
        packing=0.58,
    ),
}
