"""Fine-tune every weight of the U-Net on a captioned image folder, and of the text encoder if asked.

    accelerate launch finetune/full.py --pretrained_model_name_or_path assets/tiny-sd \
        --train_data_dir data/weave/train --output_dir runs/full

Learns  the whole U-Net; with --train_text_encoder the whole text encoder, too.
Batch   captioned images; with --with_prior_preservation prior rows beside them.
Saves   a pipeline folder, for diffusers' StableDiffusionPipeline.from_pretrained().
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs.load import command
from finetune.core.settings.images import ImageFolderConfig, PictureConfig
from finetune.core.settings.methods import EmaConfig, PriorConfig, TextEncoderConfig
from finetune.core.settings.model import HubConfig, ModelConfig, RefusedConfig
from finetune.core.settings.training import ObjectiveConfig, TrainConfig
from finetune.core.settings.watching import DriftWatchConfig, PreviewConfig, WatchConfig
from finetune.diffusion.config import NoiseConfig

if TYPE_CHECKING:
    from finetune.core.run import Opened


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
    drift: DriftWatchConfig = field(default_factory=DriftWatchConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    refused: RefusedConfig = field(default_factory=RefusedConfig)


def main(config: FullRun) -> None:
    """Train the model and save it."""
    from data_prep.folders.run_folder import PIPELINE_FILE, PIPELINE_PARTS
    from finetune.core.open import open_run
    from finetune.core.pictures.hub_dataset import local_images
    from finetune.core.pictures.images import data_provenance, read_images

    config = replace(config, images=local_images(config.images, config.model.cache_dir))
    images = read_images(config.images)
    data = data_provenance(images, config.images.train_data_dir)
    with open_run(
        config, images, data, weights_file=PIPELINE_FILE, more_files=PIPELINE_PARTS, prior=config.prior
    ) as opened:
        train_full(opened, config)


def train_full(opened: Opened, config: FullRun) -> None:
    """Train in a run that was opened, on images that passed the checks."""
    from finetune.core.data.prior import with_prior
    from finetune.core.learns.averages import Averages
    from finetune.core.learns.optimizer import learning_rates
    from finetune.core.learns.trainable import all_weights
    from finetune.core.recipe import image_batches, train_and_save
    from finetune.core.run import HeldOut
    from finetune.core.save.weights import save_pipeline

    run, models = opened.run, opened.models
    batches = image_batches(
        opened, config, learns_text=config.text_encoder.train_text_encoder, balance=config.images.balanced_keys
    )
    updates = with_prior(batches, opened, config.prior, adapts=False)
    rate, text_rate = learning_rates(config.train, config.text_encoder, run.accelerator.num_processes)
    learns = all_weights(models, learning_rate=rate, text_encoder_rate=text_rate)
    averages = Averages(learns, config.ema)
    heldout = HeldOut(
        beside=config.images.train_data_dir[0],
        image_column=config.images.image_column,
        caption_column=config.images.caption_column,
    )

    def save() -> Path:
        provenance = opened.provenance("full", batches.shapes, config.prior)
        return save_pipeline(run.folder, models, provenance)

    train_and_save(
        opened,
        config,
        batches=batches,
        updates=updates,
        learns=learns,
        averages=averages,
        heldout=heldout,
        says=f"full: {learns.num_weights:,} weights learn",
        save=save,
        uses=("--pretrained_model_name_or_path", str(run.folder)),
    )


if __name__ == "__main__":
    command(FullRun, main)
