"""What a scan has that a weave has not: voids in the resin, ring artefacts, the circle of a reconstruction."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_prep.worlds.config import PhantomConfig
from data_prep.worlds.yarns import MATRIX, Floats

VOID_GREY = 10.0


def draw_rings(config: PhantomConfig, random: np.random.Generator) -> Floats:
    """Draw the ring artefacts, the same in every plane, as a worn detector pixel gives them."""
    rows, columns = config.shape[1:]
    y, x = np.ogrid[:rows, :columns]
    radius = np.hypot(y - (rows - 1) / 2, x - (columns - 1) / 2)
    profile = ndimage.gaussian_filter1d(random.standard_normal(int(radius.max()) + 2), 0.7)
    return (config.rings * (profile / 0.64)[np.rint(radius).astype(int)]).astype(np.float32)


def add_voids(
    z: int,
    grey: Floats,
    labels: NDArray[np.uint8],
    *,
    fraction: float,
    random_of: Callable[[str, int], np.random.Generator],
) -> None:
    """Draw the flat ellipsoidal voids that cut plane ``z``; yarns are left as they are.

    Args:
        z: number of the plane.
        grey: its grey levels (Y, X), changed in place.
        labels: its labels (Y, X).
        fraction: voids over matrix.
        random_of: source of randomness of a named thing and a number.
    """
    rows, columns = grey.shape
    block = 16
    for cell in (z // block - 1, z // block, z // block + 1):
        random = random_of("voids", cell)
        # Radius: log-normal about 2.5 voxels; the mean volume of such ellipsoids gives their number.
        volume = 4 / 3 * math.pi * 0.6 * 2.5**3 * math.exp(4.5 * 0.3**2)
        count = random.poisson(fraction * block * rows * columns / volume)
        radius = random.lognormal(math.log(2.5), 0.3, size=count)
        centre = random.uniform(size=(count, 3)) * (block, rows, columns) + (cell * block, 0, 0)
        left = 1 - ((z - centre[:, 0]) / (0.6 * radius)) ** 2
        for (_, y, x), reach in zip(centre[left > 0], (radius * np.sqrt(np.maximum(left, 0)))[left > 0], strict=True):
            top, bottom = max(math.ceil(y - reach), 0), min(math.floor(y + reach) + 1, rows)
            start, end = max(math.ceil(x - reach), 0), min(math.floor(x + reach) + 1, columns)
            near_y, near_x = np.ogrid[top:bottom, start:end]
            void = (near_y - y) ** 2 + (near_x - x) ** 2 <= reach**2
            void &= labels[top:bottom, start:end] == MATRIX
            grey[top:bottom, start:end][void] = VOID_GREY


def outside_circle(shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which pixels lie outside the circle inscribed in the plane."""
    rows, columns = shape
    y, x = np.ogrid[:rows, :columns]
    return np.hypot(y - (rows - 1) / 2, x - (columns - 1) / 2) > min(shape) / 2
