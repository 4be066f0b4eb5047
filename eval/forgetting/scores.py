"""Scores of drift from what both models made: rows per prompt, per set, and the worst prompt.

Letters: P probes, S seeds, n a number of pictures or predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data_prep.folders.results import Result, Verdict
from eval.forgetting.colour import FAINT, MEASURES
from eval.forgetting.divergence import divergence_parts
from eval.forgetting.leak import LeakNet, is_leaked
from eval.forgetting.verdicts import GUARD, Limits, Policy, judge_prompt, judge_set, worst
from eval.stats.distances import Interval
from eval.stats.intervals import (
    chance_of_hits,
    hierarchical,
    interval_of,
    noise_band,
    ratio_of_means,
    resample,
    share_interval,
)
from prompts.probe_lists import Probe

if TYPE_CHECKING:
    from eval.forgetting.evidence import Evidence

Floats = NDArray[np.float64]
UNCHANGED = 0.0


@dataclass(frozen=True, kw_only=True)
class Score:
    """One score over all probes, ready to be cut into sets.

    Attributes:
        metric: its name.
        unit: its unit.
        of: rows (indices of probes) -> mean over them with its interval.
        floor: (P,) what the base shows against itself.
        band: rows -> A/A band of a mean over them.
        counts: (P,) whether the probe counts; the others are grey with ``why_not``.
        why_not: reason.
        tier: ``A`` without outside weights, ``B`` with a local encoder.
    """

    metric: str
    unit: str
    of: Callable[[NDArray[np.int64]], Interval]
    floor: Floats
    band: Callable[[NDArray[np.int64]], Interval]
    counts: NDArray[np.bool_]
    why_not: str
    tier: str = "A"


@dataclass(frozen=True, kw_only=True)
class Views:
    """What an encoder sees, as vectors of length 1: texts (P, D), or None without a text side; pictures (P, S, D)."""

    kind: str
    texts: Floats | None
    tuned: Floats
    base: Floats
    base_again: Floats


def score_drift(
    probes: Sequence[Probe],
    evidence: Evidence,
    detector: LeakNet | None,
    why_blind: str,
    policy: Policy = GUARD,
    views: Sequence[Views] = (),
) -> tuple[list[Result], list[dict[str, float]]]:
    """Return the rows of ``results.jsonl`` and, for each tuned picture in order, its own numbers.

    Args:
        probes: P probes.
        evidence: pictures and predictions of both models.
        detector: recognises training slices; None if there is none that can.
        why_blind: why there is none.
        policy: what counts as drift.
        views: of the pictures by encoders.
    """
    if not evidence.tuned.shape[1]:  # a pulse
        rows = _divergence_rows(probes, evidence, policy)
        return [*rows, _overall(rows)], []
    colours = _colours(evidence)
    scores = [_colour_score(name, *values) for name, values in colours.items()]
    per_picture = {name: tuned for name, (tuned, _, _) in colours.items()}
    num_seeds = evidence.base.shape[1]
    rows = _divergence_rows(probes, evidence, policy)
    if detector is not None:
        leaks = (_patch_shares(detector, evidence.tuned), _patch_shares(detector, evidence.base))
        per_picture["leaked_patches"] = leaks[0]
        scores += [_leak_score(*leaks), _patch_leak_score(*leaks), _retention_score(leaks, colours["colourfulness"])]
    for view in views:
        scores.append(_similarity_score(view))
        if view.texts is not None:
            scores.append(_follow_score(probes, view, view.texts))
    for score in scores:
        rows += _rows(score, probes, num_seeds, policy)
    if detector is None:
        rows += [
            Result(metric=metric, unit="share", reason=why_blind) for metric in ("leak", "patch_leak", "retention")
        ]
    numbers = [
        {name: round(float(values[p, s]), 4) for name, values in per_picture.items()}
        for p in range(len(probes))
        for s in range(num_seeds)
    ]
    return [*rows, _overall(rows)], numbers


def _rows(score: Score, probes: Sequence[Probe], num_seeds: int, policy: Policy) -> list[Result]:
    """Cut one score into rows: the prompts of a set, then the set, each followed by its A/A band."""
    rows = []
    for name, members in _sets(probes).items():
        limits = policy.of(name)
        verdicts: list[Verdict] = []
        for index in members:
            one = np.array([index])
            row = Result(metric=score.metric, set=name, prompt=probes[index].shown, n=num_seeds, unit=score.unit)
            row = replace(row, tier=score.tier)
            if not score.counts[index]:
                rows.append(replace(row, reason=score.why_not))
                continue
            value = score.of(one)
            band = score.band(one)
            verdict, reason = judge_prompt(score.metric, value, band, limits, num_seeds)
            verdicts.append(verdict)
            rows.append(_with(row, value, num_seeds, float(score.floor[index]), verdict, reason))
            rows.append(_band_row(row, band, num_seeds))
        members = members[score.counts[members]]
        count = len(members) * num_seeds
        row = Result(metric=score.metric, set=name, n=count, unit=score.unit, tier=score.tier)
        if not count:
            rows.append(replace(row, reason=score.why_not))
            continue
        value, band = score.of(members), score.band(members)
        verdict, reason = judge_set(score.metric, value, band, limits, num_seeds, verdicts)
        rows.append(_with(row, value, len(members), float(score.floor[members].mean()), verdict, reason))
        rows.append(_band_row(row, band, len(members)))
    return rows


def _band_row(row: Result, band: Interval, n_eff: float) -> Result:
    """Return the row of what the base shows against itself where ``row`` compares it with the tuned model."""
    row = replace(row, metric=f"{row.metric}_aa")
    return _with(row, band, n_eff, None, "grey", "A/A band: the base against itself, other seeds")


def _sets(probes: Sequence[Probe]) -> dict[str, NDArray[np.int64]]:
    """Return the indices of the probes of each set."""
    names = dict.fromkeys(probe.set for probe in probes)
    return {name: np.array([index for index, probe in enumerate(probes) if probe.set == name]) for name in names}


def _with(row: Result, score: Interval, n_eff: float, floor: float | None, verdict: Verdict, reason: str) -> Result:
    """Fill in what was measured and what it means."""
    return replace(
        row,
        value=score.value,
        low=score.low,
        high=score.high,
        n_eff=n_eff,
        floor=floor,
        verdict=verdict,
        reason=reason,
    )


def _overall(rows: Sequence[Result]) -> Result:
    """Return the row of the whole check: the worst verdict of all, and the prompt that fared worst."""
    of_prompts = {
        metric: [row for row in rows if row.metric == metric and row.prompt and row.value is not None]
        for metric in ("retention", "clip_retention", "colourfulness_ratio", "divergence")
    }
    if kept := of_prompts["retention"] or of_prompts["clip_retention"] or of_prompts["colourfulness_ratio"]:
        least = min(kept, key=lambda row: row.value or 0.0)
    else:
        least = max(of_prompts["divergence"], key=lambda row: row.value or 0.0)
    verdict = worst([row.verdict for row in rows])
    flagged = dict.fromkeys(f"{row.metric} in {row.set}" for row in rows if row.verdict == verdict and row.set)
    return replace(
        least,
        metric="worst_prompt",
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
            ratio = Result(metric="divergence_ratio", set=name, prompt=prompt, n=row.n, unit="ratio", reason=why)
            if own is not None and not why:
                resamples = resample(ratio_of_means, difference[index], scale[index]) / np.maximum(own, mean / 100)
                interval = interval_of((row.value or 0.0) / mean, resamples)
                ratio = _with(ratio, interval, row.n_eff or 0, UNCHANGED, *_judge_ratio(name, interval.value, policy))
            rows += [row, ratio]
    return rows


def _divergence_row(name: str, prompt: str, difference: Floats, scale: Floats, per_latent: int) -> Result:
    """Return the divergence of some prompts, (P, K) each; exactly 0 where no prediction changed."""
    value = hierarchical(ratio_of_means, difference, scale)
    return Result(
        metric="divergence",
        set=name,
        prompt=prompt,
        value=value.value,
        low=value.low,
        high=value.high,
        n=difference.size * per_latent,
        n_eff=difference.size if prompt else len(difference),
        floor=UNCHANGED,
        unit="relative mean square",
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


def _colours(evidence: Evidence) -> dict[str, tuple[Floats, Floats, Floats]]:
    """Return each colour measure of the tuned, the base, and the base with other seeds, (P, S) each."""
    return {
        name: (
            _per_picture(measure, evidence.tuned),
            _per_picture(measure, evidence.base),
            _per_picture(measure, evidence.base_again),
        )
        for name, measure in MEASURES.items()
    }


def _per_picture(measure: Callable[[NDArray[np.uint8]], Floats], pictures: NDArray[np.uint8]) -> Floats:
    """Apply a measure of (N, H, W, 3) to (P, S, H, W, 3), giving (P, S)."""
    return measure(pictures.reshape(-1, *pictures.shape[2:])).reshape(pictures.shape[:2])


def _colour_score(name: str, tuned: Floats, base: Floats, again: Floats) -> Score:
    """Compare a colour measure with the base, picture by picture of the same seed."""
    counts = (base.mean(axis=1) >= FAINT[name]) & (again.mean(axis=1) >= FAINT[name])
    floor = np.ones(len(base))
    floor[counts] = ratio_of_means(again[counts], base[counts])
    return Score(
        metric=f"{name}_ratio",
        unit="ratio",
        of=lambda rows: hierarchical(ratio_of_means, tuned[rows], base[rows]),
        floor=floor,
        band=lambda rows: noise_band(again[counts], base[counts], _places(rows, counts)),
        counts=counts,
        why_not=f"the base's own pictures have too little {name} for a ratio",
    )


def _leak_score(tuned: Floats, base: Floats) -> Score:
    """Return the share of pictures with more than 30 % slice-like patches; the base's own share is its false alarms."""
    hits, own = is_leaked(tuned), is_leaked(base)

    def band(rows: NDArray[np.int64]) -> Interval:
        seen = hierarchical(_mean, own[rows])
        chance = chance_of_hits(int(own.sum()), own.size, own[rows].size)
        return Interval(value=seen.value, low=seen.low, high=max(seen.high, chance))

    return Score(
        metric="leak",
        unit="share",
        of=lambda rows: share_interval(hits[rows]),
        floor=own.mean(axis=1),
        band=band,
        counts=np.ones(len(hits), dtype=np.bool_),
        why_not="",
    )


