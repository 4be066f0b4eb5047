"""Which mirrors and quarter turns of an image leave its caption true.

A mirrored photograph of a dog is one of a dog. A mirrored slice of a weave is one of another weave, unless the user
says that the caption holds nothing of the difference. So slices are mirrored only along directions declared for
their axis, and a turn that exchanges directions exchanges their words as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from PIL.Image import Transpose as Turn

from configs.errors import UsageError
from finetune.core.pictures.images import CaptionedImage
from finetune.core.settings.images import PictureConfig
from prompts.captions import parse_caption

Way = tuple[Turn | None, tuple[str, ...]]
"""A turn, and the captions that are true of the image so turned."""
_MIRRORS = {
    "horizontal": (Turn.FLIP_LEFT_RIGHT,),
    "vertical": (Turn.FLIP_TOP_BOTTOM,),
    "both": (Turn.FLIP_LEFT_RIGHT, Turn.FLIP_TOP_BOTTOM, Turn.ROTATE_180),
}
_CLOCKWISE = {"clockwise", "anticlockwise", "counterclockwise"}
_SIDES = {
    "horizontal": {"left", "right", "leftmost", "rightmost"} | _CLOCKWISE,
    "vertical": {"top", "bottom", "upper", "lower", "above", "below"} | _CLOCKWISE,
}
_SIDES["both"] = _SIDES["horizontal"] | _SIDES["vertical"]
_TURNABLE, _EXCHANGED = "thickness", ("warp", "weft")


def ways_to_show(images: Sequence[CaptionedImage], config: PictureConfig) -> list[tuple[Way, ...]]:
    """Return for each image the ways in which it is shown, each as often as the others; the first is as it is.

    Raises:
        UsageError: an axis that no image has, a flip that would make a caption untrue, or a slice whose axis none is
            declared for.
    """
    axes = [axis_of(image) for image in images]
    if unknown := sorted(set(config.flips) - set(axes)):
        has = ", ".join(sorted({axis for axis in axes if axis})) or "none"
        raise UsageError(f"--flips {unknown[0]}={config.flips[unknown[0]]}: no image has this axis; theirs are: {has}")
    return [((None, image.captions), *_flipped(image, axis, config)) for image, axis in zip(images, axes, strict=True)]


def axis_of(image: CaptionedImage) -> str:
    """Return the axis of a slice, by its row or else by its caption; empty for an ordinary picture."""
    return image.columns.get("axis") or _axis_in(image.caption)


@lru_cache(maxsize=4096)
def _axis_in(caption: str) -> str:
    """Return the axis that a caption of ours names, or an empty text."""
    parsed = parse_caption(caption)
    return parsed[1] if parsed else ""


def _flipped(image: CaptionedImage, axis: str, config: PictureConfig) -> list[Way]:
    """Return the further ways to show an image."""
    kind = config.flips.get(axis) if axis else None
    if kind is None and config.random_flip:
        if axis:
            raise UsageError(
                f"--random_flip: {image.where}: is a slice of axis {axis}; mirrored it is a slice of another weave. If "
                f"its caption stays true all the same, say so: --flips {axis}=horizontal"
            )
        kind = "horizontal"
    if kind is None:
        return []
    flag = f"--flips {axis}={kind}" if axis in config.flips else "--random_flip"
    if kind == "quarter_turn":
        return [_quarter_turn(image, axis, flag)]
    for caption in image.captions:
        if sides := sorted(_SIDES[kind] & set(re.findall("[a-z]+", caption.lower()))):
            raise UsageError(
                f"{flag}: {image.where}: the caption says '{sides[0]}', which is untrue of the mirrored image"
            )
    return [(turn, image.captions) for turn in _MIRRORS[kind]]


def _quarter_turn(image: CaptionedImage, axis: str, flag: str) -> Way:
    """Return the quarter turn of a slice whose two directions its captions name; their words change places."""
    if axis != _TURNABLE:
        raise UsageError(
            f"{flag}: a quarter turn puts the thickness of a {axis} slice sideways, as no slice has it; it is for "
            f"{_TURNABLE}, where it exchanges {' and '.join(_EXCHANGED)}"
        )
    captions = tuple(_exchange(caption) for caption in image.captions)
    for before, after in zip(image.captions, captions, strict=True):
        if before == after:
            raise UsageError(
                f"{flag}: {image.where}: a quarter turn exchanges {' and '.join(_EXCHANGED)}, and the caption "
                f"'{before}' names neither: the turned image would come with the words of the other"
            )
    return Turn.ROTATE_90, captions


def _exchange(caption: str) -> str:
    """Exchange the words of the two directions, with whatever prefix they have."""
    first, second = _EXCHANGED
    other = {first: second, second: first}
    return re.sub(rf"(?<![a-z])({first}|{second})(?![a-z])", lambda found: other[found[0]], caption)
