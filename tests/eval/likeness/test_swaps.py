"""What one word changes: the swapped head follows, the other stays; and the model reads slices by its own loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.folders.results import Result
from eval.likeness.own_classifier import caption_losses, own_classifier_rows
from eval.likeness.rows import Classified
from eval.likeness.swaps import swap_rows

BELIEVED = {"state": "", "axis": ""}


def seen(*, ignores_axis: bool = False, state_follows_axis: bool = False, seeds: int = 8) -> Classified:
    """Pictures of 2 states x 2 axes x seeds, read as asked but for what is named."""
    state, axis, seed = (values.ravel() for values in np.meshgrid([0, 1], [0, 1], np.arange(seeds), indexing="ij"))
    read_axis = np.zeros_like(axis) if ignores_axis else axis
    read_state = axis if state_follows_axis else state
    return Classified(
        features=np.zeros((len(seed), 1)),
        truth={"state": state, "axis": axis},
        predicted={"state": read_state, "axis": read_axis},
        blocks=seed,
    )


def by_metric(*args: object) -> dict[str, Result]:
    return {row.metric: row for row in swap_rows(*args)}  # type: ignore[arg-type]


def test_a_controllable_model_follows_the_swapped_word_and_nothing_else_moves() -> None:
    rows = by_metric(seen(), BELIEVED)
    assert [rows[name].value for name in ("swap_state", "swap_state_alone", "swap_axis", "swap_axis_alone")] == [
        1.0
    ] * 4
    assert {row.verdict for row in rows.values()} == {"ok"}
    assert rows["swap_axis"].n == 2 * 8  # two states x eight seeds


def test_a_model_deaf_to_the_axis_is_flagged_although_half_agrees() -> None:
    rows = by_metric(seen(ignores_axis=True), BELIEVED)
    assert (rows["swap_axis"].value, rows["swap_axis"].verdict) == (0.0, "warn")
    assert rows["swap_state"].value == 1.0


def test_a_state_that_moves_with_the_axis_is_cross_talk() -> None:
    rows = by_metric(seen(state_follows_axis=True), BELIEVED)
    assert rows["swap_axis"].value == 1.0
    assert (rows["swap_axis_alone"].value, rows["swap_axis_alone"].verdict) == (0.0, "warn")


def test_few_seeds_and_heads_that_are_not_believed_are_grey() -> None:
    assert {row.verdict for row in swap_rows(seen(seeds=3), BELIEVED)} == {"grey"}  # type: ignore[arg-type]
    rows = swap_rows(seen(), {"state": "read at 0.80", "axis": ""})
    assert {(row.verdict, row.reason) for row in rows} == {("grey", "read at 0.80")}


def test_without_pairs_there_is_nothing_to_swap() -> None:
    one = seen().take(np.arange(8))
    assert [row.value for row in swap_rows(one, BELIEVED)] == [None, None]  # type: ignore[arg-type]


def test_the_least_surprising_caption_is_what_the_model_reads() -> None:
    classes = {"state": np.array([0, 0, 1, 1]), "axis": np.array([0, 1, 0, 1])}
    truth = {name: np.tile(values, 12) for name, values in classes.items()}
    losses = np.ones((48, 4))
    losses[np.arange(48), np.tile([0, 1, 2, 2], 12)] = 0.5  # the last caption is taken for the third
    rows = own_classifier_rows(losses, truth, classes, np.arange(48) // 4, draws=100, seed=0)
    assert [(row.metric, row.value) for row in rows] == [("own_classifier_state", 1.0), ("own_classifier_axis", 0.75)]
    assert [row.verdict for row in rows] == ["ok", "ok"]


def test_losses_by_chance_say_that_words_mean_nothing() -> None:
    classes = {"state": np.array([0, 0, 1, 1]), "axis": np.array([0, 1, 0, 1])}
    truth = {name: np.tile(values, 12) for name, values in classes.items()}
    losses = np.random.default_rng(0).random((48, 4))
    rows = own_classifier_rows(losses, truth, classes, np.arange(48), draws=100, seed=0)
    assert {row.verdict for row in rows} == {"warn"}


def test_the_same_caption_gives_the_same_loss_and_noise_is_shared(toy_sd: Path) -> None:
    from finetune.diffusion.models import load_models

    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    losses = caption_losses(load_models(str(toy_sd)), pictures, ["a", "b", "a"], num_timesteps=2)
    assert losses.shape == (3, 3)
    assert np.array_equal(losses[:, 0], losses[:, 2])
    assert not np.array_equal(losses[:, 0], losses[:, 1])


def test_the_loss_of_a_model_that_predicts_nothing_is_the_power_of_the_noise(toy_sd: Path) -> None:
    """Epsilon prediction: a U-Net of zeros errs by the noise itself, whose power is 1."""
    from finetune.diffusion.models import load_models

    models = load_models(str(toy_sd))
    for parameter in models.unet.conv_out.parameters():
        parameter.data.zero_()
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32), dtype=np.uint8)
    assert caption_losses(models, pictures, ["a"], num_timesteps=8) == pytest.approx(1.0, abs=0.1)
