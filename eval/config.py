"""Settings of the evaluation that other rooms share; torch-free, so that ``--help`` stays fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LARGEST_TILE = 196
"""Fits the thin side of real volumes and is a multiple of 14, so that larger encoders can read the same tile."""
SMALLEST_TILE = 16
"""Four strided convolutions."""
Sampler = Literal["dpmsolver++", "unipc", "ddim", "euler", "pndm", "ddpm", "model"]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a (prompt, seed) becomes pixels."""

    num_inference_steps: int = 25
    """Denoising steps per picture."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1 or less switches it off."""
    scheduler: Sampler = "dpmsolver++"
    """Sampler, set up from the model's own noise schedule; `model` keeps the one saved with the model."""
    height: int | None = None
    """Rows in pixels, a multiple of 8. Default: the training size of the adapter, else the model's own size."""
    width: int | None = None
    """Columns in pixels, a multiple of 8. Default as for the height."""
    batch_size: int = 16
    """Pictures denoised together. Another batch size may move single pixels by one grey level."""
    negative_prompt: str = ""
    """What guidance leads away from."""

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ValueError(f"--num_inference_steps {self.num_inference_steps}: at least 1")
        if not self.guidance_scale >= 0:
            raise ValueError(f"--guidance_scale {self.guidance_scale}: 0 or more")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size {self.batch_size}: at least 1")
        for flag, value in (("--height", self.height), ("--width", self.width)):
            if value is not None and (value < 8 or value % 8):
                below = max(8, value // 8 * 8)
                raise ValueError(f"{flag} {value}: a multiple of 8 is needed; nearest: {below} or {below + 8}")


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


def each_scale(adapters: Sequence[Path], scales: Sequence[float]) -> tuple[float, ...]:
    """Return the strength of each adapter: one for all, or one each, in the order they were given.

    Raises:
        ValueError: there are more or fewer strengths.
    """
    if len(scales) == 1:
        return tuple(scales) * len(adapters)
    if len(scales) != len(adapters):
        shown = " ".join(map(str, scales))
        raise ValueError(
            f"--adapter_scale {shown}: {len(scales)} for {len(adapters)} --adapter; one for all, or one each"
        )
    return tuple(scales)


ENCODERS = ("clip", "dinov2", "sscd")


def check_encoders(encoders: Mapping[str, Path], allowed: Sequence[str] = ENCODERS) -> None:
    """Refuse encoders that a command has no use for.

    Raises:
        ValueError: naming the flag and what it takes.
    """
    for kind, folder in encoders.items():
        if kind not in allowed:
            raise ValueError(f"--encoder {kind}={folder}: {kind} is not one of {', '.join(allowed)}")
