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
from typing import TYPE_CHECKING

from configs.load import command
from finetune.core.config import (
    HubConfig,
    ModelConfig,
    NoiseConfig,
    ObjectiveConfig,
    PictureConfig,
    PreviewConfig,
    RefusedConfig,
    TrainConfig,
    WatchConfig,
)
from finetune.core.method_config import EmaConfig, InstanceConfig, PriorConfig, TextEncoderConfig, check_folders

if TYPE_CHECKING:
    from finetune.core.open import Opened


@dataclass(frozen=True, kw_only=True)
class DreamBoothTrainConfig(TrainConfig):
    """The loop, with the defaults of diffusers' train_dreambooth.py."""

    train_batch_size: int = 4
    """Images per process in one forward pass; with class images as many of them beside."""
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
    hub: HubConfig = field(default_factory=HubConfig)
    refused: RefusedConfig = field(default_factory=RefusedConfig)

    def __post_init__(self) -> None:
        """Refuse what would lose what was learned, or mix subject and class."""
        if self.skip_save_text_encoder and self.text_encoder.train_text_encoder:
            raise ValueError("--skip_save_text_encoder: what --train_text_encoder learns would be lost; leave one out")
        check_folders(self.instance, self.prior)


def main(config: DreamBoothRun) -> None:
    """Train the model and save it."""
    from finetune.core.images import data_provenance, read_instance_images
    from finetune.core.open import open_run
    from finetune.core.weights import PIPELINE_FILE, PIPELINE_PARTS

    images = read_instance_images(config.instance)
    data = data_provenance(images, [config.instance.instance_data_dir])
    with open_run(
        config, images, data, weights_file=PIPELINE_FILE, more_files=PIPELINE_PARTS, prior=config.prior
    ) as opened:
        train_dreambooth(opened, config)


def train_dreambooth(opened: Opened, config: DreamBoothRun) -> None:
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
        beside=config.instance.instance_data_dir,
        learns_text=learns_text,
        captions=config.instance.captions,
    )
    run.say(
        f"DreamBooth: {learns.num_weights:,} weights learn from {len(images)} images in {run.total_steps} steps of "
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
        provenance = opened.provenance("dreambooth", height=batches.size, width=batches.size, prior=config.prior)
        with averages.in_place():
            saved = save_pipeline(run.folder, models, provenance, with_text_encoder=not config.skip_save_text_encoder)
        run.say(f"saved {saved}; next:")
    run.say(
        f"  python -m eval.generate --pretrained_model_name_or_path {run.folder} "
        f'--prompts "{images[0].caption}" --num_images 4 --seed 0 --output_dir {run.folder}-slices'
    )


if __name__ == "__main__":
    command(DreamBoothRun, main)
