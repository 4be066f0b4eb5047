"""Fine-tune every weight of the U-Net on a captioned image folder, and of the text encoder if asked.

    accelerate launch finetune/full.py --pretrained_model_name_or_path assets/tiny-sd \
        --train_data_dir data/weave/train --output_dir runs/full

Learns  the whole U-Net; with --train_text_encoder the whole text encoder, too.
Batch   captioned images; with --with_prior_preservation prior rows beside them.
Saves   a pipeline folder, for diffusers' StableDiffusionPipeline.from_pretrained().
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from configs.load import command
from finetune.core.config import (
    HubConfig,
    ImageFolderConfig,
    ModelConfig,
    NoiseConfig,
    ObjectiveConfig,
    PictureConfig,
    PreviewConfig,
    RefusedConfig,
    TrainConfig,
    WatchConfig,
)
from finetune.core.method_config import EmaConfig, PriorConfig, TextEncoderConfig

if TYPE_CHECKING:
    from finetune.core.open import Opened


@dataclass(frozen=True, kw_only=True)
class FullRun:
    """Settings of a full fine-tuning run; defaults are those of diffusers' train_text_to_image.py."""

    model: ModelConfig
    images: ImageFolderConfig
    train: TrainConfig
    pictures: PictureConfig = field(default_factory=PictureConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    previews: PreviewConfig = field(default_factory=lambda: PreviewConfig(validation_epochs=5))
    watch: WatchConfig = field(default_factory=WatchConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    refused: RefusedConfig = field(default_factory=RefusedConfig)


def main(config: FullRun) -> None:
    """Train the model and save it."""
    from finetune.core.hub_dataset import local_images
    from finetune.core.images import data_provenance, read_images
    from finetune.core.open import open_run
    from finetune.core.weights import PIPELINE_FILE, PIPELINE_PARTS

    config = replace(config, images=local_images(config.images, config.model.cache_dir))
    images = read_images(config.images)
    data = data_provenance(images, config.images.train_data_dir)
    with open_run(
        config, images, data, weights_file=PIPELINE_FILE, more_files=PIPELINE_PARTS, prior=config.prior
    ) as opened:
        train_full(opened, config)


def train_full(opened: Opened, config: FullRun) -> None:
    """Train in a run that was opened, on images that passed the checks."""
    from functools import partial

    from finetune.core.averages import Averages
    from finetune.core.batches import captioned_batches
    from finetune.core.loop import train
    from finetune.core.models import Denoiser
    from finetune.core.objective import denoising_loss
    from finetune.core.optimizer import learning_rates
    from finetune.core.previews import Previews
    from finetune.core.prior import with_prior
    from finetune.core.trainable import all_weights, checkpoint_gradients
    from finetune.core.watch import watch_losses
    from finetune.core.weights import save_pipeline

    run, models, schedule, images = opened.run, opened.models, opened.schedule, opened.images
    learns_text = config.text_encoder.train_text_encoder
    batches = captioned_batches(
        images,
        models,
        config.pictures,
        config.noise,
        run,
        num_timesteps=schedule.num_timesteps,
        learns_text=learns_text,
        balance=config.images.balanced_keys,
    )
    updates = with_prior(
        batches, opened, config.prior, config.pictures, config.noise, learns_text=learns_text, adapts=False
    )
    rate, text_rate = learning_rates(config.train, config.text_encoder, run.accelerator.num_processes)
    learns = all_weights(models, learning_rate=rate, text_encoder_rate=text_rate)
    averages = Averages(learns, config.ema)
    if config.train.gradient_checkpointing:
        checkpoint_gradients(models)
    loss = partial(denoising_loss, schedule=schedule, snr_gamma=config.objective.snr_gamma)
    previews = Previews(
        models,
        config.previews,
        run,
        size=batches.size,
        steps_per_epoch=batches.steps_per_epoch,
        averages=averages,
    )
    watch = watch_losses(
        config.watch,
        opened,
        config.pictures,
        averages,
        beside=config.images.train_data_dir[0],
        learns_text=learns_text,
        image_column=config.images.image_column,
        caption_column=config.images.caption_column,
    )
    run.say(
        f"full: {learns.num_weights:,} weights learn from {len(images)} images in {run.total_steps} steps of "
        f"{config.train.train_batch_size} x {config.train.gradient_accumulation_steps} images, seed {run.seed}"
    )

    if run.checkpoint is None:
        previews.show(0)
        watch.look(0)
    denoiser = Denoiser(models.text_encoder, models.unet)
    for step in train(run, denoiser, learns, updates, loss, config.train, averages):
        averages.update()
        run.log(step)
        previews.show(step.number)
        watch.look(step.number)

    if run.is_main:
        provenance = opened.provenance("full", height=batches.size, width=batches.size, prior=config.prior)
        with averages.in_place():
            run.say(f"saved {save_pipeline(run.folder, models, provenance)}; next:")
    run.say(
        f"  python -m eval.generate --pretrained_model_name_or_path {run.folder} "
        f'--prompts "{images[0].caption}" --num_images 4 --seed 0 --output_dir {run.folder}-slices'
    )


if __name__ == "__main__":
    command(FullRun, main)
