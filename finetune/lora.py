"""Fine-tune low-rank adapters on a captioned image folder.

    accelerate launch finetune/lora.py --pretrained_model_name_or_path assets/tiny-sd \
        --train_data_dir data/weave/train --output_dir runs/lora

Learns  adapters on the U-Net's attention, and on its ResNet convolutions if asked.
Batch   captioned images.
Saves   pytorch_lora_weights.safetensors, for diffusers' load_lora_weights().
"""

from __future__ import annotations

from dataclasses import dataclass, field

from configs.load import command
from finetune.core.config import (
    ImageFolderConfig,
    LoraConfig,
    ModelConfig,
    NoiseConfig,
    ObjectiveConfig,
    PreviewConfig,
    TrainConfig,
)


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


def main(config: LoraRun) -> None:
    """Train the adapters and save them."""
    from functools import partial

    from finetune.core.batches import captioned_batches, data_hash, data_provenance, read_images
    from finetune.core.loop import train
    from finetune.core.models import LORA_FILE, Denoiser, load_models, model_hash
    from finetune.core.noise import from_scheduler
    from finetune.core.objective import denoising_loss
    from finetune.core.optimizer import base_learning_rate
    from finetune.core.previews import is_due, render
    from finetune.core.run import start_run
    from finetune.core.trainable import lora_adapters
    from finetune.core.weights import save_lora

    images = read_images(config.images, config.train.seed or 0)
    run = start_run(config, config.train, num_images=len(images), data_hash=data_hash(images), weights_file=LORA_FILE)
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
    batches = captioned_batches(images, models, config.images, config.noise, run, num_timesteps=schedule.num_timesteps)
    models.unet.to(run.weight_dtype)
    rate = base_learning_rate(config.train, run.accelerator.num_processes)
    learns = lora_adapters(models, config.lora, learning_rate=rate, seed=run.seed)
    if config.train.gradient_checkpointing:
        models.unet.enable_gradient_checkpointing()
    loss = partial(denoising_loss, schedule=schedule, snr_gamma=config.objective.snr_gamma)
    run.say(
        f"LoRA: {learns.num_weights:,} weights learn, {len(images)} images, {run.total_steps} steps of "
        f"{config.train.train_batch_size} x {config.train.gradient_accumulation_steps} images, seed {run.seed}"
    )

    due = partial(is_due, config.previews, total=run.total_steps, steps_per_epoch=batches.steps_per_epoch)
    preview = partial(render, models, config.previews, run, size=batches.size)
    if run.is_main and run.checkpoint is None and due(0):
        run.show(preview(), 0)
    for step in train(run, Denoiser(models.text_encoder, models.unet), learns, batches, loss, config.train):
        run.log(step)
        if run.is_main and due(step.number):
            run.show(preview(), step.number)

    if run.is_main:
        provenance = {
            "method": "lora",
            "base_model": {
                "name": source.pretrained_model_name_or_path,
                "hash": model_hash(
                    source.pretrained_model_name_or_path, revision=source.revision, cache_dir=source.cache_dir
                ),
            },
            **data_provenance(images, config.images),
            "config_hash": run.config_hash,
            "height": batches.size,
            "width": batches.size,
            "scheduler": {**models.scheduler.config, "prediction_type": schedule.prediction_type},
            "steps": run.total_steps,
        }
        save_lora(run.folder, models, provenance)
    run.finish(
        f"saved {run.folder / LORA_FILE}; next:\n  python -m eval.generate --pretrained_model_name_or_path "
        f'{source.pretrained_model_name_or_path} --adapter {run.folder} --prompts "{images[0].caption}" '
        f"--num_images 4 --seed 0 --output_dir {run.folder}-slices"
    )


if __name__ == "__main__":
    command(LoraRun, main)
