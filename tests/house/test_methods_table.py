"""The commands of `make methods` are commands: each is read by the program it starts."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from configs.load import load
from configs.recipes import RECIPES
from eval.drift import DriftConfig
from eval.generate import GenerateConfig

ROOT = Path(__file__).parents[2]
ARMS = (
    *("lora", "full", "lora_plain", "textual_inversion", "dreambooth", "dreambooth_class", "dreambooth_base"),
    *("lora_dreambooth", "pivotal_tuning"),
)


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("demo", "methods"):  # the demo's output folder may have been taken for a package
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("methods")


def words_after(command: list[str], program: str) -> list[str]:
    return command[next(place for place, word in enumerate(command) if word.startswith(program)) + 1 :]


def test_every_method_is_compared(methods: ModuleType) -> None:
    arms = methods.arms(Path("out"))
    assert tuple(arm.name for arm in arms) == ARMS
    assert {arm.recipe for arm in arms} == set(RECIPES)


@pytest.mark.parametrize("name", ARMS)
def test_every_command_is_read_by_its_program(methods: ModuleType, name: str) -> None:
    config = methods.MethodsConfig(output_dir=Path("out"))
    arm = next(arm for arm in methods.arms(config.output_dir) if arm.name == name)
    recipe = getattr(importlib.import_module(f"finetune.{arm.recipe}"), RECIPES[arm.recipe].settings)
    for leg in range(max(1, len(arm.legs))):
        run = load(recipe, words_after(methods.training(config, arm, leg), "finetune/"))
        assert run.train.overwrite == (leg == 0)
        assert run.train.seed == 0
    generated = methods.generation(config, name, ["--pretrained_model_name_or_path", "x"], ["a", "b"])
    assert load(GenerateConfig, words_after(generated, "eval.")).num_images == 8
    drift = load(DriftConfig, words_after(methods.drift(config, arm, Path("out") / name), "eval."))
    assert (drift.base is None) != arm.saves_pipeline


def test_page_shows_the_recorded_figures(methods: ModuleType) -> None:
    path = ROOT / "benchmarks" / "results" / "methods.json"
    if not path.is_file():
        pytest.skip("make methods has not been run")
    rows = [methods.Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    page = (ROOT / "docs" / "fine_tune.md").read_text(encoding="utf-8")
    assert [line for line in methods.table(rows) if line not in page] == []
