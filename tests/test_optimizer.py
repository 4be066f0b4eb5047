"""Learning rates against diffusers' own schedulers, and what the optimizer holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from finetune.core.config import TrainConfig
from finetune.core.optimizer import base_learning_rate, learning_rate_factor, make_optimizer
from finetune.core.trainable import Group, Learns

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


def test_scaled_rate_counts_the_images_of_an_update() -> None:
    config = settings(learning_rate=1e-4, scale_lr=True, train_batch_size=4, gradient_accumulation_steps=3)
    assert base_learning_rate(config, num_processes=2) == pytest.approx(24e-4)


def test_plain_rate_is_the_one_asked_for() -> None:
    assert base_learning_rate(settings(learning_rate=1e-4, train_batch_size=4), num_processes=2) == 1e-4


def test_optimizer_holds_what_learns_and_its_settings() -> None:
    learned = nn.Parameter(torch.zeros(3))
    config = settings(adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6, adam_weight_decay=0.3)
    optimizer = make_optimizer(Learns((Group({"a": learned}, 2e-4),)), config)
    (group,) = optimizer.param_groups
    assert group["params"] == [learned]
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.8, 0.9), 1e-6, 0.3, 2e-4)
