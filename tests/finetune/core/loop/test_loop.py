"""The loop: what learns, how gradients are clipped, which rate is used, and when it stops."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from configs.errors import TisserandError
from finetune.core.data.batches import CaptionedBatches, captioned_batches
from finetune.core.learns.optimizer import base_learning_rate
from finetune.core.learns.trainable import Learns, lora_adapters
from finetune.core.loop.loop import train
from finetune.core.loss import denoising_loss
from finetune.core.pictures.images import read_images
from finetune.core.run import Run, Step
from finetune.core.settings.images import ImageFolderConfig, PictureConfig
from finetune.core.settings.methods import LoraConfig
from finetune.core.settings.training import TrainConfig
from finetune.core.start import start_run
from finetune.diffusion.config import NoiseConfig
from finetune.diffusion.denoiser import Denoiser
from finetune.diffusion.models import Models, load_models
from finetune.diffusion.noise import from_scheduler

Parts = tuple[Run, Models, Learns, CaptionedBatches, TrainConfig]


@pytest.fixture
def make_parts(toy_sd: Path, captioned_images: Path, tmp_path: Path) -> Iterator[Callable[..., Parts]]:
    runs = []

    def make(targets: str = "attention", dropout: float = 0.0, **options: object) -> Parts:
        settings = {"output_dir": tmp_path / "run", "seed": 0, "report_to": "none", "train_batch_size": 4}
        config = TrainConfig(**(settings | {"max_train_steps": 3} | options))
        images = read_images(ImageFolderConfig(train_data_dir=(captioned_images,)))
        run = start_run(config, config, num_images=len(images), data_hash="", weights_file="w.safetensors")
        runs.append(run)
        models = load_models(str(toy_sd))
        batches = captioned_batches(images, models, PictureConfig(), NoiseConfig(), run)
        rate = base_learning_rate(config, 1)
        lora = LoraConfig(rank=2, lora_targets=targets, lora_dropout=dropout)
        learns = lora_adapters(models, lora, learning_rate=rate, seed=0)
        return run, models, learns, batches, config

    yield make
    for run in runs:
        run.__exit__()


def steps(parts: Parts, **options: Any) -> Iterator[Step]:
    run, models, learns, batches, _ = parts
    loss = options.get("loss") or partial(denoising_loss, schedule=from_scheduler(models.scheduler.config))
    return train(run, Denoiser(models.text_encoder, models.unet), learns, batches, loss)


@pytest.mark.parametrize("targets", ["attention", "attention+resnet"])
def test_exactly_the_adapters_learn(make_parts: Callable[..., Parts], targets: str) -> None:
    parts = make_parts(targets)
    _, models, learns, _, _ = parts
    modules = {"unet": models.unet, "vae": models.vae, "text_encoder": models.text_encoder}
    state = {f"{part}.{name}": value for part, module in modules.items() for name, value in module.state_dict().items()}
    before = {name: value.clone() for name, value in state.items()}
    list(steps(parts))
    moved = {name for name, value in state.items() if not torch.equal(value, before[name])}
    assert moved == set(learns.parameters)
    assert moved
    assert all("lora" in name for name in moved)


def test_adapters_begin_as_the_base_model(make_parts: Callable[..., Parts], toy_sd: Path) -> None:
    _, models, _, batches, _ = make_parts("attention+resnet")
    (batch,) = batches.update(0).batches
    with torch.no_grad():
        predictions = [
            Denoiser(one.text_encoder, one.unet)(batch.latents, batch.timesteps, batch.conditions.prompts)
            for one in (models, load_models(str(toy_sd)))
        ]
    assert torch.equal(*predictions)


def test_what_learns_is_float32_on_a_bfloat16_model(toy_sd: Path) -> None:
    models = load_models(str(toy_sd), dtype=torch.bfloat16)
    learns = lora_adapters(models, LoraConfig(), learning_rate=1e-4, seed=0)
    assert {parameter.dtype for parameter in learns.parameters.values()} == {torch.float32}


def test_a_gradient_that_is_not_finite_at_any_scale_ends_the_run(make_parts: Callable[..., Parts]) -> None:
    """A scaler, which fp16 has on a GPU, leaves such updates out one after another, and would do so for ever."""
    parts = make_parts(max_train_steps=9)
    run, _, learns, _, _ = parts
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-11)
    next(iter(learns.parameters.values())).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TisserandError, match="step 4: the gradient is not finite at any scale"):
        list(steps(parts))


@pytest.mark.parametrize(("limit", "is_clipped"), [(1e-3, True), (1e6, False)])
def test_gradients_are_clipped_in_length_and_not_in_direction(
    make_parts: Callable[..., Parts], limit: float, is_clipped: bool
) -> None:
    """AdamW hides the length of its gradients, so they are looked at as the optimizer gets them."""
    parts = make_parts(max_grad_norm=limit, max_train_steps=1, logging_steps=1)
    _, models, learns, batches, _ = parts
    denoiser = Denoiser(models.text_encoder, models.unet)
    (batch,) = batches.update(0).batches
    losses = denoising_loss(denoiser, batch, schedule=from_scheduler(models.scheduler.config))
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), list(learns.parameters.values()))])
    seen: list[Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]).clone())

    hook = register_optimizer_step_pre_hook(look)
    (step,) = list(steps(parts))
    hook.remove()
    assert step.metrics is not None
    assert step.metrics["grad_norm"] == pytest.approx(float(plain.norm()), rel=1e-5)
    assert float(seen[0].norm()) == pytest.approx(limit if is_clipped else float(plain.norm()), rel=1e-3)
    torch.testing.assert_close(seen[0] / seen[0].norm(), plain / plain.norm(), atol=1e-6, rtol=1e-4)


def test_dropout_is_drawn_anew_in_each_pass_by_the_seed_and_the_number_of_the_update(
    make_parts: Callable[..., Parts], tmp_path: Path
) -> None:
    """Whatever else draws random numbers in between, as an observer does."""

    def dropped(seed: int, draws: int) -> list[Tensor]:
        cut = {"max_train_steps": 2, "train_batch_size": 2, "gradient_accumulation_steps": 2}
        parts = make_parts(dropout=0.5, seed=seed, output_dir=tmp_path / f"{seed}-{draws}", **cut)
        seen: list[Tensor] = []
        layer = next(module for module in parts[1].unet.modules() if isinstance(module, torch.nn.Dropout) and module.p)
        layer.register_forward_hook(lambda module, args, result: seen.append(result == 0))
        torch.randn(draws)
        for _ in steps(parts):
            torch.randn(draws)
        return seen[-4:]  # before the first update the memory of a pass is measured

    first, again, other = dropped(0, 1), dropped(0, 9), dropped(1, 1)
    assert len(first) == 4  # two updates of two passes
    assert all(0.4 < float(one.double().mean()) < 0.6 for one in first)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in itertools.combinations([*first, *other], 2))


def test_the_rate_is_base_times_factor_of_the_step(make_parts: Callable[..., Parts]) -> None:
    parts = make_parts(learning_rate=1e-2, lr_scheduler="linear", lr_warmup_steps=2, max_train_steps=6, logging_steps=1)
    rates = [step.metrics["learning_rate"] for step in steps(parts) if step.metrics]
    assert rates == pytest.approx([0.0, 0.5e-2, 1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_the_logged_loss_is_the_mean_since_the_line_before(make_parts: Callable[..., Parts]) -> None:
    done = list(steps(make_parts(max_train_steps=7, logging_steps=3)))
    lines = {step.number: step.metrics["loss"] for step in done if step.metrics}
    assert list(lines) == [3, 6, 7]
    for last, first in ((3, 1), (6, 4), (7, 7)):
        values = [float(step.loss) for step in done[first - 1 : last]]
        assert lines[last] == pytest.approx(sum(values) / len(values), rel=1e-6)


def test_the_loss_of_an_update_is_the_mean_over_its_images(make_parts: Callable[..., Parts]) -> None:
    parts = make_parts(train_batch_size=3, gradient_accumulation_steps=3, max_train_steps=2)
    _, models, _, batches, _ = parts
    loss = partial(denoising_loss, schedule=from_scheduler(models.scheduler.config))
    with torch.no_grad():
        denoiser = Denoiser(models.text_encoder, models.unet)
        values = torch.cat([loss(denoiser, batch) for batch in batches.update(0).batches])
    first = next(steps(parts))
    assert len(values) == 9
    assert float(first.loss) == pytest.approx(float(values.mean()), rel=1e-5)


def test_an_image_counts_the_same_in_a_pass_of_few(make_parts: Callable[..., Parts]) -> None:
    parts = make_parts(
        train_batch_size=3, gradient_accumulation_steps=2, max_train_steps=2, learning_rate=1e-30, adam_weight_decay=0.0
    )
    _, models, _, batches, _ = parts
    loss = partial(denoising_loss, schedule=from_scheduler(models.scheduler.config))
    with torch.no_grad():
        denoiser = Denoiser(models.text_encoder, models.unet)
        values = [loss(denoiser, batch) for batch in batches.update(1).batches]
    *_, last = steps(parts)
    assert [len(some) for some in values] == [3, 1]
    assert float(last.loss) == pytest.approx(float(torch.cat(values).mean()), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_naming_step_image_and_timestep(
    make_parts: Callable[..., Parts],
) -> None:
    parts = make_parts(max_train_steps=9, checkpointing_steps=1)
    run, models, learns, batches, _ = parts
    loss = partial(denoising_loss, schedule=from_scheduler(models.scheduler.config))
    batch = batches.update(1).batches[0]
    bad, timestep = batch.names[2], int(batch.timesteps[2])

    def spoiled(denoiser: torch.nn.Module, batch: Any) -> Tensor:
        values = loss(denoiser, batch)
        return torch.where(torch.tensor([name == bad for name in batch.names]), math.nan, values)

    done = []
    with pytest.raises(
        TisserandError, match=rf"^step 2: the loss is not finite \(images {bad} at timestep {timestep}\)"
    ):
        done.extend(step.number for step in steps(parts, loss=spoiled))
    assert all(parameter.isfinite().all() for parameter in learns.parameters.values())
    assert [path.name for path in run.folder.glob("checkpoint-*")] == ["checkpoint-1"]


def test_all_processes_stop_at_the_image_of_one(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(_TWO_PROCESSES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    root = Path(__file__).parents[4]
    output = subprocess.run(
        launcher, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=300
    )
    for rank in (0, 1):
        assert f"rank {rank}: step 1: the loss is not finite (images 1.png at timestep 7)" in output.stdout, (
            output.stderr
        )


_TWO_PROCESSES = """
from types import SimpleNamespace
import torch
from accelerate import Accelerator
from configs.errors import TisserandError
from finetune.core.loop.loop import _check_finite, _Window
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
loss, norm = torch.tensor(torch.nan if rank == 1 else 1.0), torch.tensor(1.0)
window = _Window(losses=[loss], norms=[norm], per_image=[(1, [loss[None]])])
update = SimpleNamespace(batches=[SimpleNamespace(names=[f"{rank}.png"], timesteps=torch.tensor([7]))])
try:
    _check_finite(window, SimpleNamespace(update=lambda number: update), accelerator)
