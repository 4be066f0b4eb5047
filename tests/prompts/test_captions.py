"""Captions: the words of a vocabulary in its sentence, and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import UsageError
from prompts.captions import all_captions, caption, parse_caption
from prompts.vocabulary import DEFAULT, Vocabulary, read_vocabulary


def test_the_built_in_captions_are_the_known_nine() -> None:
    assert all_captions()[:2] == ["sf_dry sf_thickness", "sf_dry sf_warp"]
    assert all_captions()[3] == "sf_dry sf_compacted sf_thickness"
    assert len(set(all_captions())) == 9


def test_identifier_and_free_text_stand_where_the_template_says() -> None:
    words = Vocabulary(identifier="xctweave", template="{identifier} X-ray slice, {axis} view, {state}")
    assert caption("dry", "warp", words) == "xctweave X-ray slice, sf_warp view, sf_dry"


def test_an_empty_identifier_leaves_no_gap() -> None:
    assert caption("dry", "warp", Vocabulary(template="{identifier} {axis}")) == "sf_warp"


def test_a_caption_can_tell_the_place_of_its_slice() -> None:
    words = Vocabulary(template="{state} {axis} at {position} percent")
    assert words.has_place
    assert caption("dry", "weft", words, place={"position": 40}) == "sf_dry sf_weft at 40 percent"


def test_a_place_that_is_not_known_is_refused() -> None:
    with pytest.raises(UsageError, match=r"nothing is known for \{um_per_px\}"):
        caption("dry", "warp", Vocabulary(template="{axis} {um_per_px}"), place={"position": 3})


@pytest.mark.parametrize(
    "words",
    [
        DEFAULT,
        Vocabulary(identifier="xct", template="{axis}: {identifier} (a+b), {state}."),
        Vocabulary(template="{state} {axis} at {position}, slice {index}"),
    ],
)
def test_every_caption_is_read_back(words: Vocabulary) -> None:
    place = {"position": 7, "index": 12}
    for state in words.states:
        for axis in words.axes:
            assert parse_caption(caption(state, axis, words, place=place), words) == (state, axis)
    assert parse_caption("a horse", words) is None


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("a sf_warp at 7 percent of 9", ("dry", "warp")),
        ("a sf_warp at percent of percent of 9", ("dry", "warp")),
        ("a sf_warp at 7 percent of", None),
        ("a sf_warp at percent of 9", None),
        ("b a sf_warp at 7 percent of 9", None),
    ],
)
def test_anything_may_stand_where_the_place_does_and_nothing_elsewhere(
    text: str, label: tuple[str, str] | None
) -> None:
    words = Vocabulary(states={"dry": ("dry",)}, template="a {axis} at {position} percent of {index}")
    assert parse_caption(text, words) == label


def test_a_long_caption_of_many_places_is_read_at_once() -> None:
    words = Vocabulary(template="{index} " * 40 + "{axis}")
    assert parse_caption("a " * 3000 + "b", words) is None


def test_captions_without_a_state_are_nobodys() -> None:
    words = Vocabulary(template="{axis}")
    assert parse_caption("sf_warp", words) is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{sate} {axis}", r"unknown field \{sate\}; .* did you mean \{state\}\?"),
        ("{state", "write a brace as"),
        ("{state}\n{axis}", "must be one line"),
        ("{state:>9}", "takes no format"),
        ("{state.__class__}", "unknown field"),
        ("{0}", "unknown field"),
        ("", "must be one line"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vocabulary(template=template)


def test_a_file_gives_identifier_and_template(tmp_path: Path) -> None:
    path = tmp_path / "words.yaml"
    path.write_text("identifier: zwx\ntemplate: '{identifier}, {state} {axis}'\n")
    assert caption("dry", "warp", read_vocabulary(path)) == "zwx, sf_dry sf_warp"
    path.write_text("template: '{stat}'\n")
    with pytest.raises(UsageError, match=r"words.yaml: template .* unknown field"):
        read_vocabulary(path)
