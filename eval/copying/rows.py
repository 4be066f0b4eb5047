"""From matches, controls and losses to judged numbers about copies.

A detector is a measuring instrument and is tested first: it must find planted copies of training tiles, and its false
alarms on held-out tiles that did not set its threshold stand beside every result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, mannwhitneyu

from data_prep.folders.checks import verify
from data_prep.folders.manifest import MANIFEST_NAME, read_manifest
from data_prep.folders.results import Result, Verdict
from eval.copying.copies import Matches, Threshold, calibrate
from eval.copying.reported import DETECTORS
from eval.stats.arrays import Floats, Ints
from eval.stats.distances import Interval, Sample, auc_interval, block_bootstrap, one_a_block
from eval.tiles.features import Tiles
from eval.tiles.sets import CORRELATION_LENGTHS

LEAST_RECALL = 0.9
"""Planted copies a detector must find."""
MOST_COPIES = 0.10
"""Share of generated tiles, lower end of its interval, beyond which copies are likely."""
MOST_AUC = (0.65, 0.60)
"""How well the loss tells trained slices from held-out ones: the value, and the lower end of its interval."""
FEW_TRAINED = 50
"""With fewer training slices copies are what to expect."""
FOUND = "planted training tiles, through the VAE, noisy and shifted, that are found"
FEWEST_GENERATED = 32
FEWEST_HELD_OUT = 32
FEWEST_LOSSES = (8, 16)
"""Trained and held-out slices whose losses are compared: nine, a few-shot run's, can be told from the others."""
FEWEST_CELL = 20
"""Tiles of a caption below which its own test is left out."""
AGREEMENT_QUANTILE = 0.99
RAW_COSINES = (0.5, 0.75)
"""What others count as copies by SSCD (Somepalli et al. 2023; Pizzi et al. 2022): reference lines, since slices are
alike anyway."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """The tiles of one set, with what the search found for each.

    Attributes:
        matches: the best training tile of each.
        cells: number of the caption of each tile, (N,).
        blocks: number of the slab, of the seed, or of the planted tile, (N,).
    """

    matches: Matches
    cells: Ints
    blocks: Ints

    def __len__(self) -> int:
        return len(self.cells)

    def take(self, index: Ints) -> Side:
        """Return the tiles at ``index``."""
        found = self.matches
        chosen = Matches(
            similarity=found.similarity[index],
            index=found.index[index],
            symmetry=found.symmetry[index],
            offset=found.offset[index],
        )
        return Side(matches=chosen, cells=self.cells[index], blocks=self.blocks[index])


@dataclass(frozen=True, kw_only=True)
class Detector:
    """What one detector found: in generated tiles, in the held-out ones, and in planted copies."""

    name: str
    generated: Side
    held_out: Side
    planted: Side


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How similar each tile is to the most similar one of another seed, or of another slab: (N,) each."""

    generated: Floats
    real: Floats


@dataclass(frozen=True, kw_only=True)
class LossGap:
    """How much lower the tuned model's loss is than its base's, a picture each.

    Attributes:
        trained: fall of the loss of each slice that it was trained on, (N,).
        held_out: fall of the loss of each slice that it was not trained on, (M,).
        trained_blocks: number of the slab of each trained slice, (N,).
        held_out_blocks: number of the slab of each held-out slice, (M,).
    """

    trained: Floats
    held_out: Floats
    trained_blocks: Ints
    held_out_blocks: Ints


@dataclass(frozen=True, kw_only=True)
class Searched:
    """Everything that was searched; ``captions`` are named by number, ``detectors`` is empty without held-out tiles.

    ``sscd_cosines`` (N,) are those of generated tiles to the nearest training tile, uncentred; None without SSCD.
    """

    reference: Tiles
    generated: Tiles
    held_out: Tiles
    captions: tuple[str, ...]
    detectors: tuple[Detector, ...]
    agreement: Agreement
    notes: tuple[str, ...]
    sscd_cosines: Floats | None = None


def split_audit(dataset: Path) -> Result:
    """Check that no training slice shares a voxel with a held-out one or is there twice, and how thick the guard is."""
    problems = verify(dataset, decode=False).problems
    row = Result(metric="split_audit", set="control", value=float(len(problems)), n=1, unit="problems", verdict="ok")
    if not problems:
        thin = _thin_guard(dataset)
        return replace(row, verdict="warn", reason=thin) if thin else row
    return replace(
        row, verdict="stop", reason=f"{problems[0]}" + (f" and {len(problems) - 1} more" if problems[1:] else "")
    )


