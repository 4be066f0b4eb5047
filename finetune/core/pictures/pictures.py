"""Images become training pictures: turned, resized until they cover a shape, and cut to it.

Shapes are (rows, columns) in px. A bucket is the set of pictures of one shape.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from configs.errors import InputError
from finetune.core.pictures.images import CaptionedImage, raise_together
from finetune.core.settings.images import PictureConfig
from finetune.diffusion.draws import counter_seed

R = TypeVar("R")
Shape = tuple[int, int]
Turn = Image.Transpose
Place = tuple[float, float]
"""Where a cut sits, from 0 (top, left) to 1 (bottom, right)."""
CENTRE: Place = (0.5, 0.5)
_SIDEWAYS = (Turn.ROTATE_90, Turn.ROTATE_270, Turn.TRANSPOSE, Turn.TRANSVERSE)
_LISTED = 3


@dataclass(frozen=True, kw_only=True)
class TrainingPicture:
    """One way in which an image is shown.

    Attributes:
        image: the file.
        turn: a mirror or a quarter turn of the upright image, or None.
        captions: true of the image turned this way.
        shape: of the picture.
    """

    image: CaptionedImage
    turn: Turn | None
    captions: tuple[str, ...]
    shape: Shape

    @property
    def turned(self) -> Shape:
        """Rows and columns of the image, turned."""
        return turned_shape(self.image, self.turn)

    @property
    def resized(self) -> Shape:
        """Rows and columns before the cut."""
        return cover(self.turned, self.shape)

    @property
    def kept(self) -> float:
        """Share of the image that a cut keeps."""
        return float(np.prod(self.shape)) / float(np.prod(self.resized))

    @property
    def um_per_px(self) -> tuple[float, float] | None:
        """The (row, column) size of its pixels in micrometres, or None if unknown."""
        if self.image.um_per_px is None:
            return None
        sizes = self.image.um_per_px[::-1] if self.turn in _SIDEWAYS else self.image.um_per_px
        row, column = (
            size * before / after for size, before, after in zip(sizes, self.turned, self.resized, strict=True)
        )
        return row, column

    def places(self, num_crops: int) -> list[Place]:
        """Return where this picture is cut: in the centre (0), or at so many seeded places.

        The places hang on the image's content alone, so that runs with other seeds find its latents in the cache.
        """
        if not num_crops or self.resized == self.shape:
            return [CENTRE]
        draws = [counter_seed(0, f"{self.image.content}/{self.turn}", number) for number in range(2 * num_crops)]
        shares = [draw / 2**32 for draw in draws]
        return list(zip(shares[::2], shares[1::2], strict=True))

    def key(self, place: Place) -> str:
        """Return what tells this picture's latents from all others of its shape."""
        turn = "as-it-is" if self.turn is None else self.turn.name.lower()
        return f"{self.image.content}-{turn}-{place[0]:.9f}-{place[1]:.9f}"


def turned_shape(image: CaptionedImage, turn: Turn | None) -> Shape:
    """Return rows and columns of an image, turned."""
    return (image.width, image.height) if turn in _SIDEWAYS else (image.height, image.width)


