"""What one word of a prompt changes: the same seed with another axis, or another state.

If the axis is swapped the axis that is read must follow and the state must not move, and the other way round. Agreement
alone would not show a model that draws the right slices by luck of the seed, or moves both together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np

from data_prep.folders.results import Result, Verdict
from eval.likeness.rows import HEADS, Classified, Head
from eval.stats.arrays import Floats, Ints
from eval.stats.intervals import share_interval

FOLLOWS: dict[Head, float] = {"state": 0.80, "axis": 0.60}
"""Share of the swaps that the swapped head must follow."""
STAYS = 0.80
"""Share of the swaps in which the other head must not move."""
FEWEST_SEEDS = 4


def swap_rows(classified: Classified, why_grey: Mapping[Head, str]) -> list[Result]:
    """Return, for each head, how often it follows when its word is swapped, and how often the other stays.

    Args:
        classified: generated pictures; a block is a seed.
        why_grey: head -> why it is not believed, empty if it is.
    """
    rows = []
    for head, other in (HEADS, HEADS[::-1]):
        follows, stays = _swaps(classified, head, other)
        grey = why_grey[head] or why_grey[other]
        base = Result(metric="", set="generated", unit="share")
        if not follows.size:
            reason = f"no seed was asked for two values of the {head} and one of the {other}"
            rows.append(replace(base, metric=f"swap_{head}", reason=grey or reason))
            continue
        few = f"{follows.shape[1]} seeds, judged from {FEWEST_SEEDS}" if follows.shape[1] < FEWEST_SEEDS else ""
        for name, hits, least, words in (
            (f"swap_{head}", follows, FOLLOWS[head], f"pairs of one seed in which the {head} read follows its word"),
            (f"swap_{head}_alone", stays, STAYS, f"of these pairs, the {other} read stays"),
        ):
            interval = share_interval(hits)
            verdict: Verdict = "ok" if interval.value >= least else "warn"
            reason = words if verdict == "ok" else f"{words}: below {least:.2f}"
            row = replace(base, metric=name, n=hits.size, n_eff=float(hits.shape[1]), reason=grey or few or reason)
            rows.append(replace(row, **asdict(interval), verdict="grey" if grey or few else verdict))
    return rows


def _swaps(classified: Classified, head: Head, other: Head) -> tuple[Floats, Floats]:
    """Return whether the head followed and the other stayed, (pairs of captions, seeds) of 0 and 1 each."""
    cells: dict[tuple[int, int, int], int] = {}
    for index in range(len(classified)):
        cells.setdefault(
            (int(classified.truth[other][index]), int(classified.truth[head][index]), int(classified.blocks[index])),
            index,
        )
    kinds = sorted({key[:2] for key in cells})
    pairs = [(first, second) for first in kinds for second in kinds if first[0] == second[0] and first[1] < second[1]]
    seeds = [
        seed for seed in np.unique(classified.blocks).tolist()
        if all((*kind, seed) in cells for pair in pairs for kind in pair)
    ]  # fmt: skip
    if not pairs or not seeds:
        return np.zeros((0, 0)), np.zeros((0, 0))
    left, right = (
        np.array([[cells[(*pair[side], seed)] for seed in seeds] for pair in pairs], dtype=np.int64) for side in (0, 1)
    )

    def correct(index: Ints) -> Ints:
        return classified.predicted[head][index] == classified.truth[head][index]

    follows = correct(left) & correct(right)
    stays = classified.predicted[other][left] == classified.predicted[other][right]
    return follows.astype(np.float64), stays.astype(np.float64)