def _patch_leak_score(tuned: Floats, base: Floats) -> Score:
    """Return the share of slice-like patches."""
    return Score(
        metric="patch_leak",
        unit="share",
        of=lambda rows: hierarchical(_mean, tuned[rows]),
        floor=base.mean(axis=1),
        band=lambda rows: hierarchical(_mean, base[rows]),
        counts=np.ones(len(tuned), dtype=np.bool_),
        why_not="",
    )


def _retention_score(leaks: tuple[Floats, Floats], colours: tuple[Floats, Floats, Floats]) -> Score:
    """Return (1 - patch leak) x min(1, colour ratio), on prompts whose base pictures do not look like slices.

    Args:
        leaks: share of slice-like patches of the tuned and the base, (P, S).
        colours: colourfulness of the tuned, the base, and the base with other seeds, (P, S).

    Prompts without colour to lose (grey textures) are judged by the leak alone.
    """
    (leak, base_leak), (tuned, base, again) = leaks, colours
    has_colour = (base.mean(axis=1) >= FAINT["colourfulness"]) & (again.mean(axis=1) >= FAINT["colourfulness"])
    tuned, base, again = (np.where(has_colour[:, None], values, 1.0) for values in (tuned, base, again))
    counts = ~is_leaked(base_leak.mean(axis=1)).astype(np.bool_)

    def retained(leak: Floats, above: Floats, below: Floats) -> Floats:
        return (1 - leak.mean(axis=-1)) * np.minimum(1, ratio_of_means(above, below))

    def band(rows: NDArray[np.int64]) -> Interval:
        own = hierarchical(retained, base_leak[rows], again[rows], base[rows])
        coloured = rows[has_colour[rows]]
        noise = 1.0
        if len(coloured):
            noise = noise_band(again[has_colour], base[has_colour], _places(coloured, has_colour)).low
        patches = float(1 - base_leak[rows].mean())
        return Interval(value=own.value, low=min(own.low, patches * noise), high=1.0)

    return Score(
        metric="retention",
        unit="share",
        of=lambda rows: hierarchical(retained, leak[rows], tuned[rows], base[rows]),
        floor=retained(base_leak, again, base),
        band=band,
        counts=counts,
        why_not="the base's own pictures look like slices here",
    )


