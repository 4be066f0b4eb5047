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
    ImageFolderConfig,
    LoraConfig,
    ModelConfig,
    NoiseConfig,
    ObjectiveConfig,
    PreviewConfig,
    RefusedConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from finetune.core.batches import CaptionedImage
    from finetune.core.run import Run


@dataclass(frozen=True, kw_only=True)
class LoraRun:
    """Settings of a LoRA run."""

    model: ModelConfig
    images: ImageFolderConfig
    train: TrainConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    previews: PreviewConfig = field(default_factory=PreviewConfig)
    refused: RefusedConfig = field(default_factory=RefusedConfig)


def main(config: LoraRun) -> None:
    """Train the adapters and save them."""
    from contextlib import suppress

    from configs.errors import UsageError
    from finetune.core.batches import data_hash, data_provenance, read_images
    from finetune.core.models import LORA_FILE, check_folder, model_hash
    from finetune.core.run import start_run

    images, source, base_hash = read_images(config.images), config.model, None
    data = data_provenance(images, config.images)
    check_folder(source.pretrained_model_name_or_path)
    with suppress(UsageError):  # a model of the hub that is not downloaded yet
        base_hash = model_hash(
            source.pretrained_model_name_or_path, revision=source.revision, cache_dir=source.cache_dir
        )
    with start_run(
        config,
        config.train,
        num_images=len(images),
        data_hash=data_hash(images),
        weights_file=LORA_FILE,
        base_hash=base_hash,
    ) as run:
        train_lora(run, config, images, data)


def train_lora(run: Run, config: LoraRun, images: list[CaptionedImage], data: dict[str, object]) -> None:
    """Train on images that passed the checks, in a run that was opened."""
    from functools import partial

    from finetune.core.batches import captioned_batches
    from finetune.core.loop import train
    from finetune.core.models import Denoiser, load_models, model_provenance
    from finetune.core.noise import from_scheduler
    from finetune.core.objective import denoising_loss
    from finetune.core.optimizer import base_learning_rate
    from finetune.core.previews import Previews
    from finetune.core.trainable import lora_adapters
    from finetune.core.weights import save_lora

    device = run.accelerator.device
    source = config.model
    models = load_models(
        source.pretrained_model_name_or_path,
        revision=source.revision,
        variant=source.variant,
        cache_dir=source.cache_dir,
        device=device,
    )
    schedule = from_scheduler(models.scheduler.config, config.noise.prediction_type).to(device)
    models.scheduler.register_to_config(prediction_type=schedule.prediction_type)  # previews sample what is trained
    batches = captioned_batches(images, models, config.images, config.noise, run, num_timesteps=schedule.num_timesteps)
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
        provenance = {
            "method": "lora",
            "base_model": model_provenance(models, source.revision, source.cache_dir),
            **data,
            "config_hash": run.config_hash,
            "height": batches.size,
            "width": batches.size,
            "scheduler": dict(models.scheduler.config),
            "steps": run.total_steps,
        }
        run.say(f"saved {save_lora(run.folder, models, provenance)}; next:")
    run.say(
        f"  python -m eval.generate --pretrained_model_name_or_path {models.name} --adapter {run.folder} "
        f'--prompts "{images[0].caption}" --num_images 4 --seed 0 --output_dir {run.folder}-slices'
    )


if __name__ == "__main__":
    command(LoraRun, main)
