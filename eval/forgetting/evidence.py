"""Everything that was made with two models, before any of it is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that was made with the models, before any of it is judged.

    Shapes: P is the number of probes, S of seeds, C of captions, K of latents and T of timesteps. Pictures are
    (P, S, H, W, 3) uint8, with S = 0 in a pulse; those of ``base_more`` are (N, H, W, 3). Predictions are
    (P, K, T, 4, h, w), of the captions (C, K, T, 4, h, w).
    """

    base: NDArray[np.uint8]
    base_again: NDArray[np.uint8]
    base_more: NDArray[np.uint8]
    tuned: NDArray[np.uint8]
    base_predictions: Tensor
    tuned_predictions: Tensor
    captions: tuple[str, ...]
    base_caption_predictions: Tensor | None
    tuned_caption_predictions: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What the base made of the probes, (P, K, 4, h, w), and of the captions, (C, K, 4, h, w), before decoding."""

    probes: Tensor
    captions: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Views:
    """What an encoder sees, as vectors of length 1: texts (P, D), or None without a text side; pictures (P, S, D)."""

    kind: str
    texts: NDArray[np.float64] | None
    tuned: NDArray[np.float64]
    base: NDArray[np.float64]
    base_again: NDArray[np.float64]
