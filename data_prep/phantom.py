"""Draw a synthetic 3D-woven volume of known geometry and write it as TIFF.

    python -m data_prep.phantom --state dry --shape 359 702 970 --dtype uint16 --seed 0 --output dry.tif

Writes ``dry.tif``, ``dry.truth.json`` and, with ``--labels``, ``dry.labels.tif`` (uint8: 0 matrix, air or void, 1 warp,
2 weft, 3 outside the field of view).

The weave is a layer-to-layer interlock. Z is the thickness, Y the warp direction, X the weft direction. Weft yarns are
nearly straight and lie in layers. Each warp yarn waves along Y, over one weft column and under the next, and so binds
its layer to the two neighbours; neighbouring warp yarns are in opposite phase. A slice perpendicular to Y (a warp
slice) shows the cross-sections of the warp, one perpendicular to X those of the weft between waving warp.

A yarn is stored as two maps over the plane, centre height and half height, so a plane of the volume costs a few array
operations and is drawn alone: memory does not depend on the number of planes, nor bytes on how they are grouped.

Legend: Z, Y, X voxels; a yarn runs along ``s``, ``u`` is the offset across it in the plane, ``v`` the one along Z.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import fft, ndimage
from tqdm import tqdm

from configs.errors import TisserandError, UsageError
from configs.load import as_dict, command
from data_prep.folders.hashes import sha256_of
from data_prep.folders.publish import check_writable

MATRIX, WARP, WEFT, OUTSIDE = range(4)
VOID_GREY = 10.0

Floats = NDArray[np.float32]
State = Literal["dry", "dry_compacted", "injected"]

# Counts per grey level of 255, and counts at level 0. The offset of uint16 keeps noise and 0 outside apart.
_CALIBRATION = {"uint8": (1.0, 0.0), "uint16": (160.0, 12000.0), "float32": (1 / 255, 0.0)}


@dataclass(frozen=True, kw_only=True)
class Look:
    """What distinguishes a state: shares of the pitch or of the compacted layer height, and grey levels of 255.

    Attributes:
        compaction: layer height over that of the loose fabric.
        warp_width, weft_width: yarn width over pitch.
        warp_thickness, weft_thickness: yarn thickness over layer height; a sum above 1 presses yarns into each other.
        flatness: exponent of the cross-section, 2 an ellipse, more a flattened one.
        nesting: shift of odd layers along the warp, over the weft pitch.
        wander: spread of yarn paths, over the pitch and the layer height.
        matrix_grey, yarn_grey: level between the yarns and in them.
        streak_grey: spread of the fibre texture inside yarns.
        edge_px: depth over which a yarn reaches its own level.
        blur_px: standard deviation of the point spread.
        void_fraction: voids over matrix.
        packing: fibres over yarn volume.
    """

    compaction: float
    warp_width: float
    warp_thickness: float
    weft_width: float
    weft_thickness: float
    flatness: float
    nesting: float
    wander: float
    matrix_grey: float
    yarn_grey: float
    streak_grey: float
    edge_px: float
    blur_px: float
    void_fraction: float
    packing: float


# One calibration for all: air near 28, resin near 150, and a yarn brighter the more fibre and resin it holds. The greys
# span most of 0 to 255, so that a percentile window hardly stretches them and the noise keeps its level.
LOOKS: dict[str, Look] = {
    "dry": Look(
        compaction=1.0,
        warp_width=0.76,
        warp_thickness=0.46,
        weft_width=0.72,
        weft_thickness=0.48,
        flatness=2.0,
        nesting=0.0,
        wander=0.035,
        matrix_grey=26.0,
        yarn_grey=182.0,
        streak_grey=24.0,
        edge_px=1.5,
        blur_px=0.7,
        void_fraction=0.0,
        packing=0.52,
    ),
    "dry_compacted": Look(
        compaction=0.64,
        warp_width=0.96,
        warp_thickness=0.66,
        weft_width=0.94,
        weft_thickness=0.64,
        flatness=3.5,
        nesting=0.25,
        wander=0.025,
        matrix_grey=26.0,
        yarn_grey=188.0,
        streak_grey=20.0,
        edge_px=1.5,
        blur_px=0.7,
        void_fraction=0.0,
        packing=0.62,
    ),
    "injected": Look(
        compaction=0.80,
        warp_width=0.9,
        warp_thickness=0.56,
        weft_width=0.86,
        weft_thickness=0.56,
        flatness=2.5,
        nesting=0.12,
        wander=0.03,
        matrix_grey=142.0,
        yarn_grey=206.0,
        streak_grey=12.0,
        edge_px=2.5,
        blur_px=0.9,
        void_fraction=0.04,
        packing=0.58,
    ),
}


# From nano tomography to hand-sized voxels; and the longest of the weave's lengths, which numbers can still hold.
VOXEL_UM = (1e-3, 1e5)
MOST_VOXELS = 100_000


@dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """A synthetic woven volume. Options left unset take the value of the state."""

    state: State
    """dry: loose, dark gaps; dry_compacted: thinner, nested, small gaps; injected: bright matrix, low contrast."""
    shape: tuple[int, int, int]
    """Voxels along Z (thickness), Y (warp direction) and X (weft direction)."""
    output: Path
    """The .tif file to write; the truth goes beside it as <stem>.truth.json."""
    dtype: Literal["uint8", "uint16", "float32"] = "uint16"
    """Type of the voxels. float32 holds grey levels of 255 over 255, not clipped."""
    seed: int = 0
    """Same seed and options, same bytes."""
    voxel_um: float = 80.0
    """Edge of a voxel."""
    warp_pitch_um: float = 2080.0
    """Distance between neighbouring warp yarns, along X."""
    weft_pitch_um: float = 3200.0
    """Distance between neighbouring weft columns, along Y."""
    layer_height_um: float = 1440.0
    """Distance between weft layers of the loose fabric, along Z, before compaction."""
    compaction: float | None = None
    """Layer height over that of the loose fabric, 0.3 to 1.5 (dry 1, dry_compacted 0.64, injected 0.8)."""
    crimp: float = 0.8
    """Amplitude of the warp's wave over half a layer height, 0 to 1.5; about 1 binds neighbouring layers."""
    weft_crimp: float = 0.08
    """Amplitude of the weft's wave over half a layer height, 0 to 1.5."""
    streak_grey: float | None = None
    """Spread of the fibre texture inside yarns, in grey levels of 255, before blur."""
    streak_width_um: float = 96.0
    """Width of the streaks of the fibre texture, as the standard deviation of a Gaussian."""
    streak_length_um: float = 1600.0
    """Length of the streaks along the yarn, as the standard deviation of a Gaussian."""
    blur_px: float | None = None
    """Standard deviation of the point spread, in voxels, 0 to 5."""
    noise_sigma: float = 8.0
    """Standard deviation of the white noise, in grey levels of 255; a percentile window can only raise it."""
    void_fraction: float | None = None
    """Voids over matrix, 0 to 0.3."""
    rings: float = 0.0
    """Spread of ring artefacts about the centre of the plane, in grey levels of 255."""
    cylinder: bool = False
    """Set voxels outside the circle inscribed in the plane to 0, as a reconstruction does."""
    labels: bool = False
    """Write <stem>.labels.tif too."""
    overwrite: bool = False
    """Replace an output that exists."""

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"--shape {' '.join(map(str, self.shape))}: every side must be at least 1 voxel")
        if self.output.suffix.lower() not in {".tif", ".tiff"}:
            raise ValueError(f"--output {self.output}: the name must end in .tif or .tiff")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must be 0 or more")
        low, high = VOXEL_UM
        if not low <= self.voxel_um <= high:
            raise ValueError(f"--voxel_um {self.voxel_um:g}: must lie in [{low:g}, {high:g}] um")
        for name, low in (
            ("warp_pitch_um", 4),
            ("weft_pitch_um", 4),
            ("layer_height_um", 4),
            ("streak_width_um", 0.01),
            ("streak_length_um", 0.01),
        ):
            value, voxels = getattr(self, name), getattr(self, name) / self.voxel_um
            if not low <= voxels <= MOST_VOXELS:
                ends = f"{low * self.voxel_um:g} to {MOST_VOXELS * self.voxel_um:g} um"
                raise ValueError(f"--{name} {value:g}: must be {low:g} to {MOST_VOXELS} voxels, {ends}")
        for name, low, high in (
            ("compaction", 0.3, 1.5),
            ("crimp", 0.0, 1.5),
            ("weft_crimp", 0.0, 1.5),
            ("streak_grey", 0.0, 128.0),
            ("blur_px", 0.0, 5.0),
            ("noise_sigma", 0.0, 128.0),
            ("void_fraction", 0.0, 0.3),
            ("rings", 0.0, 128.0),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name} {value:g}: must lie in [{low:g}, {high:g}]")

    def look(self) -> Look:
        """Return the look of the state with the options that were set put in."""
        chosen = {
            "compaction": self.compaction,
            "streak_grey": self.streak_grey,
            "blur_px": self.blur_px,
            "void_fraction": self.void_fraction,
        }
        return replace(LOOKS[self.state], **{name: value for name, value in chosen.items() if value is not None})


