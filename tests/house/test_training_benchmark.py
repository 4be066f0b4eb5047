"""The measurement of training speed: turns are what they say, every arm's options are options, the counts are right."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from configs.load import load

ROOT = Path(__file__).parents[2]
SCRIPT = """
import time, torch
weight = torch.zeros(1, requires_grad=True)
optimizer = torch.optim.SGD([weight])
for step in range(9):
    time.sleep(0.05)
    optimizer.step()
"""


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("training")


def test_an_arm_does_the_steps_it_is_told_and_no_others(training: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arm = training.Arm("ours", [str(script)], tmp_path)
    try:
        turns = [arm.turn(steps) for steps in (1, 4, 2)]
        report = arm.end()
    finally:
        arm.kill()
    assert [turn["steps"] for turn in turns] == [1, 4, 2]
    assert all(turn["seconds"] > 0.05 * turn["steps"] for turn in turns)
    assert report["steps"] == 9
    assert report["peak_resident_gb"] > 0


@pytest.mark.parametrize("method", ["lora", "full", "textual_inversion", "dreambooth"])
def test_our_arms_are_started_with_options_they_know(training: ModuleType, method: str, tmp_path: Path) -> None:
    names = {"lora": "LoraRun", "full": "FullRun", "textual_inversion": "TextualInversionRun"}
    config = training.TrainingConfig()
    place = training.Place(work=tmp_path, model=tmp_path, resolution=256)
    script, *words = training.arm_words(config, place, method, "ours", 8, 100)
    assert Path(script) == ROOT / "finetune" / f"{method}.py"
    settings = load(getattr(importlib.import_module(f"finetune.{method}"), names.get(method, "DreamBoothRun")), words)
    assert settings.train.total_steps(10, 1) == 100
    assert settings.train.train_batch_size == 8


def test_operations_of_the_published_size_are_those_counted_elsewhere(training: ModuleType) -> None:
    assert training.flops_per_image("sd15", "lora", 512) == pytest.approx(1.714e12, rel=0.02)


def test_bare_steps_take_turns_with_ours_and_learn(training: ModuleType, tmp_path: Path) -> None:
    config = training.TrainingConfig(size="grain", num_images=2, warmup_steps=1, turns=2, turn_steps=3)
    place = training.prepare(config, tmp_path)
    words = training.arm_words(config, place, "textual_inversion", "ours", 2, 1 + 2 * 3)
    report = training.run_through("ours", words, tmp_path, bounds={"warmup_steps": 1, "turn_steps": 3})
    assert {kind: len(values) for kind, values in report["bounds"].items()} == {"ours": 2, "bare": 2, "unet": 2}
    assert report["steps"] == 1 + 2 * 3 + 2 * 3  # those of the optimizer: ours, and the bare ones
