"""Attributes to caption and back; slices are captioned and prompts are written by the same function."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import TypeVar

from configs.errors import UsageError
from prompts.vocabulary import DEFAULT, PLACE, Vocabulary, fields_of

Word = TypeVar("Word", str, tuple[str, ...])


def caption(
    state: str, axis: str, vocabulary: Vocabulary = DEFAULT, *, place: Mapping[str, object] | None = None
) -> str:
    """Write the caption of a slice, such as ``sf_dry sf_compacted sf_thickness``.

    Args:
        state: a key of ``vocabulary.states``.
        axis: a key of ``vocabulary.axes``; the direction the slice is perpendicular to.
        vocabulary: the words to use, and the sentence they stand in.
        place: values of the fields that tell the place of one slice, for templates that ask for them.

    Raises:
        UsageError: an unknown state or axis, with the nearest known one; or a place that the template asks for.
    """
    words = {
        "identifier": vocabulary.identifier,
        "state": " ".join(vocabulary.prefix + word for word in _known(state, vocabulary.states, "state")),
        "axis": vocabulary.prefix + _known(axis, vocabulary.axes, "axis"),
        **{name: str(value) for name, value in (place or {}).items()},
    }
    if missing := [name for name in fields_of(vocabulary.template) if name not in words]:
        raise UsageError(f"caption template {vocabulary.template!r}: nothing is known for {{{missing[0]}}}")
    # A field that is empty leaves no gap.
    return " ".join(vocabulary.template.format_map(words).split())


def parse_caption(text: str, vocabulary: Vocabulary = DEFAULT) -> tuple[str, str] | None:
    """Return the (state, axis) whose caption, at any place, is exactly ``text``, or None if it is not one of ours."""
    found = readings(text, vocabulary)
    return found[0] if len(found) == 1 else None


def readings(text: str, vocabulary: Vocabulary = DEFAULT) -> list[tuple[str, str]]:
    """Return every (state, axis) whose caption, at any place, is exactly ``text``; none if it is not one of ours."""
    return [
        (state, axis)
        for state in vocabulary.states
        for axis in vocabulary.axes
        if _fits(text, _around_the_place(state, axis, vocabulary))
    ]


def all_captions(vocabulary: Vocabulary = DEFAULT) -> list[str]:
    """Return every caption of the vocabulary, states first, axes within; half-way where captions tell the place."""
    place = dict.fromkeys(PLACE, "") | {"position": "50", "index": "0"}
    return [caption(state, axis, vocabulary, place=place) for state in vocabulary.states for axis in vocabulary.axes]


def _around_the_place(state: str, axis: str, vocabulary: Vocabulary) -> list[str]:
    """Return the pieces of a caption between which the place stands; one piece if it does not tell the place."""
    mark = "\0{}\0".format
    text = caption(state, axis, vocabulary, place={name: mark(name) for name in PLACE})
    return re.split("\0[a-z_]+\0", text)


def _fits(text: str, pieces: list[str]) -> bool:
    """Return whether ``text`` is the pieces in their order, with anything between them; in linear time."""
    if len(pieces) == 1:
        return text == pieces[0]
    first, *middle, last = pieces
    if not text.startswith(first):
        return False
    at = len(first)
    for piece in middle:
        at = text.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return text.endswith(last, at)


def _known(name: str, allowed: dict[str, Word], kind: str) -> Word:
    """Look a name up, or say what was meant."""
    if name in allowed:
        return allowed[name]
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UsageError(f"{kind} '{name}' is not in the vocabulary; allowed: {', '.join(allowed)}{hint}")