def _thin_guard(dataset: Path) -> str:
    """Say which guard slab is too thin for what lies behind it to be independent of what was trained on, or nothing."""
    volumes: Any = read_manifest(dataset).get("volumes") if (dataset / MANIFEST_NAME).is_file() else []
    for volume in volumes if isinstance(volumes, list) else []:
        split = (volume.get("split") or {}) if isinstance(volume, dict) else {}
        guard, length = split.get("guard"), split.get("correlation_length")
        if not (isinstance(guard, list) and len(guard) == 2 and isinstance(length, int | float)):
            continue
        if guard[1] - guard[0] < CORRELATION_LENGTHS * length:
            return (
                f"the guard of {volume.get('name')} has {guard[1] - guard[0]} voxels, less than {CORRELATION_LENGTHS} "
                f"correlation lengths of {length:g}: the held-out slices nearest to it are near copies"
            )
    return ""


def memorization_rows(
    searched: Searched,
    *,
    audit: Result,
    loss_gap: LossGap | None,
    no_model: str,
    num_trained: int,
    draws: int,
    seed: int,
) -> list[Result]:
    """Return every number of the check, the verdict first.

    Args:
        searched: what the detectors found.
        audit: the row that tells whether the split leaks.
        loss_gap: how the losses of trained and held-out slices fell; None for the reason in ``no_model``.
        no_model: why there is no loss gap.
        num_trained: number of slices that the model was trained on.
        draws: number of resamples behind each interval.
        seed: seed of the resampling.
    """
    rows = [audit]
    blind = []
    for detector in searched.detectors:
        found, is_blind = _detector_rows(detector, searched, draws=draws, seed=seed)
        rows += found
        blind += [DETECTORS[detector.name]] if is_blind else []
    if not searched.detectors:
        why = "; ".join(searched.notes) or "there are no held-out tiles to set a threshold"
        weightless = ("ncc", "copy_net")
        rows += [Result(metric=f"{name}_copies", set="generated", unit="share", reason=why) for name in weightless]
    rows += _raw_rows(searched.sscd_cosines)
    rows += _agreement_rows(searched.agreement)
    rows += _loss_rows(loss_gap, no_model, draws=draws, seed=seed)
    return [_verdict(rows, blind, len(searched.detectors), num_trained), *rows]


def _raw_rows(cosines: Floats | None) -> list[Result]:
    """Return the share of generated tiles above the cosines that others use."""
    if cosines is None:
        return []
    reason = "reference: share of tiles above this cosine to a training tile, uncentred; slices are alike anyway"
    row = Result(metric="", set="generated", n=len(cosines), unit="share", tier="B", reason=reason)
    return [replace(row, metric=f"sscd_above_{line:g}", value=float((cosines > line).mean())) for line in RAW_COSINES]


def halves(side: Side) -> tuple[Side, Side]:
    """Part the held-out tiles: one half sets the threshold, the other tests it; whole slabs where there are several."""
    first = np.zeros(len(side), dtype=np.bool_)
    for cell in np.unique(side.cells):
        members = np.flatnonzero(side.cells == cell)
        blocks = np.unique(side.blocks[members])
        key = np.searchsorted(blocks, side.blocks[members]) if len(blocks) > 1 else np.arange(len(members))
        first[members] = key % 2 == 0
    return side.take(np.flatnonzero(first)), side.take(np.flatnonzero(~first))


def threshold_of(detector: Detector, *, draws: int = 500, seed: int = 0) -> Threshold:
    """Return the threshold that half of the held-out tiles set."""
    half = halves(detector.held_out)[0]
    return calibrate(half.matches.similarity, half.cells, half.blocks, draws=draws, seed=seed)


