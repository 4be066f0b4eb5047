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
from typing import TYPE_CHECKING, Literal

from configs.load import command
from finetune.core.settings.images import PictureConfig
from finetune.core.settings.methods import EmaConfig, InstanceConfig, PriorConfig, TextEncoderConfig, check_folders
from finetune.core.settings.model import HubConfig, ModelConfig, RefusedConfig
from finetune.core.settings.training import ObjectiveConfig, TrainConfig
from finetune.core.settings.watching import DriftWatchConfig, PreviewConfig, WatchConfig
from finetune.diffusion.config import NoiseConfig

if TYPE_CHECKING:
    from finetune.core.run import Opened


@dataclass(frozen=True, kw_only=True)
class DreamBoothTrainConfig(TrainConfig):
    """The loop, with the defaults of diffusers' train_dreambooth.py."""

    train_batch_size: int | Literal["auto"] = 4
    """Images per process in one forward pass, with class images as many of them beside; auto: as many as fit."""
    num_train_epochs: int = 1
    """Passes over the images; max_train_steps wins."""
    learning_rate: float = 5e-6
    """Learning rate before the schedule's factor."""


@dataclass(frozen=True, kw_only=True)
class DreamBoothRun:
    """Settings of a DreamBooth run."""

    model: ModelConfig
    instance: InstanceConfig
    train: DreamBoothTrainConfig
    pictures: PictureConfig = field(default_factory=PictureConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    skip_save_text_encoder: bool = False
    """Leave the text encoder out of the pipeline folder; it then has to come from the base model."""
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
        """Refuse what would lose what was learned, or mix subject and class."""
        if self.skip_save_text_encoder and self.text_encoder.train_text_encoder:
            raise ValueError("--skip_save_text_encoder: what --train_text_encoder learns would be lost; leave one out")
        check_folders(self.instance, self.prior)


def main(config: DreamBoothRun) -> None:
    """Train the model and save it."""
    from data_prep.folders.run_folder import PIPELINE_FILE, PIPELINE_PARTS
    from finetune.core.open import open_run
    from finetune.core.pictures.images import data_provenance, read_instance_images

    images = read_instance_images(config.instance)
    data = data_provenance(images, [config.instance.instance_data_dir])
    with open_run(
        config, images, data, weights_file=PIPELINE_FILE, more_files=PIPELINE_PARTS, prior=config.prior
    ) as opened:
        train_dreambooth(opened, config)


def train_dreambooth(opened: Opened, config: DreamBoothRun) -> None:
    """Train in a run that was opened, on images that passed the checks."""
    from finetune.core.data.prior import with_prior
    from finetune.core.learns.averages import Averages
    from finetune.core.learns.optimizer import learning_rates
    from finetune.core.learns.trainable import all_weights
    from finetune.core.recipe import image_batches, train_and_save
    from finetune.core.run import HeldOut
    from finetune.core.save.weights import save_pipeline

    run, models = opened.run, opened.models
    batches = image_batches(opened, config, learns_text=config.text_encoder.train_text_encoder)
    updates = with_prior(batches, opened, config.prior, adapts=False)
    rate, text_rate = learning_rates(config.train, config.text_encoder, run.accelerator.num_processes)
    learns = all_weights(models, learning_rate=rate, text_encoder_rate=text_rate)
    averages = Averages(learns, config.ema)
    heldout = HeldOut(beside=config.instance.instance_data_dir, captions=config.instance.captions)

    def save() -> Path:
        provenance = opened.provenance("dreambooth", batches.shapes, config.prior)
        return save_pipeline(run.folder, models, provenance, with_text_encoder=not config.skip_save_text_encoder)

    train_and_save(
        opened,
        config,
        batches=batches,
        updates=updates,
        learns=learns,
        averages=averages,
        heldout=heldout,
        says=f"DreamBooth: {learns.num_weights:,} weights learn",
        save=save,
        uses=() if config.skip_save_text_encoder else ("--pretrained_model_name_or_path", str(run.folder)),
    )


if __name__ == "__main__":
    command(DreamBoothRun, main)
