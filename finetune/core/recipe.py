"""The body of a run, one for every recipe: batches of its images; then train, look, save, say what comes next."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError

from configs.errors import TisserandError
from finetune.core.data.batches import CaptionedBatches, captioned_batches
from finetune.core.learns.averages import Averages
from finetune.core.learns.trainable import Learns, checkpoint_gradients
from finetune.core.loop.checkpoints import step_of
from finetune.core.loop.compilation import uncompiled
from finetune.core.loop.fused_backward import check_fused_backward
from finetune.core.loop.loop import train
from finetune.core.loop.micro_batch import fit_micro_batch
from finetune.core.loop.sharding import gather
from finetune.core.loss import loss_of
from finetune.core.open import Recipe
from finetune.core.run import Batches, HeldOut, Opened, Run
from finetune.core.settings.training import ObjectiveConfig
from finetune.core.settings.watching import DriftWatchConfig, PreviewConfig, WatchConfig
from finetune.core.watch.drift import DriftWatch
from finetune.core.watch.losses import watch_losses
from finetune.core.watch.previews import Previews
from finetune.diffusion.denoiser import Denoiser
from finetune.diffusion.models import park


class Observer(Protocol):
    """Looks at the models while they learn; leaves them, and training's own draws, as they were."""

    def look(self, step: int) -> bool:
        """Look, if it is due after this many updates; return whether the run ends with them.

        Every process calls it, before the first update too, with step 0, and must come to the same answer.
        """


class Trains(Recipe, Protocol):
    """What the settings of a recipe hold, beside those of its method."""

    @property
    def objective(self) -> ObjectiveConfig:
        """What is minimised."""

    @property
    def previews(self) -> PreviewConfig:
        """Pictures rendered during training."""

    @property
    def watch(self) -> WatchConfig:
        """Loss on held-out images."""

    @property
    def drift(self) -> DriftWatchConfig:
        """What becomes of prompts of other things."""


def image_batches(
    opened: Opened, config: Recipe, *, learns_text: bool, balance: Sequence[str] = ()
) -> CaptionedBatches:
    """Return the updates that the images of a run make; ``learns_text`` and ``balance`` as for captioned_batches."""
    return captioned_batches(
        opened.images,
        opened.models,
        config.pictures,
        config.noise,
        opened.run,
        num_timesteps=opened.schedule.num_timesteps,
        learns_text=learns_text,
        balance=balance,
    )


def train_and_save(
    opened: Opened,
    config: Trains,
    *,
    batches: CaptionedBatches,
    updates: Batches,
    learns: Learns,
    averages: Averages,
    heldout: HeldOut,
    says: str,
    save: Callable[[], Path],
    uses: Sequence[str],
    observers: Sequence[Observer] = (),
) -> None:
    """Train what learns, let every observer look after each update, save, and say how to generate with it.

    Args:
        opened: the run, with its models as they are to be trained.
        config: the recipe's settings.
        batches: of the images.
        updates: what is trained on: the batches, and the prior beside them if there is one.
        learns: which parameters, at which rates.
        averages: of them; previews, held-out losses and what is saved are theirs.
        heldout: where held-out images are.
        says: what learns, for the line before the first step.
        save: writes what users load, and returns its path; the main process calls it, with the averages in place.
        uses: the options with which ``eval.generate`` loads it; none where it needs a part of another model.
        observers: of the method's own, beside previews and held-out losses.
    """
    run, models = opened.run, opened.models
    if config.train.gradient_checkpointing:
        checkpoint_gradients(models)
    loss = loss_of(config.objective, opened.schedule)
    check_fused_backward(run, batches)
    watch = watch_losses(
        config.watch,
        opened,
        config.pictures,
        averages,
        heldout,
        learns_text=batches.learns_text,
        for_drift=config.drift.drift_probes is not None,
    )
    cuts_anew = config.pictures.crops_at_random and not config.pictures.cache_crops
    park(models, keeps_text_encoder=batches.learns_text, keeps_vae=cuts_anew)
    denoiser = Denoiser(models.text_encoder if batches.learns_text else None, models.unet)
    updates = fit_micro_batch(run, denoiser, learns, updates, loss)
    previews = Previews(
        models,
        config.previews,
        run,
        shape=next(iter(batches.shapes)),
        steps_per_epoch=batches.steps_per_epoch,
        averages=averages,
    )
    drift = DriftWatch(config.drift, opened, learns, averages, watch, size=batches.size)
    looking: tuple[Observer, ...] = (drift, watch, *observers, previews)
    num_images = len({image.path for image in opened.images})
    run.say(
        f"{says} from {num_images} images in {run.total_steps} steps of {run.train.micro_batch} x "
        f"{run.train.gradient_accumulation_steps} images, seed {run.seed}"
    )

    if run.checkpoint is None:
        _look(looking, run, 0)
    elif drift.ended_before():
        run.total_steps = step_of(run.checkpoint)
    for step in train(run, denoiser, learns, updates, loss, run.train, averages):
        averages.update()
        run.log(step)
        _look(looking, run, step.number)

    with uncompiled(run):
        drift.finish()
    if run.is_sharded:
        gather(denoiser, learns, averages, keeps=run.is_main)
    if run.is_main:
        with averages.in_place():
            run.say(f"saved {_saved(save, run)}" + "; next:" * bool(uses))
    if uses:
        words = ["--prompts", opened.images[0].caption, "--num_images", "4", "--seed", "0"]
        run.say(f"  python -m eval.generate {shlex.join([*uses, *words, '--output_dir', f'{run.folder}-slices'])}")


def _saved(save: Callable[[], Path], run: Run) -> Path:
    """Save what users load; a full disk says how to go on, whichever library met it."""
    try:
        return save()
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise TisserandError(
            f"{run.folder}: the weights cannot be written ({reason}); make room on the disk first, then the same "
            "command goes on from the last checkpoint"
        ) from error


def _look(observers: Sequence[Observer], run: Run, step: int) -> None:
    """Let all look; where one ends the run, this becomes its last step, also for those that look after it."""
    with uncompiled(run):
        for observer in observers:
            if observer.look(step):
                run.total_steps = step
