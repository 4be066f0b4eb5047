"""Attributes to caption and back; slices are captioned and prompts are written by the same function."""

from __future__ import annotations

import difflib
from typing import TypeVar

from configs.errors import UsageError
from prompts.vocabulary import DEFAULT, Vocabulary

Word = TypeVar("Word", str, tuple[str, ...])


def caption(state: str, axis: str, vocabulary: Vocabulary = DEFAULT) -> str:
    """Write the caption of a slice, such as ``sf_dry sf_compacted sf_thickness``.

    Args:
        state: a key of ``vocabulary.states``.
        axis: a key of ``vocabulary.axes``; the direction the slice is perpendicular to.
        vocabulary: the words to use.

    Raises:
        UsageError: an unknown state or axis, with the nearest known one.
    """
    words = (*_known(state, vocabulary.states, "state"), _known(axis, vocabulary.axes, "axis"))
    return " ".join(vocabulary.prefix + word for word in words)


def parse_caption(text: str, vocabulary: Vocabulary = DEFAULT) -> tuple[str, str] | None:
    """Return the (state, axis) whose caption is exactly ``text``, or None if it is not one of ours."""
    for state in vocabulary.states:
        for axis in vocabulary.axes:
            if caption(state, axis, vocabulary) == text:
                return state, axis
    return None


def all_captions(vocabulary: Vocabulary = DEFAULT) -> list[str]:
    """Return every caption of the vocabulary, states first, axes within."""
    return [caption(state, axis, vocabulary) for state in vocabulary.states for axis in vocabulary.axes]


def _known(name: str, allowed: dict[str, Word], kind: str) -> Word:
    """Look a name up, or say what was meant."""
    if name in allowed:
        return allowed[name]
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UsageError(f"{kind} '{name}' is not in the vocabulary; allowed: {', '.join(allowed)}{hint}")
