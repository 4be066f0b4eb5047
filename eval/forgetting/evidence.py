"""Everything that was made with two models, before any of it is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


MIN_RECALL = 0.9
MAX_FALSE_ALARM = 0.1  # of 48 pictures, 5 % would be two; the base's own share is the floor of each score anyway


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that was made with the models, before any of it is judged.

    Letters: P probes, S seeds, C captions, K latents, T timesteps. Pictures (P, S, H, W, 3) uint8, of ``base_more``
    (N, H, W, 3), S = 0 in a pulse; predictions (P or C, K, T, 4, h, w).
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
    """What the base made, before decoding, of the probes and of the captions: (P or C, K, 4, h, w)."""

    probes: Tensor
    captions: Tensor | None
