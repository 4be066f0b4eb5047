"""How many generated slices are not grey, as slices are; every other number reads the mean of the channels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.folders.results import Result

GREY_LEVELS = 2.0
"""Mean distance of the channels of a picture, in grey levels, beyond which it is not grey."""


def coloured_row(paths: Sequence[Path]) -> Result:
    """Return the share of pictures that are not grey."""
    spreads = []
    for path in paths:
        with Image.open(path) as opened:
            picture = np.asarray(opened.convert("RGB")).astype(int)
        spreads.append(float((picture.max(axis=2) - picture.min(axis=2)).mean()))
    reason = f"channels more than {GREY_LEVELS:g} grey levels apart; {np.mean(spreads):.1f} over all; shown, not judged"
    share = float(np.mean(np.array(spreads) > GREY_LEVELS))
    return Result(metric="coloured", set="generated", value=share, n=len(paths), unit="share", reason=reason)
