"""The optimizer from settings, and the learning rate as a function of the step."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import torch

from configs.errors import UsageError
from finetune.core.learns.trainable import Learns
from finetune.core.settings.methods import TextEncoderConfig
from finetune.core.settings.training import TrainConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer


def check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimizer that cannot run here, before anything is loaded.

    Raises:
        UsageError: its package is missing, or it needs a GPU.
    """
    if config.use_8bit_adam:
        if not torch.cuda.is_available():
            raise UsageError("--use_8bit_adam: needs a GPU; leave it out, or save memory with --optimizer adafactor")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UsageError(
                "--use_8bit_adam: bitsandbytes is not installed; pip install bitsandbytes, or leave it out"
            )
    if config.optimizer == "prodigy" and importlib.util.find_spec("prodigyopt") is None:
        raise UsageError("--optimizer prodigy: prodigyopt is not installed; pip install prodigyopt, or use adamw")


def make_optimizer(learns: Learns, config: TrainConfig) -> Optimizer:
    """Return the optimizer over what learns, one group per learning rate.

    AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) is fused; with 8-bit moments (Dettmers et al. 2022,
    arXiv:2110.02861) bitsandbytes'. Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) is transformers', at the rate
    asked for instead of one relative to the weights. Prodigy (Mishchenko and Defazio 2023, arXiv:2306.06101) is its
    authors', set up as diffusers does.

    Raises:
        UsageError: prodigy, which finds one rate for all, with groups of different rates.
    """
    groups: list[dict[str, Any]] = [
        {"params": list(group.parameters.values()), "lr": group.learning_rate, "base_lr": group.learning_rate}
        for group in learns.groups
    ]
    adam: dict[str, Any] = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            groups,
            lr=config.learning_rate,
            weight_decay=adam["weight_decay"],
            scale_parameter=False,
            relative_step=False,
        )
    if config.optimizer == "prodigy":
        from prodigyopt import Prodigy

        if len({group["lr"] for group in groups}) > 1:
            raise UsageError("--optimizer prodigy: finds one learning rate for all; leave out --text_encoder_lr")
        with redirect_stdout(None):  # it announces its weight decay, from every process
            return Prodigy(groups, decouple=True, use_bias_correction=True, safeguard_warmup=True, **adam)
    if config.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **adam)
    return torch.optim.AdamW(groups, fused=True, **adam)


def base_learning_rate(config: TrainConfig, num_processes: int, rate: float | None = None) -> float:
    """Return ``rate`` (``--learning_rate`` if None), multiplied by the images per update with ``--scale_lr``."""
    scale = config.images_per_update(num_processes) if config.scale_lr else 1
    return (config.learning_rate if rate is None else rate) * scale


def learning_rates(
    config: TrainConfig, text_encoder: TextEncoderConfig, num_processes: int
) -> tuple[float, float | None]:
    """Return the base rates of the U-Net and of the text encoder, or None for one that does not learn."""
    rate = base_learning_rate(config, num_processes)
    if not text_encoder.train_text_encoder:
        return rate, None
    return rate, base_learning_rate(config, num_processes, text_encoder.text_encoder_lr)


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
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    return scheduler.lr_lambdas[0]
