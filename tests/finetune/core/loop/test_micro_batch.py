"""--train_batch_size auto: the number that memory holds, and that nothing but time depends on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_loop import Parts, make_parts  # noqa: F401
from test_methods import run_recipe, words_of
from torch import Tensor, nn

from configs.errors import UsageError
from data_prep.folders.run_folder import LORA_FILE
from finetune.core.loop.memory import estimate
from finetune.core.loop.micro_batch import fit_micro_batch
from finetune.core.run import Batch
from finetune.core.settings.training import TrainConfig
from finetune.diffusion.denoiser import Denoiser

Memory = Callable[[float], None]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Set the free memory of this machine, in bytes."""
    return lambda free: monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=int(free)))


@pytest.fixture
def lora(toy_sd: Path, captioned_images: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train adapters with more options; return the run folder."""

    def run(*words: object, folder: str = "run") -> Path:
        more = ["--output_dir", str(tmp_path / folder), *(str(word) for word in words)]
        run_recipe("lora", [*words_of("lora", toy_sd, captioned_images, tmp_path), *more])
        return tmp_path / folder

    return run


AUTO = ("--train_batch_size", "auto", "--global_batch_size", 8)


def quiet_loss(denoiser: nn.Module, batch: Batch) -> Tensor:
    return denoiser(batch.latents, batch.timesteps, batch.conditions.prompts).square().mean(dim=(1, 2, 3))


def choose(parts: Parts, loss: Callable[[nn.Module, Batch], Tensor] = quiet_loss) -> int:
    run, models, learns, batches, _ = parts
    return fit_micro_batch(run, Denoiser(models.text_encoder, models.unet), learns, batches, loss).micro_batch


@pytest.mark.parametrize("fits", [1, 2, 4, 8])
def test_the_largest_divisor_that_memory_holds_is_chosen(
    make_parts: Callable[..., Parts],  # noqa: F811
    memory: Memory,
    fits: int,
) -> None:
    """Given memory for half an image more than ``fits``, and 1 % for what two images tell wrongly."""
    parts = make_parts(train_batch_size="auto", global_batch_size=8)
    run, models, learns, batches, _ = parts
    batch = batches.cut(run.train.with_micro_batch(8)).update(0).batches[0]
    need = estimate(
        Denoiser(models.text_encoder, models.unet), list(learns.parameters.values()), quiet_loss, batch, run.train
    )
    each = need.activations / 8
    memory(1.01 * (need.gradients + need.optimizer + (fits + 0.5) * each) / 0.9)
    assert choose(parts) == fits


def test_a_pass_that_runs_out_of_memory_is_tried_no_further(make_parts: Callable[..., Parts]) -> None:  # noqa: F811
    """As on a GPU, whose allocator knows better than any estimate."""
    tried = []

    def tight(denoiser: nn.Module, batch: Batch) -> Tensor:
        tried.append(len(batch.names))
        if len(batch.names) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return quiet_loss(denoiser, batch)

    assert choose(make_parts(train_batch_size="auto", global_batch_size=8), tight) == 2
    assert tried == [1, 1, 2, 8, 4, 2]


def test_auto_learns_what_the_same_number_learns(lora: Callable[..., Path], memory: Memory) -> None:
    memory(1e12)
    chosen = load_file(lora(*AUTO) / LORA_FILE)
    asked = load_file(lora("--train_batch_size", 8, folder="asked") / LORA_FILE)
    assert all(torch.equal(chosen[name], asked[name]) for name in asked)


def test_a_run_goes_on_with_the_batch_it_began_with(
    lora: Callable[..., Path], memory: Memory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bitwise: a larger batch, for which there is memory now, would add up in another order."""
    memory(1e6)
    folder = lora(*AUTO, "--max_train_steps", 4)
    size = json.loads((folder / "environment.json").read_text())["train_batch_size"]
    assert 1 <= size < 8
    (folder / LORA_FILE).unlink()
    memory(1e12)
    lora(*AUTO)
    assert f"{size} images a pass, as the run began" in capsys.readouterr().out
    assert json.loads((folder / "environment.json").read_text())["train_batch_size"] == size
    asked = lora("--train_batch_size", size, "--global_batch_size", 8, folder="asked")
    resumed, whole = load_file(folder / LORA_FILE), load_file(asked / LORA_FILE)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("source", ["class_images", "base_prediction"])
def test_auto_counts_prior_rows(
    lora: Callable[..., Path], memory: Memory, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    memory(1e12)
    prior = ["--with_prior_preservation", "--class_prompt", "a", "--prior_source", source, "--max_train_steps", "2"]
    if source == "class_images":
        prior += ["--class_data_dir", str(tmp_path / "class"), "--num_class_images", "4"]
    lora(*AUTO, *prior)
    assert "8 images a pass" in capsys.readouterr().out


def test_the_global_batch_counts_images_of_all_processes() -> None:
    config = TrainConfig(output_dir=Path("x"), train_batch_size=2, global_batch_size=12)
    assert config.with_micro_batch(2, 3).gradient_accumulation_steps == 2
    assert config.steps_per_epoch(25, 3) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"train_batch_size": "auto"}, "--train_batch_size auto: needs --global_batch_size"),
        ({"global_batch_size": 8, "gradient_accumulation_steps": 2}, "--gradient_accumulation_steps 2: leave it out"),
        ({"global_batch_size": 0}, "--global_batch_size 0: must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TrainConfig(output_dir=Path("x"), **options)


def test_a_global_batch_that_passes_do_not_divide_is_refused(lora: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"--global_batch_size 10: must be a multiple of 4 x 1"):
        lora("--global_batch_size", 10)
