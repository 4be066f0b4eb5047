"""Pivotal tuning as a user runs it: the pivot holds, both files load, and a run goes on exactly in either stage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from word_runs import Train, trainer

from configs.errors import UsageError
from data_prep.folders.run_folder import EMBEDDINGS_FILE, LORA_FILE
from finetune.core.learns.words import ROWS
from finetune.pivotal_tuning import PivotalTuningRun, main


@pytest.fixture(scope="module")
def train_in(toy_sd: Path, captioned_images: Path) -> Train:
    """Run the recipe in this process, with the pivot after step 3 of 6; options given again win."""
    options = {"instance_data_dir": captioned_images, "token_steps": 3, "rank": 2, "checkpointing_steps": 1}
    return trainer(main, PivotalTuningRun, toy_sd, **options)


@pytest.fixture
def train(train_in: Train, tmp_path: Path) -> Train:
    return partial(train_in, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(train_in: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that nothing interrupted."""
    return train_in(tmp_path_factory.mktemp("pivotal") / "run")


def learned(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "learned.safetensors")


def moved(folder: Path, first: int, last: int) -> set[str]:
    before, after = learned(folder, first), learned(folder, last)
    return {name for name in before if not torch.equal(before[name], after[name])}


def adapters(folder: Path) -> set[str]:
    return set(learned(folder, 1)) - {ROWS}


def test_before_the_pivot_the_rows_learn_and_after_it_the_adapters(whole: Path) -> None:
    """In diffusers' advanced script the rate of the text side comes back one step after the pivot."""
    assert moved(whole, 1, 3) == {ROWS}
    assert moved(whole, 3, 6) == adapters(whole)


def test_the_optimizer_knows_nothing_of_adapters_before_the_pivot(whole: Path) -> None:
    names = {key.rpartition("/")[0] for key in load_file(whole / "checkpoint-3" / "optimizer.safetensors")}
    assert names == {ROWS}


def test_rows_may_go_on_slowly(train: Train) -> None:
    folder = train("--token_lr_after", 1e-4)
    assert moved(folder, 3, 6) == {ROWS} | adapters(folder)


def test_a_first_step_of_a_stage_has_the_rate_asked_for(train: Train) -> None:
    """AdamW's first step moves a number by its learning rate, whatever the gradient."""
    folder = train("--token_lr", 1e-3, "--adam_weight_decay", 0, "--adam_epsilon", 1e-20, "--max_grad_norm", 1e6)
    before, after = learned(folder, 3), learned(folder, 4)
    steps = {name: (after[name] - before[name]).abs().max() for name in before}
    # A is still at its start: B is zero, so its gradient is, too.
    assert float(max(steps[name] for name in steps if "lora_B" in name)) == pytest.approx(1e-2, rel=1e-3)
    assert steps[ROWS] == 0


def test_the_logged_rate_is_that_of_what_learns(train: Train) -> None:
    folder = train("--token_lr", 1e-3, "--logging_steps", 1)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows] == [1e-3] * 3 + [1e-2] * 3


@pytest.mark.parametrize("stop", [2, 3, 5], ids=["within the first stage", "at the pivot", "within the second stage"])
def test_resumed_is_uninterrupted_bit_for_bit(train: Train, whole: Path, tmp_path: Path, stop: int) -> None:
    parts = shutil.copytree(whole, tmp_path / "run")
    for name in (EMBEDDINGS_FILE, LORA_FILE, "provenance.json"):
        (parts / name).unlink()
    for step in range(stop + 1, 7):
        shutil.rmtree(parts / f"checkpoint-{step}", ignore_errors=True)
    train()
    for name in (EMBEDDINGS_FILE, LORA_FILE):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_that_goes_on_for_longer_keeps_its_pivot(train: Train) -> None:
    short = train("--token_steps", "null", "--max_train_steps", 4)
    assert moved(short, 2, 4) == adapters(short)
    with pytest.raises(UsageError, match=r"--token_steps \(2 then, 4 now\)"):
        train("--token_steps", "null", "--max_train_steps", 8)
    train("--token_steps", 2, "--max_train_steps", 8)
    assert torch.equal(learned(short, 2)[ROWS], learned(short, 7)[ROWS])


