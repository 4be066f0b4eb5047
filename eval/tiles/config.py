"""Settings of the tiles that are compared, and of local encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LARGEST_TILE = 196
"""Fits the thin side of real volumes and is a multiple of 14, so that larger encoders can read the same tile."""
SMALLEST_TILE = 16
"""Four strided convolutions."""


@dataclass(frozen=True, kw_only=True)
class SlicesConfig:
    """Which real and generated slices are compared, and how they are cut."""

    real: Path
    """Dataset folder written by `python -m data_prep.slice`, with its train/ and validation/."""
    generated: Path
    """Folder written by `python -m eval.generate`, with its records.jsonl."""
    pretrained_model_name_or_path: str | None = None
    """Model behind the slices; its VAE gives the round trip. Default: the one named in the records."""
    vocabulary: Path | None = None
    """YAML file with the words of the captions. Default: the built-in ones."""
    tile_size: int | None = None
    """Side of the tiles compared, in px, at native scale. Default: what fits real and generated slices, at most 196."""
    bootstrap_draws: int = 500
    """Resamples behind each interval."""
    seed: int = 0
    """Of the tiles drawn, of whatever is trained on them, and of the resampling."""

    def __post_init__(self) -> None:
        """Refuse tiles and intervals that say nothing."""
        if self.bootstrap_draws < 100:
            raise ValueError(f"--bootstrap_draws {self.bootstrap_draws}: at least 100")
        if self.tile_size is not None and self.tile_size < SMALLEST_TILE:
            raise ValueError(f"--tile_size {self.tile_size}: at least {SMALLEST_TILE} px")


ENCODERS = ("clip", "dinov2", "sscd")


def check_encoders(encoders: Mapping[str, Path], allowed: Sequence[str] = ENCODERS) -> None:
    """Refuse encoders that a command has no use for.

    Raises:
        ValueError: naming the flag and what it takes.
    """
    for kind, folder in encoders.items():
        if kind not in allowed:
            raise ValueError(f"--encoder {kind}={folder}: {kind} is not one of {', '.join(allowed)}")