except TisserandError as error:
    print(f"rank {rank}: {error}\\n", end="", flush=True)
accelerator.wait_for_everyone()
accelerator.end_training()
"""


def test_a_gradient_that_is_not_finite_stops_the_run(make_parts: Callable[..., Parts]) -> None:
    parts = make_parts()

    def steep(denoiser: torch.nn.Module, batch: Any) -> Tensor:
        values = denoiser(batch.latents, batch.timesteps, batch.conditions.prompts).square().mean(dim=(1, 2, 3))
        return (values - values.detach()).sqrt()  # 0, with an infinite slope

    with pytest.raises(TisserandError, match=r"^step 1: the gradient is not finite"):
        list(steps(parts, loss=steep))


def test_weights_count_in_the_mean(make_parts: Callable[..., Parts]) -> None:
    """Rows of weight 0 neither add to the loss nor to the gradient: the way prior images and spare rows work."""
    parts = make_parts(max_train_steps=1)
    batches = parts[3]
    update = batches.update(0)
    update.batches[0].weights[1:] = 0.0

    class OneImage:
        steps_per_epoch = 1

        def update(self, number: int) -> Any:
            return update.__class__(batches=update.batches, weight=1.0, num_images=1)

    loss = partial(denoising_loss, schedule=from_scheduler(parts[1].scheduler.config))
    with torch.no_grad():
        expected = loss(Denoiser(parts[1].text_encoder, parts[1].unet), update.batches[0])[0]
    (step,) = list(steps((*parts[:3], OneImage(), parts[4])))
    assert float(step.loss) == pytest.approx(float(expected), rel=1e-5)


def test_what_the_caller_changes_is_in_the_checkpoint(make_parts: Callable[..., Parts]) -> None:
    from safetensors.torch import load_file

    parts = make_parts(max_train_steps=1, checkpointing_steps=1)
    name, parameter = next(iter(parts[2].parameters.items()))
    for _ in steps(parts):
        with torch.no_grad():
            parameter.fill_(7.0)
    assert bool((load_file(parts[0].folder / "checkpoint-1" / "learned.safetensors")[name] == 7).all())
