"""What every recipe does with its method: open the run, train, look, save, say what comes next."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from configs.errors import TisserandError
from finetune.core.data.batches import CaptionedBatches, captioned_batches
from finetune.core.learns.averages import Averages
from finetune.core.learns.trainable import Learns, checkpoint_gradients
from finetune.core.loop.checkpoints import step_of
from finetune.core.loop.compilation import uncompiled
from finetune.core.loop.fused_backward import check_fused_backward
from finetune.core.loop.loop import drive, train
from finetune.core.loop.memory import check_memory
from finetune.core.loop.micro_batch import fit_micro_batch
from finetune.core.loop.sharding import gather
from finetune.core.loss import loss_of
from finetune.core.open import open_run
from finetune.core.pictures.images import CaptionedImage
from finetune.core.run import Batches, HeldOut, OpenRun, Run, Step
from finetune.core.settings.methods import PriorConfig
from finetune.core.settings.recipe import RecipeConfig
from finetune.core.watch.drift import DriftWatch
from finetune.core.watch.losses import watch_losses
from finetune.core.watch.previews import Previews
from finetune.diffusion.denoiser import Denoiser
from finetune.diffusion.models import park

Provenance = dict[str, Any]


class Observer(Protocol):
    """Looks at the models while they learn; leaves them, and training's own draws, as they were."""

    def look(self, step: int, *, is_last: bool) -> bool:
        """Look, if it is due after this many updates; return whether the run ends with them.

        Every process calls it, before the first update too, with step 0, and must come to the same answer.
        """


@dataclass(frozen=True, kw_only=True)
class Method:
    """What makes a recipe different from the others.

    Attributes:
        name: of the recipe, as provenance and card have it.
        batches: of the images.
        updates: what is trained on: the batches, and the prior beside them if there is one.
        learns: which parameters, at which rates.
        averages: of what learns; previews, held-out losses and what is saved are theirs.
        heldout: where held-out images are.
        summary: what learns, for the line before the first step.
        save: writes what users load, with its provenance, and returns its path; the main process calls it, with the
            averages in place.
        generate_options: with which ``eval.generate`` loads it; none where it needs a part of another model.
        prior: what is preserved, for the provenance.
        observers: of the method's own, beside drift watch, held-out losses and previews.
    """

    name: str
    batches: CaptionedBatches
    updates: Batches
    learns: Learns
    averages: Averages
    heldout: HeldOut
    summary: str
    save: Callable[[Provenance], Path]
    generate_options: Sequence[str]
    prior: PriorConfig | None = None
    observers: Sequence[Observer] = ()


def image_batches(
    opened: OpenRun, config: RecipeConfig, *, learns_text: bool, balance: Sequence[str] = ()
) -> CaptionedBatches:
    """Return the updates that the images of a run make; ``learns_text`` and ``balance`` as for captioned_batches."""
    return captioned_batches(
        opened.images,
        opened.models,
        config.pictures,
        config.noise,
        opened.run,
        learns_text=learns_text,
        balance=balance,
    )


def run_method(
    config: RecipeConfig,
    images: list[CaptionedImage],
    data: dict[str, object],
    method: Callable[[OpenRun], Method],
    *,
    leaves: tuple[str, ...],
    prior: PriorConfig | None = None,
) -> None:
    """Open a run, or go on with it, train, and save; a finished run says so, and nothing else happens.

    Args:
        config: the recipe's settings, whole.
        images: that passed the checks.
        data: what the weights file says about them.
        method: makes the method from the opened run.
        leaves: files and folders of the finished run; the first is written last, and tells that it is finished.
        prior: what is to be preserved, checked before the run starts.
    """
    weights_file, *more = leaves
    with open_run(config, images, data, weights_file=weights_file, more_files=tuple(more), prior=prior) as opened:
        if opened is not None:
            train_and_save(opened, config, method(opened))


def train_and_save(opened: OpenRun, config: RecipeConfig, method: Method) -> None:
    """Train what learns, let every observer look after each update, save, and say how to generate with it.

    Args:
        opened: the run, with its models as they are to be trained.
        config: the recipe's settings.
        method: what is trained, on what, and how it is saved.
    """
    models, batches, learns, averages = opened.models, method.batches, method.learns, method.averages
    if config.train.gradient_checkpointing:
        checkpoint_gradients(models)
    loss = loss_of(config.objective, opened.schedule)
    check_fused_backward(opened.run, batches)
    watch = watch_losses(
        config.watch,
        opened,
        config.pictures,
        averages,
        method.heldout,
        learns_text=batches.learns_text,
        for_drift=config.drift.drift_probes is not None,
    )
    cuts_anew = config.pictures.crops_at_random and not config.pictures.cache_crops
    park(models, keeps_text_encoder=batches.learns_text, keeps_vae=cuts_anew)
    denoiser = Denoiser(models.text_encoder if batches.learns_text else None, models.unet)
    run = dataclasses.replace(opened.run, train=fit_micro_batch(opened.run, denoiser, learns, method.updates, loss))
    opened, updates = dataclasses.replace(opened, run=run), method.updates.cut(run.train)
    drift = DriftWatch(config.drift, opened, learns, averages, watch.of(opened), shape=next(iter(batches.shapes)))
    previews = Previews(
        models,
        config.previews,
        run,
        shape=next(iter(batches.shapes)),
        steps_per_epoch=batches.steps_per_epoch,
        averages=averages,
    )
    observers: tuple[Observer, ...] = (drift, watch.of(opened), *method.observers, previews)
    num_images = len({image.path for image in opened.images})
    run.say(
        f"{method.summary} from {num_images} images in {run.total_steps} steps of {run.train.micro_batch} x "
        f"{run.train.gradient_accumulation_steps} images, seed {run.seed}"
    )
    if not check_memory(run, denoiser, learns, updates, loss):
        return

    begun = step_of(run.checkpoint) if run.checkpoint else None
    if begun is None:
        _look(observers, run, 0)
    until = begun if begun is not None and drift.ended_before() else None

    def after(step: Step) -> bool:
        averages.update()
        run.log(step)
        return _look(observers, run, step.number)

    last = drive(train(run, denoiser, learns, updates, loss, averages, until), after) or begun or 0
    with uncompiled(run):
        steps = drift.finish(last)
    if run.is_sharded:
        gather(denoiser, learns, averages, keeps=run.is_main)
    _save(opened, method, steps)


def _save(opened: OpenRun, method: Method, steps: int) -> None:
    """Save what users load, and say what comes next; a full disk says how to go on, whichever library met it."""
    run = opened.run
    if run.is_main:
        try:
            with method.averages.in_place():
                path = method.save(opened.provenance(method.name, method.batches.shapes, method.prior, steps))
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise TisserandError(
                f"{run.folder}: the weights cannot be written ({reason}); make room on the disk first, then the same "
                "command goes on from the last checkpoint"
            ) from error
        run.say(f"saved {path}" + "; next:" * bool(method.generate_options))
    if method.generate_options:
        words = ["--prompts", opened.images[0].caption, "--num_images", "4", "--seed", "0"]
        options = [*method.generate_options, *words, "--output_dir", f"{run.folder}-slices"]
        run.say(f"  python -m eval.generate {shlex.join(options)}")


def _look(observers: Sequence[Observer], run: Run, step: int) -> bool:
    """Let all look; where one ends the run, this is its last step, also for those that look after it."""
    is_last = step == run.total_steps
    with uncompiled(run):
        for observer in observers:
            is_last |= observer.look(step, is_last=is_last)
    return is_last
