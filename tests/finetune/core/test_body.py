"""The body that recipes share: who looks when, and what it means that a look ends the run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_methods import run_recipe, words_of

import finetune.core.recipe
from data_prep.folders.run_folder import LORA_FILE
from finetune.core.recipe import Method
from finetune.core.run import OpenRun
from finetune.core.settings.recipe import RecipeConfig


@dataclass
class Ends:
    """Notes the steps it is shown, and ends the run after one of them."""

    after: int
    seen: list[int] = field(default_factory=list)

    def look(self, step: int, *, is_last: bool) -> bool:
        self.seen.append(step)
        return step == self.after


@pytest.fixture
def observed(toy_sd: Path, captioned_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ends:
    """Run LoRA for six steps at most, with an observer of its own that ends it after the third."""
    observer, body = Ends(3), finetune.core.recipe
    train_and_save = body.train_and_save

    def with_observer(opened: OpenRun, config: RecipeConfig, method: Method) -> None:
        train_and_save(opened, config, replace(method, observers=[observer]))

    monkeypatch.setattr(body, "train_and_save", with_observer)
    preview = ["--validation_prompt", "ab", "--num_validation_images", "1", "--validation_steps", "2"]
    run_recipe("lora", [*words_of("lora", toy_sd, captioned_images, tmp_path), *preview])
    return observer


def test_an_observer_looks_before_the_first_update_and_after_each(observed: Ends) -> None:
    assert observed.seen == [0, 1, 2, 3]


def test_a_run_that_ends_early_is_whole_and_says_how_long_it_was(observed: Ends, tmp_path: Path) -> None:
    told = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert told["steps"] == 3
    assert (tmp_path / "run" / "README.md").is_file()
    previews = sorted(path.name for path in (tmp_path / "run" / "previews").iterdir())
    assert previews == ["step-000000.png", "step-000002.png", "step-000003.png"]


@pytest.mark.usefixtures("observed")
def test_a_run_that_ends_early_leaves_the_weights_of_one_that_short(
    toy_sd: Path, captioned_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    more = ["--output_dir", str(tmp_path / "short"), "--max_train_steps", "3"]
    run_recipe("lora", [*words_of("lora", toy_sd, captioned_images, tmp_path), *more])
    ended, short = (load_file(tmp_path / name / LORA_FILE) for name in ("run", "short"))
    assert all(torch.equal(ended[name], short[name]) for name in short)
