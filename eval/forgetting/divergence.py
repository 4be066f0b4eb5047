"""How far the predictions of a tuned denoiser are from those of its base, on inputs the base itself made.

Shapes: P prompts, K latents per prompt, T timesteps, latents (P, K, 4, h, w). It costs a few pictures' worth of forward
passes and is exactly zero where nothing changed. It says how far, not whether that is bad.
"""

from __future__ import annotations

from torch import Tensor

from eval.stats.arrays import Floats


def divergence_parts(tuned: Tensor, base: Tensor) -> tuple[Floats, Floats]:
    """Return the squared difference and the squared base prediction, each a mean over pixels and timesteps, (P, K).

    Args:
        tuned: predictions of the tuned model, (P, K, T, 4, h, w).
        base: those of the base model, the same shape.
    """
    if tuned.shape != base.shape:
        raise ValueError(f"predictions of different shape: {tuple(tuned.shape)} and {tuple(base.shape)}")
    difference = (tuned.double() - base.double()).square().flatten(2).mean(2)
    scale = base.double().square().flatten(2).mean(2)
    return difference.numpy(), scale.numpy()


def divergence(difference: Floats, scale: Floats) -> float:
    """Return the relative mean squared difference: 0 for no change, 1 for a change as large as the prediction."""
    return float(difference.sum() / scale.sum())
