"""Drift looked at during training: zero before the first update, no trace in the training, the right weights kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_watch import write_images

from configs.errors import InputError, UsageError
from configs.load import load
from finetune.core.config import DriftWatchConfig
from finetune.core.drift_watch import Clock
from finetune.core.models import LORA_FILE
from finetune.lora import LoraRun, main

Train = Callable[..., Path]

PROBES = """
version: 1
sets:
  G0: {probes: {horse: a horse, zebras: two zebras}}
  G4: {probes: {"null": ""}}
"""
NOTHING_MAY_CHANGE = """
version: 1
divergence_ratio: 0.1
sets:
  G0: {colour_warn: 1, colour_stop: 1}
  G4: {}
  other: {}
"""


@pytest.fixture
def train(toy_sd: Path, tmp_path: Path) -> Train:
    """Train a toy adapter on data with a validation folder beside it, probes at hand; options given again win."""
    data = write_images(tmp_path / "data" / "train", 0, 12)
    write_images(tmp_path / "data" / "validation", 1, 5)
    (tmp_path / "probes.yaml").write_text(PROBES)
    (tmp_path / "policy.yaml").write_text(NOTHING_MAY_CHANGE)
    values = {
        "pretrained_model_name_or_path": toy_sd,
        "train_data_dir": data,
        "output_dir": tmp_path / "run",
        "seed": 0,
        "max_train_steps": 6,
        "train_batch_size": 4,
        "checkpointing_steps": 3,
        "logging_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "drift_probes": tmp_path / "probes.yaml",
        "drift_steps": 2,
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]

    def run(*more: object) -> Path:
        config = load(LoraRun, [*words, *map(str, more)])
        main(config)
        return config.train.output_dir

    return run


def rows_of(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of drift.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (folder / "drift.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name != "seconds"} for row in rows if kind in {None, row["kind"]}]


def selection_of(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "selection.json").read_text())
    assert content.pop("cost").keys() == {"total_s", "start_s", "pulse_s", "check_s", "share"}
    return dict(content)


def unfinish(folder: Path, *checkpoints: str) -> None:
    """Take away what a run leaves at its end, and the checkpoints named."""
    for name in (LORA_FILE, "provenance.json", "selection.json"):
        (folder / name).unlink()
    for name in checkpoints:
        shutil.rmtree(folder / name)


def test_the_pulse_is_exactly_zero_before_the_first_update_and_not_after(train: Train) -> None:
    pulses = rows_of(train("--drift_policy", "report"), "pulse")
    assert [row["step"] for row in pulses] == [0, 2, 3, 4, 6]  # every second, and where a checkpoint is written
    assert (pulses[0]["divergence"], pulses[0]["captions"], pulses[0]["ratio"]) == (0.0, 0.0, None)
    assert pulses[-1]["divergence"] > 0
    assert pulses[-1]["prompts"].keys() == {"horse", "zebras", "null"}
    assert pulses[-1]["ratio"] == pytest.approx(pulses[-1]["divergence"] / pulses[-1]["captions"])


def test_the_base_is_without_the_adapters_a_run_begins_with(train: Train, tmp_path: Path) -> None:
    first = train("--max_train_steps", 3, "--output_dir", tmp_path / "first", "--drift_policy", "report")
    last = rows_of(first, "pulse")[-1]
    going_on = train("--init_adapter", first, "--drift_policy", "report", "--max_train_steps", 1)
    begun = rows_of(going_on, "pulse")[0]
    # The first run's weights are what the second one begins with: its first pulse is the other's last.
    assert begun["step"] == 0
    assert begun["prompts"] == pytest.approx(last["prompts"], rel=1e-6)


def test_looking_leaves_training_bitwise_as_it_was(train: Train, tmp_path: Path, toy_sd: Path) -> None:
    watched = load_file(train("--drift_policy", "report", "--drift_steps", 1) / LORA_FILE)
    plain = train("--output_dir", tmp_path / "plain", "--drift_policy", "report", "--drift_steps", 100)
    assert all(np.array_equal(value, load_file(plain / LORA_FILE)[name]) for name, value in watched.items())


def test_pictures_and_losses_are_checked_at_the_start_at_checkpoints_and_at_the_end(train: Train) -> None:
    checks = rows_of(train("--drift_policy", "report"), "check")
    assert [row["step"] for row in checks][:1] + [row["step"] for row in checks][-1:] == [0, 6]
    assert {row["metric"] for row in checks[0]["rows"]} >= {"divergence", "luminance_ratio"}
    assert {row["value"] for row in checks[0]["rows"] if row["metric"] == "colourfulness_ratio"} <= {1.0}
    assert [len(checks[-1]["losses"][name]) for name in ("validation", "train")] == [5, 12]
    assert checks[-1]["losses"] != checks[0]["losses"]


def test_under_report_the_run_goes_to_its_end_and_keeps_the_last_weights(train: Train) -> None:
    folder = train("--drift_policy", "report", "--learning_rate", 1)
    told = selection_of(folder)
    assert (told["selected_step"], told["last_step"], told["ended"], told["saved_steps"]) == (6, 6, "", 0)
    assert not list((folder / "drift").glob("step-*"))


def test_an_overtrained_run_ends_early_and_keeps_the_weights_before(train: Train, tmp_path: Path) -> None:
    options = ("--drift_policy", tmp_path / "policy.yaml", "--max_train_steps", 40, "--checkpointing_steps", 40)
    folder = train(*options, "--drift_steps", 1, "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 40,
                   "--learning_rate", 3)  # fmt: skip
    told = selection_of(folder)
    assert told["ended"] == "drift at 2 checks in a row"
    assert told["last_step"] < 40
    assert told["saved_steps"] == 40 - told["last_step"]
    assert told["selected_step"] in told["feasible_steps"]
    assert told["selected_step"] < told["last_step"]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert (provenance["steps"], provenance["planned_steps"]) == (told["selected_step"], 40)
    kept = load_file(folder / "drift" / f"step-{told['selected_step']:06d}.safetensors")
    saved = load_file(folder / LORA_FILE)
    assert sorted(np.abs(value).sum() for value in kept.values()) == pytest.approx(
        sorted(np.abs(value).sum() for value in saved.values()), rel=1e-6
    )
    with pytest.raises(SystemExit) as error:
        train(*options)
    assert error.value.code == 0


@pytest.mark.parametrize("policy", ["report", "policy.yaml"])
def test_a_resumed_run_decides_as_the_uninterrupted_one(train: Train, tmp_path: Path, policy: str) -> None:
    options = ("--drift_policy", tmp_path / policy if policy.endswith("yaml") else policy, "--max_train_steps", 8)
    whole = train(*options, "--output_dir", tmp_path / "whole")
    folder = train(*options)
    unfinish(folder, "checkpoint-6") if (folder / "checkpoint-6").is_dir() else unfinish(folder)
    train(*options)
    assert rows_of(folder) == rows_of(whole)
    assert selection_of(folder) == selection_of(whole)
    assert load_file(folder / LORA_FILE).keys() == load_file(whole / LORA_FILE).keys()
    for name, value in load_file(folder / LORA_FILE).items():
        assert np.array_equal(value, load_file(whole / LORA_FILE)[name])


def test_keep_last_saves_the_last_weights(train: Train, tmp_path: Path) -> None:
    selected = train("--output_dir", tmp_path / "selected")
    last = train("--keep", "last")
    plain = train("--output_dir", tmp_path / "report", "--drift_policy", "report")
    told = selection_of(last)
    assert told["selected_step"] == told["last_step"]
    assert "--keep last" in told["reason"]
    assert rows_of(last) == rows_of(selected)
    if told["last_step"] == 6:
        assert (last / LORA_FILE).stat().st_size == (plain / LORA_FILE).stat().st_size


def test_a_run_cannot_go_on_without_what_the_base_made(train: Train) -> None:
    folder = train("--drift_policy", "report")
    unfinish(folder, "checkpoint-6")
    (folder / "drift" / "base.safetensors").unlink()
    with pytest.raises(InputError, match=r"drift/base.safetensors is gone"):
        train("--drift_policy", "report")


@pytest.mark.parametrize("flag", [{"drift_steps": 5}, {"drift_policy": "report"}, {"keep": "last"}])
def test_settings_that_would_do_nothing_are_refused(flag: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs --drift_probes, what to look at"):
        DriftWatchConfig(**flag)


def test_another_prediction_type_than_the_base_is_refused(train: Train) -> None:
    with pytest.raises(UsageError, match="their predictions cannot be compared"):
        train("--prediction_type", "v_prediction")


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--drift_probes", "nowhere", "--drift_probes nowhere: neither a readable file"),
        ("--drift_policy", "nowhere", "--drift_policy nowhere: neither guard"),
    ],
)
def test_the_flag_with_a_missing_file_is_named(train: Train, flag: str, value: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(flag, value)


def test_looks_keep_to_their_share_of_the_time() -> None:
    clock = Clock(started_s=-1000.0)  # long ago: what one more look takes decides
    with clock.measures("pulse"):
        pass
    assert clock.allows("pulse", 0.01)
    now = clock.started_s
    clock.started_s = __import__("time").monotonic() - 100
    clock.last_s["pulse"], clock.spent_s["pulse"] = 0.4, 0.5
    assert clock.allows("pulse", 0.01)
    clock.spent_s["pulse"] = 0.7
    assert not clock.allows("pulse", 0.01)
    assert now == -1000.0
