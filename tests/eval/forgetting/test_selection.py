"""When a run ends and what it keeps: decided from its checks alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import ttest_rel

from data_prep.folders.results import Result, Verdict
from eval.forgetting.selection import (
    Check,
    copying_interval,
    is_better,
    is_catastrophic,
    is_copying,
    select,
    why_selected,
    why_stop,
)
from eval.stats.distances import Interval

IMAGES = np.random.default_rng(0).normal(0, 1e-3, 32)
"""What tells one held-out image from the next at every check; small against the steps below."""


def checks(*verdicts: Verdict, losses: Sequence[float] = ()) -> list[Check]:
    """Return checks of the steps 0, 10, 20, ...; a loss is that of every held-out image, but for noise."""
    noise = np.random.default_rng(1).normal(0, 1e-3, (len(verdicts), len(IMAGES)))
    rows = [tuple(loss + IMAGES + more) for loss, more in zip(losses, noise, strict=False)] or [()] * len(verdicts)
    return [Check(step=10 * n, verdict=v, losses=row) for n, (v, row) in enumerate(zip(verdicts, rows, strict=True))]


@pytest.mark.parametrize(
    ("verdicts", "ends"),
    [
        (["ok", "stop"], False),
        (["ok", "stop", "stop"], True),
        (["ok", "stop", "warn", "stop"], False),
        (["ok", "stop", "grey", "stop"], False),
        (["ok", "stop", "stop", "ok"], False),
    ],
)
def test_drift_has_to_hold_at_two_checks_in_a_row(verdicts: list[Verdict], ends: bool) -> None:
    assert bool(why_stop(checks(*verdicts))) is ends


def test_catastrophic_drift_ends_the_run_at_once() -> None:
    assert why_stop([Check(step=10, verdict="stop", is_catastrophic=True)]).startswith("half of the anchors")


def test_copies_have_to_be_likely_at_two_checks_in_a_row() -> None:
    found = [Check(step=step, verdict="ok", is_copying=True) for step in (10, 20)]
    assert why_stop(found[:1]) == ""
    assert why_stop(found) == "copies of training images likely at 2 checks in a row"


@pytest.mark.parametrize(("fewest", "ends"), [(20, True), (21, False)])
def test_no_run_is_ended_before_its_fewest_steps(fewest: int, ends: bool) -> None:
    assert bool(why_stop(checks("ok", "stop", "stop"), fewest_steps=fewest)) is ends


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        ([1.0, 0.9, 0.9, 0.95, 0.92], True),
        ([1.0, 0.9, 0.91, 0.95, 0.8], False),
        ([1.0, 0.9, 0.8, 0.95, 0.95], False),
        ([1.0, 1.1, 1.1, 1.1], True),  # step 0 was better than all that followed
        ([1.0, 0.9, 0.9, 0.9], False),  # the first of the three was an improvement
    ],
)
def test_three_checks_without_a_lower_loss_end_the_run(losses: list[float], ends: bool) -> None:
    verdicts: list[Verdict] = ["ok"] * len(losses)
    found = checks(*verdicts, losses=losses)
    assert why_stop(found) == ("no lower loss on held-out images at 3 checks in a row" if ends else "")


def test_a_lower_loss_has_to_be_beyond_chance_as_a_paired_test_says() -> None:
    random = np.random.default_rng(2)
    verdicts = set()
    for shift in np.linspace(-0.6, 0.2, 41):
        before = random.normal(1, 2, 24)
        after = before + random.normal(shift, 0.5, 24)
        better = is_better(after.tolist(), before.tolist())
        # A two-sided test at 5 % on the lower side is a one-sided one at 2.5 %.
        assert better == (ttest_rel(after, before, alternative="less").pvalue < 0.025)
        verdicts.add(better)
    assert verdicts == {True, False}


def test_losses_of_other_images_are_not_compared() -> None:
    with pytest.raises(ValueError, match="longer"):
        is_better([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("verdicts", "losses", "step"),
    [
        (["ok", "ok", "warn", "stop"], [], 20),  # without losses: the latest without drift
        (["ok", "stop", "stop"], [], None),
        (["ok"], [], None),  # nothing was learned at step 0
        (["ok", "ok", "ok", "ok"], [1.0, 0.9, 0.8, 0.85], 20),  # the lowest
        (["ok", "ok", "ok", "ok"], [1.0, 0.9, 0.9, 0.9], 10),  # chance may tell them apart: the earliest
        (["ok", "ok", "ok", "stop"], [1.0, 0.9, 0.8, 0.5], 20),  # never one with drift
    ],
)
def test_the_best_feasible_check_is_selected(verdicts: list[Verdict], losses: list[float], step: int | None) -> None:
    chosen = select(checks(*verdicts, losses=losses))
    assert (chosen.step if chosen else None) == step


def test_a_check_with_copies_is_not_selected() -> None:
    found = [Check(step=10, verdict="ok"), Check(step=20, verdict="ok", is_copying=True)]
    assert select(found) == found[0]


def test_what_was_selected_is_said_with_its_reason() -> None:
    found = checks("ok", "ok", "stop")
    assert why_selected(found, last_step=20) == "the weights, of step 10, are kept: the last check without drift"
    assert why_selected(checks("ok", "ok"), last_step=10).startswith("the last weights, of step 10, are kept")
    assert "try a lower learning rate" in why_selected(checks("ok", "stop"), last_step=10)


@pytest.mark.parametrize(("leaked", "expected"), [(1, False), (2, True)])
def test_half_of_the_anchors_and_far_probes_leaking_is_catastrophic(leaked: int, expected: bool) -> None:
    rows = [
        Result(
            metric="leak", set="G0" if i % 2 else "G3", prompt=str(i), value=0.5 if i < leaked else 0.0, verdict="ok"
        )
        for i in range(4)
    ]
    near = Result(metric="leak", set="G2", prompt="near", value=1.0, verdict="ok")
    assert is_catastrophic([*rows, near]) is expected


def test_copying_is_the_share_of_pairs_in_which_the_trained_loss_fell_further() -> None:
    random = np.random.default_rng(3)
    trained, held_out = random.normal(1, 1, 40), random.normal(0, 1, 40)
    found = copying_interval(trained.tolist(), held_out.tolist())
    assert found is not None
    assert found.value == pytest.approx(np.mean([a > b for a in trained for b in held_out]))
    assert found.low < found.value < found.high


def test_too_few_images_tell_nothing_about_copies() -> None:
    assert copying_interval([1.0] * 15, [0.0] * 40) is None


@pytest.mark.parametrize(
    ("low", "value", "num_trained", "expected"),
    [(0.7, 0.8, 50, True), (0.59, 0.8, 50, False), (0.61, 0.65, 50, False), (0.7, 0.8, 49, False)],
)
def test_copies_of_few_images_are_no_reason(low: float, value: float, num_trained: int, expected: bool) -> None:
    assert is_copying(Interval(value=value, low=low, high=0.9), num_trained=num_trained) is expected
