"""Pivotal tuning: first learn a new word in the frozen model, then adapters around it.

    accelerate launch finetune/pivotal_tuning.py --pretrained_model_name_or_path assets/tiny-sd \
        --instance_data_dir data/few/dry --placeholder_token "<dry-slice>" --initializer_token woven \
        --output_dir runs/pivotal

Learns  the rows of the new word for --token_steps updates; then adapters, while the rows rest or go on slowly.
Batch   images with templates around the word, or with captions that hold it; prior rows beside the adapters if asked.
Saves   learned_embeds.safetensors and pytorch_lora_weights.safetensors.

The idea is Roich et al. 2021, arXiv:2106.05744: find the place of a subject in the model first, then tune the
model there.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.checks import need_not_negative, need_positive, refuse
from configs.load import command
from finetune.core.settings.images import PictureConfig
from finetune.core.settings.methods import (
    EmaConfig,
    LoraConfig,
    PriorConfig,
    SentenceConfig,
    TextEncoderConfig,
    TokenConfig,
)
from finetune.core.settings.model import HubConfig, ModelConfig, RefusedConfig
from finetune.core.settings.training import ObjectiveConfig, TrainConfig
from finetune.core.settings.watching import DriftWatchConfig, PreviewConfig, WatchConfig
from finetune.diffusion.config import NoiseConfig

if TYPE_CHECKING:
    from finetune.core.run import Batches, Opened, Update


@dataclass(frozen=True, kw_only=True)
class PivotalTuningTrainConfig(TrainConfig):
    """The loop; batch and rate as in LoRA + DreamBooth, length as in Textual Inversion."""

    train_batch_size: int | Literal["auto"] = 4
    """Images per process in one forward pass, with class images as many of them beside; auto: as many as fit."""
    max_train_steps: int | None = 2000
    """Optimizer updates in all; `null`: as many as num_train_epochs gives."""


@dataclass(frozen=True, kw_only=True)
class PivotConfig:
    """When the word is done and the adapters begin."""

    token_steps: int | None = None
    """Steps in which the rows of the word learn alone; half of all if absent. The adapters learn after them."""
    token_lr: float | None = None
    """Learning rate of the rows; learning_rate if absent."""
    token_lr_after: float = 0.0
    """Their learning rate beside the adapters; 0: they rest."""

    def __post_init__(self) -> None:
        """Check ranges."""
        need_positive(token_steps=self.token_steps, token_lr=self.token_lr)
        need_not_negative(token_lr_after=self.token_lr_after)

    def steps_alone(self, total: int) -> int:
        """Return the updates before the pivot.

        Raises:
            ValueError: the adapters would never learn.
        """
        steps = self.token_steps or total // 2
        if not 0 < steps < total:
            raise refuse("token_steps", steps, f"must be above 0 and below the {total} steps of the whole run")
        return steps


@dataclass(frozen=True, kw_only=True)
class PivotalTuningRun:
    """Settings of a pivotal tuning run."""

    model: ModelConfig
    instance_data_dir: Path
    """Folder with images of the subject."""
    tokens: TokenConfig
    train: PivotalTuningTrainConfig
    pivot: PivotConfig = field(default_factory=PivotConfig)
    sentences: SentenceConfig = field(default_factory=SentenceConfig)
    pictures: PictureConfig = field(default_factory=PictureConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    previews: PreviewConfig = field(default_factory=lambda: PreviewConfig(validation_steps=100))
    watch: WatchConfig = field(default_factory=WatchConfig)
    drift: DriftWatchConfig = field(default_factory=DriftWatchConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    refused: RefusedConfig = field(default_factory=RefusedConfig)

    def __post_init__(self) -> None:
        """Refuse what does not fit a word that moves, or two files."""
        word = self.tokens.placeholder_token
        if self.tokens.save_as_full_pipeline:
            raise refuse("save_as_full_pipeline", True, "use finetune/export.py --to pipeline on the finished run")
        if self.text_encoder.pre_compute_text_embeddings:
            raise refuse("pre_compute_text_embeddings", True, "leave it out: they change with the rows of the word")
        if self.prior.class_prompt is not None and word in self.prior.class_prompt:
            raise refuse("class_prompt", self.prior.class_prompt, f"the base model does not know {word}; leave it out")
        folder = self.prior.class_data_dir
        if folder is not None and folder.resolve() == self.instance_data_dir.resolve():
            raise refuse(
                "class_data_dir", folder, "is --instance_data_dir, too; class images need a folder of their own"
            )


@dataclass(frozen=True, kw_only=True)
class Staged:
    """Updates of one ``Batches`` before the pivot, and of another from there on.

    Attributes:
        pivot: number of the first update of the second.
    """

    first: Batches
    then: Batches
    pivot: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates in one pass over the images, in either stage."""
        return self.first.steps_per_epoch

    def cut(self, train: TrainConfig) -> Staged:
        """Return the same updates, in forward passes of as many images as these settings say."""
        return dataclasses.replace(self, first=self.first.cut(train), then=self.then.cut(train))

    def update(self, number: int) -> Update:
        """Return this process's share of an update."""
        return (self.first if number < self.pivot else self.then).update(number)


