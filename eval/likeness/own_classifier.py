"""The generator as its own classifier: under which caption is a held-out slice least surprising to the model?

No other network is involved, so it shows whether the words mean anything to the model, even where its pictures are not
yet good enough for a classifier. Source: Li et al. 2023, Your diffusion model is secretly a zero-shot classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
from tqdm import tqdm

from data_prep.folders.results import Result, Verdict
from eval.likeness.rows import HEADS, Head, Naming
from eval.likeness.tile_sets import block_numbers, class_numbers, leak_unchecked
from eval.stats.arrays import Floats, Grey, Ints
from eval.stats.distances import accuracy_interval
from eval.tiles.config import SlicesConfig
from eval.tiles.features import cover, draw_cuts, read_grey
from eval.tiles.sets import Generated, RealSlices, split_cuts
from finetune.diffusion.fixed_noise import denoising_losses
from finetune.diffusion.models import Models
from finetune.diffusion.tuned import load_tuned
from finetune.diffusion.vae import slice_latents
from prompts.captions import caption

FEWEST = 32


def rows_by_own_loss(
    slices: SlicesConfig,
    real: RealSlices,
    generated: Generated,
    naming: Naming,
    *,
    num_slices: int,
    num_timesteps: int,
) -> list[Result]:
    """Let the model that made the slices read held-out ones by its own loss, or say why not.

    Args:
        slices: what is compared; its seed draws the slices and the noise.
        real: the slices of the dataset.
        generated: the generated slices, whose records name the model and its adapters.
        naming: names of the classes.
        num_slices: held-out slices that are read; 0 leaves it out.
        num_timesteps: noise levels of the loss.

    Raises:
        UsageError, InputError: the model or an adapter of the records cannot be loaded.
    """
    name = slices.pretrained_model_name_or_path or generated.base_model
    why = "left out; ask for it with --classify_slices 45" if not num_slices else ""
    why = why or ("" if name else "the records name no model") or leak_unchecked(real)
    if why:
        return [Result(metric=f"own_classifier_{head}", set="held_out", unit="share", reason=why) for head in HEADS]
    paths, scales = [path for path, _ in generated.adapters], [scale for _, scale in generated.adapters]
    models = load_tuned(name, paths, scales or [1.0]).models
    labels = sorted({(row.state, row.axis) for row in real.validation})
    each = max(1, num_slices // len(labels))
    cuts = {cut.path: cut for cut in draw_cuts(split_cuts(real, "validation", real.shortest_side), each, slices.seed)}
    pictures = np.stack([cover(read_grey(path), (models.size_px, models.size_px)) for path in cuts])
    captions = [caption(*label, naming.vocabulary) for label in labels]
    return own_classifier_rows(
        caption_losses(models, pictures, captions, num_timesteps=num_timesteps, seed=slices.seed),
        class_numbers((cut.label for cut in cuts.values()), naming),
        class_numbers(labels, naming),
        block_numbers(cut.block for cut in cuts.values()),
        draws=slices.bootstrap_draws,
        seed=slices.seed,
    )


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
    losses: Floats, truth: Mapping[Head, Ints], classes: Mapping[Head, Ints], blocks: Ints, *, draws: int, seed: int
) -> list[Result]:
    """Return how often the least surprising caption names the right state, axis, and both.

    Args:
        losses: loss of each picture under each caption, (N, C).
        truth: class numbers of the ``state`` and the ``axis`` of each picture, (N,).
        classes: the same class numbers of each caption, (C,).
        blocks: number of the slab that each picture was cut from, (N,).
        draws: number of resamples behind each interval.
        seed: seed of the resampling.
    """
    chosen = losses.argmin(axis=1)
    strata = truth["state"] * 1000 + truth["axis"]
    rows = []
    for head in HEADS:
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
        filled = replace(row, **asdict(interval), verdict=verdict, reason=reason)
        rows.append(filled)
    return rows
