"""Memory: the estimate against what a step really holds, and what is said when it does not suffice."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from configs.errors import TisserandError
from configs.load import load
from finetune.core.learns.optimizer import make_optimizer
from finetune.core.learns.trainable import Group, Learns, all_weights, checkpoint_gradients, lora_adapters
from finetune.core.loop.memory import estimate, peaks
from finetune.core.loss import denoising_loss
from finetune.core.out_of_memory import advice, is_out_of_memory
from finetune.core.run import Batch
from finetune.core.settings.methods import LoraConfig
from finetune.core.settings.training import TrainConfig
from finetune.core.start import start_run
from finetune.diffusion.denoiser import Denoiser
from finetune.diffusion.models import Models, load_models
from finetune.diffusion.noise import from_scheduler
from finetune.diffusion.text import Conditions, encode_prompts
from finetune.lora import LoraRun, main


@pytest.fixture
def models(toy_sd: Path) -> Models:
    return load_models(str(toy_sd))


def settings(folder: Path = Path("unused"), **options: object) -> TrainConfig:
    return TrainConfig(output_dir=folder, report_to="none", **options)


def make_batch(models: Models, size: int) -> Batch:
    latents, noise = torch.randn(2, size, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(
        latents=latents,
        noise=noise,
        input_noise=noise,
        timesteps=torch.full((size,), 500),
        conditions=Conditions(prompts=encode_prompts(models, ["sf_dry"] * size)),
        weights=torch.ones(size),
        names=("a.png",) * size,
        positions=tuple(range(size)),
    )


@pytest.mark.parametrize("whole", [False, True], ids=["adapters", "whole model"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_two_images_tell_what_a_batch_of_six_takes(models: Models, whole: bool, checkpointing: bool) -> None:
    learns = (
        all_weights(models, learning_rate=1e-4)
        if whole
        else lora_adapters(models, LoraConfig(rank=2), learning_rate=1e-4, seed=0)
    )
    if checkpointing:
        checkpoint_gradients(models)
    denoiser = Denoiser(models.text_encoder, models.unet).train()
    loss = partial(denoising_loss, schedule=from_scheduler(models.scheduler.config))
    parameters, batch = list(learns.parameters.values()), make_batch(models, 6)
    need = estimate(denoiser, parameters, loss, batch, settings())
    _, held = peaks(denoiser, parameters, loss, batch)
    # Gradients and activations share the time after the forward pass, so that their sum may be a little too much.
    assert 0.95 * held < need.gradients + need.activations < 1.05 * (held + need.gradients)
    assert all(parameter.grad is None for parameter in parameters)


def test_gradient_checkpointing_shows_in_the_estimate(models: Models) -> None:
    learns = lora_adapters(models, LoraConfig(rank=2), learning_rate=1e-4, seed=0)
    denoiser = Denoiser(models.text_encoder, models.unet).train()
    loss = partial(denoising_loss, schedule=from_scheduler(models.scheduler.config))
    arguments = (denoiser, list(learns.parameters.values()), loss, make_batch(models, 4), settings())
    plain = estimate(*arguments)
    checkpoint_gradients(models)
    assert estimate(*arguments).activations < 0.7 * plain.activations


@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy"])
def test_the_optimizer_keeps_what_was_said(models: Models, name: str) -> None:
    config = settings(optimizer=name, learning_rate=1.0)
    parameters = {key: torch.nn.Parameter(torch.ones(40, 30, 3, 3)) for key in ("a", "b")}
    optimizer = make_optimizer(Learns((Group(parameters, 1.0),)), config)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    loss = partial(denoising_loss, schedule=from_scheduler(models.scheduler.config))
    models.unet.requires_grad_(True)
    said = estimate(
        Denoiser(models.text_encoder, models.unet), list(parameters.values()), loss, make_batch(models, 1), config
    )
    assert said.optimizer == pytest.approx(kept, abs=64)  # and a few counters


def test_advice_names_what_is_not_lowered_yet() -> None:
    assert advice(settings(train_batch_size=4)).startswith("lower --train_batch_size 4 and raise --gradient_acc")
    lowered = settings(train_batch_size=1, gradient_checkpointing=True, mixed_precision="bf16", optimizer="adafactor")
    assert advice(lowered) == "or lower --resolution"


def test_running_out_of_memory_says_what_to_lower(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", train_batch_size=8)
    with pytest.raises(TisserandError, match=r"^out of memory; lower --train_batch_size 8"):  # noqa: SIM117
        with start_run(config, config, num_images=1, data_hash="", weights_file="w"):
            torch.empty(10**15)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def words(toy_sd: Path, captioned_images: Path, tmp_path: Path) -> list[str]:
    values = {"pretrained_model_name_or_path": toy_sd, "train_data_dir": captioned_images, "train_batch_size": 4}
    values |= {"output_dir": tmp_path / "run", "max_train_steps": 2, "report_to": "none"}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_far_too_little_memory_is_refused_before_the_first_step(
    toy_sd: Path, captioned_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100_000))
    with pytest.raises(TisserandError, match=r"memory: .* MB are needed and 0.1 MB free; lower --train_batch_size 4"):
        main(load(LoraRun, words(toy_sd, captioned_images, tmp_path)))


def test_a_dry_run_prints_the_memory_and_leaves_no_run(
    toy_sd: Path, captioned_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*words(toy_sd, captioned_images, tmp_path), "--validation_prompt", "sf_dry"]
    main(load(LoraRun, [*asked, "--dry_run"]))
    assert "memory: weights" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["cache"]
    main(load(LoraRun, asked))
    assert (tmp_path / "run" / "previews" / "step-000000.png").is_file()
