"""No combination of options is broken: every cell trains, equals a naive loss, and resumes, or is refused by name.

The default run takes the cells of ``SOME``, in which every pair of values of two axes occurs; ``make slow`` takes all,
and resumes each of them.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_methods import run_recipe, words_of
from torch import nn

import finetune.core.recipe
from configs.errors import UsageError
from configs.recipes import RECIPES
from finetune.core.data.prior import WithPrior
from finetune.core.loop.loop import train
from finetune.core.run import Batch, Run, Step, Update

AXES: dict[str, dict[str, str]] = {
    "method": {name: "" for name in RECIPES},
    "precision": {"fp32": "", "bf16": "--mixed_precision bf16"},
    "prior": {
        "none": "",
        "class": "--with_prior_preservation --class_prompt ab --class_data_dir {classes} --num_class_images 2",
        "base": "--with_prior_preservation --class_prompt ab --prior_source base_prediction",
    },
    "snr": {"plain": "", "min": "--snr_gamma 0.5"},
    "terminal": {"shown": "", "zero": "--rescale_betas_zero_snr"},
    "latents": {"cached": "", "encoded": "--random_crop"},
}
Cell = tuple[str, ...]


def covering() -> list[Cell]:
    """Choose cells greedily until every pair of values of two axes occurs in one."""

    def pairs(cell: Cell) -> set[tuple[tuple[int, str], tuple[int, str]]]:
        return set(itertools.combinations(enumerate(cell), 2))

    cells = list(itertools.product(*AXES.values()))
    left = set().union(*(pairs(cell) for cell in cells))
    chosen = []
    while left:
        best = max(cells, key=lambda cell: len(pairs(cell) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


SOME = covering()
ALL = list(itertools.product(*AXES.values()))


def refusal(cell: Cell) -> str:
    """Return what the message of a cell that cannot be says, or nothing."""
    if "textual_inversion" in cell and "none" not in cell:
        return "a class prompt does not hold the new word"
    if "base" in cell and "zero" in cell:
        return "--prior_source base_prediction: the base model never saw the noise schedule of --rescale_betas_zero_snr"
    return ""


@dataclass
class Watched:
    """What a run was seen to do: the loss of its first update, and what a naive loss gives for it."""

    loss: float = 0.0
    naive: float = 0.0


def naive_losses(update: Update, denoiser: nn.Module, run: Run, model: Any, gamma: float | None) -> list[float]:
    """Return the loss of each image, taken alone, by the papers' formulas in plain numbers."""
    alphas, predicts_v = model
    return [
        naive_loss(batch, row, denoiser, run, float(alphas[int(batch.timesteps[row])]), predicts_v, gamma)
        for batch in update.batches
        for row in range(len(batch.names))
    ]


