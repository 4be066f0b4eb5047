"""Learn a new word from a few images: its rows of the token embedding, and nothing else.

    accelerate launch finetune/textual_inversion.py --pretrained_model_name_or_path assets/tiny-sd \
        --train_data_dir data/few/dry --placeholder_token "<dry-slice>" --initializer_token woven --output_dir runs/word

Learns  the rows of the new word.
Batch   images with templates around the word, or with captions that hold it.
Saves   learned_embeds.safetensors, for diffusers' load_textual_inversion().
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from configs.load import command
from finetune.core.settings.images import PictureConfig
from finetune.core.settings.methods import EmaConfig, NoPriorConfig, SentenceConfig, TokenConfig
from finetune.core.settings.model import HubConfig, ModelConfig, RefusedConfig
from finetune.core.settings.training import ObjectiveConfig, TrainConfig
from finetune.core.settings.watching import DriftWatchConfig, PreviewConfig, WatchConfig
from finetune.diffusion.config import NoiseConfig

if TYPE_CHECKING:
    from finetune.core.run import Opened


@dataclass(frozen=True, kw_only=True)
class TextualInversionTrainConfig(TrainConfig):
    """The loop, with the defaults of diffusers' textual_inversion.py."""

    max_train_steps: int | None = 5000
    """Optimizer updates in all; `null` for num_train_epochs."""


@dataclass(frozen=True, kw_only=True)
class TextualInversionRun:
    """Settings of a Textual Inversion run."""

    model: ModelConfig
    train_data_dir: tuple[Path, ...]
    """Folder with images of what the word shall mean; or several folders."""
    tokens: TokenConfig
    train: TextualInversionTrainConfig
    sentences: SentenceConfig = field(default_factory=SentenceConfig)
    pictures: PictureConfig = field(default_factory=PictureConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    previews: PreviewConfig = field(default_factory=lambda: PreviewConfig(validation_epochs=None))
    watch: WatchConfig = field(default_factory=WatchConfig)
    drift: DriftWatchConfig = field(default_factory=DriftWatchConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    prior: NoPriorConfig = field(default_factory=NoPriorConfig)
    refused: RefusedConfig = field(default_factory=RefusedConfig)


def main(config: TextualInversionRun) -> None:
    """Train the rows and save them."""
    from data_prep.folders.run_folder import EMBEDDINGS_FILE, PIPELINE_FILE, PIPELINE_PARTS
    from finetune.core.learns.words import word_images
    from finetune.core.open import open_run
    from finetune.core.pictures.images import data_provenance

    images = word_images(config.train_data_dir, "--train_data_dir", config.tokens, config.sentences)
    data = data_provenance(images, config.train_data_dir)
    copies = tuple(path.name for path in config.train.output_dir.glob("learned_embeds-steps-*.safetensors"))
    more_files = (*copies, *((PIPELINE_FILE, *PIPELINE_PARTS) if config.tokens.save_as_full_pipeline else ()))
    with open_run(
        config, images * config.tokens.repeats, data, weights_file=EMBEDDINGS_FILE, more_files=more_files
    ) as opened:
        train_word(opened, config)


def train_word(opened: Opened, config: TextualInversionRun) -> None:
    """Train in a run that was opened, on images that passed the checks."""
    from finetune.core.learns.averages import Averages
    from finetune.core.learns.optimizer import base_learning_rate
    from finetune.core.learns.words import add_word, heldout_images, into_table
    from finetune.core.recipe import image_batches, train_and_save
    from finetune.core.save.weights import WordCopies, save_embeddings, save_pipeline

    run, models = opened.run, opened.models
    word = add_word(models, config.tokens)
    batches = image_batches(opened, config, learns_text=True)
    models.unet.to(run.weight_dtype)
    learns = word.learns(base_learning_rate(config.train, run.accelerator.num_processes))
    averages = Averages(learns, config.ema)
    provenance = partial(opened.provenance, "textual_inversion", batches.shapes)

    def save() -> Path:
        if config.tokens.save_as_full_pipeline:
            into_table(models, word)
            save_pipeline(run.folder, models, provenance())
        return save_embeddings(run.folder, word, provenance())

    train_and_save(
        opened,
        config,
        batches=batches,
        updates=batches,
        learns=learns,
        averages=averages,
        heldout=heldout_images(config.train_data_dir[0], config.tokens, config.sentences),
        says=f"Textual Inversion: {len(word.pieces)} rows of {word.rows.shape[1]} numbers learn {word.placeholder}",
        save=save,
        uses=("--pretrained_model_name_or_path", models.name, "--adapter", str(run.folder)),
        observers=[WordCopies(config.tokens.save_steps, run, word, averages, provenance)],
    )


if __name__ == "__main__":
    command(TextualInversionRun, main)
