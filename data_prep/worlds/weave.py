"""Any plane of a woven volume.

A yarn is stored as two maps over the plane, centre height and half height, so a plane of the volume costs a few array
operations and is drawn alone: memory does not depend on the number of planes, nor bytes on how they are grouped.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_prep.worlds.config import PhantomConfig
from data_prep.worlds.flaws import add_voids, draw_rings, outside_circle
from data_prep.worlds.geometry import geometry_of
from data_prep.worlds.yarns import WARP, WEFT, Floats, Layer, draw_layer, draw_texture


class Weave:
    """Draws any plane of a volume from its seed and options alone."""

    def __init__(self, config: PhantomConfig) -> None:
        self.config = config
        self.look = config.look()
        self.geometry = geometry_of(config)
        pitches = (self.geometry.layer_height, self.geometry.weft_pitch, self.geometry.warp_pitch)
        self._origin = self.random("origin").uniform(size=3) * pitches
        self._texture = draw_texture(config, self.random("texture"))
        self._layer = lru_cache(maxsize=8)(self._draw_layer)
        self.outside = outside_circle(config.shape[1:]) if config.cylinder else None
        self.rings = draw_rings(config, self.random("rings")) if config.rings else None

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
            add_voids(z, grey, labels, fraction=self.look.void_fraction, random_of=self.random)
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

    def _streaks(self, layer: Layer, height: Floats, inside: NDArray[np.intp]) -> Floats:
        """Look the fibre texture up in coordinates that follow the yarn."""
        _, n_s, n_u = self._texture.shape
        steps = np.rint(2 * height[inside]).astype(np.int32) * np.int32(n_s * n_u)
        return self._texture.ravel()[(layer.streaks.ravel()[inside] + steps) & (self._texture.size - 1)]

    def _draw_layer(self, kind: int, index: int) -> Layer:
        """Draw one layer; those near a plane are kept for the next."""
        random = self.random("layer", kind, index)
        shape = self._texture.shape
        return draw_layer(self.config, kind, index, origin=self._origin, texture=shape, random=random)
