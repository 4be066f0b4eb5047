"""Colour and brightness of pictures, and how much of them a tuned model keeps.

Fine-tuning on grey slices is first seen as fading colours and darkening pictures, long before shapes are lost.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eval.stats.arrays import Floats

Pictures = NDArray[np.uint8]

FAINT: dict[str, float] = {"colourfulness": 8.0, "saturation": 0.04, "luminance": 8.0}
"""Below this the base's own pictures have too little of it for a ratio to mean anything, as grey textures have."""


def colourfulness(pictures: Pictures) -> Floats:
    """Return the colourfulness of each picture, (N, H, W, 3) -> (N,), in grey levels: 0 is grey, about 100 vivid.

    Source: Hasler and Suesstrunk 2003, Measuring colourfulness in natural images, M(3).
    """
    red, green, blue = (pictures[..., channel].astype(np.float64) for channel in range(3))
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(axis=(1, 2)), yellow_blue.std(axis=(1, 2)))
    offset = np.hypot(red_green.mean(axis=(1, 2)), yellow_blue.mean(axis=(1, 2)))
    return np.asarray(spread + 0.3 * offset)


def saturation(pictures: Pictures) -> Floats:
    """Return the mean HSV saturation of each picture, (N, H, W, 3) -> (N,), in [0, 1]."""
    high = pictures.max(axis=-1).astype(np.float64)
    low = pictures.min(axis=-1)
    return np.asarray(((high - low) / np.maximum(high, 1.0)).mean(axis=(1, 2)))


def luminance(pictures: Pictures) -> Floats:
    """Return the mean luma of each picture by the weights of ITU-R BT.709, (N, H, W, 3) -> (N,), in [0, 255]."""
    return np.asarray((pictures @ np.array([0.2126, 0.7152, 0.0722])).mean(axis=(1, 2)))


MEASURES = {"colourfulness": colourfulness, "saturation": saturation, "luminance": luminance}
