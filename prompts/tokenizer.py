"""How a model's own tokenizer splits prompts; what is a word it knows already, and what it cuts off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORD_END = "</w>"
SHOWN = 60
"""Characters of a prompt in the table: the pieces are there whole."""
SHORTEST_WORD = 3
"""Letters; shorter pieces are syllables of too many words to mean one."""


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


@dataclass(frozen=True, kw_only=True)
class Split:
    """A prompt as the text encoder gets it.

    Attributes:
        prompt: the text.
        pieces: its tokens without the start and end marks; ``</w>`` closes a word.
        unknown: how many pieces stand for text that the vocabulary does not hold.
        limit: pieces the text encoder reads; the rest is cut off.
        known_words: pieces that are also whole words of the vocabulary, in the order they occur, each once.
    """

    prompt: str
    pieces: tuple[str, ...]
    unknown: int
    limit: int
    known_words: tuple[str, ...] = ()

    @property
    def cut_off(self) -> str:
        """The end of the prompt that the text encoder never sees, empty if it sees all."""
        return "".join(self.pieces[self.limit :]).replace(WORD_END, " ").strip()


def split(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Split:
    """Split a prompt into the pieces of a tokenizer of the CLIP kind."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    pieces, vocabulary = tuple(tokenizer.convert_ids_to_tokens(ids)), tokenizer.get_vocab()
    return Split(
        prompt=prompt,
        pieces=pieces,
        known_words=tuple(dict.fromkeys(word for piece in pieces if (word := known_word(piece, vocabulary)))),
        unknown=sum(index == tokenizer.unk_token_id for index in ids),
        limit=tokenizer.model_max_length - tokenizer.num_special_tokens_to_add(),
    )


def known_word(piece: str, vocabulary: Mapping[str, int]) -> str:
    """Return the everyday word a piece spells, or an empty string: letters only, and a whole word of the vocabulary."""
    word = piece.removesuffix(WORD_END)
    is_word = len(word) >= SHORTEST_WORD and word.isalpha() and word.isascii() and word + WORD_END in vocabulary
    return word if is_word else ""


def table(splits: Sequence[Split]) -> str:
    """Write one line per prompt: number of pieces, what goes wrong, the words known already, and the pieces."""
    rows = [("prompt", "pieces", "remark", "known words", "split")]
    for item in splits:
        shown = " | ".join(piece.removesuffix(WORD_END) for piece in item.pieces)
        remarks = [f"{item.unknown} unknown"] if item.unknown else []
        if item.cut_off:
            remarks.append(f"cut off after {item.limit}")
        known = ", ".join(item.known_words) or "none"
        prompt = item.prompt if len(item.prompt) <= SHOWN else item.prompt[: SHOWN - 3] + "..."
        rows.append((repr(prompt), str(len(item.pieces)), ", ".join(remarks) or "whole", known, shown))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[4]]).rstrip() for row in rows)
