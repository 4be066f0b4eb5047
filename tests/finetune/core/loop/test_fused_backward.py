"""--fused_backward: the ordinary step's bits, with one gradient at a time; and what has left the device by then."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_loop import Parts, make_parts, steps  # noqa: F401
from test_methods import run_recipe, words_of
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import finetune.core.recipe
from configs.errors import TisserandError, UsageError
from data_prep.folders.run_folder import LORA_FILE
from finetune.core.loop.memory import estimate
from finetune.core.run import Batch
from finetune.core.settings.training import TrainConfig
from finetune.diffusion.denoiser import Denoiser
from finetune.diffusion.models import load_models, park

FUSED = ("--fused_backward", "--max_grad_norm", "0")


@pytest.fixture
def go(toy_sd: Path, captioned_images: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train with more options; return the run folder."""

    def run(recipe: str, *words: object, folder: str = "run") -> Path:
        more = ["--output_dir", str(tmp_path / folder), *(str(word) for word in words)]
        run_recipe(recipe, [*words_of(recipe, toy_sd, captioned_images, tmp_path), *more])
        return tmp_path / folder

    return run


def learned(folder: Path, step: int) -> dict[str, Tensor]:
    path = folder / f"checkpoint-{step}"
    return load_file(path / "learned.safetensors") | load_file(path / "optimizer.safetensors")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("full", []),
        ("lora", ["--optimizer", "adafactor", "--gradient_checkpointing"]),
        ("pivotal_tuning", ["--train_text_encoder"]),  # its groups rest in turn
    ],
)
def test_the_weights_are_those_of_the_ordinary_step(go: Callable[..., Path], recipe: str, words: list[str]) -> None:
    fused = go(recipe, *words, *FUSED, folder="fused")
    plain = go(recipe, *words, "--max_grad_norm", "0", folder="plain")
    for step in (2, 6):
        one, other = learned(fused, step), learned(plain, step)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)
    norms = [
        [json.loads(line)["grad_norm"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (fused, plain)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_fused_run_goes_on_to_the_same_bits(go: Callable[..., Path]) -> None:
    whole = go("lora", *FUSED, folder="whole")
    cut = go("lora", *FUSED, "--max_train_steps", 4, folder="cut")
    (cut / LORA_FILE).unlink()
    go("lora", *FUSED, folder="cut")
    assert all(torch.equal(learned(whole, 6)[name], value) for name, value in learned(cut, 6).items())


def test_one_gradient_is_held_at_a_time(make_parts: Callable[..., Parts]) -> None:  # noqa: F811
    parts = make_parts(fused_backward=True, max_grad_norm=0.0, max_train_steps=1)
    parameters = list(parts[2].parameters.values())
    held: list[int] = []
    hook = register_optimizer_step_pre_hook(
        lambda *_: held.append(sum(parameter.grad is not None for parameter in parameters))
    )
    list(steps(parts))
    hook.remove()
    assert held == [1] * len(parameters)
    assert all(parameter.grad is None for parameter in parameters)


def test_no_tensor_is_stepped_with_a_gradient_that_is_not_finite(
    make_parts: Callable[..., Parts],  # noqa: F811
    tmp_path: Path,
) -> None:
    parts = make_parts(fused_backward=True, max_grad_norm=0.0)
    name, parameter = next(iter(parts[2].parameters.items()))
    before = parameter.detach().clone()
    parameter.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TisserandError, match=r"step 1: the gradient is not finite \(images .*png"):
        list(steps(parts))
    assert torch.equal(parameter, before), name
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_without_clipping_gradients_are_left_as_they_are(make_parts: Callable[..., Parts]) -> None:  # noqa: F811
    """A limit above the norm is 1.0 times the gradient, too."""
    results = []
    for limit in (0.0, 1e9):
        parts = make_parts(max_grad_norm=limit, overwrite=True)
        list(steps(parts))
        results.append({name: value.detach().clone() for name, value in parts[2].parameters.items()})
        parts[0].__exit__()
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_the_estimate_counts_the_largest_gradient(make_parts: Callable[..., Parts]) -> None:  # noqa: F811
    _, models, learns, batches, config = make_parts()
    parameters = list(learns.parameters.values())

    def loss(denoiser: nn.Module, batch: Batch) -> Tensor:
        return denoiser(batch.latents, batch.timesteps, batch.conditions.prompts).mean(dim=(1, 2, 3))

    fused = dataclasses.replace(config, fused_backward=True, max_grad_norm=0.0)
    batch = batches.update(0).batches[0]
    need = estimate(Denoiser(None, models.unet), parameters, loss, batch, fused)
    assert need.gradients == 4 * max(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "--max_grad_norm 1.0: not with --fused_backward"),
        ({"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}, "--gradient_accumulation_steps 2: not with"),
        ({"max_grad_norm": 0.0, "train_batch_size": "auto", "global_batch_size": 8}, "--train_batch_size auto: not"),
        ({"max_grad_norm": 0.0, "optimizer": "prodigy", "learning_rate": 1.0}, "--optimizer prodigy: not with"),
        ({"max_grad_norm": 0.0, "set_grads_to_none": False}, "--set_grads_to_none False: not with"),
    ],
)
def test_what_needs_all_gradients_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TrainConfig(output_dir=Path("x"), fused_backward=True, **options)


def test_several_passes_an_update_are_refused(go: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="--gradient_accumulation_steps 2: not with --fused_backward"):
        go("lora", *FUSED, "--global_batch_size", 8)


def test_training_reads_neither_vae_nor_frozen_text_encoder(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the device without numbers could not be trained with."""
    plain = load_file(go("lora", folder="plain") / LORA_FILE)
    monkeypatch.setattr(finetune.core.recipe, "park", partial(park, where="meta"))
    parked = load_file(go("lora") / LORA_FILE)
    assert all(torch.equal(parked[name], value) for name, value in plain.items())


def test_what_is_parked_leaves_the_device(toy_sd: Path) -> None:
    models = load_models(str(toy_sd))
    park(models, keeps_text_encoder=False, keeps_vae=False, where="meta")
    parts = (models.unet, models.vae, models.text_encoder)
    there = sum(p.numel() for part in parts for p in part.parameters() if p.device.type == "cpu")
    assert there == sum(p.numel() for p in models.unet.parameters())
