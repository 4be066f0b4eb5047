"""The demo's commands are commands: each is read by the settings of the program it starts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from configs.load import load
from data_prep.slice import SliceConfig
from data_prep.worlds.config import PhantomConfig
from eval.drift import DriftConfig
from eval.fidelity import FidelityConfig
from eval.generate import GenerateConfig
from eval.report import ReportConfig
from finetune.lora import LoraRun

SETTINGS = {
    "phantoms": PhantomConfig,
    "slices": SliceConfig,
    "training": LoraRun,
    "generation": GenerateConfig,
    "drift": DriftConfig,
    "fidelity": FidelityConfig,
    "report": ReportConfig,
}


def demo() -> ModuleType:
    specification = importlib.util.spec_from_file_location("demo", Path(__file__).parents[2] / "benchmarks" / "demo.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["demo"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("stage", SETTINGS)
def test_every_stage_of_the_demo_is_read_by_its_program(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    module = demo()
    stages = module.commands(module.DemoConfig(seed=3))
    assert list(stages) == list(SETTINGS)
    for words in stages[stage]:
        programs = ("data_prep.", "eval.", "finetune/")
        program = next(place for place, word in enumerate(words) if word.startswith(programs))
        config = load(SETTINGS[stage], words[program + 1 :])
        seed = getattr(config, "seed", None) or getattr(getattr(config, "train", None), "seed", None)
        assert stage not in {"phantoms", "training", "generation"} or seed == 3
