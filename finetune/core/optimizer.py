"""The optimizer from settings, and the learning rate as a function of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from finetune.core.config import TrainConfig
from finetune.core.trainable import Learns

if TYPE_CHECKING:
    from torch.optim import Optimizer


def make_optimizer(learns: Learns, config: TrainConfig) -> Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over what learns, one group per learning rate."""
    groups = [
        {"params": list(group.parameters.values()), "lr": group.learning_rate, "base_lr": group.learning_rate}
        for group in learns.groups
    ]
    return torch.optim.AdamW(
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )


def base_learning_rate(config: TrainConfig, num_processes: int) -> float:
    """Return the learning rate before the schedule, multiplied by the images per update with ``--scale_lr``."""
    scale = config.train_batch_size * config.gradient_accumulation_steps * num_processes if config.scale_lr else 1
    return config.learning_rate * scale


def learning_rate_factor(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """Return the schedule as a function of the updates done so far; diffusers' names and formulas.

    diffusers hands its formulas out inside a scheduler only, so one is built around an optimizer of nothing.
    """
    from diffusers.optimization import get_scheduler

    nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer=nothing,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=total_steps,
    )
    return scheduler.lr_lambdas[0]
