"""Drift looked at during training: zero before the first update, no trace in the training, the right weights kept."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file
from test_leak import weave
from test_processes import torchrun
from test_watch import write_images

from configs.errors import InputError, UsageError
from configs.load import load
from data_prep.folders.run_folder import LORA_FILE
from finetune.core.settings.watching import DriftWatchConfig
from finetune.core.watch.drift import Clock
from finetune.lora import LoraRun, main
from finetune.lora_dreambooth import LoraDreamBoothRun
from finetune.lora_dreambooth import main as overtrain

Train = Callable[..., Path]
TINY_SD = Path(__file__).parents[4] / "assets" / "tiny-sd"

PROBES = """
version: 1
sets:
  G0: {probes: {zebras: two zebras}}
  G4: {probes: {"null": ""}}
"""


@pytest.fixture(scope="module")
def train(toy_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train a toy adapter on data with a validation folder beside it; options given again win."""
    folder = tmp_path_factory.mktemp("drift_watch")
    # Six images are too few to teach a network what they look like, which takes seconds.
    data = write_images(folder / "data" / "train", 0, 6)
    write_images(folder / "data" / "validation", 1, 5)
    (folder / "probes.yaml").write_text(PROBES)
    values = {
        "pretrained_model_name_or_path": toy_sd,
        "train_data_dir": data,
        "seed": 0,
        "max_train_steps": 6,
        "train_batch_size": 4,
        "checkpointing_steps": 4,
        "logging_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    watched = ["--drift_probes", str(folder / "probes.yaml"), "--drift_steps", "3"]

    def run(name: str, *more: object, is_watched: bool = True) -> Path:
        place = ["--output_dir", str(folder / name)]
        main(load(LoraRun, [*words, *(watched if is_watched else []), *place, *map(str, more)]))
        return folder / name

    return run


@pytest.fixture(scope="module")
def reported(train: Train) -> Path:
    """A run that was only reported on."""
    return train("reported", "--drift_policy", "report")


def rows_of(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of drift.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (folder / "drift.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name != "seconds"} for row in rows if kind in {None, row["kind"]}]


def selection_of(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "selection.json").read_text())
    assert content.pop("cost").keys() == {"total_s", "start_s", "pulse_s", "check_s", "share"}
    return dict(content)


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two weight files hold the same bits."""
    return one.keys() == other.keys() and all(np.array_equal(value, other[name]) for name, value in one.items())


def unfinish(folder: Path, *checkpoints: str) -> None:
    """Take away what a run leaves at its end, and the checkpoints named."""
    for name in (LORA_FILE, "provenance.json", "selection.json"):
        (folder / name).unlink()
    for name in checkpoints:
        shutil.rmtree(folder / name, ignore_errors=True)


def test_the_pulse_is_exactly_zero_before_the_first_update_and_not_after(reported: Path) -> None:
    pulses = rows_of(reported, "pulse")
    assert [row["step"] for row in pulses] == [0, 3, 4, 6]  # every third, and where a checkpoint is written
    assert (pulses[0]["divergence"], pulses[0]["captions"], pulses[0]["ratio"]) == (0.0, 0.0, None)
    assert pulses[-1]["divergence"] > 0
    assert pulses[-1]["prompts"].keys() == {"zebras", "null"}
    assert pulses[-1]["ratio"] == pytest.approx(pulses[-1]["divergence"] / pulses[-1]["captions"])


def test_pictures_and_losses_are_checked_at_the_start_at_checkpoints_and_at_the_end(reported: Path) -> None:
    checks = rows_of(reported, "check")
    assert {row["step"] for row in checks} >= {0, 4, 6}
    assert {row["metric"] for row in checks[0]["rows"]} >= {"divergence", "luminance_ratio"}
    assert {row.get("value", 1.0) for row in checks[0]["rows"] if row["metric"] == "colourfulness_ratio"} == {1.0}
    assert [len(checks[-1]["losses"][name]) for name in ("validation", "train")] == [5, 6]
    assert checks[-1]["losses"] != checks[0]["losses"]


def test_checks_of_drift_look_at_the_held_out_images_that_were_named(train: Train, tmp_path: Path) -> None:
    named = write_images(tmp_path / "named", 2, 3)
    folder = train("named", "--validation_data_dir", named, "--drift_policy", "report", "--max_train_steps", 1)
    assert {len(check["losses"]["validation"]) for check in rows_of(folder, "check")} == {3}
    with pytest.raises(UsageError, match=r"--validation_data_dir .*: there is no folder"):
        train("nothing", "--validation_data_dir", tmp_path / "nothing")


def test_probes_have_the_shape_of_most_pictures_of_a_run_in_buckets(
    reported: Path, train: Train, tmp_path: Path
) -> None:
    data = write_images(tmp_path / "data" / "train", 0, 6)
    for path in sorted(data.glob("*.png"))[:4]:  # two rows to three columns
        Image.fromarray(np.zeros((32, 48), dtype=np.uint8)).save(path)
    run = train("buckets", "--train_data_dir", data, "--buckets", "--max_train_steps", "1")
    shapes = json.loads((run / "provenance.json").read_text())["shapes"]
    assert len(shapes) == 2
    for folder, (height, width) in ((run, (shapes[0]["height"], shapes[0]["width"])), (reported, (32, 32))):
        base = load_file(folder / "drift" / "base.safetensors")
        assert base["pictures"].shape == (2, 4, height, width, 3)
        assert base["predictions"].shape[-2:] == base["caption_latents"].shape[-2:]
    assert shapes[0]["height"] < shapes[0]["width"]


def test_under_report_the_run_goes_to_its_end_and_keeps_the_last_weights(reported: Path) -> None:
    told = selection_of(reported)
    assert (told["selected_step"], told["last_step"], told["ended"], told["saved_steps"]) == (6, 6, "", 0)
    assert not list((reported / "drift").glob("step-*"))


def test_looking_leaves_training_bitwise_as_it_was(reported: Path, train: Train) -> None:
    plain = train("plain", is_watched=False)
    assert equal(load_file(reported / LORA_FILE), load_file(plain / LORA_FILE))
    assert not (plain / "drift.jsonl").exists()


def test_the_base_is_without_the_adapters_a_run_begins_with(reported: Path, train: Train) -> None:
    going_on = train("going_on", "--init_adapter", reported, "--drift_policy", "report", "--max_train_steps", 1)
    first, last = rows_of(going_on, "pulse")[0], rows_of(reported, "pulse")[-1]
    # The weights of the first run's end are those that the second begins with.
    assert (first["step"], last["step"]) == (0, 6)
    assert first["prompts"] == pytest.approx(last["prompts"], rel=1e-6)


WORSE = ("--max_train_steps", 40, "--checkpointing_steps", 40, "--drift_steps", 2, "--learning_rate", 1,
         "--logging_steps", 100)  # fmt: skip


@pytest.fixture(scope="module")
def worse(train: Train) -> Path:
    """A run that was ended early: it gets no better."""
    return train("worse", *WORSE)


def copy_of(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder, folder.with_name(name)))


def test_a_run_that_gets_no_better_ends_early_and_keeps_the_best_weights(worse: Path, train: Train) -> None:
    folder = worse
    told = selection_of(folder)
    assert told["ended"] == "no lower loss on held-out images at 3 checks in a row"
    assert 4 <= told["last_step"] < 40  # not in the first tenth
    assert told["saved_steps"] == 40 - told["last_step"]
    assert told["selected_step"] in told["feasible_steps"]
    assert told["selected_step"] < told["last_step"]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert (provenance["steps"], provenance["planned_steps"]) == (told["selected_step"], 40)
    kept = load_file(folder / "drift" / f"step-{told['selected_step']:06d}.safetensors")
    sizes = [
        sorted(float(np.abs(value).sum()) for value in one.values()) for one in (kept, load_file(folder / LORA_FILE))
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)
    train("worse", *WORSE)  # the same command finds it finished


def test_a_run_that_is_ended_tells_of_its_last_step(worse: Path) -> None:
    last = selection_of(worse)["last_step"]
    assert [json.loads(line)["step"] for line in (worse / "metrics.jsonl").read_text().splitlines()] == [last]
    assert [path.name for path in worse.glob("checkpoint-*")] == [f"checkpoint-{last}"]


def test_a_run_killed_after_it_was_ended_ends_there_again(worse: Path, train: Train) -> None:
    again = copy_of(worse, "killed")
    unfinish(again)
    train("killed", *WORSE)
    assert selection_of(again) == selection_of(worse)
    assert rows_of(again) == rows_of(worse)
    assert equal(load_file(again / LORA_FILE), load_file(worse / LORA_FILE))


def test_a_run_that_reached_its_end_was_not_ended(worse: Path, train: Train) -> None:
    told = selection_of(worse)
    shorter = copy_of(worse, "shorter")
    train("shorter", *WORSE, "--max_train_steps", told["last_step"])
    expected = told | {"ended": "", "planned_steps": told["last_step"], "saved_steps": 0}
    assert selection_of(shorter) == expected


def test_the_last_weights_of_a_run_that_was_ended_can_be_had_afterwards(worse: Path, train: Train) -> None:
    last = selection_of(worse)["last_step"]
    kept = copy_of(worse, "kept")
    train("kept", *WORSE, "--keep", "last")
    assert selection_of(kept)["selected_step"] == last
    learned = load_file(kept / f"checkpoint-{last}" / "learned.safetensors")
    sizes = [
        sorted(float(np.abs(value).sum()) for value in one.values()) for one in (learned, load_file(kept / LORA_FILE))
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)


def test_a_run_that_was_ended_goes_on_where_drift_is_only_reported(worse: Path, train: Train) -> None:
    steps = selection_of(worse)["last_step"] + 2
    going_on = copy_of(worse, "going-on")
    train("going-on", *WORSE, "--drift_policy", "report", "--max_train_steps", steps)
    told = selection_of(going_on)
    assert (told["ended"], told["last_step"], told["selected_step"]) == ("", steps, steps)


def test_a_resumed_run_decides_as_the_uninterrupted_one(train: Train) -> None:
    whole = train("whole", "--max_train_steps", 8, "--learning_rate", 0.1)
    again = Path(shutil.copytree(whole, whole.with_name("again")))
    unfinish(again, "checkpoint-8")
    train("again", "--max_train_steps", 8, "--learning_rate", 0.1)
    assert rows_of(again) == rows_of(whole)
    assert selection_of(again) == selection_of(whole)
    assert equal(load_file(again / LORA_FILE), load_file(whole / LORA_FILE))
    metrics = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (again, whole)]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in metrics]
    assert losses[0] == losses[1]


def test_keep_last_saves_the_last_weights(reported: Path, train: Train) -> None:
    last = train("last", "--keep", "last", "--drift_steps", 6)
    told = selection_of(last)
    assert told["selected_step"] == told["last_step"] == 6
    assert "--keep last" in told["reason"]
    assert equal(load_file(last / LORA_FILE), load_file(reported / LORA_FILE))


def test_a_run_cannot_go_on_without_what_the_base_made(reported: Path, train: Train) -> None:
    folder = Path(shutil.copytree(reported, reported.with_name("robbed")))
    unfinish(folder)
    (folder / "drift" / "base.safetensors").unlink()
    with pytest.raises(InputError, match=r"drift/base.safetensors is gone"):
        train("robbed", "--drift_policy", "report")


@pytest.mark.parametrize("flag", [{"drift_steps": 5}, {"drift_policy": "report"}, {"keep": "last"}])
def test_settings_that_would_do_nothing_are_refused(flag: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs --drift_probes, what to look at"):
        DriftWatchConfig(**flag)


def test_another_prediction_type_than_the_base_is_refused(train: Train) -> None:
    with pytest.raises(UsageError, match="their predictions cannot be compared"):
        train("other", "--prediction_type", "v_prediction")


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--drift_probes", "nowhere", "--drift_probes nowhere: neither a readable file"),
        ("--drift_policy", "nowhere", "--drift_policy nowhere: neither guard"),
    ],
)
def test_the_flag_with_a_missing_file_is_named(train: Train, flag: str, value: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train("nowhere", flag, value)


@pytest.mark.parametrize(("spent_s", "allowed"), [(0.5, True), (0.7, False)])
def test_looks_keep_to_their_share_of_the_time(spent_s: float, allowed: bool) -> None:
    clock = Clock(started_s=time.monotonic() - 100)  # of which 1 % is 1 s: another look of 0.4 s fits, or does not
    clock.last_s["pulse"], clock.spent_s["pulse"] = 0.4, spent_s
    assert clock.allows("pulse", 0.01) is allowed


@pytest.mark.slow
def test_two_processes_look_and_end_together(train: Train) -> None:
    more = {"max_train_steps": 40, "checkpointing_steps": 40, "drift_steps": 2, "learning_rate": 1}
    options = [word for name, value in more.items() for word in (f"--{name}", value)]
    one = train("one", *options, "--train_batch_size", 2)
    words = yaml.safe_load((one / "config.yaml").read_text())
    asked = [
        f"--{name}={words[name]}" for name in ("pretrained_model_name_or_path", "drift_probes", "seed", "report_to")
    ]
    asked += ["--train_data_dir", words["train_data_dir"][0], "--train_batch_size=1", "--logging_steps=2"]
    process = torchrun("finetune/lora.py", *asked, *options, "--output_dir", one.with_name("two"))
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert output.count("drift at step") == len(rows_of(one.with_name("two"), "check")) - 1  # the first process alone
    lines = [(folder / "metrics.jsonl").read_text().splitlines()[:2] for folder in (one, one.with_name("two"))]
    alone, together = ([json.loads(line)["loss"] for line in found] for found in lines)
    assert together == pytest.approx(alone, rel=1e-3)  # later steps differ: at this rate rounding grows a thousandfold
    told = selection_of(one.with_name("two"))
    assert told["last_step"] < 40
    assert told["selected_step"] in told["feasible_steps"]
    assert (one.with_name("two") / "drift" / f"step-{told['selected_step']:06}.safetensors").is_file()


@pytest.mark.slow
def test_guard_ends_an_overtrained_run_and_keeps_weights_without_drift(tmp_path: Path) -> None:
    """Ten slices, no prior, a rate that is too high: the embedded model forgets its colours within 60 steps."""
    (tmp_path / "ten").mkdir()
    for index in range(10):
        Image.fromarray(weave(index)).save(tmp_path / "ten" / f"{index}.png")
    words = ["--pretrained_model_name_or_path", str(TINY_SD), "--instance_data_dir", str(tmp_path / "ten")]
    words += ["--instance_prompt", "a w17h3r texture", "--output_dir", str(tmp_path / "run"), "--seed", "0"]
    words += ["--lora_targets", "attention+resnet", "--rank", "16", "--learning_rate", "4e-3", "--report_to", "none"]
    words += ["--max_train_steps", "100", "--train_batch_size", "4", "--drift_probes", "tiny", "--drift_steps", "10"]
    overtrain(load(LoraDreamBoothRun, words))
    told = selection_of(tmp_path / "run")
    assert told["ended"] in {"drift at 2 checks in a row", "half of the anchors and far prompts show training images"}
    assert told["last_step"] < 100
    assert told["selected_step"] == (told["feasible_steps"] or [told["last_step"]])[-1]
