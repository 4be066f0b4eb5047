"""Split what is trained over the processes (FSDP 2): each holds its share of weights, gradients and moments.

    accelerate launch --config_file configs/accelerate/fsdp.yaml finetune/full.py ...

torch's ``fully_shard`` is called here and not through accelerate, which shards on GPUs only: what the tests run on CPUs
is then what runs on GPUs. Nothing is cast on its way between processes: weights stay float32 and mixed precision is
autocast, as without a split. Checkpoints and weights are those of a run that is not split, tensor by tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from configs.errors import UsageError
from finetune.core.learns.averages import Averages
from finetune.core.learns.trainable import Learns
from finetune.core.loop.zero import Moment

if TYPE_CHECKING:
    from accelerate import Accelerator

_WHOLE_MODEL = "no process holds the whole model; leave it out"
_REFUSED = {
    "validation_prompt": f"{_WHOLE_MODEL}, and render with eval.generate when the run is done",
    "validation_prompts": f"{_WHOLE_MODEL}, and render with eval.generate when the run is done",
    "heldout_steps": _WHOLE_MODEL,
    "drift_probes": f"{_WHOLE_MODEL}, and run eval.drift on the finished weights",
    "placeholder_token": "a few rows learn, which leaves nothing to split; use configs/accelerate/multi_gpu.yaml",
    "use_8bit_adam": "its moments cannot be split; leave it out",
    "offload_ema": "each process holds its share of the averages; leave it out",
    "fused_backward": "gradients are added up over the processes first; leave it out",
}
# What the launcher hands on by these names, and the values that are honoured.
_LAUNCHER = {
    "FSDP_VERSION": ("2",),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "false"),
    "FSDP_AUTO_WRAP_POLICY": ("no_wrap",),
    "FSDP_OFFLOAD_PARAMS": ("false",),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false",),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false",),
    "FSDP_IGNORED_MODULES": (),
}


def is_asked() -> bool:
    """Tell whether the launcher asks for FSDP.

    Raises:
        UsageError: in a form that is not honoured.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return False
    for name, honoured in _LAUNCHER.items():
        value = os.environ.get(name, "1" if name == "FSDP_VERSION" else None)
        if value is not None and value.lower() not in honoured:
            raise UsageError(
                f"accelerate launch with {name.lower()}: {value}: "
                + (f"must be {' or '.join(honoured)}" if honoured else "is not honoured, leave it out")
                + "; configs/accelerate/fsdp.yaml has what works"
            )
    return True


def check_settings(settings: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Refuse settings that cannot be honoured when the model is split.

    Args:
        settings: of the recipe, by flag.
        accelerator: its processes and precision.

    Raises:
        UsageError: naming the setting, the reason and what to do.
    """
    if accelerator.num_processes == 1:
        raise UsageError(
            "accelerate launch with FSDP: --num_processes 1: there is nothing to split over; use 2 or more"
        )
    if accelerator.mixed_precision == "fp16":
        raise UsageError("--mixed_precision fp16: not with FSDP, whose shares would scale apart; use bf16 or no")
    reasons = {name: reason for name, reason in _REFUSED.items() if settings.get(name)}
    if settings.get("optimizer") != "adamw":
        reasons["optimizer"] = "it needs whole matrices; use adamw"
    if settings.get("with_prior_preservation") and settings.get("prior_source") == "base_prediction":
        reasons["prior_source"] = f"{_WHOLE_MODEL.partition(';')[0]}; use class_images"
    for name, reason in reasons.items():
        raise UsageError(f"--{name} {settings[name]}: not with FSDP: {reason}")


def shard(denoiser: nn.Module, learns: Learns, averages: Averages | None, accelerator: Accelerator) -> None:
    """Split the model over the processes, in place; ``learns`` and the averages then hold shares, too.

    Transformer blocks, ResNet blocks and layers of the text encoder are gathered one by one when they are needed, all
    else at once. The optimizer is made afterwards.
    """
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    denoiser.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    frees = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    for module in list(denoiser.modules()):
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D | CLIPEncoderLayer):
            fully_shard(module, mesh=mesh, reshard_after_forward=frees)
    fully_shard(denoiser, mesh=mesh)
    denoiser.forward = convert_outputs_to_fp32(accelerator.autocast()(denoiser.forward))
    _take_up(denoiser, learns, averages)


def gather(denoiser: nn.Module, learns: Learns, averages: Averages, *, keeps: bool) -> None:
    """Put the model together again on the CPU, to be saved; only the process that ``keeps`` it has it then.

    Every process must call it. The model does not train afterwards.
    """
    for module in denoiser.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    whole = gathered(dict(denoiser.named_parameters()), keeps=keeps)
    means = gathered(averages.tensors, keeps=keeps)
    if keeps:
        for name, value in whole.items():
            owner, _, key = name.rpartition(".")
            setattr(denoiser.get_submodule(owner), key, nn.Parameter(value))
        _take_up(denoiser, learns, averages)
        for name, value in averages.tensors.items():
            value.copy_(means[name])


def _take_up(denoiser: nn.Module, learns: Learns, averages: Averages | None) -> None:
    """Let what learns, and the averages, be the parameters that the model has now."""
    now = dict(denoiser.named_parameters())
    for group in learns.groups:
        group.parameters.update({name: now[name] for name in group.parameters})
    if averages is not None:
        averages.begin()


def gathered(tensors: Mapping[str, Tensor | Moment], *, keeps: bool) -> dict[str, Tensor]:
    """Return tensors whole and on the CPU to the process that ``keeps`` them; where one is split, all must call it."""
    found = {}
    for name, value in tensors.items():
        whole = value.full_tensor() if isinstance(value, DTensor | Moment) else value
        if keeps:
            found[name] = whole.detach().cpu().contiguous()
    return found


def shared_as(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's share of a whole tensor, where ``like`` of the same shape is split; else the tensor."""
    value = value.to(like.device)
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def clip(accelerator: Accelerator, parameters: Mapping[str, nn.Parameter], largest: float) -> Tensor:
    """Scale the gradients down to a norm of ``largest`` over all, if above 0; return the norm they had."""
    values, largest = list(parameters.values()), largest or float("inf")
    if any(isinstance(value, DTensor) for value in values):
        # accelerate compares lists of tensors here, which fails for shares.
        norm = torch.nn.utils.clip_grad_norm_(values, largest)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
    return accelerator.clip_grad_norm_(values, largest)


@contextmanager
def no_sync(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Add up gradients within each process alone, for a ``with`` block around a backward pass."""
    if not isinstance(model, FSDPModule):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
