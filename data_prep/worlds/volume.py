"""The planes of a woven volume as a scanner would give them: blurred, noisy, in counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_prep.worlds.config import PhantomConfig
from data_prep.worlds.weave import Weave
from data_prep.worlds.yarns import OUTSIDE, Floats

# Counts per grey level of 255, and counts at level 0. The offset of uint16 keeps noise and 0 outside apart.
CALIBRATION = {"uint8": (1.0, 0.0), "uint16": (160.0, 12000.0), "float32": (1 / 255, 0.0)}


def draw(config: PhantomConfig, *, workers: int = 1, block: int = 8) -> Iterator[tuple[Floats, NDArray[np.uint8]]]:
    """Yield grey levels of 255, blurred and noisy, and labels of every plane, each (Y, X).

    Args:
        config: the volume.
        workers: threads.
        block: planes drawn at a time; memory grows with it, values do not depend on it.
    """
    weave = Weave(config)
    planes, rows, columns = config.shape
    sigma = weave.look.blur_px
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2) if sigma else np.ones(1)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    outside = weave.outside

    def drawn(z: int) -> tuple[Floats, NDArray[np.uint8]]:
        grey, labels = weave.plane(z)
        return (ndimage.gaussian_filter(grey, sigma, truncate=3.0) if sigma else grey), labels

    def finished(z: int) -> tuple[Floats, NDArray[np.uint8]]:
        grey = np.zeros((rows, columns), np.float32)
        for weight, neighbour in zip(kernel, range(z - reach, z + reach + 1), strict=True):
            grey += weight * ready[neighbour][0]
        if weave.rings is not None:
            grey += weave.rings
        if config.noise_sigma:
            noise = weave.random("noise", z).standard_normal(grey.shape, dtype=np.float32)
            grey += np.float32(config.noise_sigma) * noise
        labels = ready[z][1]
        if outside is not None:
            labels[outside] = OUTSIDE
        return grey, labels

    ready: dict[int, tuple[Floats, NDArray[np.uint8]]] = {}
    with ThreadPoolExecutor(workers) as threads:
        for first in range(0, planes, block):
            last = min(first + block, planes)
            missing = [z for z in range(first - reach, last + reach) if z not in ready]
            ready.update(zip(missing, threads.map(drawn, missing), strict=True))
            yield from threads.map(finished, range(first, last))
            for z in [z for z in ready if z < last - reach]:
                del ready[z]


def to_counts(grey: Floats, labels: NDArray[np.uint8], dtype: str) -> NDArray[np.generic]:
    """Turn grey levels of 255 into voxels of ``dtype``; outside the field of view they are 0."""
    scale, offset = CALIBRATION[dtype]
    counts = grey * np.float32(scale) + np.float32(offset)
    if dtype != "float32":
        limit = np.iinfo(dtype).max
        counts = np.clip(np.rint(counts), 0, limit)
    counts[labels == OUTSIDE] = 0
    return counts.astype(dtype)
