"""Descriptors of generated slices in units of how much real slices differ among themselves.

The floor ratio of a descriptor is D(generated, held-out real) / D(other real, held-out real) at equal numbers per
caption: 1 means as different as two pieces of the same part. Beside it stand the same ratio for real slices after the
VAE round trip, and for the nearest other state of the material.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.folders.results import Result, Verdict
from eval.likeness.described import Described, DescribedSets
from eval.likeness.descriptors import DESCRIPTORS, Descriptor, as_vectors
from eval.likeness.rows import Naming
from eval.stats.arrays import Floats
from eval.stats.distances import (
    Interval,
    Sample,
    auc_interval,
    block_weights,
    blocked_kid,
    density_coverage,
    gaussian_kernel,
    median_distance,
    one_a_block,
    two_sample_scores,
)

MOST_DRAWS = 200
"""Resamples of a descriptor; there are a dozen of them for each caption."""
FEWEST_TILES = 128
"""Tiles a side below which nothing here is judged."""
FEWEST_INDEPENDENT = 200
"""Independent real tiles below which density and coverage are not judged."""
GREY_LEVELS = 2.0
"""Mean distance of the channels of a picture, in grey levels, beyond which it is not grey."""
NEIGHBOURS = 5
TOLD_APART = (0.65, 0.9)
"""Share of pairs in order (AUC) of the two-sample test, beyond the real-to-real line, that warns; and that is clear."""


def descriptor_rows(sets: DescribedSets, naming: Naming, why_grey: str, *, draws: int, seed: int) -> list[Result]:
    """Return the floor ratios, the two-sample test, the distance of distributions, density and coverage.

    Args:
        sets: the descriptors of every set.
        naming: names of the states and axes, for the captions.
        why_grey: why nothing may be judged, such as a missing held-out region; empty if it may.
        draws: number of resamples behind each interval.
        seed: seed of the resampling.
    """
    sides = [sets.generated, sets.held_out, sets.aside]
    number = {
        int(cell): min(int((side.cells == cell).sum()) for side in sides)
        for cell in np.unique(np.concatenate([side.cells for side in sides]))
    }
    number = {cell: count for cell, count in number.items() if count >= 2}
    if not number:
        reason = why_grey or "no caption has two tiles each of generated, held-out and set-aside real slices"
        return [Result(metric="descriptor_floor_ratio", set="generated", unit="ratio", reason=reason)]
    equal = DescribedSets(
        generated=_first(sets.generated, number),
        held_out=_first(sets.held_out, number),
        aside=_first(sets.aside, number),
        vae=None if sets.vae is None else _first(sets.vae, number),
    )
    total = len(equal.held_out)
    grey = why_grey or (f"{total} tiles a side, judged from {FEWEST_TILES}" if total < FEWEST_TILES else "")
    rows = _ratio_rows(equal, naming, grey, draws=min(draws, MOST_DRAWS), seed=seed)
    return rows + _set_rows(equal, grey, draws=draws, seed=seed)


def coloured_row(paths: Sequence[Path]) -> Result:
    """Return the share of pictures that are not grey, as slices are; every other number reads the mean of channels."""
    spreads = []
    for path in paths:
        with Image.open(path) as opened:
            picture = np.asarray(opened.convert("RGB")).astype(int)
        spreads.append(float((picture.max(axis=2) - picture.min(axis=2)).mean()))
    reason = f"channels more than {GREY_LEVELS:g} grey levels apart; {np.mean(spreads):.1f} over all; shown, not judged"
    share = float(np.mean(np.array(spreads) > GREY_LEVELS))
    return Result(metric="coloured", set="generated", value=share, n=len(paths), unit="share", reason=reason)


def _ratio_rows(sets: DescribedSets, naming: Naming, grey: str, *, draws: int, seed: int) -> list[Result]:
    """Return the ratio of every descriptor, its reference lines, its captions, and the median over all."""
    others = {"generated": sets.generated, "aside": sets.aside} | ({"vae": sets.vae} if sets.vae is not None else {})
    weights = {
        name: np.concatenate([np.ones((1, len(side))), block_weights(side.cells, side.blocks, draws=draws, seed=place)])
        for place, (name, side) in enumerate({**others, "held_out": sets.held_out}.items(), start=seed)
    }
    rows, medians = list[Result](), dict[str, list[Floats]]()
    for descriptor in DESCRIPTORS:
        far = {
            name: _distances(descriptor, side, sets.held_out, weights[name], weights["held_out"])
            for name, side in others.items()
        }  # (1 + draws, captions) each; the first draw is the set as it is
        base = Result(
            metric=descriptor.name,
            set="descriptor",
            n=len(sets.held_out),
            n_eff=sets.held_out.num_blocks,
            floor=1.0,
            unit="ratio",
        )
        floor = far["aside"].mean(axis=1)
        if floor[0] <= 0:
            rows.append(replace(base, floor=None, reason="real slices do not differ by it; there is no floor"))
            continue
        steady = _recentred(floor)
        ratios = {name: _recentred(values.mean(axis=1)) / steady for name, values in far.items()}
        for name, values in ratios.items():
            medians.setdefault(name, []).append(values)
        other = _nearest_state(descriptor, sets.held_out)
        vae = _interval(ratios["vae"]) if "vae" in ratios else None
        value = _interval(ratios["generated"])
        verdict, reason = _judge(value, vae, None if other is None else other / floor[0])
        text = f"{far['generated'][0].mean():.3g} {descriptor.unit} from held-out slices, real ones {floor[0]:.3g}"
        rows.append(
            replace(base, **asdict(value), verdict="grey" if grey else verdict, reason=f"{grey or reason}; {text}")
        )
        if vae is not None:
            text = "reference: real slices after the VAE round trip, over real to real"
            rows.append(replace(base, set="descriptor_vae", **asdict(vae), reason=text))
        if other is not None:
            text = "reference: the nearest two states among held-out slices, over real to real"
            nearest = replace(base, set="descriptor_nearest_states", value=float(other / floor[0]), reason=text)
            rows.append(nearest)
        for place, cell in enumerate(np.unique(sets.held_out.cells)):
            if far["aside"][0, place] > 0:
                own = _interval(_recentred(far["generated"][:, place]) / _recentred(far["aside"][:, place]))
                count = int((sets.held_out.cells == cell).sum())
                row = replace(base, prompt=naming.caption(int(cell)), n=count, n_eff=None)
                rows.append(replace(row, **asdict(own), reason=grey or "shown per caption, not judged"))
    return [_median_row(medians, sets, grey), *rows]


def _median_row(medians: Mapping[str, Sequence[Floats]], sets: DescribedSets, grey: str) -> Result:
    """Return the median ratio over the descriptors, judged once, so that a dozen tests do not raise a false alarm."""
    lines = {name: _interval(np.median(np.stack(values), axis=0)) for name, values in medians.items()}
    row = Result(
        metric="descriptor_floor_ratio",
        set="generated",
        n=len(sets.held_out),
        n_eff=sets.held_out.num_blocks,
        floor=1.0,
        unit="ratio",
    )
    if not lines:
        return replace(row, reason=grey or "real slices do not differ by any descriptor")
    verdict, reason = _judge(lines["generated"], lines.get("vae"), None)
    reason = grey or f"{reason} (median of {len(medians['generated'])} descriptors)"
    return replace(row, **asdict(lines["generated"]), verdict="grey" if grey else verdict, reason=reason)


def _judge(value: Interval, vae: Interval | None, other_state: float | None) -> tuple[Verdict, str]:
    """Compare a floor ratio with 1, with the VAE's line and with the nearest other state."""
    line = max(1.0, vae.high if vae is not None else 1.0)
    if value.low <= line:
        return "ok", "within what two pieces of the same part differ by, as scanned or through the VAE"
    if other_state is not None and value.value >= other_state:
        return "stop", "further from real slices than the nearest two states are from each other"
    return "warn", "further than two pieces of the same part"


