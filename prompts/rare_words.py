"""Rare words as identifiers for DreamBooth: propose some, and judge others by their tokens.

An identifier should be one token, so that its meaning is learned in one place, and a rare one, so that there is little
to unlearn. The vocabulary is in the order in which byte pairs were merged: the later, the rarer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from prompts.tokenizer import WORD_END, split
from prompts.word_vectors import WordVectors, nearest_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTHS = range(3, 5)
"""Letters of a proposed identifier."""
RARE_SHARE = 0.25
"""The last part of the vocabulary that counts as rare."""
MOST_PIECES = 3
FAR_SHARE = 0.5
"""Of the rare tokens, the part whose rows lie nearest to the mean of all rows: those that were moved least."""

Grade = Literal["good", "usable", "poor"]


@dataclass(frozen=True, kw_only=True)
class Identifier:
    """A word judged as an identifier.

    Attributes:
        word: as given.
        pieces: what the tokenizer makes of it.
        nearest: known words nearest to it in the text encoder's table, with cosines.
        grade: ``good``, ``usable`` or ``poor``.
        reason: in words.
    """

    word: str
    pieces: tuple[str, ...]
    nearest: tuple[tuple[str, float], ...]
    grade: Grade
    reason: str


def judge(tokenizer: PreTrainedTokenizerBase, word: str, vectors: WordVectors | None = None) -> Identifier:
    """Judge one word by its pieces, their rank in the vocabulary, and the words it resembles.

    Args:
        tokenizer: of the CLIP kind.
        word: the identifier; letter case is ignored, as the tokenizer ignores it.
        vectors: rows of the text encoder; None leaves the nearest words out.
    """
    found = split(tokenizer, word)
    near = nearest_words(vectors, tokenizer, word, 3) if vectors is not None else []
    grade, reason = _grade(tokenizer, word, found.pieces, found.known_words, found.unknown)
    return Identifier(word=word, pieces=found.pieces, nearest=tuple(near), grade=grade, reason=reason)


def propose(tokenizer: PreTrainedTokenizerBase, count: int, vectors: WordVectors | None = None) -> list[str]:
    """Return rare words of one token, the rarest first: three or four letters from the end of the vocabulary.

    With the text encoder's rows, only those that lie near the mean of all rows: they were moved least in training.
    """
    vocabulary = tokenizer.get_vocab()
    rare = (1 - RARE_SHARE) * len(vocabulary)
    found = [
        (index, piece.removesuffix(WORD_END))
        for piece, index in vocabulary.items()
        if index >= rare and piece.endswith(WORD_END) and _is_plain(piece.removesuffix(WORD_END))
    ]
    if vectors is not None and found:
        known = [(index, word) for index, word in found if index < len(vectors.rows)]
        away = np.linalg.norm(vectors.rows[[index for index, _ in known]] - vectors.rows.mean(axis=0), axis=1)
        limit = np.quantile(away, FAR_SHARE) if len(away) else 0.0
        found = [item for item, distance in zip(known, away, strict=True) if distance <= limit]
    return [word for _, word in sorted(found, reverse=True)[:count]]


def table(identifiers: Sequence[Identifier]) -> str:
    """Write one line per identifier."""
    rows = [("identifier", "verdict", "pieces", "nearest words", "why")]
    for item in identifiers:
        pieces = " | ".join(piece.removesuffix(WORD_END) for piece in item.pieces)
        near = ", ".join(f"{word} {cosine:.2f}" for word, cosine in item.nearest) or "-"
        rows.append((item.word, item.grade, pieces, near, item.reason))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[4]]).rstrip() for row in rows)


def _grade(
    tokenizer: PreTrainedTokenizerBase, word: str, pieces: Sequence[str], known: Sequence[str], unknown: int
) -> tuple[Grade, str]:
    """Say how good an identifier is, and why."""
    if not pieces or unknown:
        return "poor", "the vocabulary does not hold it"
    whole = pieces[0].removesuffix(WORD_END)
    total, index = len(tokenizer), tokenizer.get_vocab()[pieces[0]]
    if len(pieces) == 1:
        if index >= (1 - RARE_SHARE) * total:
            return "good", f"one rare token, number {index} of {total}"
        if len(whole) < min(LENGTHS):
            return "poor", f"one short token, number {index} of {total}: a syllable of many words"
        return "poor", f"one common token, number {index} of {total}: it means something already"
    if known:
        return "poor", f"shares {', '.join(known)} with everyday words, which would change too"
    if len(pieces) > MOST_PIECES:
        return "poor", f"{len(pieces)} pieces, mostly single letters, which every other spelled-out word shares"
    return "usable", f"{len(pieces)} pieces, none of them a known word"


def _is_plain(word: str) -> bool:
    """Return whether a word can be typed and read: a few plain letters."""
    return len(word) in LENGTHS and word.isascii() and word.isalpha()
