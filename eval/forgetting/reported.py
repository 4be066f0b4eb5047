"""The numbers of ``eval.drift``, declared once, and which function measures each.

A new score of pictures is one line in ``SCORES`` and its function: its rows, verdicts, columns and its place on the
page follow from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from eval.forgetting.picture_scores import (
    Measured,
    Score,
    agreement,
    colour,
    leak,
    patch_leak,
    retention,
    similarity,
)
from eval.stats.number import Number

DIVERGENCE = Number(name="divergence", unit="relative mean square", bad="high")
DIVERGENCE_RATIO = Number(
    name="divergence_ratio", unit="ratio", bad="high", column="moved", place=1, card="moved", card_place=6
)
COLOURFULNESS = Number(
    name="colourfulness_ratio",
    unit="ratio",
    bad="low",
    limits="colour",
    column="colour",
    place=3,
    card="colour",
    card_place=4,
)
SATURATION = Number(name="saturation_ratio", unit="ratio", bad="low", limits="colour")
LUMINANCE = Number(
    name="luminance_ratio",
    unit="ratio",
    bad="both",
    limits="colour",
    column="light",
    place=4,
    card="brightness",
    card_place=5,
)
LEAK = Number(
    name="leak",
    unit="share",
    bad="high",
    limits="leak",
    column="leak",
    place=2,
    card="leaked pictures",
    card_place=3,
)
PATCH_LEAK = Number(name="patch_leak", unit="share", bad="high")
RETENTION = Number(
    name="retention", unit="share", bad="low", limits="retention", column="kept", place=5, card="kept", card_place=1
)
CLIP_RETENTION = Number(
    name="clip_retention",
    unit="share",
    bad="low",
    tier="B",
    limits="retention",
    card="follows its prompt (CLIP)",
    card_place=2,
)
CLIP_SIMILARITY = Number(name="clip_similarity", unit="cosine", bad="low", tier="B", card="alike (CLIP)", card_place=7)
DINOV2_SIMILARITY = Number(
    name="dinov2_similarity", unit="cosine", bad="low", tier="B", card="alike (DINOv2)", card_place=8
)
LEAK_RECALL = Number(name="leak_recall", unit="share", bad="low")
LEAK_FALSE_ALARM = Number(name="leak_false_alarm", unit="share", bad="high")
WORST_PROMPT = Number(
    name="worst_prompt",
    bad="low",
    compared="worst prompt kept",
    answers="Drift",
    finding="Worst prompt: {prompt}, {unit} {value:.2f}",
)
SWEEP_WORST_PROMPT = Number(name="sweep_worst_prompt", label="worst prompt", bad="low")
SWEEP_CAPTIONS_MOVED = Number(name="sweep_captions_moved", label="change for the captions kept", unit="share")


@dataclass(frozen=True, kw_only=True)
class DriftScore:
    """A number of pictures and what measures it.

    Attributes:
        number: what it is.
        of: measures it; None where this evidence has nothing to say.
        needs: ``slices`` for the detector of training slices, or the encoder it takes; nothing but pictures if empty.
    """

    number: Number
    of: Callable[[Measured], Score | None]
    needs: Literal["", "slices", "clip", "dinov2"] = ""


SCORES = (
    DriftScore(number=COLOURFULNESS, of=partial(colour, name="colourfulness")),
    DriftScore(number=SATURATION, of=partial(colour, name="saturation")),
    DriftScore(number=LUMINANCE, of=partial(colour, name="luminance")),
    DriftScore(number=LEAK, of=leak, needs="slices"),
    DriftScore(number=PATCH_LEAK, of=patch_leak, needs="slices"),
    DriftScore(number=RETENTION, of=retention, needs="slices"),
    DriftScore(number=CLIP_SIMILARITY, of=partial(similarity, encoder="clip"), needs="clip"),
    DriftScore(number=CLIP_RETENTION, of=partial(agreement, encoder="clip"), needs="clip"),
    DriftScore(number=DINOV2_SIMILARITY, of=partial(similarity, encoder="dinov2"), needs="dinov2"),
)
"""In the order of their rows."""
WORST_BY = (RETENTION, CLIP_RETENTION, COLOURFULNESS, DIVERGENCE)
"""What names the worst prompt: the first of these that was measured."""
FOLLOWED = (RETENTION, COLOURFULNESS)
"""What the page follows over several checks: the first that was measured."""
NUMBERS = (
    DIVERGENCE,
    DIVERGENCE_RATIO,
    *(score.number for score in SCORES),
    LEAK_RECALL,
    LEAK_FALSE_ALARM,
    WORST_PROMPT,
    SWEEP_WORST_PROMPT,
    SWEEP_CAPTIONS_MOVED,
)
