"""Scores of drift from what both models made: rows per prompt, per set, and the worst prompt.

Shapes: P is the number of probes and S of seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.folders.results import Result, Verdict
from eval.forgetting.divergence import divergence_parts
from eval.forgetting.evidence import Evidence, Views
from eval.forgetting.leak import LeakNet
from eval.forgetting.picture_scores import Measured, Score
from eval.forgetting.policy import GUARD, Limits, Policy
from eval.forgetting.reported import (
    DIVERGENCE,
    DIVERGENCE_RATIO,
    SCORES,
    SWEEP_CAPTIONS_MOVED,
    SWEEP_WORST_PROMPT,
    WORST_BY,
    WORST_PROMPT,
    DriftScore,
)
from eval.forgetting.verdicts import judge_prompt, judge_set, worst
from eval.stats.arrays import Floats
from eval.stats.distances import Interval
from eval.stats.intervals import hierarchical, interval_of, ratio_of_means, resample
from eval.stats.number import Number
from prompts.probe_lists import Probe

UNCHANGED = 0.0


def score_drift(
    probes: Sequence[Probe],
    evidence: Evidence,
    detector: LeakNet | None,
    why_blind: str,
    policy: Policy = GUARD,
    views: Sequence[Views] = (),
    scores: Sequence[DriftScore] = SCORES,
) -> tuple[list[Result], list[dict[str, float]]]:
    """Return the rows of ``results.jsonl`` and, for each tuned picture in order, its own numbers.

    Args:
        probes: P probes.
        evidence: pictures and predictions of both models.
        detector: recognises training slices; None if there is none that can.
        why_blind: why there is none.
        policy: what counts as drift.
        views: of the pictures by encoders.
        scores: what to measure of pictures.
    """
    rows = _divergence_rows(probes, evidence, policy)
    num_seeds = evidence.tuned.shape[1]
    if not num_seeds:  # a pulse
        return [*rows, _overall(rows)], []
    seen = {view.kind: view for view in views}
    shares = None if detector is None else detector.patch_shares
    measured = Measured(probes=probes, evidence=evidence, patch_shares=shares, views=seen)
    has = ["", "slices"] if detector is not None else [""]
    wanted = [one for one in scores if one.needs in has]
    wanted += [one for kind in seen for one in scores if one.needs == kind]
    per_picture: dict[str, Floats] = {}
    for one in wanted:
        score = one.of(measured)
        if score is not None:
            rows += _rows(one.number, score, probes, num_seeds, policy)
            per_picture |= score.per_picture
    if detector is None:
        blind = [one.number for one in scores if one.needs == "slices"]
        rows += [Result(metric=number.name, unit=number.unit, reason=why_blind) for number in blind]
    numbers = [
        {name: round(float(values[p, s]), 4) for name, values in per_picture.items()}
        for p in range(len(probes))
        for s in range(num_seeds)
    ]
    return [*rows, _overall(rows)], numbers


def _rows(number: Number, score: Score, probes: Sequence[Probe], num_seeds: int, policy: Policy) -> list[Result]:
    """Cut one score into rows: the prompts of a set, then the set, each followed by its A/A band."""
    rows = []
    blank = Result(metric=number.name, unit=number.unit, tier=number.tier)
    for name, members in _sets(probes).items():
        limits = policy.of(name)
        verdicts: list[Verdict] = []
        for index in members:
            one = np.array([index])
            row = replace(blank, set=name, prompt=probes[index].shown, n=num_seeds)
            if not score.counts[index]:
                rows.append(replace(row, reason=score.why_not))
                continue
            value = score.of(one)
            band = score.band(one)
            verdict, reason = judge_prompt(number, value, band, limits, num_seeds)
            verdicts.append(verdict)
            floor = float(score.floor[index])
            rows.append(_measured(row, value, n_eff=num_seeds, floor=floor, verdict=verdict, reason=reason))
            rows.append(_band_row(row, band, num_seeds))
        members = members[score.counts[members]]
        count = len(members) * num_seeds
        row = replace(blank, set=name, n=count)
        if not count:
            rows.append(replace(row, reason=score.why_not))
            continue
        value, band = score.of(members), score.band(members)
        verdict, reason = judge_set(number, value, band, limits, num_seeds, verdicts)
        floor = float(score.floor[members].mean())
        rows.append(_measured(row, value, n_eff=len(members), floor=floor, verdict=verdict, reason=reason))
        rows.append(_band_row(row, band, len(members)))
    return rows


def _band_row(row: Result, band: Interval, n_eff: float) -> Result:
    """Return the row of what the base shows against itself where ``row`` compares it with the tuned model."""
    row = replace(row, metric=f"{row.metric}_aa", floor=None, verdict="grey", n_eff=n_eff)
    return _measured(row, band, reason="A/A band: the base against itself, other seeds")


def _sets(probes: Sequence[Probe]) -> dict[str, NDArray[np.int64]]:
    """Return the indices of the probes of each set."""
    names = dict.fromkeys(probe.set for probe in probes)
    return {name: np.array([index for index, probe in enumerate(probes) if probe.set == name]) for name in names}


def _measured(row: Result, score: Interval, **known: Any) -> Result:
    """Fill in a value with its interval, and other fields of the row."""
    return replace(row, value=score.value, low=score.low, high=score.high, **known)


def _overall(rows: Sequence[Result]) -> Result:
    """Return the row of the whole check: the worst verdict of all, and the prompt that fared worst."""
    of_prompts = {
        number: [row for row in rows if row.metric == number.name and row.prompt and row.value is not None]
        for number in WORST_BY
    }
    by = next(number for number in WORST_BY if of_prompts[number])
    most = max if by.bad == "high" else min
    least = most(of_prompts[by], key=lambda row: row.value or 0.0)
    verdict = worst([row.verdict for row in rows])
    flagged = dict.fromkeys(f"{row.metric} in {row.set}" for row in rows if row.verdict == verdict and row.set)
    return replace(
        least,
        metric=WORST_PROMPT.name,
        unit=least.metric,
        verdict=verdict,
        reason="; ".join(flagged) if verdict in {"warn", "stop"} else "",
    )


def _divergence_rows(probes: Sequence[Probe], evidence: Evidence, policy: Policy) -> list[Result]:
    """Return how far the predictions moved, absolutely and against how far they moved for the trained captions."""
    difference, scale = divergence_parts(evidence.tuned_predictions, evidence.base_predictions)  # (P, K)
    per_latent = evidence.base_predictions.shape[2]
    own, mean = None, 0.0
    rows: list[Result] = []
    why = "no captions of the trained domain; give --captions"
    if evidence.tuned_caption_predictions is not None and evidence.base_caption_predictions is not None:
        parts = divergence_parts(evidence.tuned_caption_predictions, evidence.base_caption_predictions)
        rows.append(_divergence_row("captions", "", *parts, per_latent))
        mean, own = float(ratio_of_means(*parts).mean()), resample(ratio_of_means, *parts, seed=1)
        why = "" if mean > 0 else "nothing changed for the captions"
    for name, members in _sets(probes).items():
        for index, prompt in (*((np.array([m]), probes[m].shown) for m in members), (members, "")):
            row = _divergence_row(name, prompt, difference[index], scale[index], per_latent)
            ratio = Result(metric=DIVERGENCE_RATIO.name, set=name, prompt=prompt, n=row.n, unit=DIVERGENCE_RATIO.unit)
            ratio = replace(ratio, reason=why)
            if own is not None and not why:
                resamples = resample(ratio_of_means, difference[index], scale[index]) / np.maximum(own, mean / 100)
                interval = interval_of((row.value or 0.0) / mean, resamples)
                verdict, reason = _judge_ratio(name, interval.value, policy)
                ratio = _measured(
                    ratio, interval, n_eff=row.n_eff or 0, floor=UNCHANGED, verdict=verdict, reason=reason
                )
            rows += [row, ratio]
    return rows


def _divergence_row(name: str, prompt: str, difference: Floats, scale: Floats, per_latent: int) -> Result:
    """Return the divergence of some prompts, (P, K) each; exactly 0 where no prediction changed."""
    value = hierarchical(ratio_of_means, difference, scale)
    return Result(
        metric=DIVERGENCE.name,
        set=name,
        prompt=prompt,
        value=value.value,
        low=value.low,
        high=value.high,
        n=difference.size * per_latent,
        n_eff=difference.size if prompt else len(difference),
        floor=UNCHANGED,
        unit=DIVERGENCE.unit,
        verdict="grey" if value.value else "ok",
        reason="a distance; judged as its ratio to the captions'" if value.value else "",
    )


def _judge_ratio(name: str, value: float, policy: Policy) -> tuple[Verdict, str]:
    """Judge the divergence ratio: it only ever calls for a look at pictures."""
    limit = policy.divergence_ratio
    if limit is None or policy.of(name) == Limits():
        return "grey", "reported, not judged"
    if value > limit:
        return "warn", f"moved by more than {limit:g} of what the captions moved: look at the pictures"
    return "ok", ""


def sweep_rows(rows: Sequence[Result], weaker: Evidence, whole: Evidence, strength: float) -> list[Result]:
    """Return what adapters at a share of their strength forget, and how much of the change for the captions they keep.

    Args:
        rows: of ``score_drift`` at that strength.
        weaker: evidence at that strength.
        whole: evidence at full strength.
        strength: the share.
    """
    name = f"strength {strength:g}"
    worst_of_all = next(row for row in rows if row.metric == WORST_PROMPT.name)
    found = [replace(worst_of_all, metric=SWEEP_WORST_PROMPT.name, set=name)]
    parts = [
        divergence_parts(one.tuned_caption_predictions, one.base_caption_predictions)
        for one in (weaker, whole)
        if one.tuned_caption_predictions is not None and one.base_caption_predictions is not None
    ]
    if len(parts) == 2 and parts[1][0].any():
        moved, full = (float(ratio_of_means(*part).mean()) for part in parts)
        reason = (
            "how far the predictions for the captions moved, over full strength; eval.fidelity says what it is worth"
        )
        row = Result(metric=SWEEP_CAPTIONS_MOVED.name, set=name, value=moved / full, unit=SWEEP_CAPTIONS_MOVED.unit)
        found.append(replace(row, n=parts[0][0].size, floor=UNCHANGED, reason=reason))
    return found
