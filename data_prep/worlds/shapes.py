"""Captioned coloured shapes and textures: the small world that the embedded base model knows.

A picture is a pure function of (seed, index). A few combinations are never drawn (``HELD_OUT``), so that a model
trained on this world can be asked for something new. Nothing here knows volumes, yarn geometry or the captions of
slices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Pixels = NDArray[np.uint8]
Field = NDArray[np.float64]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 215, 50),
    "purple": (150, 50, 170),
    "cyan": (60, 200, 220),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
COUNTS = {"one": 1, "two": 2, "three": 3}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
TEXTURES = (
    "striped",
    "banded",
    "zigzagged",
    "dotted",
    "chequered",
    "honeycombed",
    "meshed",
    "woven",
    "fibrous",
    "speckled",
)
HELD_OUT: frozenset[tuple[str, frozenset[str]]] = frozenset(
    {
        ("circle", frozenset({"red", "cyan"})),
        ("square", frozenset({"yellow", "blue"})),
        ("triangle", frozenset({"green", "black"})),
        ("ring", frozenset({"purple", "white"})),
        ("striped", frozenset({"red", "blue"})),
        ("chequered", frozenset({"green", "yellow"})),
        ("dotted", frozenset({"purple", "cyan"})),
        ("zigzagged", frozenset({"white", "blue"})),
    }
)
"""(kind, its two colours) that are never drawn for training."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows; everything its caption says and nothing else.

    Attributes:
        kind: one of ``SHAPES`` or ``TEXTURES``.
        colours: shapes: (shape, ground); textures: the two colours in the order of the caption, or empty for grey.
        count: number of shapes, 0 for a texture.
    """

    kind: str
    colours: tuple[str, ...]
    count: int = 0

    @property
    def caption(self) -> str:
        """The caption of the picture, which is also the prompt that asks for it."""
        if self.count:
            number = next(word for word, value in COUNTS.items() if value == self.count)
            plural = {"cross": "crosses"}.get(self.kind, self.kind + "s") if self.count > 1 else self.kind
            return f"{number} {self.colours[0]} {plural} on a {self.colours[1]} background"
        return f"a {' and '.join(self.colours) if self.colours else 'grey'} {self.kind} texture"

    @property
    def is_held_out(self) -> bool:
        """Whether this combination is kept out of training pictures."""
        return (self.kind, frozenset(self.colours)) in HELD_OUT


def draw_scene(random: np.random.Generator, *, texture_share: float = 0.6, grey_share: float = 0.4) -> Scene:
    """Draw what the next picture shows, never a held-out combination.

    Args:
        random: source of randomness.
        texture_share: share of textures among all pictures, in [0, 1].
        grey_share: share of grey ones among the textures, in [0, 1].
    """
    while True:
        is_texture = random.random() < texture_share
        kind = str(random.choice(TEXTURES if is_texture else SHAPES))
        colours: tuple[str, ...] = tuple(map(str, random.choice(list(COLOURS), size=2, replace=False)))
        if is_texture and random.random() < grey_share:
            colours = ()
        scene = Scene(kind=kind, colours=colours, count=0 if is_texture else int(random.integers(1, 4)))
        if not scene.is_held_out:
            return scene


def render(scene: Scene, random: np.random.Generator, size: int = 64) -> Pixels:
    """Render a scene; sizes, places, angles, contrast and noise come from ``random``.

    Args:
        scene: what to show.
        random: source of randomness.
        size: side in px; patterns scale with it (lengths below are for 64 px).

    Returns:
        (size, size, 3) uint8. Grey scenes have three equal channels.
    """
    rows, columns = (np.mgrid[0:size, 0:size] + 0.5) * (64 / size)
    if scene.count:
        mask = _place_shapes(scene.kind, scene.count, rows, columns, random)
        ground, figure = _jitter(scene.colours[1], random), _jitter(scene.colours[0], random)
    else:
        mask = _PATTERNS[scene.kind](rows, columns, random)
        if not scene.colours:
            return _grey(mask, random)
        first, second = random.permutation(2)
        ground, figure = _jitter(scene.colours[first], random), _jitter(scene.colours[second], random)
    picture = ground + mask[..., None] * (figure - ground)
    picture += random.normal(0.0, random.uniform(0.0, 4.0), picture.shape)
    return picture.clip(0, 255).round().astype(np.uint8)


def picture(seed: int, index: int, size: int = 64) -> tuple[Scene, Pixels]:
    """Return scene and picture number ``index`` of the stream of ``seed``."""
    random = np.random.default_rng((seed, index))
    scene = draw_scene(random)
    return scene, render(scene, random, size)


def _jitter(colour: str, random: np.random.Generator) -> Field:
    """Vary a named colour a little, so that a name is a range and not a value."""
    return np.asarray(COLOURS[colour], dtype=np.float64) + random.uniform(-12, 12, 3)


def _grey(mask: Field, random: np.random.Generator) -> Pixels:
    """Turn a pattern into a grey picture with the flaws of a scanner: blur, uneven light, noise."""
    low, high = random.uniform(10, 130), random.uniform(60, 125)
    if random.random() < 0.5:
        mask = 1.0 - mask
    rows, columns = np.linspace(-1, 1, mask.shape[0])[:, None], np.linspace(-1, 1, mask.shape[1])[None, :]
    light = random.uniform(-12, 12) * rows + random.uniform(-12, 12) * columns
    picture = ndimage.gaussian_filter(low + high * mask, random.uniform(0.0, 0.9)) + light
    grain = ndimage.gaussian_filter(random.normal(0.0, 1.0, mask.shape), random.uniform(0.0, 0.6))
    picture += grain * (random.uniform(0.0, 14.0) / grain.std())
    return np.repeat(picture.clip(0, 255).round().astype(np.uint8)[..., None], 3, axis=-1)


def _edge(distance: Field) -> Field:
    """Signed distance in px (negative inside) to coverage in [0, 1] with a one-pixel edge."""
    return np.clip(0.5 - distance, 0.0, 1.0)


def _rotate(rows: Field, columns: Field, angle: float) -> tuple[Field, Field]:
    """Rotate coordinates by ``angle`` radians."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return cosine * rows - sine * columns, sine * rows + cosine * columns