def cover(image: Shape, shape: Shape) -> Shape:
    """Return the size to which an image is resized, at its aspect ratio, so that it covers ``shape`` and no more.

    One side fits exactly; the other is rounded down, as torchvision does when it resizes the shorter side.
    """
    (height, width), (rows, columns) = image, shape
    if rows * width >= columns * height:
        return rows, max(columns, rows * width // height)
    return max(rows, columns * height // width), columns


def bucket_of(image: Shape, resolution: int, step: int) -> Shape:
    """Return the shape of at most resolution^2 px, with sides of whole steps, that keeps most of an image.

    Sides go from half the resolution to twice it: what is longer is cut. Between equal shares the larger picture wins.
    """
    low, high = max(step, resolution // 2 // step * step), 2 * resolution // step * step
    # As long as the area allows, for each short side; and as wide, for each long one.
    sides = [(side, min(high, resolution**2 // side // step * step)) for side in range(low, high + 1, step)]
    shapes = [shape for side, other in sides if other >= low for shape in ((side, other), (other, side))]

    def worth(shape: Shape) -> tuple[float, int]:
        rows, columns = cover(image, shape)
        return round(shape[0] * shape[1] / (rows * columns), 9), shape[0] * shape[1]

    return max(shapes, key=worth)


def bucket_step(resolution: int, multiple: int) -> int:
    """Return the step of the buckets' sides: 64 px, or an eighth of the resolution where that is less."""
    return max(multiple, min(64, resolution // 8) // multiple * multiple)


def prepare_pixels(
    image: Image.Image, shape: Shape, interpolation: str, place: Sequence[float] = CENTRE, turn: Turn | None = None
) -> np.ndarray:
    """Turn an image, resize it until it covers ``shape``, cut it, and return (3, H, W) float32 in [-1, 1].

    ``place`` says where the cut sits; 0.5 is the centre, as torchvision rounds it.
    """
    rgb = ImageOps.exif_transpose(image).convert("RGB")
    if turn is not None:
        rgb = rgb.transpose(turn)
    size = cover((rgb.height, rgb.width), shape)
    if size != (rgb.height, rgb.width):
        rgb = rgb.resize(size[::-1], Image.Resampling[interpolation.upper()])
    top, left = (round((side - cut) * share) for side, cut, share in zip(size, shape, place, strict=True))
    levels = np.asarray(rgb.crop((left, top, left + shape[1], top + shape[0])), dtype=np.float32)
    return np.ascontiguousarray(levels.transpose(2, 0, 1)) / np.float32(127.5) - np.float32(1)


def load_pixels(
    pictures: Sequence[TrainingPicture], places: Sequence[Sequence[float]], config: PictureConfig
) -> Tensor:
    """Decode and prepare pictures of one shape, (N, 3, H, W), in ``dataloader_num_workers`` threads if there are any.

    Raises:
        InputError: naming an image that cannot be decoded.
    """

    def one(picture: TrainingPicture, place: Sequence[float]) -> Tensor:
        with _decoding(picture.image) as opened:
            pixels = prepare_pixels(opened, picture.shape, config.image_interpolation_mode, place, picture.turn)
        return torch.from_numpy(pixels)

    return torch.stack(_in_threads(one, config, pictures, places))


def check_decodable(images: Sequence[CaptionedImage], config: PictureConfig) -> None:
    """Decode every image once, and forget it: what cannot be decoded is named before the first step, all at once.

    Raises:
        InputError: naming the files.
    """

    def problem(image: CaptionedImage) -> str:
        try:
            with _decoding(image) as opened:
                opened.load()
        except InputError as error:
            return str(error)
        return ""

    unique = list({image.path: image for image in images}.values())
    raise_together([said for said in _in_threads(problem, config, unique) if said])


@contextmanager
def _decoding(image: CaptionedImage) -> Iterator[Image.Image]:
    """Open an image; a failure to decode it names it."""
    try:
        with Image.open(image.path) as opened:
            yield opened
    except (OSError, SyntaxError) as error:
        raise InputError(f"{image.path}: cannot be decoded ({' '.join(str(error).split())})") from None


def _in_threads(function: Callable[..., R], config: PictureConfig, *items: Sequence[Any]) -> list[R]:
    """Map a function over items, in ``dataloader_num_workers`` threads if there are any."""
    if not config.dataloader_num_workers:
        return list(map(function, *items))
    with ThreadPoolExecutor(config.dataloader_num_workers) as pool:
        return list(pool.map(function, *items))


def bucket_table(pictures: Sequence[TrainingPicture]) -> str:
    """Return a table of the buckets: their pictures, what they are cut from, the share that is kept, um a pixel."""
    buckets = defaultdict(list)
    for picture in pictures:
        buckets[picture.shape].append(picture)
    lines = [("bucket", "pictures", "cut from", "keeps", "um/px")]
    for shape, members in sorted(buckets.items()):
        sources = [_by(source) for source, _ in Counter(picture.turned for picture in members).most_common()]
        kept = sorted(picture.kept for picture in members)
        sizes = sorted({picture.um_per_px for picture in members if picture.um_per_px is not None})
        more = f" and {len(sources) - _LISTED} more" if len(sources) > _LISTED else ""
        lines.append(
            (
                _by(shape),
                str(len(members)),
                ", ".join(sources[:_LISTED]) + more,
                _span(f"{100 * share:.0f}" for share in (kept[0], kept[-1])) + " %",
                _span(" x ".join(f"{edge:.3g}" for edge in size) for size in (sizes[:1] + sizes[-1:])) or "unknown",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def captions_by_shape(pictures: Iterable[TrainingPicture]) -> dict[Shape, Counter[str]]:
    """Return how often each caption comes with each shape, that of most pictures first; each picture counts once."""
    unique = {(picture.image.path, picture.turn): picture for picture in pictures}.values()
    captions: dict[Shape, Counter[str]] = defaultdict(Counter)
    for picture in unique:
        captions[picture.shape].update(picture.captions)
    counts = Counter(picture.shape for picture in unique)
    return {shape: captions[shape] for shape in sorted(counts, key=lambda shape: (-counts[shape], shape))}


def _by(shape: Shape) -> str:
    """Return a shape as text, rows first."""
    return f"{shape[0]}x{shape[1]}"


def _span(ends: Iterable[str]) -> str:
    """Return 'a to b', or 'a' where both are equal."""
    return " to ".join(dict.fromkeys(ends))
