"""Fine-tune every weight of the U-Net on a few images of one subject, and of the text encoder if asked (DreamBooth).

    accelerate launch finetune/dreambooth.py --pretrained_model_name_or_path assets/tiny-sd \
        --instance_data_dir data/few/dry --instance_prompt "a w17h3r texture" --output_dir runs/dreambooth \
        --with_prior_preservation --class_prompt "a texture" --class_data_dir runs/class

Learns  the whole U-Net; with --train_text_encoder the whole text encoder, too.
Batch   images of the subject; with --with_prior_preservation prior rows beside them.
Saves   a pipeline folder, for diffusers' StableDiffusionPipeline.from_pretrained().

After Ruiz et al. 2022 (arXiv:2208.12242).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from configs.load import command
from finetune.core.settings.methods import InstanceConfig, PriorConfig, TextEncoderConfig, check_folders
from finetune.core.settings.recipe import RecipeConfig
from finetune.core.settings.training import DreamBoothTrainConfig
from finetune.core.settings.watching import PreviewConfig

if TYPE_CHECKING:
    from finetune.core.parts import Method, OpenRun, Provenance


@dataclass(frozen=True, kw_only=True)
class DreamBoothRun(RecipeConfig):
    """Settings of a DreamBooth run."""

    instance: InstanceConfig
    train: DreamBoothTrainConfig
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    skip_save_text_encoder: bool = False
    """Leave the text encoder out of the pipeline folder; it then has to come from the base model."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    previews: PreviewConfig = field(default_factory=lambda: PreviewConfig(validation_steps=100))

    def __post_init__(self) -> None:
        """Refuse what would lose what was learned, or mix subject and class."""
        if self.skip_save_text_encoder and self.text_encoder.train_text_encoder:
            raise ValueError("--skip_save_text_encoder: what --train_text_encoder learns would be lost; leave one out")
        check_folders(self.instance, self.prior)


def main(config: DreamBoothRun) -> None:
    """Train the model and save it."""
    from finetune.core import parts

    images = parts.read_instance_images(config.instance)
    data = parts.data_provenance(images, [config.instance.instance_data_dir])

    def method(opened: OpenRun) -> Method:
        run, models = opened.run, opened.models
        batches = parts.image_batches(opened, config, learns_text=config.text_encoder.train_text_encoder)
        updates = parts.with_prior(batches, opened, config.prior, adapts=False)
        lr, text_lr = parts.learning_rates(config.train, config.text_encoder, run.accelerator.num_processes)
        learns = parts.trainable.all_weights(models, learning_rate=lr, text_encoder_rate=text_lr)

        def save(provenance: Provenance) -> Path:
            return parts.save_pipeline(
                run.folder, models, provenance, with_text_encoder=not config.skip_save_text_encoder
            )

        return parts.Method(
            name="dreambooth",
            batches=batches,
            updates=updates,
            learns=learns,
            averages=parts.Averages(learns, config.ema),
            heldout=parts.HeldOut(beside=config.instance.instance_data_dir, captions=config.instance.captions),
            summary=f"DreamBooth: {learns.num_weights:,} weights learn",
            save=save,
            generate_options=()
            if config.skip_save_text_encoder
            else ("--pretrained_model_name_or_path", str(run.folder)),
            prior=config.prior,
        )

    leaves = (parts.PIPELINE_FILE, *parts.PIPELINE_PARTS)
    parts.run_method(config, images, data, method, leaves=leaves, prior=config.prior)


if __name__ == "__main__":
    command(DreamBoothRun, main)