def _detector_rows(detector: Detector, searched: Searched, *, draws: int, seed: int) -> tuple[list[Result], bool]:
    """Return controls and findings of one detector, and whether it is blind."""
    name, words = detector.name, DETECTORS[detector.name]
    threshold = threshold_of(detector, draws=draws, seed=seed)
    tested = halves(detector.held_out)[1]
    found, alarms, flagged = (
        threshold.flags(side.matches.similarity, side.cells) for side in (detector.planted, tested, detector.generated)
    )
    recall, false = _share(found), _share(alarms)
    is_blind = recall.value < LEAST_RECALL
    why_blind = f"detector blind: it finds {recall.value:.0%} of the planted copies, {LEAST_RECALL:.0%} are needed"
    base = Result(metric="", set="control", unit="share", tier="B" if name == "sscd" else "A")
    rows = [
        replace(
            base,
            metric=f"{name}_recall",
            n=len(found),
            **asdict(recall),
            verdict="warn" if is_blind else "ok",
            reason=why_blind if is_blind else FOUND,
        ),
        replace(
            base,
            metric=f"{name}_false_alarm",
            n=len(alarms),
            n_eff=_num_blocks(tested),
            **asdict(false),
            reason="reference: held-out tiles, which cannot be copies, that are flagged",
        ),
    ]
    share = block_bootstrap(
        lambda weights: float(weights @ flagged / weights.sum()),
        detector.generated.cells,
        detector.generated.blocks,
        draws=draws,
        seed=seed,
    )
    share = _wider(share, _share(flagged))
    grey = _too_few(detector, tested)
    verdict: Verdict = "stop" if share.low > MOST_COPIES else "ok"
    reason = (
        f"{words}: lower end of the interval " + ("above" if verdict == "stop" else "not above") + f" {MOST_COPIES:.0%}"
    )
    if is_blind or grey:
        verdict, reason = "grey", why_blind if is_blind else grey
    row = replace(base, metric=f"{name}_copies", set="generated", n=len(flagged), n_eff=_num_blocks(detector.generated))
    rows.append(replace(row, floor=false.value, **asdict(share), verdict=verdict, reason=reason))
    for cell in np.unique(detector.generated.cells):
        own = flagged[detector.generated.cells == cell]
        single = replace(row, prompt=searched.captions[cell], n=len(own), n_eff=None)
        rows.append(
            replace(single, **asdict(_share(own)), reason=why_blind if is_blind else "shown per caption, not judged")
        )
    return [*rows, _closer_row(detector, tested, grey or (why_blind if is_blind else ""))], is_blind


def _closer_row(detector: Detector, tested: Side, grey: str) -> Result:
    """Return the C_T statistic: are generated tiles closer to training than held-out ones, caption by caption?

    Source: Meehan, Chaudhuri, Dasgupta 2020, A non-parametric test to detect data-copying in generative models.
    """
    zs, sizes = [], []
    thin = tested.take(one_a_block(tested.cells, tested.blocks))
    for cell in np.unique(detector.generated.cells):
        made = detector.generated.matches.similarity[detector.generated.cells == cell]
        real = tested.matches.similarity[tested.cells == cell]
        if min(len(made), len(real)) < FEWEST_CELL:
            continue
        statistic = mannwhitneyu(made, real, alternative="greater").statistic
        middle = len(made) * len(real) / 2
        spread = np.sqrt(len(made) * len(real) * (len(made) + len(real) + 1) / 12)
        zs.append((statistic - middle) / spread)
        sizes.append(len(made))
    row = Result(
        metric=f"{detector.name}_closer", set="generated", unit="z", n=len(detector.generated), n_eff=len(thin)
    )
    if not zs:
        return replace(
            row, n=0, n_eff=None, reason=f"no caption has {FEWEST_CELL} generated and {FEWEST_CELL} held-out tiles"
        )
    reason = "C_T: above 0 means closer to training slices than held-out ones are; tiles of a slab depend on each other"
    return replace(row, value=float(np.average(zs, weights=sizes)), reason=grey or f"{reason}; shown, not judged")


def _agreement_rows(agreement: Agreement) -> list[Result]:
    """Return how much seeds agree with each other, against real tiles of different slabs."""
    row = Result(metric="seed_agreement", set="generated", unit="similarity", n=len(agreement.generated))
    if min(len(agreement.generated), len(agreement.real)) < FEWEST_GENERATED:
        few = min(len(agreement.generated), len(agreement.real))
        return [replace(row, reason=f"{few} tiles, judged from {FEWEST_GENERATED}")]
    limit = float(np.quantile(agreement.real, AGREEMENT_QUANTILE))
    value = float(np.median(agreement.generated))
    verdict: Verdict = "stop" if value > limit else "ok"
    reason = "half of the tiles resemble one of another seed more than 99 % of real tiles resemble another slab"
    reason = (
        reason if verdict == "stop" else "different seeds give different slices; floor: 99 % quantile of real tiles"
    )
    low, high = np.quantile(agreement.generated, (0.25, 0.75))
    return [replace(row, value=value, low=float(low), high=float(high), floor=limit, verdict=verdict, reason=reason)]