class Geometry(NamedTuple):
    """Lengths of the weave in voxels, after compaction; a wave is the amplitude of a yarn's path along Z."""

    warp_pitch: float
    weft_pitch: float
    layer_height: float
    warp_wave: float
    weft_wave: float


def geometry_of(config: PhantomConfig) -> Geometry:
    """Return the lengths that the options ask for."""
    layer_height = config.layer_height_um / config.voxel_um * config.look().compaction
    return Geometry(
        warp_pitch=config.warp_pitch_um / config.voxel_um,
        weft_pitch=config.weft_pitch_um / config.voxel_um,
        layer_height=layer_height,
        warp_wave=config.crimp * layer_height / 2,
        weft_wave=config.weft_crimp * layer_height / 2,
    )


class Layer(NamedTuple):
    """One layer of yarns of one direction, as maps over the plane (Y, X)."""

    centre: Floats  # height of the yarn's middle, in planes
    half: Floats  # half thickness along Z, in planes; 0 or less between yarns
    tone: Floats  # grey level of the yarn beside that of its kind
    streaks: NDArray[np.int32]  # where this column of voxels starts in the texture


class Weave:
    """Draws any plane of a volume from its seed and options alone."""

    def __init__(self, config: PhantomConfig) -> None:
        self.config = config
        self.look = config.look()
        self.geometry = geometry_of(config)
        pitches = (self.geometry.layer_height, self.geometry.weft_pitch, self.geometry.warp_pitch)
        self._origin = self.random("origin").uniform(size=3) * pitches
        self._texture = self._draw_texture()
        self._layer = lru_cache(maxsize=8)(self._draw_layer)
        self.outside = _outside_circle(config.shape[1:]) if config.cylinder else None
        self.rings = self._draw_rings() if config.rings else None

    def plane(self, z: int) -> tuple[Floats, NDArray[np.uint8]]:
        """Return grey levels before blur and noise, and labels, of plane ``z``, which may lie beyond the volume.

        Where yarns overlap, the voxel goes to the one it lies deeper in: the boundary is then a contact surface.
        """
        shape = self.config.shape[1:]
        deepest = np.full(shape[0] * shape[1], -self.look.edge_px / 2, np.float32)
        labels = np.zeros(deepest.size, np.uint8)
        yarn = np.zeros(deepest.size, np.float32)
        for kind, index in self._layers_near(z):
            layer = self._layer(kind, index)
            height = (z - layer.centre).ravel()
            depth = layer.half.ravel() - np.abs(height)
            inside = np.flatnonzero(depth > deepest)
            deepest[inside] = depth[inside]
            labels[inside] = np.where(depth[inside] > 0, kind, labels[inside])
            yarn[inside] = layer.tone.ravel()[inside] + self._streaks(layer, height, inside)
        cover = np.clip(deepest / self.look.edge_px + 0.5, 0, 1)
        grey = self.look.matrix_grey + cover * (self.look.yarn_grey - self.look.matrix_grey + yarn)
        grey, labels = grey.reshape(shape), labels.reshape(shape)
        if self.look.void_fraction:
            self._add_voids(z, grey, labels)
        return grey, labels

    def random(self, *key: object) -> np.random.Generator:
        """Return the generator of one named thing, so that no draw depends on what was drawn before it."""
        digest = hashlib.sha256("/".join(map(str, (self.config.seed, *key))).encode()).digest()
        return np.random.Generator(np.random.SFC64(int.from_bytes(digest)))

    def _layers_near(self, z: int) -> list[tuple[int, int]]:
        """Return (kind, index) of the layers whose yarns can reach plane ``z``."""
        near = []
        for kind, wave, span, thickness in (
            (WARP, self.geometry.warp_wave, self.geometry.weft_pitch, self.look.warp_thickness),
            (WEFT, self.geometry.weft_wave, self.geometry.warp_pitch, self.look.weft_thickness),
        ):
            # The bounds of a yarn: steepest slope, least swell (0.9), furthest wander (sqrt 6 spreads).
            oblique = math.hypot(1, wave * math.pi / span)
            reach = wave + self.geometry.layer_height * (
                thickness / 2 * oblique / 0.9 + math.sqrt(6) * self.look.wander
            )
            reach += self.look.edge_px / 2
            middle = z - self._origin[0]
            first = math.ceil((middle - reach) / self.geometry.layer_height)
            last = math.floor((middle + reach) / self.geometry.layer_height)
            near += [(kind, index) for index in range(first, last + 1)]
        return near

    def _draw_layer(self, kind: int, index: int) -> Layer:
        """Draw the yarns of one layer; the maps are built as (u, s) and turned for the warp."""
        rows, columns = self.config.shape[1:]
        across, along = (columns, rows) if kind == WARP else (rows, columns)
        pitch, other = (
            (self.geometry.warp_pitch, self.geometry.weft_pitch)
            if kind == WARP
            else (self.geometry.weft_pitch, self.geometry.warp_pitch)
        )
        width, thickness = (
            (self.look.warp_width, self.look.warp_thickness)
            if kind == WARP
            else (self.look.weft_width, self.look.weft_thickness)
        )
        wave = self.geometry.warp_wave if kind == WARP else -self.geometry.weft_wave
        # Odd layers are shifted along the warp; the warp of a layer follows the weft that it binds.
        shift = self.look.nesting * self.geometry.weft_pitch * (index % 2)
        start_across, start_along = self._origin[2], self._origin[1] + shift
        if kind == WEFT:
            start_across, start_along = start_along, start_across

        nearest = np.round((np.arange(across) - start_across) / pitch).astype(int)
        yarn = np.arange(nearest[0], nearest[-1] + 1)
        random = self.random("layer", kind, index)
        position = np.arange(along)
        wander = self.look.wander
        lateral = start_across + pitch * (yarn[:, None] + wander * _smooth(random, yarn.size, position, 6 * other))
        phase = math.pi * ((position - start_along) / other + yarn[:, None])
        path = self._origin[0] + index * self.geometry.layer_height + wave * np.cos(phase)
        path += wander * self.geometry.layer_height * _smooth(random, yarn.size, position, 6 * other)
        # A sloping yarn is cut obliquely by the Z axis.
        oblique = np.hypot(1, wave * math.pi / other * np.sin(phase))
        swell = 1 + 0.04 * _smooth(random, yarn.size, position, 4 * other)
        half_width = swell * width * pitch / 2
        half_height = oblique / swell * thickness * self.geometry.layer_height / 2
        tone = 5 * random.standard_normal((yarn.size, 1)) + 3 * _smooth(random, yarn.size, position, 3 * other)
        offset = random.integers(0, 2**16, size=(yarn.size, 3))

        row = nearest - nearest[0]  # (across,) which yarn
        u = np.arange(across)[:, None] - lateral[row]  # (across, along)
        flat = 1 - (np.abs(u) / half_width[row]) ** self.look.flatness
        half = np.where(flat > 0, np.sqrt(np.maximum(flat, 0)), flat) * half_height[row]
        n_v, n_s, n_u = self._texture.shape
        index_s = (position // 2 + offset[row, :1]) % n_s
        index_u = (np.rint(2 * u).astype(int) + offset[row, 1:2]) % n_u
        streaks = ((offset[row, 2:] % n_v) * n_s + index_s) * n_u + index_u
        maps = (path[row].astype(np.float32), half.astype(np.float32), tone[row].astype(np.float32))
        turned = [array.T if kind == WARP else array for array in (*maps, streaks.astype(np.int32))]
        return Layer(*map(np.ascontiguousarray, turned))

    def _streaks(self, layer: Layer, height: Floats, inside: NDArray[np.intp]) -> Floats:
        """Look the fibre texture up in coordinates that follow the yarn."""
        _, n_s, n_u = self._texture.shape
        steps = np.rint(2 * height[inside]).astype(np.int32) * np.int32(n_s * n_u)
        return self._texture.ravel()[(layer.streaks.ravel()[inside] + steps) & (self._texture.size - 1)]

    def _draw_texture(self) -> Floats:
        """Draw one periodic block of streaks (v, s, u): half voxels across, 2 voxels along; sides are powers of two."""
        config = self.config
        shape = (64, 256, 128)
        white = fft.rfftn(self.random("texture").standard_normal(shape, dtype=np.float32))
        across, along = 2 * config.streak_width_um / config.voxel_um, config.streak_length_um / config.voxel_um / 2
        fine, coarse = (
            fft.irfftn(ndimage.fourier_gaussian(white, size, n=shape[2]), shape)
            for size in ((across, along, across), (3 * across, 2 * along, 3 * across))
        )
        texture = fine / fine.std() + coarse / coarse.std()
        return (self.look.streak_grey / texture.std() * texture).astype(np.float32)

    def _draw_rings(self) -> Floats:
        """Draw the ring artefacts, the same in every plane, as a worn detector pixel gives them."""
        rows, columns = self.config.shape[1:]
        y, x = np.ogrid[:rows, :columns]
        radius = np.hypot(y - (rows - 1) / 2, x - (columns - 1) / 2)
        profile = ndimage.gaussian_filter1d(self.random("rings").standard_normal(int(radius.max()) + 2), 0.7)
        return (self.config.rings * (profile / 0.64)[np.rint(radius).astype(int)]).astype(np.float32)

    def _add_voids(self, z: int, grey: Floats, labels: NDArray[np.uint8]) -> None:
        """Draw the flat ellipsoidal voids that cut plane ``z``; yarns are left as they are."""
        rows, columns = grey.shape
        block = 16
        for cell in (z // block - 1, z // block, z // block + 1):
            random = self.random("voids", cell)
            # Radius: log-normal about 2.5 voxels; the mean volume of such ellipsoids gives their number.
            volume = 4 / 3 * math.pi * 0.6 * 2.5**3 * math.exp(4.5 * 0.3**2)
            count = random.poisson(self.look.void_fraction * block * rows * columns / volume)
            radius = random.lognormal(math.log(2.5), 0.3, size=count)
            centre = random.uniform(size=(count, 3)) * (block, rows, columns) + (cell * block, 0, 0)
            left = 1 - ((z - centre[:, 0]) / (0.6 * radius)) ** 2
            for (_, y, x), reach in zip(
                centre[left > 0], (radius * np.sqrt(np.maximum(left, 0)))[left > 0], strict=True
            ):
                top, bottom = max(math.ceil(y - reach), 0), min(math.floor(y + reach) + 1, rows)
                start, end = max(math.ceil(x - reach), 0), min(math.floor(x + reach) + 1, columns)
                near_y, near_x = np.ogrid[top:bottom, start:end]
                void = (near_y - y) ** 2 + (near_x - x) ** 2 <= reach**2
                void &= labels[top:bottom, start:end] == MATRIX
                grey[top:bottom, start:end][void] = VOID_GREY


class Tally:
    """Counts of labels and grey levels, for the truth."""

    def __init__(self) -> None:
        self.labels = np.zeros(4, np.int64)
        self._levels = np.zeros(384 * 8, np.int64)  # eighths of a grey level from -64 to 320

    def add(self, grey: Floats, labels: NDArray[np.uint8]) -> None:
        """Count one plane; every fourth row is enough for the window."""
        self.labels += np.bincount(labels.ravel(), minlength=4)
        seen = grey[::4][labels[::4] != OUTSIDE]
        level = np.clip((seen + 64) * 8, 0, self._levels.size - 1).astype(np.int64)
        self._levels += np.bincount(level, minlength=self._levels.size)

    def percentile(self, percent: float) -> float:
        """Return the grey level below which ``percent`` of the voxels lie."""
        total = np.cumsum(self._levels)
        return float(np.searchsorted(total, percent / 100 * total[-1]) / 8 - 64)


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
    scale, offset = _CALIBRATION[dtype]
    counts = grey * np.float32(scale) + np.float32(offset)
    if dtype != "float32":
        limit = np.iinfo(dtype).max
        counts = np.clip(np.rint(counts), 0, limit)
    counts[labels == OUTSIDE] = 0
    return counts.astype(dtype)


def write(config: PhantomConfig, *, workers: int = 1) -> dict[str, object]:
    """Write the volume, its truth and, if asked, its labels; return the truth.

    Everything is written under temporary names and renamed at the end, the truth last.

    Raises:
        UsageError: an output exists, or its folder cannot be written to.
        TisserandError: the disk filled up or failed.
    """
    every = {
        "labels": config.output.with_suffix(".labels.tif"),
        "volume": config.output,
        "truth": config.output.with_suffix(".truth.json"),
    }
    check_writable(config.output, "--output")
    for path in every.values():
        if path.is_dir() or (path.exists() and not config.overwrite):
            raise UsageError(f"--output {config.output}: {path.name} exists; name another file or pass --overwrite")
    paths = {name: path for name, path in every.items() if name != "labels" or config.labels}
    try:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f"{config.output.stem}.partial-", dir=config.output.parent, ignore_cleanup_errors=True
        ) as room:
            parts = {name: Path(room) / path.name for name, path in paths.items()}
            tally = _write_planes(config, parts, workers)
            truth = _truth(config, tally, {name: parts[name] for name in paths if name != "truth"})
            parts["truth"].write_text(json.dumps(truth, indent=2) + "\n", encoding="utf-8")
            # A truth always belongs to the volume beside it, also when this stops half-way.
            for name in ("truth", "labels"):
                every[name].unlink(missing_ok=True)
            for name, part in parts.items():
                part.replace(paths[name])
    except OSError as error:
        raise TisserandError(f"--output {config.output}: writing failed ({error.strerror or error})") from error
    return truth


def _write_planes(config: PhantomConfig, parts: dict[str, Path], workers: int) -> Tally:
    """Draw the volume plane by plane into empty TIFF files of the right size."""
    tally = Tally()
    with contextlib.ExitStack() as files:
        volume = files.enter_context(_empty_tiff(parts["volume"], config.shape, config.dtype, config.voxel_um))
        stored = None
        if "labels" in parts:
            stored = files.enter_context(_empty_tiff(parts["labels"], config.shape, "uint8", config.voxel_um))
        planes = draw(config, workers=workers)
        for grey, labels in tqdm(planes, total=config.shape[0], desc=config.output.name, unit="plane", disable=None):
            tally.add(grey, labels)
            volume.write(to_counts(grey, labels, config.dtype).tobytes())
            if stored is not None:
                stored.write(labels.tobytes())
    return tally


@contextlib.contextmanager
def _empty_tiff(path: Path, shape: tuple[int, int, int], dtype: str, voxel_um: float) -> Iterator[BinaryIO]:
    """Open a contiguous TIFF of zeros at its first voxel; tifffile cannot fill two files plane by plane at once."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if (free := shutil.disk_usage(path.parent).free) < size:
        raise OSError(f"{size / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free")
    # ImageJ's flavour carries the voxel size along Z, but ends at 4 GB.
    is_imagej = size < 2**32 - 2**25
    tifffile.imwrite(
        path,
        shape=shape,
        dtype=dtype,
        byteorder="<",
        imagej=is_imagej,
        photometric="minisblack",
        resolution=(1 / voxel_um, 1 / voxel_um) if is_imagej else (1e4 / voxel_um, 1e4 / voxel_um),
        resolutionunit="NONE" if is_imagej else "CENTIMETER",
        metadata={"axes": "ZYX", "spacing": voxel_um, "unit": "um"},
    )
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.series[0].dataoffset
    with path.open("r+b") as file:
        file.seek(offset)
        yield file


def _truth(config: PhantomConfig, tally: Tally, files: dict[str, Path]) -> dict[str, object]:
    """Describe what was drawn: geometry, fractions counted from the labels, grey levels, options, hashes."""
    geometry, look = geometry_of(config), config.look()
    scale, offset = _CALIBRATION[config.dtype]
    voxels = dict(zip(("matrix", "warp", "weft", "outside"), map(int, tally.labels), strict=True))
    inside = max(sum(voxels.values()) - voxels["outside"], 1)
    yarn = (voxels["warp"] + voxels["weft"]) / inside
    low, high = tally.percentile(0.1), tally.percentile(99.9)
    lengths_px = {
        "warp_pitch": geometry.warp_pitch,
        "weft_pitch": geometry.weft_pitch,
        "layer_height": geometry.layer_height,
        "warp_wave_amplitude": geometry.warp_wave,
        "warp_wave_length": 2 * geometry.weft_pitch,
        "weft_wave_amplitude": geometry.weft_wave,
        "weft_wave_length": 2 * geometry.warp_pitch,
    }
    return {
        "format": 1,
        "state": config.state,
        "shape": list(config.shape),
        "axes": {"z": "thickness", "y": "warp direction", "x": "weft direction"},
        "voxel_um": config.voxel_um,
        **{f"{name}_px": value for name, value in lengths_px.items()},
        **{f"{name}_um": value * config.voxel_um for name, value in lengths_px.items()},
        "orientation_zyx": {"warp": [0, 1, 0], "weft": [0, 0, 1]},
        "warp_crimp": _crimp(geometry.warp_wave, 2 * geometry.weft_pitch),
        "weft_crimp": _crimp(geometry.weft_wave, 2 * geometry.warp_pitch),
        "voxels": voxels,
        "yarn_fraction": yarn,
        "warp_fraction": voxels["warp"] / inside,
        "weft_fraction": voxels["weft"] / inside,
        "matrix_fraction": voxels["matrix"] / inside,
        "fibre_fraction": yarn * look.packing,
        "grey": {
            "matrix": look.matrix_grey,
            "yarn": look.yarn_grey,
            "void": VOID_GREY,
            "counts_per_level": scale,
            "counts_at_0": offset,
        },
        "noise_sigma": config.noise_sigma,
        "window_0.1_99.9_percent": [low, high],
        "noise_sigma_windowed": config.noise_sigma * 255 / max(high - low, 1e-6),
        "look": asdict(look),
        "options": {name: value for name, value in as_dict(config).items() if name not in {"output", "overwrite"}},
        "sha256": {name: sha256_of(path) for name, path in files.items()},
    }


def _crimp(amplitude: float, length: float) -> dict[str, float]:
    """Return angles to the yarn's direction, and the yarn's length beyond its span, of a sinusoid."""
    slope = 2 * math.pi * amplitude / length * np.cos(np.linspace(0, 2 * math.pi, 3600, endpoint=False))
    angle = np.degrees(np.arctan(np.abs(slope)))
    return {
        "max_deg": float(angle.max()),
        "mean_deg": float(angle.mean()),
        "percent": 100 * float(np.hypot(1, slope).mean() - 1),
    }


def _smooth(random: np.random.Generator, count: int, position: NDArray[np.integer], length: float) -> Floats:
    """Draw ``count`` smooth random lines of variance 1 along ``position``: three sinusoids about ``length`` px long."""
    wave = length * random.uniform(0.6, 1.6, size=(3, count, 1))
    phase = random.uniform(0, 2 * math.pi, size=(3, count, 1))
    return np.sqrt(2 / 3) * np.sin(2 * math.pi * position / wave + phase).sum(axis=0)


def _outside_circle(shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which pixels lie outside the circle inscribed in the plane."""
    rows, columns = shape
    y, x = np.ogrid[:rows, :columns]
    return np.hypot(y - (rows - 1) / 2, x - (columns - 1) / 2) > min(shape) / 2


def main(config: PhantomConfig) -> None:
    """Write the phantom and say what it holds."""
    truth = write(config, workers=min(len(os.sched_getaffinity(0)), 4))
    print(
        f"{config.output}: {config.state}, {'x'.join(map(str, config.shape))} {config.dtype}, "
        f"{truth['yarn_fraction']:.0%} yarn; truth in {config.output.with_suffix('.truth.json').name}"
    )
    print(f"next: python -m data_prep.slice --volumes {config.state}={config.output} --output_dir data/{config.state}")


if __name__ == "__main__":
    command(PhantomConfig, main)
