"""The yarns of a weave, one layer at a time, and the fibre texture inside them.

Legend: Z, Y, X voxels; a yarn runs along ``s``, ``u`` is the offset across it in the plane, ``v`` the one along Z.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from data_prep.worlds.config import PhantomConfig
from data_prep.worlds.geometry import geometry_of

MATRIX, WARP, WEFT, OUTSIDE = range(4)
"""Labels of voxels; ``OUTSIDE`` lies beyond the field of view."""

Floats = NDArray[np.float32]


class Layer(NamedTuple):
    """One layer of yarns of one direction, as maps over the plane (Y, X)."""

    centre: Floats  # height of the yarn's middle, in planes
    half: Floats  # half thickness along Z, in planes; 0 or less between yarns
    tone: Floats  # grey level of the yarn beside that of its kind
    streaks: NDArray[np.int32]  # where this column of voxels starts in the texture


def draw_layer(
    config: PhantomConfig,
    kind: int,
    index: int,
    *,
    origin: NDArray[np.float64],
    texture: tuple[int, int, int],
    random: np.random.Generator,
) -> Layer:
    """Draw the yarns of one layer; the maps are built as (u, s) and turned for the warp.

    Args:
        config: the volume.
        kind: ``WARP`` or ``WEFT``.
        index: number of the layer along Z.
        origin: where the weave begins along (Z, Y, X), in voxels.
        texture: shape of the block of streaks that the layer points into.
        random: the layer's own source of randomness.
    """
    look, geometry = config.look(), geometry_of(config)
    rows, columns = config.shape[1:]
    across, along = (columns, rows) if kind == WARP else (rows, columns)
    pitch, other = (
        (geometry.warp_pitch, geometry.weft_pitch) if kind == WARP else (geometry.weft_pitch, geometry.warp_pitch)
    )
    width, thickness = (
        (look.warp_width, look.warp_thickness) if kind == WARP else (look.weft_width, look.weft_thickness)
    )
    wave = geometry.warp_wave if kind == WARP else -geometry.weft_wave
    # Odd layers are shifted along the warp; the warp of a layer follows the weft that it binds.
    shift = look.nesting * geometry.weft_pitch * (index % 2)
    start_across, start_along = origin[2], origin[1] + shift
    if kind == WEFT:
        start_across, start_along = start_along, start_across

    nearest = np.round((np.arange(across) - start_across) / pitch).astype(int)
    yarn = np.arange(nearest[0], nearest[-1] + 1)
    position = np.arange(along)
    wander = look.wander
    lateral = start_across + pitch * (yarn[:, None] + wander * _smooth(random, yarn.size, position, 6 * other))
    phase = math.pi * ((position - start_along) / other + yarn[:, None])
    path = origin[0] + index * geometry.layer_height + wave * np.cos(phase)
    path += wander * geometry.layer_height * _smooth(random, yarn.size, position, 6 * other)
    # A sloping yarn is cut obliquely by the Z axis.
    oblique = np.hypot(1, wave * math.pi / other * np.sin(phase))
    swell = 1 + 0.04 * _smooth(random, yarn.size, position, 4 * other)
    half_width = swell * width * pitch / 2
    half_height = oblique / swell * thickness * geometry.layer_height / 2
    tone = 5 * random.standard_normal((yarn.size, 1)) + 3 * _smooth(random, yarn.size, position, 3 * other)
    offset = random.integers(0, 2**16, size=(yarn.size, 3))

    row = nearest - nearest[0]  # (across,) which yarn
    u = np.arange(across)[:, None] - lateral[row]  # (across, along)
    flat = 1 - (np.abs(u) / half_width[row]) ** look.flatness
    half = np.where(flat > 0, np.sqrt(np.maximum(flat, 0)), flat) * half_height[row]
    n_v, n_s, n_u = texture
    index_s = (position // 2 + offset[row, :1]) % n_s
    index_u = (np.rint(2 * u).astype(int) + offset[row, 1:2]) % n_u
    streaks = ((offset[row, 2:] % n_v) * n_s + index_s) * n_u + index_u
    maps = (path[row].astype(np.float32), half.astype(np.float32), tone[row].astype(np.float32))
    turned = [array.T if kind == WARP else array for array in (*maps, streaks.astype(np.int32))]
    return Layer(*map(np.ascontiguousarray, turned))


def draw_texture(config: PhantomConfig, random: np.random.Generator) -> Floats:
    """Draw one periodic block of streaks (v, s, u): half voxels across, 2 voxels along; sides are powers of two."""
    shape = (64, 256, 128)
    white = fft.rfftn(random.standard_normal(shape, dtype=np.float32))
    across, along = 2 * config.streak_width_um / config.voxel_um, config.streak_length_um / config.voxel_um / 2
    fine, coarse = (
        fft.irfftn(ndimage.fourier_gaussian(white, size, n=shape[2]), shape)
        for size in ((across, along, across), (3 * across, 2 * along, 3 * across))
    )
    texture = fine / fine.std() + coarse / coarse.std()
    return (config.look().streak_grey / texture.std() * texture).astype(np.float32)


def _smooth(random: np.random.Generator, count: int, position: NDArray[np.integer], length: float) -> Floats:
    """Draw ``count`` smooth random lines of variance 1 along ``position``: three sinusoids about ``length`` px long."""
    wave = length * random.uniform(0.6, 1.6, size=(3, count, 1))
    phase = random.uniform(0, 2 * math.pi, size=(3, count, 1))
    return np.sqrt(2 / 3) * np.sin(2 * math.pi * position / wave + phase).sum(axis=0)
