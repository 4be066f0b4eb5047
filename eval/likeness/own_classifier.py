"""The generator as its own classifier: under which caption is a held-out slice least surprising to the model?

No other network is involved, so it shows whether the words mean anything to the model, even where its pictures are not
yet good enough for a classifier. Source: Li et al. 2023, Your diffusion model is secretly a zero-shot classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from data_prep.folders.results import Result, Verdict
from eval.stats.distances import Floats, Ints, accuracy_interval
from finetune.diffusion.fixed_noise import denoising_losses
from finetune.diffusion.vae import slice_latents

if TYPE_CHECKING:
    from eval.tiles.features import Grey
    from finetune.diffusion.models import Models

FEWEST = 32


def caption_losses(
    models: Models, pictures: Grey, captions: Sequence[str], *, num_timesteps: int = 8, seed: int = 0
) -> Floats:
    """Return the loss of each picture (N, H, W) under each caption, (N, C): same noise and timesteps for all."""
    latents = slice_latents(models, pictures)
    columns = [
        denoising_losses(models, latents, [caption] * len(pictures), num_timesteps=num_timesteps, seed=seed).mean(
            axis=1
        )
        for caption in tqdm(captions, desc="own classifier", unit="caption", disable=None)
    ]
    return np.stack(columns, axis=1)


def own_classifier_rows(
    losses: Floats, truth: dict[str, Ints], classes: dict[str, Ints], blocks: Ints, *, draws: int, seed: int
) -> list[Result]:
    """Return how often the least surprising caption names the right state, axis, and both.

    Args:
        losses: (N, C).
        truth: ``state`` and ``axis`` of each picture, (N,).
        classes: the same of each caption, (C,).
        blocks: (N,) slab of each picture.
        draws: resamples behind the intervals.
        seed: of the resampling.
    """
    chosen = losses.argmin(axis=1)
    strata = truth["state"] * 1000 + truth["axis"]
    rows = []
    for head in ("state", "axis"):
        number = int(classes[head].max()) + 1
        read = classes[head][chosen]
        interval = accuracy_interval(truth[head], read, number, strata, blocks, draws=draws, seed=seed)
        chance = 1 / number
        verdict: Verdict = "ok" if interval.low > chance else "warn"
        reason = f"held-out slices; chance is {chance:.2f}"
        if verdict == "warn":
            reason = f"not above chance ({chance:.2f}): the words of the {head} mean nothing to the model"
        if len(losses) < FEWEST:
            verdict, reason = "grey", f"{len(losses)} slices, judged from {FEWEST}"
        row = Result(
            metric=f"own_classifier_{head}",
            set="held_out",
            n=len(losses),
            n_eff=float(len(np.unique(blocks))),
            floor=chance,
            unit="share",
        )
        filled = replace(
            row, value=interval.value, low=interval.low, high=interval.high, verdict=verdict, reason=reason
        )
        rows.append(filled)
    return rows
