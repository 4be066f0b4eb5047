"""From what the slice classifier reads in real and generated tiles to judged numbers.

The classifier is a measuring instrument and is tested first: where it cannot read real slices, or real slices sent
through the VAE, what it says of generated ones is grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np

from data_prep.folders.results import Result, Verdict
from eval.stats.arrays import Floats, Ints
from eval.stats.distances import Interval, Sample, accuracy_interval, blocked_kid, confusion
from prompts.captions import caption
from prompts.vocabulary import Vocabulary

Head = Literal["state", "axis"]
HEADS: tuple[Head, Head] = ("state", "axis")

ADMISSION = 0.95
"""Balanced accuracy on held-out real tiles, and on their VAE round trip, below which a head is not believed."""
WITHOUT_GREY = 0.90
"""Balanced accuracy of the state on histogram-matched tiles, below which it is recognised by grey level."""
AGREEMENT: dict[Head, float] = {"state": 0.90, "axis": 0.70}
"""Share of generated slices that must show what their prompt asked for."""
FEWEST_PER_CAPTION = 64
"""Generated slices of one caption below which its own numbers are shown and not judged."""
FEWEST_FOR_KID = 128
"""Tiles per side below which the distance is not judged."""


@dataclass(frozen=True, kw_only=True)
class Classified:
    """Tiles or pictures as the classifier reads them, with what they are.

    Attributes:
        features: (N, F), standardised by the learning tiles.
        truth: head -> (N,) class number, of the caption or the prompt.
        predicted: head -> (N,) class number the classifier reads.
        blocks: (N,) block number.
    """

    features: Floats
    truth: Mapping[Head, Ints]
    predicted: Mapping[Head, Ints]
    blocks: Ints

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def cells(self) -> Ints:
        """(N,) number of the caption."""
        return self.truth["state"] * 1000 + self.truth["axis"]

    @property
    def num_blocks(self) -> int:
        """Blocks, counted within each caption."""
        return len(np.unique(np.stack([self.cells, self.blocks]), axis=1).T)

    def take(self, index: Ints) -> Classified:
        """Return the entries at ``index``."""
        return Classified(
            features=self.features[index],
            truth={head: values[index] for head, values in self.truth.items()},
            predicted={head: values[index] for head, values in self.predicted.items()},
            blocks=self.blocks[index],
        )


@dataclass(frozen=True, kw_only=True)
class ClassifiedSets:
    """What is compared; the round trips are None where the model cannot be loaded, for the reason in ``no_vae``."""

    held_out: Classified
    held_out_matched: Classified
    held_out_vae: Classified | None
    aside: Classified
    aside_vae: Classified | None
    generated: Classified
    generated_tiles: Classified
    no_vae: str
    leak_unchecked: str


@dataclass(frozen=True, kw_only=True)
class Naming:
    """Names of the class numbers."""

    states: tuple[str, ...]
    axes: tuple[str, ...]
    vocabulary: Vocabulary

    def of(self, head: Head) -> tuple[str, ...]:
        """Return the class names of a head."""
        return self.states if head == "state" else self.axes

    def caption(self, cell: int) -> str:
        """Return the caption of a cell number."""
        return caption(self.states[cell // 1000], self.axes[cell % 1000], self.vocabulary)


def table_of(classified: Classified, head: Head, naming: Naming) -> Floats:
    """Return the confusion table of one head."""
    return confusion(classified.truth[head], classified.predicted[head], len(naming.of(head)))


def fidelity_rows(sets: ClassifiedSets, naming: Naming, *, draws: int, seed: int) -> list[Result]:
    """Return every number of the check, judged, in the order they are read."""
    accuracies = _accuracy_rows(sets, naming, draws, seed)
    blocked = {head: why_not_believed(head, accuracies, sets, naming) for head in HEADS}
    rows = [*accuracies]
    for head in HEADS:
        rows += _agreement_rows(head, sets, naming, accuracies, blocked[head], draws, seed)
    reasons = [reason for reason in blocked.values() if reason and reason != sets.no_vae]
    return rows + distance_rows(sets, naming, reasons[0] if reasons else "", draws, seed)


def _accuracy_rows(sets: ClassifiedSets, naming: Naming, draws: int, seed: int) -> list[Result]:
    """Return the admission tests and the grey-level control."""
    rows = []
    tests = (
        ("held_out", sets.held_out),
        ("held_out_matched", sets.held_out_matched),
        ("held_out_vae", sets.held_out_vae),
    )
    for name, classified in tests:
        for head in HEADS:
            row = Result(metric=f"accuracy_{head}", set=name, unit="share", verdict="grey", reason=sets.no_vae)
            if classified is None:
                rows.append(row)
                continue
            classes = len(naming.of(head))
            interval = accuracy_interval(
                classified.truth[head],
                classified.predicted[head],
                classes,
                classified.cells,
                classified.blocks,
                draws=draws,
                seed=seed,
            )
            verdict, reason = _judge_accuracy(name, head, interval.value, classes)
            rows.append(
                replace(
                    row,
                    **asdict(interval),
                    verdict=verdict,
                    reason=reason,
                    n=len(classified),
                    n_eff=classified.num_blocks,
                )
            )
    return rows


def _judge_accuracy(name: str, head: Head, value: float, classes: int) -> tuple[Verdict, str]:
    """Say whether the classifier may be believed."""
    if classes < 2:
        return "grey", f"the dataset has one {head} only; there is nothing to tell apart"
    if name == "held_out_matched":
        if head == "state" and value < WITHOUT_GREY:
            return (
                "warn",
                f"below {WITHOUT_GREY:.2f} without grey levels: state is recognised by grey level",
            )
        return "ok", "with one common histogram for all tiles: read from structure, not from grey level"
    where = "held-out real tiles" if name == "held_out" else "held-out real tiles after the VAE round trip"
    if value < ADMISSION:
        return "grey", f"below {ADMISSION:.2f} on {where}: the {head} head is not believed"
    return "ok", f"at least {ADMISSION:.2f} on {where}: the {head} head is believed"


def why_not_believed(head: Head, accuracies: Sequence[Result], sets: ClassifiedSets, naming: Naming) -> str:
    """Return why the numbers of a head are grey, or an empty string."""
    if sets.leak_unchecked:
        return sets.leak_unchecked
    if len(naming.of(head)) < 2:
        return f"the dataset has one {head} only; there is nothing to tell apart"
    for row in accuracies:
        if row.metric != f"accuracy_{head}" or row.set == "held_out_matched":
            continue
        if row.value is None:
            return sets.no_vae
        if row.value < ADMISSION:
            through = " after the VAE round trip" if row.set == "held_out_vae" else ""
            return f"{head} of held-out real tiles{through} is read at {row.value:.2f}, below {ADMISSION:.2f}"
    return ""


def _agreement_rows(
    head: Head, sets: ClassifiedSets, naming: Naming, accuracies: Sequence[Result], blocked: str, draws: int, seed: int
) -> list[Result]:
    """Return how often generated slices show what was asked for, over all and per caption."""
    classified, classes = sets.generated, len(naming.of(head))
    ceiling = next(
        (
            row.value
            for row in reversed(accuracies)
            if row.metric == f"accuracy_{head}" and row.set != "held_out_matched"
        ),
        None,
    )
    caution = next((row.reason for row in accuracies if row.metric == f"accuracy_{head}" and row.verdict == "warn"), "")
    rows = []
    for cell in (None, *np.unique(classified.cells)):
        part = classified if cell is None else classified.take(np.flatnonzero(classified.cells == cell))
        interval = accuracy_interval(
            np.zeros(len(part), dtype=np.int64),
            (part.truth[head] != part.predicted[head]).astype(np.int64),
            2,
            part.cells,
            part.blocks,
            draws=draws,
            seed=seed,
        )
        few = f"{len(part)} pictures, judged from {FEWEST_PER_CAPTION}" if len(part) < FEWEST_PER_CAPTION else ""
        verdict, reason = _judge_agreement(head, interval, 1 / classes)
        if caution and verdict == "ok":
            verdict, reason = "warn", caution
        row = Result(
            metric=f"agreement_{head}",
            set="generated",
            prompt="" if cell is None else naming.caption(int(cell)),
            n=len(part),
            n_eff=part.num_blocks,
            floor=ceiling,
            unit="share",
            reason=blocked or few or reason,
        )
        rows.append(replace(row, **asdict(interval), verdict="grey" if blocked or few else verdict))
    return rows


def _judge_agreement(head: Head, interval: Interval, chance: float) -> tuple[Verdict, str]:
    """Compare an agreement with what is asked for and with chance."""
    if interval.value >= AGREEMENT[head]:
        return "ok", f"generated slices show the {head} asked for; at least {AGREEMENT[head]:.2f} is expected"
    if interval.low <= chance:
        return "stop", f"not above chance ({chance:.2f}): prompts do not choose the {head}"
    return "warn", f"below {AGREEMENT[head]:.2f}, above chance ({chance:.2f})"


def distance_rows(sets: ClassifiedSets, naming: Naming, blocked: str, draws: int, seed: int) -> list[Result]:
    """Return the distance of the generated slices beside its reference lines, at equal numbers per caption."""
    number = equal_numbers([sets.aside, sets.held_out, sets.generated_tiles])
    base = Result(metric="kid", unit="squared MMD")
    if not number:
        reason = "no caption has two tiles each of generated, held-out and set-aside real slices"
        row = replace(base, set="generated", reason=blocked or reason)
        return [row, replace(row, metric="kid_floor_ratio", unit="ratio")]
    captions = f"{len(number)} captions"
    held_out, generated = pick(sets.held_out, number), pick(sets.generated_tiles, number)
    lines = {"real": _kid(pick(sets.aside, number), held_out, draws, seed)}
    if sets.aside_vae is not None:
        lines["vae"] = _kid(pick(sets.aside_vae, number), held_out, draws, seed)
    measured = _kid(generated, held_out, draws, seed)
    nearest = _nearest_state(held_out, naming, draws, seed)
    total = len(held_out)
    base = replace(base, n=total, n_eff=held_out.num_blocks)

    few = f"{total} tiles a side, judged from {FEWEST_FOR_KID}" if total < FEWEST_FOR_KID else ""
    verdict, reason = _judge_distance(measured, lines, nearest)
    if blocked or few:
        verdict, reason = "grey", blocked or few
    floor = lines["real"]
    kid_row = replace(base, **asdict(measured), set="generated", floor=floor.value, verdict=verdict, reason=reason)
    rows = [kid_row]
    if floor.high > 0:
        ratio = Interval(
            value=measured.value / floor.high, low=measured.low / floor.high, high=measured.high / floor.high
        )
        rows.append(replace(kid_row, **asdict(ratio), metric="kid_floor_ratio", unit="ratio", floor=1.0))
    notes = {
        "real": f"reference: other real slices against held-out ones, {captions}; the ratio divides by the upper end",
        "vae": f"reference: these after the VAE round trip, {captions}; no generator behind this VAE does better",
    }
    rows += [replace(base, **asdict(line), set=name, reason=notes[name]) for name, line in lines.items()]
    if sets.aside_vae is None:
        rows.append(replace(base, set="vae", n=0, n_eff=None, reason=sets.no_vae))
    if nearest is not None:
        interval, names, per_side = nearest
        text = f"reference: how far {names[0]} is from {names[1]} among held-out slices, the nearest two states"
        rows.append(replace(base, **asdict(interval), set="nearest_states", n=per_side, reason=text))
    for cell, count in number.items():
        one = {cell: count}
        interval = _kid(pick(sets.generated_tiles, one), pick(sets.held_out, one), draws, seed)
        between = _kid(pick(sets.aside, one), pick(sets.held_out, one), draws, seed)
        row = replace(
            base, set="generated", prompt=naming.caption(cell), n=count, n_eff=pick(sets.held_out, one).num_blocks
        )
        rows.append(
            replace(row, **asdict(interval), floor=between.value, reason=blocked or "shown per caption, not judged")
        )
    return rows


def _judge_distance(
    measured: Interval, lines: Mapping[str, Interval], nearest: tuple[Interval, tuple[str, str], int] | None
) -> tuple[Verdict, str]:
    """Compare a distance with two parts of the same material, with the VAE and with the nearest other state."""
    ceiling = max(line.high for line in lines.values())
    if measured.low <= ceiling:
        return (
            "ok",
            "not distinguishable from two parts of the same real material, as scanned or through the VAE",
        )
    if nearest is not None and measured.value >= nearest[0].value:
        first, second = nearest[1]
        return "stop", f"further from real slices than {first} is from {second}"
    return (
        "warn",
        "further from real slices than other real slices are, nearer than the nearest other state",
    )


def _nearest_state(
    held_out: Classified, naming: Naming, draws: int, seed: int
) -> tuple[Interval, tuple[str, str], int] | None:
    """Return the smallest distance between two states at equal numbers per axis, their names and tiles a side."""
    found: tuple[Interval, tuple[str, str], int] | None = None
    for first, second in combinations(np.unique(held_out.truth["state"]), 2):
        sides = [held_out.take(np.flatnonzero(held_out.truth["state"] == state)) for state in (first, second)]
        counts = {
            int(axis): min(int((side.truth["axis"] == axis).sum()) for side in sides)
            for axis in np.unique(held_out.truth["axis"])
        }
        counts = {axis: count for axis, count in counts.items() if count >= 2}
        if not counts:
            continue
        a, b = (as_sample(_first(side, side.truth["axis"], counts), "axis") for side in sides)
        interval = blocked_kid(a, b, draws=draws, seed=seed)
        if found is None or interval.value < found[0].value:
            found = interval, (naming.states[int(first)], naming.states[int(second)]), len(a)
    return found


def equal_numbers(sides: Sequence[Classified]) -> dict[int, int]:
    """Return how many tiles of each caption every side has; captions with fewer than two are left out."""
    number = {
        int(cell): min(int((side.cells == cell).sum()) for side in sides)
        for cell in np.unique(np.concatenate([side.cells for side in sides]))
    }
    return {cell: count for cell, count in number.items() if count >= 2}


def pick(classified: Classified, number: Mapping[int, int]) -> Classified:
    """Return the first so many entries of each caption; tiles come drawn by seed and spread over blocks."""
    return _first(classified, classified.cells, number)


def _first(classified: Classified, labels: Ints, number: Mapping[int, int]) -> Classified:
    """Return the first so many entries of each label."""
    return classified.take(np.concatenate([np.flatnonzero(labels == label)[:count] for label, count in number.items()]))


def _kid(a: Classified, b: Classified, draws: int, seed: int) -> Interval:
    """Return the blocked KID over captions."""
    return blocked_kid(as_sample(a), as_sample(b), draws=draws, seed=seed)


def as_sample(classified: Classified, head: Head | None = None) -> Sample:
    """Return the features with captions, or the classes of one head, as strata."""
    return Sample(
        features=classified.features,
        strata=classified.cells if head is None else classified.truth[head],
        blocks=classified.blocks,
    )
