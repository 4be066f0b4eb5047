"""Fine-tune low-rank adapters on a captioned image folder.

    accelerate launch finetune/lora.py --pretrained_model_name_or_path assets/tiny-sd \
        --train_data_dir data/weave/train --output_dir runs/lora

Learns  adapters on the U-Net's attention, and on its ResNet convolutions if asked.
Batch   captioned images.
Saves   pytorch_lora_weights.safetensors, for diffusers' load_lora_weights().
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
)
from finetune.core.method_config import LoraConfig

if TYPE_CHECKING:
    from finetune.core.open import Opened


@dataclass(frozen=True, kw_only=True)
class LoraRun:
    """Settings of a LoRA run."""

    model: ModelConfig
    images: ImageFolderConfig
    train: TrainConfig
    pictures: PictureConfig = field(default_factory=PictureConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    previews: PreviewConfig = field(default_factory=PreviewConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    refused: RefusedConfig = field(default_factory=RefusedConfig)


def main(config: LoraRun) -> None:
    """Train the adapters and save them."""
    from finetune.core.images import data_provenance, read_images
    from finetune.core.models import LORA_FILE
    from finetune.core.open import open_run

    images = read_images(config.images)
    data = data_provenance(images, config.images.train_data_dir)
    with open_run(config, images, data, weights_file=LORA_FILE) as opened:
        train_lora(opened, config)


def train_lora(opened: Opened, config: LoraRun) -> None:
    """Train in a run that was opened, on images that passed the checks."""
    from functools import partial

    from finetune.core.batches import captioned_batches
    from finetune.core.loop import train
    from finetune.core.models import Denoiser
    from finetune.core.objective import denoising_loss
    from finetune.core.optimizer import base_learning_rate
    from finetune.core.previews import Previews
    from finetune.core.trainable import lora_adapters
    from finetune.core.weights import save_lora

    run, models, schedule, images = opened.run, opened.models, opened.schedule, opened.images
    batches = captioned_batches(
        images, models, config.pictures, config.noise, run, num_timesteps=schedule.num_timesteps
    )
    models.unet.to(run.weight_dtype)
    rate = base_learning_rate(config.train, run.accelerator.num_processes)
    learns = lora_adapters(models, config.lora, learning_rate=rate, seed=run.seed)
    if config.train.gradient_checkpointing:
        models.unet.enable_gradient_checkpointing()
    loss = partial(denoising_loss, schedule=schedule, snr_gamma=config.objective.snr_gamma)
    previews = Previews(models, config.previews, run, size=batches.size, steps_per_epoch=batches.steps_per_epoch)
    run.say(
        f"LoRA: {learns.num_weights:,} weights learn from {len(images)} images in {run.total_steps} steps of "
        f"{config.train.train_batch_size} x {config.train.gradient_accumulation_steps} images, seed {run.seed}"
    )

    if run.checkpoint is None:
        previews.show(0)
    for step in train(run, Denoiser(models.text_encoder, models.unet), learns, batches, loss, config.train):
        run.log(step)
        previews.show(step.number)

    if run.is_main:
        provenance = opened.provenance("lora", height=batches.size, width=batches.size)
        run.say(f"saved {save_lora(run.folder, models, provenance)}; next:")
    run.say(
        f"  python -m eval.generate --pretrained_model_name_or_path {models.name} --adapter {run.folder} "
        f'--prompts "{images[0].caption}" --num_images 4 --seed 0 --output_dir {run.folder}-slices'
    )


if __name__ == "__main__":
    command(LoraRun, main)
