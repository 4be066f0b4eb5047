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
from finetune.core.settings.methods import NoPriorConfig, SentenceConfig, TokenConfig
from finetune.core.settings.recipe import RecipeConfig
from finetune.core.settings.training import TextualInversionTrainConfig
from finetune.core.settings.watching import PreviewConfig

if TYPE_CHECKING:
    from finetune.core.parts import Method, OpenRun, Provenance


@dataclass(frozen=True, kw_only=True)
class TextualInversionRun(RecipeConfig):
    """Settings of a Textual Inversion run."""

    train_data_dir: tuple[Path, ...]
    """Folder with images of what the word shall mean; or several folders."""
    tokens: TokenConfig
    train: TextualInversionTrainConfig
    sentences: SentenceConfig = field(default_factory=SentenceConfig)
    previews: PreviewConfig = field(default_factory=lambda: PreviewConfig(validation_epochs=None))
    prior: NoPriorConfig = field(default_factory=NoPriorConfig)


def main(config: TextualInversionRun) -> None:
    """Train the rows and save them."""
    from finetune.core import parts

    images = parts.word_images(config.train_data_dir, "--train_data_dir", config.tokens, config.sentences)
    data = parts.data_provenance(images, config.train_data_dir)

    def method(opened: OpenRun) -> Method:
        run, models = opened.run, opened.models
        word = parts.add_word(models, config.tokens)
        batches = parts.image_batches(opened, config, learns_text=True)
        models.unet.to(run.weight_dtype)
        learns = word.learns(parts.base_learning_rate(config.train, run.accelerator.num_processes))
        averages = parts.Averages(learns, config.ema)
        told = partial(opened.provenance, "textual_inversion", batches.shapes)
        count, width = word.rows.shape

        def save(provenance: Provenance) -> Path:
            if config.tokens.save_as_full_pipeline:
                parts.into_table(models, word)
                parts.save_pipeline(run.folder, models, provenance)
            return parts.save_embeddings(run.folder, word, provenance)

        return parts.Method(
            name="textual_inversion",
            batches=batches,
            updates=batches,
            learns=learns,
            averages=averages,
            heldout=parts.heldout_images(config.train_data_dir[0], config.tokens, config.sentences),
            summary=f"Textual Inversion: {count} rows of {width} numbers learn {word.placeholder}",
            save=save,
            generate_options=("--pretrained_model_name_or_path", models.name, "--adapter", str(run.folder)),
            observers=[parts.WordCopies(config.tokens.save_steps, run, word, averages, told)],
        )

    pipeline = (parts.PIPELINE_FILE, *parts.PIPELINE_PARTS) if config.tokens.save_as_full_pipeline else ()
    leaves = (parts.EMBEDDINGS_FILE, *parts.copies_of(config.train.output_dir), *pipeline)
    parts.run_method(config, images * config.tokens.repeats, data, method, leaves=leaves)


if __name__ == "__main__":
    command(TextualInversionRun, main)
