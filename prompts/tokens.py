"""Show how a model's own tokenizer splits prompts, what it does not know, and what it cuts off.

    python -m prompts.tokens "sf_dry sf_warp" "sf_injected sf_weft" --pretrained_model_name_or_path assets/tiny-sd

The text encoder sees pieces, not words: captions that share pieces with everyday words will move those words too.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import UsageError
from configs.load import Positional, command

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORD_END = "</w>"


@dataclass(frozen=True, kw_only=True)
class Split:
    """A prompt as the text encoder gets it.

    Attributes:
        prompt: the text.
        pieces: its tokens without the start and end marks; ``</w>`` closes a word.
        unknown: how many pieces stand for text that the vocabulary does not hold.
        limit: pieces the text encoder reads; the rest is cut off.
    """

    prompt: str
    pieces: tuple[str, ...]
    unknown: int
    limit: int

    @property
    def cut_off(self) -> str:
        """The end of the prompt that the text encoder never sees, empty if it sees all."""
        return "".join(self.pieces[self.limit :]).replace(WORD_END, " ").strip()


def split(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Split:
    """Split a prompt into the pieces of a tokenizer of the CLIP kind."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return Split(
        prompt=prompt,
        pieces=tuple(tokenizer.convert_ids_to_tokens(ids)),
        unknown=sum(index == tokenizer.unk_token_id for index in ids),
        limit=tokenizer.model_max_length - tokenizer.num_special_tokens_to_add(),
    )


def table(splits: Sequence[Split]) -> str:
    """Write one line per prompt: number of pieces, the pieces, and what goes wrong."""
    rows = [("prompt", "pieces", "remark", "split")]
    for item in splits:
        shown = " | ".join(piece.removesuffix(WORD_END) for piece in item.pieces)
        remarks = [f"{item.unknown} unknown"] if item.unknown else []
        if item.cut_off:
            remarks.append(f"cut off after {item.limit}")
        rows.append((repr(item.prompt), str(len(item.pieces)), ", ".join(remarks) or "whole", shown))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[3]]).rstrip() for row in rows)


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """Settings of ``python -m prompts.tokens``."""

    prompts: Positional[tuple[str, ...]]
    """The prompts to split."""
    pretrained_model_name_or_path: str
    """The model whose tokenizer is asked: a pipeline folder, or a name on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""

    def __post_init__(self) -> None:
        """Refuse an empty list."""
        if not self.prompts:
            raise ValueError("PROMPTS: name at least one prompt")


def main(config: TokensConfig) -> None:
    """Print the table and what to do next."""
    tokenizer = load_tokenizer(config.pretrained_model_name_or_path, config.revision)
    splits = [split(tokenizer, prompt) for prompt in config.prompts]
    print(table(splits))
    words = ["--pretrained_model_name_or_path", config.pretrained_model_name_or_path, "--prompts", *config.prompts]
    print(f"next: python -m eval.generate {shlex.join(words)} --output_dir out/pictures")


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a pipeline folder or of a model on the hub.

    Raises:
        UsageError: there is none.
    """
    from transformers import CLIPTokenizer

    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / "tokenizer").is_dir():
        raise UsageError(f"--pretrained_model_name_or_path {name_or_path}: has no folder named tokenizer")
    try:
        return CLIPTokenizer.from_pretrained(name_or_path, subfolder="tokenizer", revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"--pretrained_model_name_or_path {name_or_path}: no tokenizer there ({reason})") from None


if __name__ == "__main__":
    command(TokensConfig, main)
