"""Split moments and gradients over the processes with DeepSpeed (ZeRO stages 1 and 2); weights stay whole in each.

    accelerate launch --config_file configs/accelerate/deepspeed.yaml finetune/full.py ...

``deepspeed.initialize`` is called here and not through accelerate, whose wrapper clips and steps inside the backward
pass; the loop looks at a gradient before it is used. DeepSpeed runs in float32: mixed precision is autocast, as
without it. Checkpoints and weights are those of a run that is not split, tensor by tensor.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.optim import Optimizer

from configs.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

BUCKET = 50_000_000
"""Gradients that are sent at once, at most; DeepSpeed's default of ten times as many takes 2 GB."""

_MOMENTS = ("exp_avg", "exp_avg_sq")
_REFUSED = {
    "placeholder_token": "a few rows learn, which leaves nothing to split; use configs/accelerate/multi_gpu.yaml",
    "use_8bit_adam": "its moments cannot be split; leave it out",
}
# What the launcher hands on, by its names for it, and the values that are honoured.
_LAUNCHER = {
    "zero_stage": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", ("1", "2")),
    "gradient_accumulation_steps": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1",)),
    "gradient_clipping": ("ACCELERATE_GRADIENT_CLIPPING", ()),
    "offload_optimizer_device": ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", ("none",)),
    "offload_param_device": ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", ("none",)),
    "zero3_init_flag": ("ACCELERATE_DEEPSPEED_ZERO3_INIT", ("false",)),
    "zero3_save_16bit_model": ("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", ("false",)),
    "deepspeed_config_file": ("ACCELERATE_DEEPSPEED_CONFIG_FILE", ("none",)),
    "deepspeed_moe_layer_cls_names": ("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", ()),
}
_INSTEAD = {
    "zero_stage": "configs/accelerate/fsdp.yaml splits the weights, too",
    "gradient_accumulation_steps": "the recipe's --gradient_accumulation_steps is",
    "gradient_clipping": "the recipe's --max_grad_norm is",
}


def stage_asked() -> int:
    """Return the stage that the launcher asks for, 1 or 2; 0 if it does not ask for DeepSpeed.

    Raises:
        UsageError: in a form that is not honoured, or DeepSpeed is not installed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("true", "1"):
        return 0
    for name, (variable, honoured) in _LAUNCHER.items():
        value = os.environ.get(variable)
        if value is not None and value.lower() not in honoured:
            raise UsageError(
                f"accelerate launch with {name}: {value}: "
                + (f"must be {' or '.join(honoured)}" if honoured else "is not honoured, leave it out")
                + f"; {_INSTEAD.get(name, 'configs/accelerate/deepspeed.yaml has what works')}"
            )
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError("accelerate launch with DeepSpeed: it is not installed; pip install deepspeed")
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))


def check_settings(settings: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Refuse settings that cannot be honoured when moments are split.

    Args:
        settings: of the recipe, by flag.
        accelerator: its processes and precision.

    Raises:
        UsageError: naming the setting, the reason and what to do.
    """
    if accelerator.num_processes == 1:
        raise UsageError(
            "accelerate launch with DeepSpeed: --num_processes 1: there is nothing to split over; use 2 or more"
        )
    if accelerator.mixed_precision == "fp16":
        raise UsageError(
            "--mixed_precision fp16: not with DeepSpeed, which would scale losses by itself; use bf16 or no"
        )
    reasons = {name: reason for name, reason in _REFUSED.items() if settings.get(name)}
    if settings.get("optimizer") != "adamw":
        reasons["optimizer"] = "it needs whole matrices; use adamw"
    for name, reason in reasons.items():
        raise UsageError(f"--{name} {settings[name]}: not with DeepSpeed: {reason}")


def split(
    denoiser: nn.Module, optimizer: Optimizer, accelerator: Accelerator, *, stage: int, largest: float
) -> tuple[Any, Any]:
    """Return DeepSpeed's engine around the model, to be called, and its optimizer around ours, to step.

    Ours holds this process's share from then on, group by group, and still has the learning rates. The parameters
    become views of one tensor a group.

    Args:
        denoiser: is called in autocast afterwards.
        optimizer: AdamW, of all that learns.
        accelerator: its device, precision and processes.
        stage: 1 splits the moments, 2 also what is kept of the gradients.
        largest: the norm that gradients are scaled down to, if above 0.
    """
    os.environ["DS_ACCELERATOR"] = accelerator.device.type  # else it looks for a device by itself
    import deepspeed

    if accelerator.device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # else it compiles a collective for half-precision inference, for minutes
    denoiser.forward = convert_outputs_to_fp32(accelerator.autocast()(denoiser.forward))
    learned = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    zero = {"stage": stage, "reduce_bucket_size": min(BUCKET, learned)}
    # It wants to know a batch size, and does nothing with it here: the loop divides losses and ends updates.
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": largest, "zero_optimization": zero}
    engine, outer, *_ = deepspeed.initialize(model=denoiser, optimizer=optimizer, config=config)
    for group in optimizer.param_groups:
        (flat,) = group["params"]
        moments = {name: torch.zeros_like(flat) for name in _MOMENTS}
        optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}
    # DeepSpeed finds moments by parameter after the first group's first step, which is too early for other groups'.
    outer._lazy_init_hp_params_optimizer_state()
    return engine, outer


def backward(engine: Any, loss: Tensor, *, is_last: bool) -> None:
    """Run a backward pass; after the last of an update each process has its share of the gradients' mean."""
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss, scale_wrt_gas=False)


@dataclass(frozen=True)
class Moment:
    """A moment of one parameter, of which each process may hold a part."""

    parameter: nn.Parameter
    name: str

    def full_tensor(self) -> Tensor:
        """Return it whole; every process must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(self.parameter, self.name)


def state_of(optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, Any]:
    """Return what an optimizer keeps for a parameter, by name; where moments are split, each as a ``Moment``."""
    if not hasattr(parameter, "_hp_mapping"):
        return optimizer.state.get(parameter, {})
    moments = {name: Moment(parameter, name) for name in _MOMENTS}
    step = next(iter(optimizer.state.values()))["step"]  # all groups have stepped as often
    return {"step": step.clone(), **moments}


def put_state(optimizer: Optimizer, parameter: nn.Parameter, state: Mapping[str, Any]) -> None:
    """Give an optimizer what it kept for a parameter, whose value was set before; where it is split, our part."""
    if not hasattr(parameter, "_hp_mapping"):
        optimizer.state[parameter] = dict(state)
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    safe_set_full_fp32_param(parameter, parameter.detach())
    for name in _MOMENTS:
        safe_set_full_optimizer_state(parameter, state[name], name)
    for kept in optimizer.state.values():
        kept["step"].copy_(state["step"])
