"""Prior preservation: what the base model made of a class, or of other prompts, should stay.

Two sources. Class images are generated once by the base model and trained on beside the others (Ruiz et al. 2022,
arXiv:2208.12242, section 4.2). Or the target for other prompts is what the base model itself predicts there, at the
same noisy latents, and no images are needed (learning without forgetting: Li and Hoiem 2016, arXiv:1606.09282). Either
way the loss is mean(images) + prior_loss_weight * mean(prior), and weights by the timestep hold for both.

Shapes: batch B, prompts U, token places L, width D, latents (4, h, w).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor

from configs.errors import UsageError
from finetune.core.data.batches import CaptionedBatches, captioned_batches
from finetune.core.data.class_images import check_class_images, class_images
from finetune.core.loss import noisy_latents
from finetune.core.pictures.images import data_hash
from finetune.core.run import Batch, Batches, OpenRun, Update
from finetune.core.settings.methods import PriorConfig
from finetune.core.settings.training import TrainConfig
from finetune.diffusion.adapters import adapters_off
from finetune.diffusion.denoiser import Denoiser
from finetune.diffusion.draws import counter_seed
from finetune.diffusion.noise import NoiseSchedule, from_scheduler
from finetune.diffusion.objective import target
from finetune.diffusion.text import Conditions, encode_prompts, joined, tokenize
from prompts.probe_lists import read_probes

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


class Prior(Protocol):
    """Where the prior rows of an update come from."""

    def __call__(self, number: int, update: Update) -> Update:
        """Return the prior rows of an update, from its number and its own images."""

    def cut(self, train: TrainConfig) -> Prior:
        """Return the same rows, in forward passes of as many images as these settings say."""


@dataclass(frozen=True, kw_only=True)
class WithPrior:
    """Updates of another ``Batches``, with prior rows beside its own.

    Attributes:
        images: what is to be learned.
        prior: the prior rows of an update.
        loss_weight: of the mean over prior rows beside the mean over images.
    """

    images: Batches
    prior: Prior
    loss_weight: float
    schedule: NoiseSchedule

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates in one pass over the images; the prior does not count."""
        return self.images.steps_per_epoch

    def cut(self, train: TrainConfig) -> WithPrior:
        """Return the same updates, in forward passes of as many images, and prior rows, as these settings say."""
        return dataclasses.replace(self, images=self.images.cut(train), prior=self.prior.cut(train))

    def update(self, number: int) -> Update:
        """Return this process's share of an update; rows of one shape go through the model together."""
        own = self.images.update(number)
        prior = self.prior(number, own)
        # The loop divides by the weight of the images alone: prior rows then come to loss_weight in all.
        share = self.loss_weight * own.weight / prior.weight
        weighted = [dataclasses.replace(batch, weights=batch.weights * share) for batch in prior.batches]
        batches: list[Batch] = []
        for pair in zip_longest(own.batches, weighted):
            batches += _joined([batch for batch in pair if batch is not None], self.schedule)
        return Update(batches=batches, weight=own.weight, num_images=own.num_images)


def _joined(batches: list[Batch], schedule: NoiseSchedule) -> list[Batch]:
    """Make batches one, if their latents and prompts have one shape."""
    if len({(batch.latents.shape[1:], batch.conditions.shape) for batch in batches}) > 1 or len(batches) == 1:
        return batches
    targets = None
    if any(batch.targets is not None for batch in batches):
        targets = torch.cat(
            [
                target(schedule, one.latents, one.noise, one.timesteps) if one.targets is None else one.targets
                for one in batches
            ]
        )
    return [
        Batch(
            latents=torch.cat([one.latents for one in batches]),
            noise=torch.cat([one.noise for one in batches]),
            input_noise=torch.cat([one.input_noise for one in batches]),
            timesteps=torch.cat([one.timesteps for one in batches]),
            conditions=joined([one.conditions for one in batches]),
            weights=torch.cat([one.weights for one in batches]),
            names=tuple(name for one in batches for name in one.names),
            positions=tuple(place for one in batches for place in one.positions),
            targets=targets,
        )
    ]


@dataclass(frozen=True)
class ClassImages:
    """Prior rows from class images, as many as there are images in an update."""

    batches: CaptionedBatches

    def cut(self, train: TrainConfig) -> ClassImages:
        """Return the same rows, in forward passes of as many images as these settings say."""
        return ClassImages(self.batches.cut(train))

    def __call__(self, number: int, update: Update) -> Update:
        """Return the class images of an update."""
        return self.batches.update(number)


@dataclass(frozen=True, kw_only=True)
class BasePrediction:
    """Prior rows from no images: the noisy latents of an update with other prompts; the base model says the target.

    Attributes:
        predict: the base model, from noisy latents, timesteps and prompts.
        prompts: the conditions of U prompts.
    """

    predict: Predict
    prompts: Conditions
    schedule: NoiseSchedule
    seed: int

    def cut(self, train: TrainConfig) -> BasePrediction:
        """Return itself: it follows the batches of the images."""
        return self

    def __call__(self, number: int, update: Update) -> Update:
        """Return as many prior rows as the update has images, each with a prompt drawn by its position."""
        batches = []
        for batch in update.batches:
            drawn = [
                counter_seed(self.seed, "prior prompt", place) % len(self.prompts.prompts) for place in batch.positions
            ]
            conditions = self.prompts.rows(drawn, each_once=True)
            targets = self.predict(noisy_latents(self.schedule, batch), batch.timesteps, conditions.prompts)
            batches.append(
                dataclasses.replace(
                    batch,
                    conditions=conditions,
                    targets=targets.to(batch.latents.dtype),
                    names=tuple(f"the prior beside {name}" for name in batch.names),
                )
            )
        return Update(batches=batches, weight=update.weight, num_images=update.num_images)


