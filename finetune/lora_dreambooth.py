"""Fine-tune low-rank adapters on a few images of one subject (DreamBooth with LoRA).

    accelerate launch finetune/lora_dreambooth.py --pretrained_model_name_or_path assets/tiny-sd \
        --instance_data_dir data/few/dry --instance_prompt "a w17h3r texture" --output_dir runs/lora-dreambooth

Learns  adapters on the U-Net; with --train_text_encoder on the text encoder, too.
Batch   images of the subject; with --with_prior_preservation prior rows beside them.
Saves   pytorch_lora_weights.safetensors, for diffusers' load_lora_weights().

After Ruiz et al. 2022 (arXiv:2208.12242) and Hu et al. 2021 (arXiv:2106.09685).
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
from finetune.core.method_config import (
    EmaConfig,
    InstanceConfig,
    LoraConfig,
    PriorConfig,
    TextEncoderConfig,
    check_folders,
)

if TYPE_CHECKING:
    from finetune.core.open import Opened


@dataclass(frozen=True, kw_only=True)
class LoraDreamBoothTrainConfig(TrainConfig):
    """The loop, with the defaults of diffusers' train_dreambooth_lora.py."""

    train_batch_size: int = 4
    """Images per process in one forward pass; with class images as many of them beside."""
    num_train_epochs: int = 1
    """Passes over the images; max_train_steps wins."""
    learning_rate: float = 5e-4
    """Learning rate before the schedule's factor."""


@dataclass(frozen=True, kw_only=True)
class LoraDreamBoothRun:
    """Settings of a LoRA + DreamBooth run."""

    model: ModelConfig
    instance: InstanceConfig
    train: LoraDreamBoothTrainConfig
    pictures: PictureConfig = field(default_factory=PictureConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    previews: PreviewConfig = field(default_factory=lambda: PreviewConfig(validation_epochs=50))
    watch: WatchConfig = field(default_factory=WatchConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    refused: RefusedConfig = field(default_factory=RefusedConfig)

    def __post_init__(self) -> None:
        """Refuse to mix subject and class."""
        check_folders(self.instance, self.prior)


def main(config: LoraDreamBoothRun) -> None:
    """Train the adapters and save them."""
    from finetune.core.images import data_provenance, read_instance_images
    from finetune.core.models import LORA_FILE
    from finetune.core.open import open_run

    images = read_instance_images(config.instance)
    data = data_provenance(images, [config.instance.instance_data_dir])
    with open_run(config, images, data, weights_file=LORA_FILE, prior=config.prior) as opened:
        train_lora_dreambooth(opened, config)


def train_lora_dreambooth(opened: Opened, config: LoraDreamBoothRun) -> None:
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
    from finetune.core.trainable import checkpoint_gradients, lora_adapters
    from finetune.core.watch import watch_losses
    from finetune.core.weights import save_lora

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
        batches, opened, config.prior, config.pictures, config.noise, learns_text=learns_text, adapts=True
    )
    models.unet.to(run.weight_dtype)
    rate, text_rate = learning_rates(config.train, config.text_encoder, run.accelerator.num_processes)
    learns = lora_adapters(models, config.lora, learning_rate=rate, seed=run.seed, text_encoder_rate=text_rate)
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
        f"LoRA + DreamBooth: {learns.num_weights:,} weights learn from {len(images)} images in {run.total_steps} steps "
        f"of {config.train.train_batch_size} x {config.train.gradient_accumulation_steps} images, seed {run.seed}"
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
        provenance = opened.provenance("lora_dreambooth", height=batches.size, width=batches.size, prior=config.prior)
        with averages.in_place():
            run.say(f"saved {save_lora(run.folder, models, provenance)}; next:")
    run.say(
        f"  python -m eval.generate --pretrained_model_name_or_path {models.name} --adapter {run.folder} "
        f'--prompts "{images[0].caption}" --num_images 4 --seed 0 --output_dir {run.folder}-slices'
    )


if __name__ == "__main__":
    command(LoraDreamBoothRun, main)
