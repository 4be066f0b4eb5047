"""Fine-tune low-rank adapters on a captioned image folder.

    accelerate launch finetune/lora.py --pretrained_model_name_or_path assets/tiny-sd \
        --train_data_dir data/weave/train --output_dir runs/lora

Learns  adapters on the U-Net's attention, on its ResNet convolutions if asked, and with --train_text_encoder on the
        text encoder.
Batch   captioned images; with --with_prior_preservation prior rows beside them.
Saves   pytorch_lora_weights.safetensors, for diffusers' load_lora_weights().
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs.load import command
from finetune.core.settings.images import ImageFolderConfig, PictureConfig
from finetune.core.settings.methods import EmaConfig, LoraConfig, PriorConfig, TextEncoderConfig
from finetune.core.settings.model import HubConfig, ModelConfig, RefusedConfig
from finetune.core.settings.training import ObjectiveConfig, TrainConfig
from finetune.core.settings.watching import DriftWatchConfig, PreviewConfig, WatchConfig
from finetune.diffusion.config import NoiseConfig

if TYPE_CHECKING:
    from finetune.core.run import Opened


@dataclass(frozen=True, kw_only=True)
class LoraRun:
    """Settings of a LoRA run; defaults are those of diffusers' train_text_to_image_lora.py."""

    model: ModelConfig
    images: ImageFolderConfig
    train: TrainConfig
    pictures: PictureConfig = field(default_factory=PictureConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    previews: PreviewConfig = field(default_factory=PreviewConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    drift: DriftWatchConfig = field(default_factory=DriftWatchConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    refused: RefusedConfig = field(default_factory=RefusedConfig)


def main(config: LoraRun) -> None:
    """Train the adapters and save them."""
    from data_prep.folders.run_folder import LORA_FILE
    from finetune.core.open import open_run
    from finetune.core.pictures.hub_dataset import local_images
    from finetune.core.pictures.images import data_provenance, read_images

    config = replace(config, images=local_images(config.images, config.model.cache_dir))
    images = read_images(config.images)
    data = data_provenance(images, config.images.train_data_dir)
    with open_run(config, images, data, weights_file=LORA_FILE, prior=config.prior) as opened:
        train_lora(opened, config)


def train_lora(opened: Opened, config: LoraRun) -> None:
    """Train in a run that was opened, on images that passed the checks."""
    from finetune.core.data.prior import with_prior
    from finetune.core.learns.averages import Averages
    from finetune.core.learns.optimizer import learning_rates
    from finetune.core.learns.trainable import lora_adapters
    from finetune.core.recipe import image_batches, train_and_save
    from finetune.core.run import HeldOut
    from finetune.core.save.weights import save_lora

    run, models = opened.run, opened.models
    batches = image_batches(
        opened, config, learns_text=config.text_encoder.train_text_encoder, balance=config.images.balanced_keys
    )
    updates = with_prior(batches, opened, config.prior, adapts=True)
    rate, text_rate = learning_rates(config.train, config.text_encoder, run.accelerator.num_processes)
    models.unet.to(run.weight_dtype)
    learns = lora_adapters(models, config.lora, learning_rate=rate, seed=run.seed, text_encoder_rate=text_rate)
    averages = Averages(learns, config.ema)
    heldout = HeldOut(
        beside=config.images.train_data_dir[0],
        image_column=config.images.image_column,
        caption_column=config.images.caption_column,
    )

    def save() -> Path:
        provenance = opened.provenance("lora", batches.shapes, config.prior)
        return save_lora(run.folder, models, provenance)

    train_and_save(
        opened,
        config,
        batches=batches,
        updates=updates,
        learns=learns,
        averages=averages,
        heldout=heldout,
        says=f"LoRA: {learns.num_weights:,} weights learn",
        save=save,
        uses=("--pretrained_model_name_or_path", models.name, "--adapter", str(run.folder)),
    )


if __name__ == "__main__":
    command(LoraRun, main)
