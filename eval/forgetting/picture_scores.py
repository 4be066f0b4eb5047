"""The scores of drift: what of the base is left in the tuned model's pictures; one function a score.

Shapes: P is the number of probes and S of seeds. A new score is a function here or in a file beside, and its line in
``reported.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from eval.forgetting.colour import FAINT, MEASURES
from eval.forgetting.evidence import Evidence, Views
from eval.stats.arrays import Floats
from eval.stats.distances import Interval
from eval.stats.intervals import chance_of_hits, hierarchical, noise_band, ratio_of_means, share_interval
from prompts.probe_lists import Probe

LEAKED_SHARE = 0.3
"""A picture with more than this share of slice-like patches counts as leaked."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What scores are made of; what several of them need is measured once.

    Attributes:
        probes: P of them.
        evidence: pictures of both models.
        patch_shares: returns the share of slice-like patches of pictures, (N, H, W, 3) -> (N,); None if nothing can.
        views: name of an encoder -> what it sees.
    """

    probes: Sequence[Probe]
    evidence: Evidence
    patch_shares: Callable[[NDArray[np.uint8]], Floats] | None = None
    views: Mapping[str, Views] = field(default_factory=dict)

    @cached_property
    def colours(self) -> dict[str, tuple[Floats, Floats, Floats]]:
        """Each colour measure of the tuned, the base, and the base with other seeds, (P, S) each."""
        made = self.evidence
        return {
            name: (
                per_picture(measure, made.tuned),
                per_picture(measure, made.base),
                per_picture(measure, made.base_again),
            )
            for name, measure in MEASURES.items()
        }

    @cached_property
    def leaked_patches(self) -> tuple[Floats, Floats]:
        """The share of slice-like patches of the tuned and of the base pictures, (P, S) each.

        Raises:
            ValueError: nothing can tell.
        """
        shares = self.patch_shares
        if shares is None:
            raise ValueError("no detector of training slices")
        return per_picture(shares, self.evidence.tuned), per_picture(shares, self.evidence.base)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One score over all probes, ready to be cut into sets.

    Attributes:
        of: rows (indices of probes) -> mean over them with its interval.
        floor: (P,) what the base shows against itself.
        band: rows -> A/A band of a mean over them.
        counts: (P,) whether the probe counts; the others are grey with ``why_not``.
        why_not: reason.
        per_picture: name -> (P, S) numbers of the single tuned pictures, for their records.
    """

    of: Callable[[NDArray[np.int64]], Interval]
    floor: Floats
    band: Callable[[NDArray[np.int64]], Interval]
    counts: NDArray[np.bool_]
    why_not: str
    per_picture: Mapping[str, Floats] = field(default_factory=dict)


def is_leaked(patch_shares: Floats) -> Floats:
    """Return 1 for pictures that count as leaked, else 0."""
    return np.asarray(patch_shares > LEAKED_SHARE, dtype=np.float64)


def per_picture(measure: Callable[[NDArray[np.uint8]], Floats], pictures: NDArray[np.uint8]) -> Floats:
    """Apply a measure of (N, H, W, 3) to (P, S, H, W, 3), giving (P, S)."""
    return measure(pictures.reshape(-1, *pictures.shape[2:])).reshape(pictures.shape[:2])


def colour(measured: Measured, name: str) -> Score:
    """Compare a colour measure with the base, picture by picture of the same seed."""
    tuned, base, again = measured.colours[name]
    counts = (base.mean(axis=1) >= FAINT[name]) & (again.mean(axis=1) >= FAINT[name])
    floor = np.ones(len(base))
    floor[counts] = ratio_of_means(again[counts], base[counts])
    return Score(
        of=lambda rows: hierarchical(ratio_of_means, tuned[rows], base[rows]),
        floor=floor,
        band=lambda rows: noise_band(again[counts], base[counts], _places(rows, counts)),
        counts=counts,
        why_not=f"the base's own pictures have too little {name} for a ratio",
        per_picture={name: tuned},
    )


def leak(measured: Measured) -> Score:
    """Return the share of pictures with more than 30 % slice-like patches; the base's own share is its false alarms."""
    tuned, base = measured.leaked_patches
    hits, own = is_leaked(tuned), is_leaked(base)

    def band(rows: NDArray[np.int64]) -> Interval:
        seen = hierarchical(_mean, own[rows])
        chance = chance_of_hits(int(own.sum()), own.size, own[rows].size)
        return Interval(value=seen.value, low=seen.low, high=max(seen.high, chance))

    return Score(
        of=lambda rows: share_interval(hits[rows]),
        floor=own.mean(axis=1),
        band=band,
        counts=np.ones(len(hits), dtype=np.bool_),
        why_not="",
    )


def patch_leak(measured: Measured) -> Score:
    """Return the share of slice-like patches."""
    tuned, base = measured.leaked_patches
    return Score(
        of=lambda rows: hierarchical(_mean, tuned[rows]),
        floor=base.mean(axis=1),
        band=lambda rows: hierarchical(_mean, base[rows]),
        counts=np.ones(len(tuned), dtype=np.bool_),
        why_not="",
        per_picture={"leaked_patches": tuned},
    )


def retention(measured: Measured) -> Score:
    """Return (1 - patch leak) x min(1, colour ratio), on prompts whose base pictures do not look like slices.

    Prompts without colour to lose (grey textures) are judged by the leak alone.
    """
    (leak, base_leak), (tuned, base, again) = measured.leaked_patches, measured.colours["colourfulness"]
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
        of=lambda rows: hierarchical(retained, leak[rows], tuned[rows], base[rows]),
        floor=retained(base_leak, again, base),
        band=band,
        counts=counts,
        why_not="the base's own pictures look like slices here",
    )


def agreement(measured: Measured, encoder: str) -> Score | None:
    """Return how much of the base's agreement of picture and prompt is left, by an encoder with a text side.

    Cosines less what the base's pictures of other prompts reach: 1 as good as the base, 0 like a random picture.
    """
    view, probes = measured.views[encoder], measured.probes
    if view.texts is None:
        return None
    texts = view.texts
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
        of=lambda rows: hierarchical(ratio_of_means, above[rows], below[rows]),
        floor=floor,
        band=lambda rows: noise_band(other[counts], below[counts], _places(rows, counts)),
        counts=counts,
        why_not=f"the base's own pictures do not follow this prompt clearly, by {encoder}",
    )


def similarity(measured: Measured, encoder: str) -> Score:
    """Return how alike pictures of one seed stay: an early warning, since recomposing a picture lowers it too."""
    view = measured.views[encoder]
    same, other = (np.einsum("psd,psd->ps", view.base, seen) for seen in (view.tuned, view.base_again))
    return Score(
        of=lambda rows: hierarchical(_mean, same[rows]),
        floor=other.mean(axis=1),
        band=lambda rows: hierarchical(_mean, other[rows]),
        counts=np.ones(len(same), dtype=np.bool_),
        why_not="",
    )


def _places(rows: NDArray[np.int64], counts: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return where rows stand among those that count."""
    return np.asarray(np.cumsum(counts)[rows] - 1)


def _mean(values: Floats) -> Floats:
    """Mean over seeds."""
    return np.asarray(values.mean(axis=-1))
