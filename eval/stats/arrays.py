"""Names of the arrays that measurements are made of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Grey = NDArray[np.uint8]
"""Grey levels from 0 to 255 of a picture (H, W), or of several (N, H, W)."""
