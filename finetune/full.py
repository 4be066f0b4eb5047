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
from finetune.core.settings.images import ImageFolderConfig
from finetune.core.settings.methods import PriorConfig, TextEncoderConfig
from finetune.core.settings.recipe import RecipeConfig
from finetune.core.settings.watching import PreviewConfig

if TYPE_CHECKING:
    from finetune.core.parts import Method, OpenRun, Provenance


@dataclass(frozen=True, kw_only=True)
class FullRun(RecipeConfig):
    """Settings of a full fine-tuning run; defaults are those of diffusers' train_text_to_image.py."""

    images: ImageFolderConfig
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    previews: PreviewConfig = field(default_factory=lambda: PreviewConfig(validation_epochs=5))


def main(config: FullRun) -> None:
    """Train the model and save it."""
    from finetune.core import parts

    config = replace(config, images=parts.local_images(config.images, config.model.cache_dir))
    images = parts.read_images(config.images)
    data = parts.data_provenance(images, config.images.train_data_dir)

    def method(opened: OpenRun) -> Method:
        run, models = opened.run, opened.models
        learns_text, balance = config.text_encoder.train_text_encoder, config.images.balanced_keys
        batches = parts.image_batches(opened, config, learns_text=learns_text, balance=balance)
        updates = parts.with_prior(batches, opened, config.prior, adapts=False)
        lr, text_lr = parts.learning_rates(config.train, config.text_encoder, run.accelerator.num_processes)
        learns = parts.trainable.all_weights(models, learning_rate=lr, text_encoder_rate=text_lr)

        def save(provenance: Provenance) -> Path:
            return parts.save_pipeline(run.folder, models, provenance)

        return parts.Method(
            name="full",
            batches=batches,
            updates=updates,
            learns=learns,
            averages=parts.Averages(learns, config.ema),
            heldout=parts.HeldOut(
                beside=config.images.train_data_dir[0],
                image_column=config.images.image_column,
                caption_column=config.images.caption_column,
            ),
            summary=f"full: {learns.num_weights:,} weights learn",
            save=save,
            generate_options=("--pretrained_model_name_or_path", str(run.folder)),
            prior=config.prior,
        )

    leaves = (parts.PIPELINE_FILE, *parts.PIPELINE_PARTS)
    parts.run_method(config, images, data, method, leaves=leaves, prior=config.prior)


if __name__ == "__main__":
    command(FullRun, main)
