"""Pictures to arrays: grey values, tiles at native scale, and the one exact resize.

Structure is judged at the scale it was scanned at, so pictures are cut, never squashed. Where a size must change,
``resize`` is the only function that does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from configs.errors import InputError
from eval.stats.arrays import Grey

DEEP_MODES = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}
"""Pillow's names of pixels of more than 8 bits, which it would cut off at 255."""
FLAT_RANGE = 4
"""A tile whose grey levels span less than this (of 255) is padding or a scanner gap and shows no material."""


@dataclass(frozen=True, kw_only=True)
class TileCut:
    """Where a tile is taken: picture, upper left corner, the class it belongs to, and its block.

    Attributes:
        path: the picture.
        row, column: upper left corner in px.
        label: any hashable class, such as (state, axis).
        block: name of the contiguous slab (real) or the seed (generated).
    """

    path: Path
    row: int
    column: int
    label: tuple[str, str]
    block: str


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles of equal size with where they came from.

    Attributes:
        pixels: (N, tile, tile) uint8 grey values.
        cuts: one per tile.
        num_flat: tiles left out because they show nothing.
    """

    pixels: Grey
    cuts: tuple[TileCut, ...]
    num_flat: int = 0

    def __len__(self) -> int:
        return len(self.cuts)

    def take(self, index: Iterable[int]) -> Tiles:
        """Return the tiles at ``index``, in that order."""
        chosen = list(index)
        return Tiles(pixels=self.pixels[chosen], cuts=tuple(self.cuts[i] for i in chosen), num_flat=self.num_flat)


def resize(image: NDArray[np.uint8] | NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Resize with an anti-aliased bicubic filter in float, channel by channel, without rounding or clipping.

    Args:
        image: (H, W) or (H, W, C), any range.
        height: rows wanted, in px.
        width: columns wanted, in px.

    Returns:
        (height, width) or (height, width, C) float32 in the range of the input, plus the overshoot of the filter.

    Source: Parmar et al. 2022, On Aliased Resizing: Pillow's filters scale with the factor, which most others do not.
    """
    if image.ndim == 3:
        return np.stack([resize(image[..., channel], height, width) for channel in range(image.shape[2])], axis=-1)
    plane = Image.fromarray(np.asarray(image, dtype=np.float32))
    return np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)


def read_grey(path: Path) -> Grey:
    """Read a picture as (H, W) uint8; colour becomes the mean of its channels, as the caption model sees no colour.

    Raises:
        InputError: the file is missing or no picture.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode in DEEP_MODES:
                raise InputError(f"{path}: {picture.mode} pixels, not 8 bits; slices come as 8-bit PNG")
            return to_grey(np.asarray(picture.convert("RGB") if picture.mode not in {"L", "RGB"} else picture))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such picture; the list that names it is out of date") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not readable as a picture ({error})") from None


def to_grey(image: Grey) -> Grey:
    """Return the channel mean of an (H, W, 3) uint8 picture, rounded; (H, W) is returned as it is."""
    return image if image.ndim == 2 else np.rint(image.mean(axis=-1)).astype(np.uint8)


def cover(picture: Grey, size: tuple[int, int]) -> Grey:
    """Return a picture as training sees it: resized until (height, width) is covered, and its centre cut out."""
    height, width = picture.shape
    scale = max(size[0] / height, size[1] / width)
    if scale != 1:
        resized = resize(picture, max(size[0], round(height * scale)), max(size[1], round(width * scale)))
        picture = resized.clip(0, 255).round().astype(np.uint8)
    row, column = ((have - want) // 2 for have, want in zip(picture.shape, size, strict=True))
    return picture[row : row + size[0], column : column + size[1]]


def tile_corners(height: int, width: int, tile: int) -> list[tuple[int, int]]:
    """Return the upper left corners of the fewest evenly spread tiles that cover a picture; neighbours may overlap.

    Raises:
        ValueError: the tile is larger than the picture.
    """
    if tile > min(height, width):
        raise ValueError(f"a tile of {tile} px does not fit in {height} x {width} px")
    rows, columns = (
        np.unique(np.rint(np.linspace(0, side - tile, -(-side // tile))).astype(int)) for side in (height, width)
    )
    return [(int(row), int(column)) for row in rows for column in columns]


def draw_cuts(cuts: Sequence[TileCut], per_class: int, seed: int) -> list[TileCut]:
    """Return at most ``per_class`` cuts of each class, drawn by seed and spread over its blocks in turn."""
    drawn: list[TileCut] = []
    for label in sorted({cut.label for cut in cuts}):
        generator = np.random.default_rng([seed, *label[0].encode(), *label[1].encode()])
        blocks: dict[str, list[TileCut]] = {}
        for cut in cuts:
            if cut.label == label:
                blocks.setdefault(cut.block, []).append(cut)
        shuffled = [[members[i] for i in generator.permutation(len(members))] for members in blocks.values()]
        in_turn = [
            members[turn] for turn in range(max(map(len, shuffled))) for members in shuffled if turn < len(members)
        ]
        drawn += in_turn[:per_class]
    return drawn


def read_tiles(cuts: Sequence[TileCut], tile: int, *, keep_flat: bool = False) -> Tiles:
    """Cut the tiles out of their pictures; flat ones are counted, and left out unless asked for.

    Raises:
        InputError: a picture cannot be read, or a tile sticks out of it.

    Returns:
        Tiles in the order of ``cuts``.
    """
    by_path: dict[Path, list[int]] = {}
    for number, cut in enumerate(cuts):
        by_path.setdefault(cut.path, []).append(number)
    pixels = np.zeros((len(cuts), tile, tile), dtype=np.uint8)
    for path, numbers in by_path.items():
        image = read_grey(path)
        for number in numbers:
            row, column = cuts[number].row, cuts[number].column
            if row + tile > image.shape[0] or column + tile > image.shape[1]:
                raise InputError(
                    f"{path}: {image.shape[0]} x {image.shape[1]} px, smaller than its row in the list says"
                )
            pixels[number] = image[row : row + tile, column : column + tile]
    spread = pixels.max(axis=(1, 2)).astype(int) - pixels.min(axis=(1, 2)) if len(cuts) else np.zeros(0, dtype=int)
    has_structure = spread >= FLAT_RANGE
    shown = np.flatnonzero(has_structure | keep_flat).tolist()
    return Tiles(pixels=pixels[shown], cuts=tuple(cuts[i] for i in shown), num_flat=int((~has_structure).sum()))


def match_histograms_to(pixels: Grey, reference: Grey) -> Grey:
    """Give every tile (N, h, w) the grey-level distribution of ``reference``, any shape: what is left is structure."""
    from skimage.exposure import match_histograms

    wanted = reference.reshape(1, -1)
    return np.stack([np.rint(match_histograms(tile, wanted)).astype(np.uint8) for tile in pixels])