def _follow_score(probes: Sequence[Probe], view: Views, texts: Floats) -> Score:
    """Return how much of the base's agreement of picture and prompt is left, by an encoder with a text side.

    Cosines less what the base's pictures of other prompts reach: 1 as good as the base, 0 like a random picture.
    """
    tuned, base, again = (np.einsum("psd,pd->ps", seen, texts) for seen in (view.tuned, view.base, view.base_again))
    of_others = np.einsum("qsd,pd->pq", view.base, texts) / view.base.shape[1]
    np.fill_diagonal(of_others, np.nan)
    mismatch = np.nanmean(of_others, axis=1, keepdims=True) if len(probes) > 1 else np.zeros((1, 1))
    above, below, other = tuned - mismatch, base - mismatch, again - mismatch
    error = below.std(axis=1, ddof=1) / np.sqrt(below.shape[1]) if below.shape[1] > 1 else np.zeros(len(below))
    counts = (below.mean(axis=1) > 2 * error) & (other.mean(axis=1) > 0) & np.array([bool(p.prompt) for p in probes])
    floor = np.ones(len(probes))
    floor[counts] = ratio_of_means(other[counts], below[counts])
    return Score(
        metric=f"{view.kind}_retention",
        unit="share",
        of=lambda rows: hierarchical(ratio_of_means, above[rows], below[rows]),
        floor=floor,
        band=lambda rows: noise_band(other[counts], below[counts], _places(rows, counts)),
        counts=counts,
        why_not=f"the base's own pictures do not follow this prompt clearly, by {view.kind}",
        tier="B",
    )