def _set_rows(sets: DescribedSets, grey: str, *, draws: int, seed: int) -> list[Result]:
    """Return what needs all descriptors at once."""
    vectors = as_vectors(dict(sets.held_out.values))
    scale = vectors.mean(axis=0), vectors.std(axis=0) + 1e-9
    held_out, aside, generated = (side.sample(scale) for side in (sets.held_out, sets.aside, sets.generated))
    base = Result(metric="", set="generated", n=len(held_out), n_eff=sets.held_out.num_blocks)
    auc = {
        name: auc_interval(side, held_out, two_sample_scores(side, held_out, seed=seed), draws=draws, seed=seed)
        for name, side in (("generated", generated), ("aside", aside))
    }
    line = max(0.5, auc["aside"].high)
    warn, stop = (max(limit, line) for limit in TOLD_APART)
    verdict: Verdict = "ok" if auc["generated"].low <= warn else "warn"
    reason = f"share of pairs a classifier puts in order; real against real {auc['aside'].value:.2f}"
    if auc["generated"].low > stop:
        reason = f"told apart almost always; real against real {auc['aside'].value:.2f}"
    row = replace(base, metric="two_sample_auc", unit="share", floor=auc["aside"].value)
    rows = [replace(row, **asdict(auc["generated"]), verdict="grey" if grey else verdict, reason=grey or reason)]

    rows.append(mmd_row(base, held_out, aside, generated, grey, draws=draws, seed=seed))
    return rows + density_rows(base, held_out, aside, generated, grey)


