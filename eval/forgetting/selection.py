"""When to end a run, and which of its checks to keep: pure, from the list of checks alone.

A run that was interrupted decides as if it had not been: the checks are read again, not the decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.folders.results import Result, Verdict
from eval.copying.rows import FEW_TRAINED, FEWEST_HELD_OUT, MOST_AUC
from eval.stats.distances import Interval, Sample, auc_interval
from eval.stats.intervals import mean_interval

IN_A_ROW = 2
"""Checks at which drift, or copying, has to hold."""
PATIENCE = 3
"""Checks in a row that may pass without a better loss on held-out images."""
LEAKED = 0.5
"""Share of its pictures from which on a prompt counts as lost to the training images."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one look at the model found.

    Attributes:
        step: optimizer updates done.
        verdict: of the probes, the worst of all; ``stop`` is drift beyond the limits.
        is_catastrophic: half of the prompts of G0 and G3 are lost; once is enough.
        is_copying: training images are told from held-out ones by what training did to their losses.
        losses: of each held-out image at fixed noise, always in the same order; none where there are no such images.
    """

    step: int
    verdict: Verdict
    is_catastrophic: bool = False
    is_copying: bool = False
    losses: tuple[float, ...] = ()

    @property
    def is_feasible(self) -> bool:
        """Whether weights like these may be kept."""
        return self.verdict != "stop" and not self.is_copying


def is_catastrophic(rows: Sequence[Result]) -> bool:
    """Return whether half of the prompts of G0 and G3, the anchors and those far from the domain, leaked."""
    shares = [row.value for row in rows if row.metric == "leak" and row.prompt and row.set in {"G0", "G3"}]
    lost = [share for share in shares if share is not None and share >= LEAKED]
    return bool(shares) and 2 * len(lost) >= len(shares)


def copying_interval(trained: Sequence[float], held_out: Sequence[float]) -> Interval | None:
    """Return how often the loss of a trained image fell further than that of a held-out one; 0.5 is no difference.

    Args:
        trained: how far the loss of each image that is trained on fell since step 0, at fixed noise.
        held_out: likewise, of images that are not.

    Returns:
        The share of pairs with its 95 % interval over images; None for too few images to tell.
    """
    if min(len(trained), len(held_out)) < FEWEST_HELD_OUT // 2:
        return None
    falls = np.array(trained), np.array(held_out)
    sides = [
        Sample(features=fall[:, None], strata=np.zeros(len(fall), dtype=np.int64), blocks=np.arange(len(fall)))
        for fall in falls
    ]
    return auc_interval(sides[0], sides[1], falls)


def is_copying(share: Interval | None, *, num_trained: int) -> bool:
    """Return whether that share is beyond the gate of ``eval.memorization``; of few images copies are expected."""
    is_beyond = share is not None and share.value > MOST_AUC[0] and share.low > MOST_AUC[1]
    return is_beyond and num_trained >= FEW_TRAINED


def is_better(losses: Sequence[float], than: Sequence[float]) -> bool:
    """Return whether the losses of the same images are lower, beyond chance: the 95 % interval of the mean difference.

    Raises:
        ValueError: they are not of the same images.
    """
    differences = [one - other for one, other in zip(losses, than, strict=True)]
    high = mean_interval(differences)[2] if differences else None
    return high is not None and high < 0


def why_stop(checks: Sequence[Check], *, fewest_steps: int = 0) -> str:
    """Return the reason to end the run after the last of these checks, or nothing.

    Args:
        checks: in the order of their steps; one of step 0 tells where the losses began.
        fewest_steps: the run is never ended before.
    """
    if not checks or checks[-1].step < fewest_steps:
        return ""
    if checks[-1].is_catastrophic:
        return "half of the anchors and far prompts show training images"
    recent = checks[-IN_A_ROW:]
    if len(recent) == IN_A_ROW:
        if all(check.verdict == "stop" for check in recent):
            return f"drift at {IN_A_ROW} checks in a row"
        if all(check.is_copying for check in recent):
            return f"copies of training images likely at {IN_A_ROW} checks in a row"
    if len(checks) > PATIENCE and all(check.losses for check in checks):
        best = _lowest(checks[:-PATIENCE])
        if not any(is_better(check.losses, best.losses) for check in checks[-PATIENCE:]):
            return f"no lower loss on held-out images at {PATIENCE} checks in a row"
    return ""


def select(checks: Sequence[Check]) -> Check | None:
    """Return the check whose weights to keep: of those without drift or copying, the best; None if there are none.

    With held-out losses the best is the lowest, and of those that chance may tell apart the earlier: less was changed
    for the same. Without, it is the latest: until drift sets in, a model goes on learning. Step 0 is none: nothing was
    learned.
    """
    feasible = [check for check in checks if check.is_feasible and check.step > 0]
    if not feasible:
        return None
    return _lowest(feasible) if all(check.losses for check in feasible) else feasible[-1]


def why_selected(checks: Sequence[Check], *, last_step: int) -> str:
    """Say in words which weights ``select`` keeps, of those and of the last ones, and why."""
    chosen, later = select(checks), [check for check in checks if check.is_feasible and check.step > 0]
    if chosen is None:
        return (
            "no check was without drift, so the last weights are kept: try a lower learning rate, fewer steps, a "
            "smaller rank or --adapter_scale, or prior preservation with the failing probes"
        )
    by_loss = bool(chosen.losses) and len(later) > 1
    reason = "the lowest held-out loss among the checks without drift" if by_loss else "the last check without drift"
    what = "the last weights" if chosen.step == last_step else "the weights"
    return f"{what}, of step {chosen.step}, are kept: {reason}"


def _lowest(checks: Sequence[Check]) -> Check:
    """Return the first check whose losses no later one improves on beyond chance."""
    best = checks[0]
    for check in checks[1:]:
        if is_better(check.losses, best.losses):
            best = check
    return best
