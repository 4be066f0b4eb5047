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
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.load import command
from finetune.core.settings.images import PictureConfig
from finetune.core.settings.methods import (
    EmaConfig,
    InstanceConfig,
    LoraConfig,
    PriorConfig,
    TextEncoderConfig,
    check_folders,
)
from finetune.core.settings.model import HubConfig, ModelConfig, RefusedConfig
from finetune.core.settings.training import ObjectiveConfig, TrainConfig
from finetune.core.settings.watching import DriftWatchConfig, PreviewConfig, WatchConfig
from finetune.diffusion.config import NoiseConfig

if TYPE_CHECKING:
    from finetune.core.run import Opened


@dataclass(frozen=True, kw_only=True)
class LoraDreamBoothTrainConfig(TrainConfig):
    """The loop, with the defaults of diffusers' train_dreambooth_lora.py."""

    train_batch_size: int | Literal["auto"] = 4
    """Images per process in one forward pass, with class images as many of them beside; auto: as many as fit."""
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
    drift: DriftWatchConfig = field(default_factory=DriftWatchConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    refused: RefusedConfig = field(default_factory=RefusedConfig)

    def __post_init__(self) -> None:
        """Refuse to mix subject and class."""
        check_folders(self.instance, self.prior)


def main(config: LoraDreamBoothRun) -> None:
    """Train the adapters and save them."""
    from data_prep.folders.run_folder import LORA_FILE
    from finetune.core.open import open_run
    from finetune.core.pictures.images import data_provenance, read_instance_images

    images = read_instance_images(config.instance)
    data = data_provenance(images, [config.instance.instance_data_dir])
    with open_run(config, images, data, weights_file=LORA_FILE, prior=config.prior) as opened:
        train_lora_dreambooth(opened, config)


def train_lora_dreambooth(opened: Opened, config: LoraDreamBoothRun) -> None:
    """Train in a run that was opened, on images that passed the checks."""
    from finetune.core.data.prior import with_prior
    from finetune.core.learns.averages import Averages
    from finetune.core.learns.optimizer import learning_rates
    from finetune.core.learns.trainable import lora_adapters
    from finetune.core.recipe import image_batches, train_and_save
    from finetune.core.run import HeldOut
    from finetune.core.save.weights import save_lora

    run, models = opened.run, opened.models
    batches = image_batches(opened, config, learns_text=config.text_encoder.train_text_encoder)
    updates = with_prior(batches, opened, config.prior, adapts=True)
    rate, text_rate = learning_rates(config.train, config.text_encoder, run.accelerator.num_processes)
    models.unet.to(run.weight_dtype)
    learns = lora_adapters(models, config.lora, learning_rate=rate, seed=run.seed, text_encoder_rate=text_rate)
    averages = Averages(learns, config.ema)
    heldout = HeldOut(beside=config.instance.instance_data_dir, captions=config.instance.captions)

    def save() -> Path:
        provenance = opened.provenance("lora_dreambooth", batches.shapes, config.prior)
        return save_lora(run.folder, models, provenance)

    train_and_save(
        opened,
        config,
        batches=batches,
        updates=updates,
        learns=learns,
        averages=averages,
        heldout=heldout,
        says=f"LoRA + DreamBooth: {learns.num_weights:,} weights learn",
        save=save,
        uses=("--pretrained_model_name_or_path", models.name, "--adapter", str(run.folder)),
    )


if __name__ == "__main__":
    command(LoraDreamBoothRun, main)
