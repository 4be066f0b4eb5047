"""Pivotal tuning: first learn a new word in the frozen model, then adapters around it.

    accelerate launch finetune/pivotal_tuning.py --pretrained_model_name_or_path assets/tiny-sd \
        --instance_data_dir data/few/dry --placeholder_token "<dry-slice>" --initializer_token woven \
        --output_dir runs/pivotal

Learns  the rows of the new word for --token_steps updates; then adapters, while the rows rest or go on slowly.
Batch   images with templates around the word, or with captions that hold it; prior rows beside the adapters if asked.
Saves   learned_embeds.safetensors and pytorch_lora_weights.safetensors.

The idea is Roich et al. 2021, arXiv:2106.05744: find the place of a subject in the model first, then tune the
model there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from configs.load import command
from finetune.core.settings.methods import (
    LoraConfig,
    PivotConfig,
    PriorConfig,
    SentenceConfig,
    TextEncoderConfig,
    TokenConfig,
    check_pivotal,
)
from finetune.core.settings.recipe import RecipeConfig
from finetune.core.settings.training import PivotalTuningTrainConfig
from finetune.core.settings.watching import PreviewConfig

if TYPE_CHECKING:
    from finetune.core.parts import Method, OpenRun, Provenance


@dataclass(frozen=True, kw_only=True)
class PivotalTuningRun(RecipeConfig):
    """Settings of a pivotal tuning run."""

    instance_data_dir: Path
    """Folder with images of the subject."""
    tokens: TokenConfig
    train: PivotalTuningTrainConfig
    pivot: PivotConfig = field(default_factory=PivotConfig)
    sentences: SentenceConfig = field(default_factory=SentenceConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    previews: PreviewConfig = field(default_factory=lambda: PreviewConfig(validation_steps=100))

    def __post_init__(self) -> None:
        """Refuse what does not fit a word that moves, or two files."""
        check_pivotal(self.instance_data_dir, self.tokens, self.text_encoder, self.prior)


def main(config: PivotalTuningRun) -> None:
    """Train the rows, then the adapters, and save both."""
    from finetune.core import parts

    folders = (config.instance_data_dir,)
    images = parts.word_images(folders, "--instance_data_dir", config.tokens, config.sentences)
    shown = images * config.tokens.repeats
    alone = config.pivot.steps_alone(config.train.total_steps(len(shown), int(os.environ.get("WORLD_SIZE", "1"))))
    # In steps, and written down: a run that goes on for longer must not move its pivot.
    config = replace(config, pivot=replace(config.pivot, token_steps=alone))

    def method(opened: OpenRun) -> Method:
        run, models, processes = opened.run, opened.models, opened.run.accelerator.num_processes
        lr, text_lr = parts.learning_rates(config.train, config.text_encoder, processes)
        token_lr = config.pivot.token_lr or config.train.learning_rate
        word = parts.add_word(models, config.tokens)
        batches = parts.image_batches(opened, config, learns_text=True)
        # A class prompt gives the rows no gradient, and before the pivot nothing else learns.
        beside = parts.with_prior(batches, opened, config.prior, adapts=True)
        models.unet.to(run.weight_dtype)
        adapters = parts.trainable.lora_adapters(
            models, config.lora, learning_rate=lr, seed=run.seed, text_encoder_rate=text_lr
        )
        word.embedding.rows.requires_grad_(True)  # peft has frozen all that it found
        rows = word.learns(parts.base_learning_rate(config.train, processes, token_lr))
        learns = parts.word_then_adapters(rows, adapters, pivot=alone, after=config.pivot.token_lr_after / token_lr)
        averages = parts.Averages(learns, config.ema)
        told = partial(opened.provenance, "pivotal_tuning", batches.shapes, config.prior)

        def save(provenance: Provenance) -> Path:
            parts.save_embeddings(run.folder, word, provenance)
            return parts.save_lora(run.folder, models, provenance).parent

        return parts.Method(
            name="pivotal_tuning",
            batches=batches,
            updates=parts.Staged(first=batches, then=beside, pivot=alone),
            learns=learns,
            averages=averages,
            heldout=parts.heldout_images(config.instance_data_dir, config.tokens, config.sentences),
            summary=f"pivotal tuning: {len(word.pieces)} rows learn {word.placeholder} for {alone} steps, then "
            f"{adapters.num_weights:,} weights of adapters",
            save=save,
            generate_options=("--pretrained_model_name_or_path", models.name, "--adapter", str(run.folder)),
            prior=config.prior,
            observers=[parts.WordCopies(config.tokens.save_steps, run, word, averages, told)],
        )

    leaves = (parts.LORA_FILE, parts.EMBEDDINGS_FILE, *parts.copies_of(config.train.output_dir))
    parts.run_method(config, shown, parts.data_provenance(images, folders), method, leaves=leaves, prior=config.prior)


if __name__ == "__main__":
    command(PivotalTuningRun, main)