def _place_shapes(kind: str, count: int, rows: Field, columns: Field, random: np.random.Generator) -> Field:
    """Cover of ``count`` shapes that neither touch each other nor the border."""
    low, high = {1: (13.0, 20.0), 2: (10.0, 13.0), 3: (8.0, 10.5)}[count]
    while True:
        radius = random.uniform(low, high)
        centres = random.uniform(radius + 2, 62 - radius, (count, 2))
        gaps = np.linalg.norm(centres[:, None] - centres[None], axis=-1) + 1e9 * np.eye(count)
        if gaps.min() > 2.4 * radius:
            break
    mask = np.zeros_like(rows)
    for row, column in centres:
        y, x = _rotate(rows - row, columns - column, random.uniform(-0.2, 0.2))
        mask = np.maximum(mask, _edge(_distance(kind, y, x, radius)))
    return mask


def _distance(kind: str, y: Field, x: Field, radius: float) -> Field:
    """Signed distance (a lower bound is enough for a one-pixel edge) of a centred shape of that radius."""
    if kind == "circle":
        return np.hypot(y, x) - radius
    if kind == "ring":
        return np.abs(np.hypot(y, x) - 0.78 * radius) - 0.22 * radius
    if kind == "square":
        return np.maximum(np.abs(y), np.abs(x)) - 0.85 * radius
    if kind == "triangle":
        return np.maximum(y - 0.5 * radius, 0.866 * np.abs(x) - 0.5 * y - 0.5 * radius)
    arm, width = radius, 0.3 * radius
    return np.minimum(
        np.maximum(np.abs(y) - arm, np.abs(x) - width),
        np.maximum(np.abs(x) - arm, np.abs(y) - width),
    )


def _wave(phase: Field, duty: float = 0.5, sharpness: float = 6.0) -> Field:
    """Square-like wave of period 1 in [0, 1]; ``duty`` is the share of ones."""
    return np.clip(0.5 + sharpness * (duty / 2 - np.abs((phase % 1.0) - 0.5)), 0.0, 1.0)


def _striped(rows: Field, columns: Field, random: np.random.Generator) -> Field:
    """Slanted stripes of equal width."""
    angle = random.choice([-1, 1]) * random.uniform(0.5, 1.1)
    return _wave(_rotate(rows, columns, angle)[0] / random.uniform(8, 14) + random.random())


def _banded(rows: Field, columns: Field, random: np.random.Generator) -> Field:
    """Broad level bands with soft edges."""
    level, _ = _rotate(rows, columns, random.uniform(-0.08, 0.08))
    return _wave(level / random.uniform(15, 24) + random.random(), random.uniform(0.4, 0.6), 2.5)


def _zigzagged(rows: Field, columns: Field, random: np.random.Generator) -> Field:
    """Level stripes bent into a triangle wave."""
    across = columns / random.uniform(14, 22) + random.random()
    bend = random.uniform(7, 11) * 2 * np.abs((across % 1.0) - 0.5)
    return _wave((rows + bend) / random.uniform(10, 15) + random.random())


