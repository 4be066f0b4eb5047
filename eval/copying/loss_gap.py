"""Did tuning lower the loss of trained slices more than that of held-out ones?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.copying.models import TunedAndBase
from eval.copying.rows import LossGap
from eval.copying.tile_sets import few_cuts
from eval.stats.arrays import Floats
from eval.tiles.config import SMALLEST_TILE, SlicesConfig
from eval.tiles.features import TileCut, cover, draw_cuts, read_grey
from eval.tiles.sets import RealSlices, split_cuts
from finetune.diffusion.fixed_noise import denoising_losses
from finetune.diffusion.models import Models
from finetune.diffusion.vae import slice_latents
from prompts.captions import caption
from prompts.vocabulary import Vocabulary


def loss_gap(
    slices: SlicesConfig,
    real: RealSlices,
    model: TunedAndBase,
    vocabulary: Vocabulary,
    train_data_dir: Path | None,
    *,
    num_slices: int,
    num_timesteps: int,
) -> tuple[LossGap | None, str]:
    """Compare how much tuning lowered the loss of trained and of held-out slices, or say why not.

    Args:
        slices: what is compared; its seed draws the slices and the noise.
        real: the slices of the dataset.
        model: the tuned model with its base.
        vocabulary: the words of the captions.
        train_data_dir: folder that the model was trained on, if that is not all of the training split.
        num_slices: trained slices, and held-out slices, that are read; 0 leaves it out.
        num_timesteps: noise levels of the loss.
    """
    if not num_slices or not real.validation:
        return None, "left out with --loss_slices 0" if not num_slices else "there are no held-out slices"
    if model.base is None:
        return None, "no base model to compare the loss with; pass --base"
    trained, held_out = _draw_slices(slices, real, vocabulary, train_data_dir, num_slices)
    drawn = [*trained, *held_out]
    side = model.tuned.size_px
    latents = slice_latents(model.tuned, np.stack([cover(read_grey(cut.path), (side, side)) for cut in drawn]))
    captions = [caption(*cut.label, vocabulary) for cut in drawn]

    def losses(models: Models) -> Floats:
        found = denoising_losses(models, latents, captions, num_timesteps=num_timesteps, seed=slices.seed)
        return np.asarray(found.mean(axis=1))

    tuned = losses(model.tuned)
    with model.adapters_off():
        fall = losses(model.base) - tuned
    numbers = np.unique([cut.block for cut in drawn], return_inverse=True)[1].astype(np.int64)
    first = len(trained)
    return LossGap(
        trained=fall[:first],
        held_out=fall[first:],
        trained_blocks=numbers[:first],
        held_out_blocks=numbers[first:],
    ), ""


def _draw_slices(
    slices: SlicesConfig, real: RealSlices, vocabulary: Vocabulary, train_data_dir: Path | None, count: int
) -> tuple[list[TileCut], list[TileCut]]:
    """Return the first tile of trained and of held-out slices, drawn by seed; it stands for its slice."""
    smallest = real.shortest_side
    learned = (
        split_cuts(real, "train", smallest)
        if train_data_dir is None
        else few_cuts(train_data_dir, vocabulary, SMALLEST_TILE)
    )
    labels = {cut.label for cut in learned}

    def drawn(cuts: Sequence[TileCut]) -> list[TileCut]:
        # A picture counts once, however many tiles it has.
        whole = list({cut.path: cut for cut in cuts if cut.label in labels}.values())
        return list({cut.path: cut for cut in draw_cuts(whole, max(1, count // len(labels)), slices.seed)}.values())

    return drawn(learned), drawn(split_cuts(real, "validation", smallest))
