"""Lengths and angles of a weave, as they were asked for."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from data_prep.worlds.config import PhantomConfig


class Geometry(NamedTuple):
    """Lengths of the weave in voxels, after compaction; a wave is the amplitude of a yarn's path along Z."""

    warp_pitch: float
    weft_pitch: float
    layer_height: float
    warp_wave: float
    weft_wave: float


def geometry_of(config: PhantomConfig) -> Geometry:
    """Return the lengths that the options ask for."""
    layer_height = config.layer_height_um / config.voxel_um * config.look().compaction
    return Geometry(
        warp_pitch=config.warp_pitch_um / config.voxel_um,
        weft_pitch=config.weft_pitch_um / config.voxel_um,
        layer_height=layer_height,
        warp_wave=config.crimp * layer_height / 2,
        weft_wave=config.weft_crimp * layer_height / 2,
    )


def crimp(amplitude: float, length: float) -> dict[str, float]:
    """Return angles to the yarn's direction, and the yarn's length beyond its span, of a sinusoid."""
    slope = 2 * math.pi * amplitude / length * np.cos(np.linspace(0, 2 * math.pi, 3600, endpoint=False))
    angle = np.degrees(np.arctan(np.abs(slope)))
    return {
        "max_deg": float(angle.max()),
        "mean_deg": float(angle.mean()),
        "percent": 100 * float(np.hypot(1, slope).mean() - 1),
    }
