"""What trainers make of a picture's shape: the buckets of sd-scripts and of SDXL trainers, the square of diffusers.

Either changes the scale, and differently for slices of different directions, so that one yarn is learned at several
sizes. The rules are those of the trainers; the numbers are for deciding before a training, not for running one.
"""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST, LARGEST = 256, 1024  # px, edges of buckets; the defaults of sd-scripts


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Where a picture goes.

    Attributes:
        width: of the bucket, in px.
        height: of the bucket, in px.
        scale: px of the bucket per px of the picture.
        kept: share of the picture that is inside after the crop.
    """

    width: int
    height: int
    scale: float
    kept: float


def bucket_shapes(resolution: int, step: int) -> list[tuple[int, int]]:
    """Return the (width, height) of all buckets: area at most ``resolution`` squared, edges multiples of ``step``."""
    area, square = resolution * resolution, resolution // step * step
    shapes = {(square, square)}
    for width in range(max(step, SMALLEST // step * step), LARGEST + 1, step):
        height = min(LARGEST, area // width // step * step)
        if height >= SMALLEST:
            shapes |= {(width, height), (height, width)}
    return sorted(shapes)


def bucket_of(width: int, height: int, *, resolution: int, step: int) -> Bucket:
    """Return the bucket whose ratio of the edges is nearest, as sd-scripts chooses it; the picture covers it."""
    shape = min(bucket_shapes(resolution, step), key=lambda one: abs(one[0] / one[1] - width / height))
    return _cover(width, height, *shape)


def square_of(width: int, height: int, *, resolution: int) -> Bucket:
    """Return the square that diffusers' scripts crop after the short edge was made ``resolution``."""
    return _cover(width, height, resolution, resolution)


def _cover(width: int, height: int, to_width: int, to_height: int) -> Bucket:
    """Scale a picture until it covers a shape."""
    scale = max(to_width / width, to_height / height)
    kept = to_width * to_height / (width * scale * height * scale)
    return Bucket(width=to_width, height=to_height, scale=scale, kept=kept)