def _dotted(rows: Field, columns: Field, random: np.random.Generator) -> Field:
    """Discs on a square lattice, every other row shifted or not."""
    period = random.uniform(12, 18)
    row = rows / period + random.random()
    shift = random.choice([0.0, 0.5]) * (np.floor(row) % 2)
    column = columns / period + random.random() + shift
    return _edge(period * (np.hypot(row % 1.0 - 0.5, column % 1.0 - 0.5) - random.uniform(0.24, 0.32)))


def _chequered(rows: Field, columns: Field, random: np.random.Generator) -> Field:
    """A chess board."""
    period = random.uniform(14, 26)
    shift = random.random(2)
    vertical, horizontal = _wave(rows / period + shift[0], 0.5, 10), _wave(columns / period + shift[1], 0.5, 10)
    return vertical * horizontal + (1 - vertical) * (1 - horizontal)


def _honeycombed(rows: Field, columns: Field, random: np.random.Generator) -> Field:
    """Walls between the cells of a hexagonal lattice."""
    pitch = random.uniform(13, 20)
    origin = random.uniform(0, pitch, 2)
    index = np.arange(-2, int(64 / pitch / 0.866) + 4)
    row, column = (grid.ravel() for grid in np.meshgrid(index, index, indexing="ij"))
    centre_rows, centre_columns = 0.866 * pitch * row - origin[0], pitch * (column + 0.5 * (row % 2)) - origin[1]
    distances = np.hypot(rows[..., None] - centre_rows, columns[..., None] - centre_columns)
    nearest = np.partition(distances, 1, axis=-1)
    return _edge((nearest[..., 1] - nearest[..., 0]) / 2 - random.uniform(1.1, 1.9))


def _meshed(rows: Field, columns: Field, random: np.random.Generator) -> Field:
    """A net of thin lines at 45 degrees."""
    first, second = _rotate(rows, columns, np.pi / 4 + random.uniform(-0.1, 0.1))
    period, width = random.uniform(9, 14), random.uniform(0.18, 0.28)
    lines = _wave(first / period + random.random(), width, 8), _wave(second / period + random.random(), width, 8)
    return np.maximum(*lines)


def _woven(rows: Field, columns: Field, random: np.random.Generator) -> Field:
    """A flat basket of strips, seen from above: over and under alternate, each strip is rounded."""
    period = random.uniform(9, 15)
    row, column = rows / period + random.random(), columns / period + random.random()
    is_over = (np.floor(row) + np.floor(column)) % 2 == 0
    along_rows, along_columns = np.abs(row % 1.0 - 0.5), np.abs(column % 1.0 - 0.5)
    over = 0.75 + 0.25 * np.cos(2 * np.pi * along_rows)
    under = 0.30 + 0.30 * np.cos(2 * np.pi * along_columns)
    gap = np.where(is_over, along_rows, along_columns) > 0.44
    return np.where(gap, 0.0, np.where(is_over, over, np.maximum(under, 0.0)))


def _fibrous(rows: Field, columns: Field, random: np.random.Generator) -> Field:
    """Long wavy streaks in one direction: noise smoothed along it."""
    size = rows.shape[0]
    scale = size / 64
    noise = random.normal(0.0, 1.0, (2 * size, 2 * size))
    streaks = ndimage.gaussian_filter(noise, (random.uniform(0.6, 1.4) * scale, random.uniform(8, 16) * scale))
    along, across = _rotate(rows - 32, columns - 32, random.uniform(0, np.pi))
    bend = random.uniform(0, 3) * np.sin(2 * np.pi * along / random.uniform(30, 60) + random.uniform(0, 6))
    points = np.stack([(across + bend) * scale + size, along * scale + size])
    return _stretch(ndimage.map_coordinates(streaks, points, order=1, mode="wrap"), 1.2)


def _speckled(rows: Field, columns: Field, random: np.random.Generator) -> Field:
    """Irregular blobs of one size: smoothed noise, cut at its median."""
    noise = random.normal(0.0, 1.0, rows.shape)
    return _stretch(ndimage.gaussian_filter(noise, random.uniform(1.2, 2.2) * rows.shape[0] / 64, mode="wrap"), 3.0)


def _stretch(values: Field, gain: float) -> Field:
    """Centre and scale a random field into [0, 1]."""
    return np.clip(0.5 + gain * 0.25 * (values - values.mean()) / values.std(), 0.0, 1.0)


_PATTERNS: dict[str, Callable[[Field, Field, np.random.Generator], Field]] = {
    "striped": _striped,
    "banded": _banded,
    "zigzagged": _zigzagged,
    "dotted": _dotted,
    "chequered": _chequered,
    "honeycombed": _honeycombed,
    "meshed": _meshed,
    "woven": _woven,
    "fibrous": _fibrous,
    "speckled": _speckled,
}
