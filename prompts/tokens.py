"""Show how a model's own tokenizer splits prompts, what is a word it knows already, and what it cuts off.

    python -m prompts.tokens "sf_dry sf_warp" "sf_injected sf_weft" --pretrained_model_name_or_path assets/tiny-sd

The text encoder sees pieces, not words: captions that share pieces with everyday words will move those words too. With
the public vocabulary of CLIP `dtd_honeycombed` is d / td / _ / honey / com / bed, and honey and bed are known words.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.load import Positional, command
from prompts.tokenizer import load_tokenizer, split, table
from prompts.word_vectors import nearest_words, read_word_vectors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """Settings of ``python -m prompts.tokens``."""

    prompts: Positional[tuple[str, ...]]
    """The prompts to split."""
    pretrained_model_name_or_path: str
    """The model whose tokenizer is asked: a pipeline folder, or a name on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    num_neighbours: int = 3
    """Known words nearest to each word of the prompts, in the text encoder's own table; 0 leaves them out."""

    def __post_init__(self) -> None:
        """Refuse an empty list."""
        if not self.prompts:
            raise ValueError("PROMPTS: name at least one prompt")
        if self.num_neighbours < 0:
            raise ValueError(f"--num_neighbours {self.num_neighbours}: 0 or more")


def main(config: TokensConfig) -> None:
    """Print the table, the words nearest to each word that is in pieces, and what to do next."""
    tokenizer = load_tokenizer(config.pretrained_model_name_or_path, config.revision)
    splits = [split(tokenizer, prompt) for prompt in config.prompts]
    print(table(splits))
    if config.num_neighbours:
        print(_neighbours(config, tokenizer))
    words = ["--pretrained_model_name_or_path", config.pretrained_model_name_or_path, "--prompts", *config.prompts]
    print(f"next: python -m eval.generate {shlex.join(words)} --output_dir out/pictures")


def _neighbours(config: TokensConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write, for each word of the prompts, the known words nearest to it."""
    vectors = read_word_vectors(config.pretrained_model_name_or_path, tokenizer, config.revision)
    if vectors is None:
        return "nearest words: the model is not on this machine as a folder with safetensors"
    lines = ["nearest known words, by the cosine of their rows in the text encoder's table:"]
    for word in dict.fromkeys(word for prompt in config.prompts for word in prompt.split()):
        near = nearest_words(vectors, tokenizer, word, config.num_neighbours)
        lines.append(f"  {word}: " + (", ".join(f"{other} {cosine:.2f}" for other, cosine in near) or "none"))
    return "\n".join(lines)


if __name__ == "__main__":
    command(TokensConfig, main)