def mmd_row(
    base: Result, held_out: Sample, aside: Sample, generated: Sample, grey: str, *, draws: int, seed: int
) -> Result:
    """Return the squared MMD of generated from held-out tiles; the floor is that of other real ones."""
    kernel = gaussian_kernel(median_distance(held_out.features))
    far, floor = (blocked_kid(side, held_out, kernel=kernel, draws=draws, seed=seed) for side in (generated, aside))
    row = replace(base, metric="mmd", unit="squared MMD", floor=floor.value)
    reason = grey or "Gaussian kernel on all features; sees a loss of diversity; shown, not judged"
    return replace(row, **asdict(far), reason=reason)


def density_rows(base: Result, held_out: Sample, aside: Sample, generated: Sample, grey: str) -> list[Result]:
    """Return density and coverage among held-out tiles, one a block, since near copies shrink the spheres."""
    rows = []
    thin = one_a_block(held_out.strata, held_out.blocks)
    reference = held_out.features[thin]
    for place, name in enumerate(("density", "coverage")):
        row = replace(base, metric=name, unit="ratio" if name == "density" else "share", n_eff=float(len(thin)))
        if len(reference) <= NEIGHBOURS:
            rows.append(replace(row, reason=grey or f"{len(thin)} independent real tiles are too few"))
            continue
        value, floor = (density_coverage(reference, side, neighbours=NEIGHBOURS)[place] for side in
                        (generated.features, aside.features))  # fmt: skip
        few = f"{len(thin)} independent real tiles, judged from {FEWEST_INDEPENDENT}"
        fine = value >= 0.5 * floor
        verdict: Verdict = "grey" if grey or len(thin) < FEWEST_INDEPENDENT else "ok" if fine else "warn"
        why = grey or (few if verdict == "grey" else "" if fine else "less than half of what other real slices reach")
        rows.append(replace(row, value=value, floor=floor, verdict=verdict, reason=why))
    return rows


def _distances(
    descriptor: Descriptor, side: Described, reference: Described, weights: Floats, reference_weights: Floats
) -> Floats:
    """Return the distance for every resample and caption, (resamples, captions)."""
    columns = []
    for cell in np.unique(reference.cells):
        mine, theirs = np.flatnonzero(side.cells == cell), np.flatnonzero(reference.cells == cell)
        a, b = side.values[descriptor.name][mine], reference.values[descriptor.name][theirs]
        pairs = zip(weights[:, mine], reference_weights[:, theirs], strict=True)
        columns.append([descriptor.distance(a, own, b, other) for own, other in pairs])
    return np.array(columns).T


def _nearest_state(descriptor: Descriptor, held_out: Described) -> float | None:
    """Return the smallest distance between two states at equal axes among held-out slices; None with one state."""
    found = []
    states = np.unique(held_out.cells // 1000)
    for first, second in combinations(states, 2):
        both = []
        for axis in np.unique(held_out.cells % 1000):
            sides = [np.flatnonzero(held_out.cells == state * 1000 + axis) for state in (first, second)]
            count = min(map(len, sides))
            if count >= 2:
                a, b = (held_out.values[descriptor.name][side[:count]] for side in sides)
                both.append(descriptor.distance(a, np.ones(count), b, np.ones(count)))
        found += [float(np.mean(both))] if both else []
    return min(found, default=None)


def _first(side: Described, number: Mapping[int, int]) -> Described:
    """Return the first so many tiles of each caption; tiles come drawn by seed and spread over blocks."""
    return side.take(np.concatenate([np.flatnonzero(side.cells == cell)[:count] for cell, count in number.items()]))


def _recentred(distances: Floats) -> Floats:
    """Return resampled distances moved so that their mean is the first, the measured one.

    A resample holds tiles twice and is further from everything than the set it was drawn from; only the spread is used.
    """
    moved = distances - distances[1:].mean() + distances[0]
    moved[0] = distances[0]
    return np.maximum(moved, 0.2 * distances[0])


def _interval(values: Floats) -> Interval:
    """Return the first value with the 2.5 and 97.5 % quantiles of the others."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return Interval(value=float(values[0]), low=float(min(low, values[0])), high=float(max(high, values[0])))
