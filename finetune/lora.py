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
from finetune.core.settings.images import ImageFolderConfig
from finetune.core.settings.methods import LoraConfig, PriorConfig, TextEncoderConfig
from finetune.core.settings.recipe import RecipeConfig

if TYPE_CHECKING:
    from finetune.core.parts import Method, OpenRun, Provenance


@dataclass(frozen=True, kw_only=True)
class LoraRun(RecipeConfig):
    """Settings of a LoRA run; defaults are those of diffusers' train_text_to_image_lora.py."""

    images: ImageFolderConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)


def main(config: LoraRun) -> None:
    """Train the adapters and save them."""
    from finetune.core import parts

    config = replace(config, images=parts.local_images(config.images, config.model.cache_dir))
    images = parts.read_images(config.images)
    data = parts.data_provenance(images, config.images.train_data_dir)

    def method(opened: OpenRun) -> Method:
        run, models = opened.run, opened.models
        learns_text, balance = config.text_encoder.train_text_encoder, config.images.balanced_keys
        batches = parts.image_batches(opened, config, learns_text=learns_text, balance=balance)
        updates = parts.with_prior(batches, opened, config.prior, adapts=True)
        lr, text_lr = parts.learning_rates(config.train, config.text_encoder, run.accelerator.num_processes)
        models.unet.to(run.weight_dtype)
        learns = parts.trainable.lora_adapters(
            models, config.lora, learning_rate=lr, seed=run.seed, text_encoder_rate=text_lr
        )

        def save(provenance: Provenance) -> Path:
            return parts.save_lora(run.folder, models, provenance)

        return parts.Method(
            name="lora",
            batches=batches,
            updates=updates,
            learns=learns,
            averages=parts.Averages(learns, config.ema),
            heldout=parts.HeldOut(
                beside=config.images.train_data_dir[0],
                image_column=config.images.image_column,
                caption_column=config.images.caption_column,
            ),
            summary=f"LoRA: {learns.num_weights:,} weights learn",
            save=save,
            generate_options=("--pretrained_model_name_or_path", models.name, "--adapter", str(run.folder)),
            prior=config.prior,
        )

    parts.run_method(config, images, data, method, leaves=(parts.LORA_FILE,), prior=config.prior)


if __name__ == "__main__":
    command(LoraRun, main)
