"""Propose rare identifiers for DreamBooth, and judge those you have in mind.

    python -m prompts.identifiers sks w17h3r --pretrained_model_name_or_path assets/tiny-sd

An identifier should be one token, so that its meaning is learned in one place, and a rare one, so that there is little
to unlearn. The vocabulary is in the order in which byte pairs were merged: the later, the rarer.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from configs.load import Positional, command
from prompts.rare_words import judge, propose, table
from prompts.tokenizer import load_tokenizer
from prompts.word_vectors import read_word_vectors


@dataclass(frozen=True, kw_only=True)
class IdentifiersConfig:
    """Settings of ``python -m prompts.identifiers``."""

    words: Positional[tuple[str, ...]] = ()
    """Identifiers to judge."""
    pretrained_model_name_or_path: str
    """The model whose tokenizer is asked: a pipeline folder, or a name on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    num_proposals: int = 8
    """Rare identifiers to propose; 0 for none."""

    def __post_init__(self) -> None:
        """Refuse a request for nothing."""
        if self.num_proposals < 0:
            raise ValueError(f"--num_proposals {self.num_proposals}: 0 or more")
        if not self.words and not self.num_proposals:
            raise ValueError("WORDS: name at least one identifier, or ask for proposals with --num_proposals")
        if bad := [word for word in self.words if len(word.split()) != 1]:
            raise ValueError(f"WORDS: '{bad[0]}' is not one word; an identifier is written without spaces")


def main(config: IdentifiersConfig) -> None:
    """Print the verdicts and the proposals."""
    tokenizer = load_tokenizer(config.pretrained_model_name_or_path, config.revision)
    vectors = read_word_vectors(config.pretrained_model_name_or_path, tokenizer, config.revision)
    judged = [judge(tokenizer, word, vectors) for word in config.words]
    if judged:
        print(table(judged))
    proposed = propose(tokenizer, config.num_proposals, vectors)
    if config.num_proposals:
        print("rare words of one token: " + (", ".join(proposed) or "none in this vocabulary"))
    # Of the user's own the best, if one will do; then what was proposed.
    own = sorted((item for item in judged if item.grade != "poor"), key=lambda item: item.grade != "good")
    chosen = next(iter([*(item.word for item in own), *proposed, *config.words]), "sks")
    words = ["--pretrained_model_name_or_path", config.pretrained_model_name_or_path]
    words += ["--instance_prompt", f"a {chosen} texture"]
    print(f"next: accelerate launch finetune/lora_dreambooth.py {shlex.join(words)} --instance_data_dir data/few/dry")


if __name__ == "__main__":
    command(IdentifiersConfig, main)
