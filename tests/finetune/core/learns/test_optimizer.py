"""Learning rates against diffusers' own schedulers, and what the optimizer holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from configs.errors import UsageError
from finetune.core.learns.optimizer import base_learning_rate, check_optimizer, learning_rate_factor, make_optimizer
from finetune.core.learns.trainable import Group, Learns, all_weights, lora_adapters
from finetune.core.loop import checkpoints
from finetune.core.settings.methods import LoraConfig
from finetune.core.settings.training import TrainConfig
from finetune.diffusion.models import load_models

SCHEDULES = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


def settings(**options: object) -> TrainConfig:
    return TrainConfig(output_dir=Path("unused"), **options)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_rate_is_that_of_diffusers_scheduler_at_every_step(name: str) -> None:
    config = settings(lr_scheduler=name, lr_warmup_steps=7, learning_rate=3e-4)
    factor = learning_rate_factor(config, 40)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=7, num_training_steps=40)
    for step in range(41):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(3e-4 * factor(step), rel=1e-12)
        scheduler.step()


@pytest.mark.parametrize(
    ("name", "options", "theirs"),
    [
        ("cosine_with_restarts", {"lr_num_cycles": 3}, {"num_cycles": 3}),
        ("polynomial", {"lr_power": 2.0}, {"power": 2.0}),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_restarts_and_power_reach_the_schedule(
    name: str, options: dict[str, object], theirs: dict[str, object]
) -> None:
    factor = learning_rate_factor(settings(lr_scheduler=name, lr_warmup_steps=4, learning_rate=3e-4, **options), 40)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=40, **theirs)
    for step in range(41):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(3e-4 * factor(step), rel=1e-12)
        scheduler.step()
    plain = learning_rate_factor(settings(lr_scheduler=name, lr_warmup_steps=4, learning_rate=3e-4), 40)
    assert plain(30) != factor(30)


@pytest.mark.parametrize("adapts", [False, True])
def test_the_text_encoder_learns_at_its_own_rate(toy_sd: Path, adapts: bool) -> None:
    models = load_models(str(toy_sd))
    if adapts:
        learns = lora_adapters(models, LoraConfig(), learning_rate=1e-3, seed=0, text_encoder_rate=1e-5)
    else:
        learns = all_weights(models, learning_rate=1e-3, text_encoder_rate=1e-5)
    rates = {name.partition(".")[0]: one.learning_rate for one in learns.groups for name in one.parameters}
    assert rates == {"unet": 1e-3, "text_encoder": 1e-5}
    held = {group["base_lr"] for group in make_optimizer(learns, settings()).param_groups}
    assert held == {1e-3, 1e-5}


def test_scaled_rate_counts_the_images_of_an_update() -> None:
    config = settings(learning_rate=1e-4, scale_lr=True, train_batch_size=4, gradient_accumulation_steps=3)
    assert base_learning_rate(config, num_processes=2) == pytest.approx(24e-4)


def test_plain_rate_is_the_one_asked_for() -> None:
    assert base_learning_rate(settings(learning_rate=1e-4, train_batch_size=4), num_processes=2) == 1e-4


def test_a_rate_of_its_own_is_scaled_alike() -> None:
    config = settings(learning_rate=1e-4, scale_lr=True, train_batch_size=4)
    assert base_learning_rate(config, num_processes=2, rate=1e-5) == pytest.approx(8e-5)


def make_learns(seed: int) -> Learns:
    generator = torch.Generator().manual_seed(seed)
    weights = {"a": nn.Parameter(torch.randn(6, 5, generator=generator)), "b": nn.Parameter(torch.zeros(5))}
    return Learns((Group({"a": weights["a"]}, 1.0), Group({"b": weights["b"]}, 1.0)))


def do_steps(learns: Learns, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 + step)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * group["base_lr"] * (step + 1)
        for parameter in learns.parameters.values():
            parameter.grad = parameter.detach() + torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy"])
def test_every_optimizer_goes_on_bitwise_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    config = settings(optimizer=name, learning_rate=1.0)
    learns = make_learns(0)
    begun = {key: value.detach().clone() for key, value in learns.parameters.items()}
    optimizer = make_optimizer(learns, config)
    do_steps(learns, optimizer, 0, 4)
    path = checkpoints.write(tmp_path, 4, parameters=learns.parameters, optimizer=optimizer, state={})
    do_steps(learns, optimizer, 4, 9)
    again = make_learns(1)
    other = make_optimizer(again, config)
    checkpoints.read(path, parameters=again.parameters, optimizer=other)
    do_steps(again, other, 4, 9)
    assert all(torch.equal(again.parameters[key], value) for key, value in learns.parameters.items())
    assert not any(torch.equal(begun[key], value) for key, value in learns.parameters.items())


def test_adafactor_uses_the_rate_asked_for() -> None:
    learned = nn.Parameter(torch.full((3, 3), 2.0))
    config = settings(optimizer="adafactor", adam_weight_decay=0.0)
    optimizer = make_optimizer(Learns((Group({"a": learned}, 1e-3),)), config)
    learned.grad = torch.ones(3, 3)
    optimizer.step()
    # Its first update of equal gradients is 1 everywhere; relative to the weights' size it would be twice that.
    torch.testing.assert_close(learned.detach(), torch.full((3, 3), 2.0 - 1e-3), atol=1e-6, rtol=0)


def test_prodigy_refuses_two_rates_and_small_ones() -> None:
    learns = Learns((Group({"a": nn.Parameter(torch.ones(2))}, 1.0), Group({"b": nn.Parameter(torch.ones(2))}, 0.5)))
    with pytest.raises(UsageError, match="--optimizer prodigy: finds one learning rate for all"):
        make_optimizer(learns, settings(optimizer="prodigy", learning_rate=1.0))
    with pytest.raises(ValueError, match=r"--learning_rate 0.0001: prodigy multiplies the rate it finds by this"):
        settings(optimizer="prodigy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_8bit_adam": True}, r"--use_8bit_adam: (needs a GPU|bitsandbytes is not installed)"),
        ({"optimizer": "prodigy", "learning_rate": 1.0}, "--optimizer prodigy: prodigyopt is not installed"),
    ],
)
def test_an_optimizer_that_cannot_run_here_is_refused(
    options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=message):
        check_optimizer(settings(**options))


def test_optimizer_holds_what_learns_and_its_settings() -> None:
    learned = nn.Parameter(torch.zeros(3))
    config = settings(adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6, adam_weight_decay=0.3)
    optimizer = make_optimizer(Learns((Group({"a": learned}, 2e-4),)), config)
    (group,) = optimizer.param_groups
    assert group["params"] == [learned]
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.8, 0.9), 1e-6, 0.3, 2e-4)
