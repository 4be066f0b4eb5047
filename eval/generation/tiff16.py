"""Generated slices as the scanner would have stored them: counts of 16 bits, with the size of a voxel.

The grey window of the volume that a caption's state comes from is turned round. Stable Diffusion makes colour pictures;
the mean of the channels is the grey level, and how far the channels are apart is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from configs.errors import InputError
from data_prep.folders.manifest import read_manifest, read_rows
from data_prep.folders.window import Window, window_from
from prompts.captions import parse_caption
from prompts.vocabulary import words_of

LARGEST_COUNT = 65535


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What turns a grey picture into a slice of a volume.

    Attributes:
        window: grey levels to counts.
        um_per_px: (row, column) size of a pixel in micrometres, None if the dataset does not know it.
    """

    window: Window
    um_per_px: tuple[float, float] | None


def scales_of(dataset: Path, prompts: Sequence[str]) -> dict[str, Scale]:
    """Return the scale of each prompt, from the volume of its state.

    Raises:
        InputError: a prompt is no caption of the dataset, its state comes from several volumes with different windows,
            or the counts are not whole numbers of 16 bits.
    """
    volumes: Any = read_manifest(dataset)["volumes"]
    rows = read_rows(dataset / "train")
    vocabulary = words_of(dataset)
    scales = {}
    for prompt in prompts:
        asked = parse_caption(prompt, vocabulary)
        mine = [volume for volume in volumes if asked is not None and volume.get("state") == asked[0]]
        if asked is None or not mine:
            raise InputError(
                f"--dataset {dataset}: '{prompt}' is no caption of it, so there is no window to turn round"
            )
        windows = {_window(volume, dataset) for volume in mine}
        if len(windows) > 1:
            raise InputError(f"--dataset {dataset}: {len(mine)} volumes of '{asked[0]}' have different windows")
        sizes = {row.um_per_px for row in rows if (row.state, row.axis) == asked}
        scales[prompt] = Scale(window=windows.pop(), um_per_px=sizes.pop() if len(sizes) == 1 else None)
    return scales


def write_slice(path: Path, picture: NDArray[np.uint8], scale: Scale) -> float:
    """Write a picture (H, W, 3) as a plane of uint16 counts; return how far its channels are apart, in grey levels."""
    grey = picture.mean(axis=-1)
    counts = np.rint(scale.window.to_counts(grey)).clip(0, LARGEST_COUNT).astype(np.uint16)
    size: dict[str, Any] = {}
    if scale.um_per_px is not None:
        row, column = scale.um_per_px
        size = {"resolution": (1e4 / column, 1e4 / row), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, counts, photometric="minisblack", **size)
    return float((picture.max(axis=-1).astype(int) - picture.min(axis=-1)).mean())


def _window(volume: dict[str, Any], dataset: Path) -> Window:
    """Return the window of a volume whose counts fit 16 bits."""
    name, kind = volume.get("name"), str(volume.get("dtype"))
    try:
        window = window_from(volume["window"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"--dataset {dataset}: volume {name} records no grey window; slice it again") from None
    if (
        kind.startswith("float")
        or not 0 <= min(window.low, window.high) < max(window.low, window.high) <= LARGEST_COUNT
    ):
        raise InputError(
            f"--dataset {dataset}: volume {name} is {kind} with a window from {window.low:g} to {window.high:g}; "
            f"16-bit counts are whole numbers from 0 to {LARGEST_COUNT}"
        )
    return window
