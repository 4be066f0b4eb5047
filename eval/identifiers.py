r"""What does the base model already make of an identifier? The less it moves the predictions, the less is unlearned.

    python -m eval.identifiers sks w17h3r --prompt "a {word} grey woven texture" \
        --pretrained_model_name_or_path assets/tiny-sd

Each word is put into the prompt, and the model's predictions are compared with those for the prompt without it, at the
same noisy pictures. `prompts.identifiers` judges the same words by their tokens, and proposes some; without words its
proposals are measured. Everyday words stand beside them as a scale. Nothing is written.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from configs.load import Positional, command

EVERYDAY = ("red", "wooden", "dog")
"""Words that a model knows: what a poor identifier does to its predictions."""
HERE = "{word}"
"""Where a prompt holds the word."""


@dataclass(frozen=True, kw_only=True)
class IdentifiersConfig:
    """Settings of ``python -m eval.identifiers``."""

    words: Positional[tuple[str, ...]] = ()
    """Identifiers to measure; those that prompts.identifiers proposes if absent."""
    pretrained_model_name_or_path: str
    """The base model."""
    prompt: str = "a photo of a {word} texture"
    """Where the identifier will stand in training, as {word}."""
    num_proposals: int = 8
    """Proposals to measure where no words are given."""
    num_latents: int = 2
    """Pictures of the prompt without the word, whose noisy versions the predictions are made for."""
    num_timesteps: int = 8
    """Noise levels."""
    seed: int = 0
    """Of the pictures and the noise."""

    def __post_init__(self) -> None:
        """Refuse a prompt without a place for the word, and counts below one."""
        if HERE not in self.prompt:
            raise ValueError(f"--prompt '{self.prompt}': holds no {HERE}, the place of the identifier")
        for flag in ("num_proposals", "num_latents", "num_timesteps"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag} {getattr(self, flag)}: at least 1")


def main(config: IdentifiersConfig) -> None:
    """Print how far each word moves the predictions, the least first."""
    from eval.forgetting.influence import influence, open_candidates

    candidates = open_candidates(config.pretrained_model_name_or_path, config.words, config.num_proposals)
    words = candidates.words
    moved = influence(
        candidates.models,
        {word: config.prompt.replace(HERE, word) for word in (*words, *EVERYDAY)},
        " ".join(config.prompt.replace(HERE, " ").split()),
        num_latents=config.num_latents,
        num_timesteps=config.num_timesteps,
        seed=config.seed,
    )
    print(f"{'word':<12} {'moves by':>9}  by its tokens")
    for word in sorted(words, key=moved.__getitem__):
        print(f"{word:<12} {moved[word]:9.5f}  {candidates.grade(word)}")
    print("for scale: " + ", ".join(f"{word} {moved[word]:.5f}" for word in EVERYDAY))
    best = min(words, key=moved.__getitem__)
    prompt = ["--instance_prompt", config.prompt.replace(HERE, best)]
    model = ["--pretrained_model_name_or_path", config.pretrained_model_name_or_path]
    print(f"next: accelerate launch finetune/lora_dreambooth.py {shlex.join([*model, *prompt])} --instance_data_dir "
          "data/few/dry")  # fmt: skip


if __name__ == "__main__":
    command(IdentifiersConfig, main)