def _similarity_score(view: Views) -> Score:
    """Return how alike pictures of one seed stay: an early warning, since recomposing a picture lowers it too."""
    same, other = (np.einsum("psd,psd->ps", view.base, seen) for seen in (view.tuned, view.base_again))
    return Score(
        metric=f"{view.kind}_similarity",
        unit="cosine",
        of=lambda rows: hierarchical(_mean, same[rows]),
        floor=other.mean(axis=1),
        band=lambda rows: hierarchical(_mean, other[rows]),
        counts=np.ones(len(same), dtype=np.bool_),
        why_not="",
        tier="B",
    )


def sweep_rows(rows: Sequence[Result], weaker: Evidence, whole: Evidence, strength: float) -> list[Result]:
    """Return what adapters at a share of their strength forget, and how much of the change for the captions they keep.

    Args:
        rows: of ``score_drift`` at that strength.
        weaker: evidence at that strength.
        whole: evidence at full strength.
        strength: the share.
    """
    name = f"strength {strength:g}"
    worst_of_all = next(row for row in rows if row.metric == "worst_prompt")
    found = [replace(worst_of_all, metric="sweep_worst_prompt", set=name)]
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
        row = Result(metric="sweep_captions_moved", set=name, value=moved / full, unit="share", reason=reason)
        found.append(replace(row, n=parts[0][0].size, floor=UNCHANGED))
    return found


def _patch_shares(detector: LeakNet, pictures: NDArray[np.uint8]) -> Floats:
    """Return the share of slice-like patches, (P, S, H, W, 3) -> (P, S)."""
    return _per_picture(detector.patch_shares, pictures)


def _places(rows: NDArray[np.int64], counts: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return where rows stand among those that count."""
    return np.asarray(np.cumsum(counts)[rows] - 1)


def _mean(values: Floats) -> Floats:
    """Mean over seeds."""
    return np.asarray(values.mean(axis=-1))