def naive_loss(
    batch: Batch, row: int, denoiser: nn.Module, run: Run, alpha: float, predicts_v: bool, gamma: float | None
) -> float:
    one = slice(row, row + 1)
    latents, noise = batch.latents[one], batch.noise[one]
    with torch.no_grad(), run.accelerator.autocast():
        found = denoiser(
            alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise, batch.timesteps[one], batch.conditions.prompts[one]
        ).float()
    wanted = alpha**0.5 * noise - (1 - alpha) ** 0.5 * latents if predicts_v else noise
    if batch.targets is not None:
        wanted = batch.targets[one]
    snr = alpha / (1 - alpha)
    weight = 1.0 if gamma is None else min(snr, gamma) / (snr + 1 if predicts_v else snr)
    return weight * float((found - wanted).square().mean())


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Look over the loop's shoulder: the naive loss of the first update, taken before it, and the loop's own."""
    seen = Watched()

    def train_and_look(run: Run, denoiser: nn.Module, learns: Any, batches: Any, loss: Any, *rest: Any) -> Any:
        first = getattr(batches, "first", batches)  # pivotal tuning has two stages; its first update is in the first
        schedule, gamma = loss.keywords["schedule"], loss.keywords["snr_gamma"]
        model = (schedule.alphas_cumprod, schedule.prediction_type == "v_prediction")
        images = first.images if isinstance(first, WithPrior) else first
        if run.checkpoint is None:
            denoiser.eval()
            own = images.update(0)
            seen.naive = mean(naive_losses(own, denoiser, run, model, gamma))
            if isinstance(first, WithPrior):
                prior = first.prior(0, own)
                seen.naive += first.loss_weight * mean(naive_losses(prior, denoiser, run, model, gamma))
        for step in train(run, denoiser, learns, batches, loss, *rest):
            assert isinstance(step, Step)
            seen.loss = float(step.loss) if step.number == 1 else seen.loss
            yield step

    monkeypatch.setattr(finetune.core.recipe, "train", train_and_look)
    return seen


@pytest.fixture(scope="module")
def oblong(tmp_path_factory: pytest.TempPathFactory, captioned_images: Path) -> Path:
    """Return pictures that a random crop has a choice in."""
    folder = tmp_path_factory.mktemp("oblong")
    for path in captioned_images.glob("*.png"):
        Image.open(path).resize((48, 32)).save(folder / path.name)
    rows = [json.loads(line) for line in (captioned_images / "metadata.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(row) + "\n" for row in rows[:6])
    (folder / "metadata.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory, captioned_images: Path) -> Path:
    """Return two class images of a user's own: what generates them has tests of its own."""
    folder = tmp_path_factory.mktemp("classes")
    for name in ("00.png", "01.png"):
        Image.open(captioned_images / name).save(folder / name)
    return folder


@pytest.fixture
def go(toy_sd: Path, toy_sd_v: Path, oblong: Path, classes: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run a cell; return its folder."""

    def run(cell: Cell, folder: str, steps: int) -> Path:
        values = [AXES[axis][value] for axis, value in zip(AXES, cell, strict=True)]
        # Ending in pure noise, a schedule needs v: the same toy, declared to predict it.
        toy = toy_sd_v if "zero" in cell else toy_sd
        more = f"--output_dir {tmp_path / folder} --max_train_steps {steps} --checkpointing_steps 1 --logging_steps 1"
        words = " ".join([*values, more]).format(classes=classes).split()
        run_recipe(cell[0], [*words_of(cell[0], toy, oblong, tmp_path), *words])
        return tmp_path / folder

    return run


def check_training(run: Path, watched: Watched, cell: Cell, steps: int) -> dict[str, torch.Tensor]:
    """Check numbers and shapes of a run that has ended; return what it learned."""
    # A forward pass of one image in half precision rounds otherwise than one of several.
    assert watched.loss == pytest.approx(watched.naive, rel=3e-2 if "bf16" in cell else 1e-4)
    learned = load_file(run / f"checkpoint-{steps}" / "learned.safetensors")
    assert all(value.dtype == torch.float32 and bool(value.isfinite().all()) for value in learned.values())
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == steps
    assert all(0 < loss < 100 for loss in losses)
    return learned


@pytest.mark.parametrize("cell", SOME, ids="-".join)
def test_combinations_train_or_are_refused(go: Callable[..., Path], watched: Watched, cell: Cell) -> None:
    if message := refusal(cell):
        with pytest.raises(UsageError, match=re.escape(message)):
            go(cell, "run", 2)
    else:
        check_training(go(cell, "run", 2), watched, cell, 2)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ALL, ids="-".join)
def test_every_combination_trains_and_resumes_or_is_refused(
    go: Callable[..., Path], watched: Watched, cell: Cell
) -> None:
    if message := refusal(cell):
        with pytest.raises(UsageError, match=re.escape(message)):
            go(cell, "run", 2)
        return
    learned = check_training(go(cell, "whole", 3), watched, cell, 3)
    go(cell, "parts", 2)
    again = load_file(go(cell, "parts", 3) / "checkpoint-3" / "learned.safetensors")
    assert [name for name in learned if not torch.equal(learned[name], again[name])] == []


def test_zero_terminal_noise_needs_v(toy_sd: Path, oblong: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--prediction_type v_prediction is needed"):
        run_recipe("lora", [*words_of("lora", toy_sd, oblong, tmp_path), "--rescale_betas_zero_snr"])
