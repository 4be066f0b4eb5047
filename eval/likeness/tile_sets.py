"""The tiles of a likeness check: real ones to learn from, set aside and held out, and generated ones."""

from __future__ import annotations

from dataclasses import dataclass

from eval.tiles.features import Tiles


@dataclass(frozen=True, kw_only=True)
class TileSets:
    """The tiles of one check; ``owners`` gives the generated picture each generated tile belongs to."""

    learning: Tiles
    aside: Tiles
    held_out: Tiles
    generated: Tiles
    owners: list[int]