def main(config: PivotalTuningRun) -> None:
    """Train the rows, then the adapters, and save both."""
    from configs.errors import UsageError
    from data_prep.folders.run_folder import EMBEDDINGS_FILE, LORA_FILE
    from finetune.core.learns.words import word_images
    from finetune.core.open import open_run
    from finetune.core.pictures.images import data_provenance

    folders = (config.instance_data_dir,)
    images = word_images(folders, "--instance_data_dir", config.tokens, config.sentences)
    shown = images * config.tokens.repeats
    # In steps, and written down: a run that goes on for longer must not move its pivot.
    try:
        alone = config.pivot.steps_alone(config.train.total_steps(len(shown), int(os.environ.get("WORLD_SIZE", "1"))))
    except ValueError as error:
        raise UsageError(str(error)) from None
    config = dataclasses.replace(config, pivot=dataclasses.replace(config.pivot, token_steps=alone))
    copies = tuple(path.name for path in config.train.output_dir.glob("learned_embeds-steps-*.safetensors"))
    with open_run(
        config,
        shown,
        data_provenance(images, folders),
        weights_file=LORA_FILE,
        more_files=(EMBEDDINGS_FILE, *copies),
        prior=config.prior,
    ) as opened:
        train_word_and_adapters(opened, config, alone)


def train_word_and_adapters(opened: Opened, config: PivotalTuningRun, alone: int) -> None:
    """Train in a run that was opened, on images that passed the checks; the adapters begin after ``alone`` updates."""
    from finetune.core.data.prior import with_prior
    from finetune.core.learns.averages import Averages
    from finetune.core.learns.optimizer import base_learning_rate, learning_rates
    from finetune.core.learns.trainable import Group, Learns, lora_adapters
    from finetune.core.learns.words import add_word, heldout_images
    from finetune.core.recipe import image_batches, train_and_save
    from finetune.core.save.weights import WordCopies, save_embeddings, save_lora

    run, models = opened.run, opened.models
    rate, text_rate = learning_rates(config.train, config.text_encoder, run.accelerator.num_processes)
    token_lr = config.pivot.token_lr or config.train.learning_rate
    token_rate = base_learning_rate(config.train, run.accelerator.num_processes, token_lr)
    word = add_word(models, config.tokens)
    batches = image_batches(opened, config, learns_text=True)
    # A class prompt gives the rows no gradient, and before the pivot nothing else learns.
    updates = Staged(first=batches, then=with_prior(batches, opened, config.prior, adapts=True), pivot=alone)
    models.unet.to(run.weight_dtype)
    adapters = lora_adapters(models, config.lora, learning_rate=rate, seed=run.seed, text_encoder_rate=text_rate)
    word.embedding.rows.requires_grad_(True)  # peft has frozen all that it found
    rows = word.learns(token_rate, partial(_before, alone, config.pivot.token_lr_after / token_lr)).groups
    learns = Learns(
        (*rows, *(Group(one.parameters, one.learning_rate, partial(_after, alone)) for one in adapters.groups))
    )
    averages = Averages(learns, config.ema)
    provenance = partial(opened.provenance, "pivotal_tuning", batches.shapes, config.prior)

    def save() -> Path:
        save_embeddings(run.folder, word, provenance())
        return save_lora(run.folder, models, provenance()).parent

    train_and_save(
        opened,
        config,
        batches=batches,
        updates=updates,
        learns=learns,
        averages=averages,
        heldout=heldout_images(config.instance_data_dir, config.tokens, config.sentences),
        says=f"pivotal tuning: {len(word.pieces)} rows learn {word.placeholder} for {alone} steps, then "
        f"{adapters.num_weights:,} weights of adapters",
        save=save,
        uses=("--pretrained_model_name_or_path", models.name, "--adapter", str(run.folder)),
        observers=[WordCopies(config.tokens.save_steps, run, word, averages, provenance)],
    )


def _before(alone: int, after: float, done: int) -> float:
    """Return the share of their learning rate that the rows have after ``done`` updates."""
    return 1.0 if done < alone else after


def _after(alone: int, done: int) -> float:
    """Return the share of their learning rate that the adapters have after ``done`` updates."""
    return 0.0 if done < alone else 1.0


if __name__ == "__main__":
    command(PivotalTuningRun, main)
