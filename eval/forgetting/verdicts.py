"""From drift scores to ok, warn and stop: when a number may speak at all, and what it then says.

A score is flagged only where it is beyond its limit and also outside the A/A band: what the base model shows against
itself with other seeds. With too few pictures it is grey and flags nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.folders.results import Verdict
from eval.forgetting.policy import Limits
from eval.stats.distances import Interval
from eval.stats.number import Number

MIN_PICTURES = 4
"""Fewer pictures than this cannot be judged."""


def judge_prompt(number: Number, score: Interval, band: Interval, limits: Limits, pictures: int) -> tuple[Verdict, str]:
    """Judge one prompt by its value.

    Args:
        number: what was measured.
        score: value and 95 % interval.
        band: A/A band of a single prompt.
        limits: of the prompt's set.
        pictures: per prompt.
    """
    warn, stop = limits.of(number.limits, of_prompt=True)
    if grey := _grey(warn, stop, pictures):
        return "grey", grey
    value = _badness(number, score)[0]
    outside = value > _badness(number, band)[2]
    # At the stop limit itself, half of the pictures leaked: that counts.
    if stop is not None and outside and value >= _bad(number, stop):
        return "stop", f"beyond {stop:g}"
    if warn is not None and outside and value > _bad(number, warn):
        return "warn", f"beyond {warn:g}"
    return "ok", ""


def judge_set(
    number: Number, score: Interval, band: Interval, limits: Limits, pictures: int, prompts: Sequence[Verdict]
) -> tuple[Verdict, str]:
    """Judge a set by its mean and by its prompts.

    Args:
        number: what was measured.
        score: mean over the prompts, with its interval.
        band: A/A band of a mean over so many prompts.
        limits: of the set.
        pictures: per prompt; more prompts do not make up for pictures.
        prompts: verdicts of the single prompts.
    """
    warn, stop = limits.of(number.limits)
    if grey := _grey(warn, stop, pictures):
        return "grey", grey
    stopped, flagged = (sum(verdict in kinds for verdict in prompts) for kinds in ({"stop"}, {"warn", "stop"}))
    if stopped and stopped >= limits.stop_share * len(prompts):
        return "stop", f"{stopped} of {len(prompts)} prompts beyond the stop limit"
    value, best, _ = _badness(number, score)
    outside = value > _badness(number, band)[2]
    if number.bad != "high" and stop is not None and outside and best > _bad(number, stop):
        return "stop", f"whole interval beyond {stop:g}"
    if warn is not None and outside and value > _bad(number, warn):
        return "warn", f"beyond {warn:g}"
    return ("warn", f"{flagged} of {len(prompts)} prompts flagged") if flagged else ("ok", "")


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the worst verdict; grey only if nothing was judged."""
    order: tuple[Verdict, ...] = ("grey", "ok", "warn", "stop")
    return max(verdicts, key=order.index, default="grey")


def _grey(warn: float | None, stop: float | None, pictures: int) -> str:
    """Say why a score cannot be judged, or nothing."""
    if warn is None and stop is None:
        return "reported, not judged"
    return f"{pictures} pictures; {MIN_PICTURES} are needed to judge" if pictures < MIN_PICTURES else ""


def _badness(number: Number, score: Interval) -> tuple[float, float, float]:
    """Return value, best and worst end of the interval, all turned so that 0 is ideal and larger is worse."""
    if number.bad == "high":
        return score.value, score.low, score.high
    if number.bad == "both":
        ends = sorted(_folded(end) for end in (score.low, score.high))
        return _folded(score.value), 0.0 if score.low <= 1 <= score.high else ends[0], ends[1]
    return 1 - score.value, 1 - score.high, 1 - score.low


def _folded(ratio: float) -> float:
    """Return how far a ratio is from 1, the same for r and 1 / r, in [0, 1]."""
    return 1 - (min(ratio, 1 / ratio) if ratio > 0 else 0.0)


def _bad(number: Number, limit: float) -> float:
    """Turn a limit the way ``_badness`` turns scores."""
    return limit if number.bad == "high" else 1 - limit