def _loss_rows(gap: LossGap | None, no_model: str, *, draws: int, seed: int) -> list[Result]:
    """Return the loss gap, less that of the base, and how well it tells trained slices from held-out ones."""
    row = Result(metric="loss_gap_auc", set="generated", unit="share", floor=0.5)
    if gap is None:
        return [replace(row, floor=None, reason=no_model)]
    sides = [
        Sample(features=values[:, None], strata=np.zeros(len(values), dtype=np.int64), blocks=blocks)
        for values, blocks in ((gap.trained, gap.trained_blocks), (gap.held_out, gap.held_out_blocks))
    ]
    auc = auc_interval(sides[0], sides[1], (gap.trained, gap.held_out), draws=draws, seed=seed)
    verdict: Verdict = "stop" if auc.value > MOST_AUC[0] and auc.low > MOST_AUC[1] else "ok"
    reason = "how often tuning lowered the loss of a trained slice more than that of a held-out one"
    count = min(len(gap.trained), len(gap.held_out))
    fewest = FEWEST_LOSSES
    if len(gap.trained) < fewest[0] or len(gap.held_out) < fewest[1]:
        found = f"{len(gap.trained)} trained and {len(gap.held_out)} held-out slices"
        verdict, reason = "grey", f"{found}, judged from {fewest[0]} and {fewest[1]}"
    independent = min(len(np.unique(gap.trained_blocks)), len(np.unique(gap.held_out_blocks)))
    difference = float(gap.trained.mean() - gap.held_out.mean())
    row = replace(row, n=count, n_eff=independent)
    text = "reference: fall of the loss on trained slices, less that on held-out ones, against the base"
    return [
        replace(row, **asdict(auc), verdict=verdict, reason=reason),
        replace(row, metric="loss_gap", unit="loss", value=difference, floor=0.0, reason=text),
    ]


def _verdict(rows: Sequence[Result], blind: Sequence[str], num_detectors: int, num_trained: int) -> Result:
    """Return the row of the whole check; ``blind`` names the detectors that are."""
    judged = [row for row in rows if row.set == "generated" and not row.prompt and row.verdict in {"ok", "stop"}]
    tripped = [row for row in judged if row.verdict == "stop"]
    names = ", ".join(row.metric.replace("_", " ") for row in tripped)
    result = Result(metric="memorisation", set="generated", value=float(len(tripped)), n=len(judged), unit="signs")
    if tripped and num_trained < FEW_TRAINED:
        reason = f"few-shot: copies likely, as to be expected from {num_trained} training slices ({names})"
        return replace(result, verdict="warn", reason=reason)
    if tripped:
        return replace(result, verdict="stop", reason=f"copies likely ({names})")
    if audit := next((row.reason for row in rows if row.metric == "split_audit" and row.verdict == "stop"), ""):
        why = f"held-out slices are no measure of what a copy is: {audit}"
        return replace(result, value=None, verdict="grey", reason=why)
    if len(blind) == num_detectors or not any(row.metric.endswith("_copies") for row in judged):
        why = next((row.reason for row in rows if row.metric.endswith("_copies") and not row.prompt), "detector blind")
        return replace(result, value=None, verdict="grey", reason=why)
    rest = f"; detector blind: {', '.join(blind)}" if blind else ""
    return replace(result, verdict="ok", reason=f"no sign of copies{rest}")


def _too_few(detector: Detector, tested: Side) -> str:
    """Return why a detector may not judge, or nothing."""
    if len(detector.generated) < FEWEST_GENERATED:
        return f"{len(detector.generated)} generated tiles, judged from {FEWEST_GENERATED}"
    if len(tested) < FEWEST_HELD_OUT:
        return f"{len(tested)} held-out tiles to test the threshold, judged from {FEWEST_HELD_OUT}"
    return ""


def _num_blocks(side: Side) -> float:
    """Return the number of blocks, counted within each caption."""
    return float(len(one_a_block(side.cells, side.blocks)))


def _share(hits: Floats) -> Interval:
    """Return a share with its Wilson interval."""
    count = round(float(hits.sum()))
    if not len(hits):
        return Interval(value=0.0, low=0.0, high=1.0)
    ends = binomtest(count, len(hits)).proportion_ci(method="wilson")
    return Interval(value=count / len(hits), low=float(ends.low), high=float(ends.high))


def _wider(first: Interval, second: Interval) -> Interval:
    """Return the wider of two intervals around one value."""
    return Interval(value=first.value, low=min(first.low, second.low), high=max(first.high, second.high))
