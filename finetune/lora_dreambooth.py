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
from typing import TYPE_CHECKING

from configs.load import command
from finetune.core.settings.methods import InstanceConfig, LoraConfig, PriorConfig, TextEncoderConfig, check_folders
from finetune.core.settings.recipe import RecipeConfig
from finetune.core.settings.training import LoraDreamBoothTrainConfig
from finetune.core.settings.watching import PreviewConfig

if TYPE_CHECKING:
    from finetune.core.parts import Method, OpenRun, Provenance


@dataclass(frozen=True, kw_only=True)
class LoraDreamBoothRun(RecipeConfig):
    """Settings of a LoRA + DreamBooth run."""

    instance: InstanceConfig
    train: LoraDreamBoothTrainConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    previews: PreviewConfig = field(default_factory=lambda: PreviewConfig(validation_epochs=50))

    def __post_init__(self) -> None:
        """Refuse to mix subject and class."""
        check_folders(self.instance, self.prior)


def main(config: LoraDreamBoothRun) -> None:
    """Train the adapters and save them."""
    from finetune.core import parts

    images = parts.read_instance_images(config.instance)
    data = parts.data_provenance(images, [config.instance.instance_data_dir])

    def method(opened: OpenRun) -> Method:
        run, models = opened.run, opened.models
        batches = parts.image_batches(opened, config, learns_text=config.text_encoder.train_text_encoder)
        updates = parts.with_prior(batches, opened, config.prior, adapts=True)
        lr, text_lr = parts.learning_rates(config.train, config.text_encoder, run.accelerator.num_processes)
        models.unet.to(run.weight_dtype)
        learns = parts.trainable.lora_adapters(
            models, config.lora, learning_rate=lr, seed=run.seed, text_encoder_rate=text_lr
        )

        def save(provenance: Provenance) -> Path:
            return parts.save_lora(run.folder, models, provenance)

        return parts.Method(
            name="lora_dreambooth",
            batches=batches,
            updates=updates,
            learns=learns,
            averages=parts.Averages(learns, config.ema),
            heldout=parts.HeldOut(beside=config.instance.instance_data_dir, captions=config.instance.captions),
            summary=f"LoRA + DreamBooth: {learns.num_weights:,} weights learn",
            save=save,
            generate_options=("--pretrained_model_name_or_path", models.name, "--adapter", str(run.folder)),
            prior=config.prior,
        )

    leaves = (parts.LORA_FILE,)
    parts.run_method(config, images, data, method, leaves=leaves, prior=config.prior)


if __name__ == "__main__":
    command(LoraDreamBoothRun, main)