@pytest.mark.parametrize("steps", [6, 9])
def test_a_pivot_beyond_the_end_is_refused(train: Train, steps: int) -> None:
    with pytest.raises(UsageError, match=rf"--token_steps {steps}: must be above 0 and below the 6 steps"):
        train("--token_steps", steps)


def test_both_stages_learn_in_half_precision(train: Train) -> None:
    """In diffusers' advanced script the rows do not learn then."""
    folder = train("--mixed_precision", "bf16")
    assert moved(folder, 1, 3) == {ROWS}
    assert moved(folder, 3, 6) == adapters(folder)
    assert {value.dtype for value in learned(folder, 6).values()} == {torch.float32}


def test_adapters_of_the_text_encoder_learn_after_the_pivot_too(train: Train) -> None:
    folder = train("--train_text_encoder", "--text_encoder_lr", 5e-3)
    assert moved(folder, 3, 6) == adapters(folder)
    assert any(name.startswith("text_encoder.") for name in load_file(folder / LORA_FILE))


@pytest.mark.parametrize("source", ["class_images", "base_prediction"])
def test_prior_rows_come_with_the_adapters_alone(train: Train, whole: Path, tmp_path: Path, source: str) -> None:
    more: list[object] = ["--with_prior_preservation", "--prior_source", source, "--class_prompt", "b"]
    if source == "class_images":
        more += ["--class_data_dir", tmp_path / "class", "--num_class_images", 4]
    kept = train(*more)
    assert torch.equal(learned(whole, 3)[ROWS], learned(kept, 3)[ROWS])
    told = json.loads((kept / "provenance.json").read_text())
    assert told["prior"] == {"source": source, "class_prompt": "b", "weight": 1.0}
    first, second = learned(whole, 6), learned(kept, 6)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_class_prompt_with_the_word_is_refused(train: Train) -> None:
    with pytest.raises(UsageError, match="--class_prompt a <x>: the base model does not know <x>"):
        train("--with_prior_preservation", "--prior_source", "base_prediction", "--class_prompt", "a <x>")


def test_both_files_give_the_trained_model(train: Train, toy_sd: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from finetune.diffusion.adapters import load_adapter as put_on
    from finetune.diffusion.denoiser import Denoiser
    from finetune.diffusion.models import load_models
    from finetune.diffusion.text import tokenize

    folder = train("--train_text_encoder")
    assert json.loads((folder / "provenance.json").read_text())["method"] == "pivotal_tuning"
    ours = load_models(str(toy_sd))
    put_on(ours, folder)
    stock = StableDiffusionPipeline.from_pretrained(toy_sd, safety_checker=None)
    stock.load_textual_inversion(folder)
    stock.load_lora_weights(folder)
    latents, steps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    ids = tokenize(ours, ["a <x>"])
    with torch.no_grad():
        first = Denoiser(ours.text_encoder, ours.unet)(latents, steps, ids)
        second = Denoiser(stock.text_encoder, stock.unet)(latents, steps, ids)
        base = Denoiser(load_models(str(toy_sd)).text_encoder, load_models(str(toy_sd)).unet)
    assert torch.equal(first, second)
    assert not torch.equal(first, base(latents, steps, ids.clamp(max=513)))


@pytest.mark.slow
def test_two_processes_end_where_one_does(train_in: Train, tmp_path: Path) -> None:
    """With caption dropout a process may draw no word at all; its rows still have a gradient to share."""
    dropped = ("--caption_dropout", "0.6", "--train_text_encoder")
    alone = train_in(tmp_path / "one", *dropped)
    script = Path(__file__).parents[2] / "finetune" / "pivotal_tuning.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    settings = (alone / "config.yaml").read_text().replace("train_batch_size: 4", "train_batch_size: 2")
    (tmp_path / "two.yaml").write_text(settings)
    more = ["--config", str(tmp_path / "two.yaml"), "--output_dir", str(tmp_path / "two")]
    place = os.environ | {"PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([*command, *more], env=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2
    for name in (EMBEDDINGS_FILE, LORA_FILE):
        first, second = load_file(alone / name), load_file(tmp_path / "two" / name)
        for key, value in first.items():
            # The same sums in another order; AdamW divides by gradients' sizes, which can be tiny.
            torch.testing.assert_close(second[key], value, atol=2e-4, rtol=1e-3)
