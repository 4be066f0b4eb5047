"""Flips: an image is shown mirrored or turned only where its captions stay true."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL.Image import Transpose

from configs.errors import UsageError
from finetune.core.pictures.flips import ways_to_show
from finetune.core.pictures.images import CaptionedImage
from finetune.core.settings.images import PictureConfig


def image(*captions: str, axis: str = "") -> CaptionedImage:
    return CaptionedImage(
        path=Path("a.png"),
        captions=captions,
        where="metadata.jsonl:1",
        content="c",
        height=8,
        width=8,
        columns={"axis": axis} if axis else {},
    )


def turns(one: CaptionedImage, **options: object) -> list[Transpose | None]:
    ((*ways,),) = ways_to_show([one], PictureConfig(**options))
    return [turn for turn, _ in ways]


@pytest.mark.parametrize("one", [image("a dog"), image("sf_dry sf_warp"), image("x", axis="warp")])
def test_nothing_is_flipped_unless_asked(one: CaptionedImage) -> None:
    """The Textual Inversion script of diffusers mirrors half of the images, and nothing turns it off."""
    assert turns(one) == [None]


def test_an_ordinary_picture_is_mirrored_left_to_right() -> None:
    assert turns(image("a dog"), random_flip=True) == [None, Transpose.FLIP_LEFT_RIGHT]


@pytest.mark.parametrize("one", [image("x", axis="warp"), image("sf_injected sf_warp")])
def test_a_slice_is_mirrored_only_where_that_is_declared(one: CaptionedImage) -> None:
    with pytest.raises(UsageError, match=r"--random_flip: metadata.jsonl:1: is a slice of axis warp; .* --flips warp="):
        turns(one, random_flip=True)
    expected = [None, Transpose.FLIP_LEFT_RIGHT]
    assert turns(one, random_flip=True, flips={"warp": "horizontal"}) == expected
    assert turns(one, flips={"warp": "horizontal"}) == expected


def test_flips_of_another_axis_leave_a_slice_as_it_is() -> None:
    ways = ways_to_show([image("x", axis="warp"), image("x", axis="weft")], PictureConfig(flips={"weft": "vertical"}))
    assert [[turn for turn, _ in some] for some in ways] == [[None], [None, Transpose.FLIP_TOP_BOTTOM]]


def test_both_mirrors_make_four_ways() -> None:
    assert len(turns(image("x", axis="weft"), flips={"weft": "both"})) == 4


@pytest.mark.parametrize(
    ("caption", "flip"),
    [("a hand on the left", "horizontal"), ("Top of a part", "vertical"), ("clockwise", "vertical")],
)
def test_a_caption_that_names_a_side_is_not_mirrored(caption: str, flip: str) -> None:
    with pytest.raises(UsageError, match=f"--flips warp={flip}: metadata.jsonl:1: the caption says"):
        turns(image("plain", caption, axis="warp"), flips={"warp": flip})


def test_a_caption_that_names_the_other_side_is_mirrored() -> None:
    assert len(turns(image("the top, not the clef", axis="warp"), flips={"warp": "horizontal"})) == 2


def test_a_quarter_turn_exchanges_warp_and_weft_in_the_caption() -> None:
    one = image("sf_thickness, sf_warp across, warped sf_weft", axis="thickness")
    ((_, (turn, captions)),) = ways_to_show([one], PictureConfig(flips={"thickness": "quarter_turn"}))
    assert (turn, captions) == (Transpose.ROTATE_90, ("sf_thickness, sf_weft across, warped sf_warp",))


@pytest.mark.parametrize(
    ("one", "axis", "message"),
    [
        (image("sf_dry sf_thickness"), "thickness", "'sf_dry sf_thickness' names neither"),
        (image("sf_dry sf_warp"), "warp", "a quarter turn puts the thickness of a warp slice sideways"),
    ],
)
def test_a_quarter_turn_that_the_caption_cannot_say_is_refused(one: CaptionedImage, axis: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        turns(one, flips={axis: "quarter_turn"})


def test_an_axis_that_no_image_has_is_named() -> None:
    with pytest.raises(UsageError, match="--flips warpp=both: no image has this axis; theirs are: warp"):
        turns(image("x", axis="warp"), flips={"warpp": "both"})