def with_prior(batches: CaptionedBatches, opened: OpenRun, config: PriorConfig, *, adapts: bool) -> Batches:
    """Put prior rows beside the images, or return the batches as they are without ``--with_prior_preservation``.

    To be called while the models are still those of the base: they generate the missing class images.

    Args:
        batches: of the images; class images become training pictures as they do.
        opened: the run.
        config: which prior.
        adapts: what learns are adapters, which can be switched off; else a frozen copy of the base is kept.

    Raises:
        UsageError: prompts that cannot be read, or a base model that does not fit the schedule that is trained.
        InputError: class images that are stale, unreadable, or too few beside a list of them.
    """
    if not config.with_prior_preservation:
        if config.class_prompt is not None or config.class_data_dir is not None:
            opened.run.say("note: no prior: --class_prompt and --class_data_dir wait for --with_prior_preservation")
        return batches
    run, models, schedule, learns_text = opened.run, opened.models, opened.schedule, batches.learns_text
    if config.prior_source == "base_prediction":
        _check_schedule(opened)
        prompts = prior_prompts(config)
        tokens = (tokenize if learns_text else encode_prompts)(models, prompts).to(opened.device)
        predict = _base_predictor(opened, learns_text=learns_text, adapts=adapts)
        run.say(f"prior: the base model's predictions for {len(prompts)} prompts, weight {config.prior_loss_weight:g}")
        rows = BasePrediction(predict=predict, prompts=Conditions(prompts=tokens), schedule=schedule, seed=run.seed)
        return WithPrior(images=batches, prior=rows, loss_weight=config.prior_loss_weight, schedule=schedule)
    images = class_images(opened, config, batches.size)
    run.inputs["class_data_dir"] = data_hash(images)
    unturned = dataclasses.replace(batches.config, flips={})  # declared for axes of slices, which class images have not
    prior = captioned_batches(images, models, unturned, batches.noise, run, learns_text=learns_text)
    # Draws of their own: an image and the class image beside it must not share noise and timestep.
    prior = dataclasses.replace(prior, seed=counter_seed(run.seed, "prior", 0))
    return WithPrior(
        images=batches,
        prior=ClassImages(prior),
        loss_weight=config.prior_loss_weight,
        schedule=schedule,
    )


def check_prior(config: PriorConfig, base_hash: str | None) -> None:
    """Check, before a run starts, what can be checked without the model.

    Raises:
        UsageError: prompts that cannot be read.
        InputError: class images that belong to another base model or prompt.
    """
    if not config.with_prior_preservation:
        return
    if config.prior_source == "base_prediction":
        prior_prompts(config)
    else:
        wanted: dict[str, object] = {"prompt": config.class_prompt, "base_model": base_hash}
        check_class_images(config, {name: value for name, value in wanted.items() if value is not None})


def prior_prompts(config: PriorConfig) -> list[str]:
    """Return the prompts of ``--prior_prompts_file``, or the class prompt alone."""
    if config.prior_prompts_file is None:
        return [str(config.class_prompt)]
    try:
        return [probe.prompt for probe in read_probes(str(config.prior_prompts_file))]
    except UsageError as error:
        raise UsageError(str(error).replace("--probes", "--prior_prompts_file", 1)) from None


def _check_schedule(opened: OpenRun) -> None:
    """Refuse to hold a model to predictions that were learned for other noise."""
    base, trained = from_scheduler(opened.base_scheduler.config), opened.schedule
    if base.prediction_type != trained.prediction_type:
        raise UsageError(
            f"--prior_source base_prediction: the base model predicts {base.prediction_type}, and "
            f"{trained.prediction_type} is trained; use --prior_source class_images"
        )
    if not torch.equal(base.alphas_cumprod, trained.alphas_cumprod.cpu()):
        raise UsageError(
            "--prior_source base_prediction: the base model never saw the noise schedule of --rescale_betas_zero_snr, "
            "so its predictions there are no target; use --prior_source class_images"
        )


def _base_predictor(opened: OpenRun, *, learns_text: bool, adapts: bool) -> Predict:
    """Return the base model as a function: the model with its adapters off, or a frozen copy of it."""
    models, run = opened.models, opened.run
    if adapts:
        denoiser = Denoiser(models.text_encoder, models.unet)
    else:
        # The text encoder is read where it learns alone; else prompts come as embeddings.
        text_encoder = copy.deepcopy(models.text_encoder) if learns_text else models.text_encoder
        denoiser = Denoiser(text_encoder, copy.deepcopy(models.unet).to(run.weight_dtype))

    @torch.no_grad()
    def predict(noisy: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
        with run.accelerator.autocast(), adapters_off(models) if adapts else nullcontext():
            return denoiser(noisy, timesteps, prompts).float()

    return predict
