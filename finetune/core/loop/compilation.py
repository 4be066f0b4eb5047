"""Compile the blocks that the U-Net repeats, where it pays: each once for every shape it meets, and nothing else.

Weights, their names, checkpoints and saved files are those of a run that is not compiled; results differ by rounding.
Whoever looks at the model while it learns runs it as it is (``uncompiled``): no other shapes are compiled for a look.
"""

from __future__ import annotations

import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from configs.errors import UsageError
from finetune.core.loss import Loss
from finetune.core.run import Batch, Batches, Run

_GAIN = 0.1
"""Share of a step that compiled blocks save on a GPU: at the low end of what others report, 1.06x to 1.3x."""
_BLOCK_S = 6.0
"""Seconds to compile a block for a shape, forward and backward: 6.5 on a CPU core; not measured on a GPU yet."""
_MOST_VARIANTS = 1024
"""Shapes of one kind of block beyond which it runs uncompiled; torch's own limit of 8 is less than a U-Net has."""


def uncompiled(run: Run) -> AbstractContextManager[Any]:
    """Run compiled blocks as they are written, for a ``with`` block."""
    return nullcontext() if run.train.compile == "no" else torch.compiler.set_stance("force_eager")


def compile_blocks(run: Run, denoiser: nn.Module, batches: Batches, loss: Loss, *, backend: str = "inductor") -> None:
    """Compile the repeated blocks of the model in place, if ``--compile`` says so; every process must call it.

    ``auto`` compares what compiling costs with what it saves over the steps to come. A continued run does as it began,
    so that it ends with the same bits.

    Raises:
        UsageError: ``--compile yes`` where it cannot be done.
    """
    asked = run.train.compile
    if asked == "no":
        return
    obstacle = _obstacle(run)
    if asked == "yes" and obstacle:
        raise UsageError(f"--compile yes: {obstacle}; leave it out")
    if asked == "auto":
        if "compiled" in run.began:
            does, why = bool(run.began["compiled"]) and not obstacle, "as the run began"
        else:
            does, why = _pays(run, denoiser, batches, loss, obstacle)
        does, why = broadcast_object_list([does, why])
        run.say(f"--compile auto: {'yes' if does else 'no'}, {why}")
        run.note(compiled=does)
        if not does:
            return
    import torch._dynamo.config as limits

    limits.recompile_limit = max(limits.recompile_limit, _MOST_VARIANTS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 2 * _MOST_VARIANTS)
    # The compiler looks at the gradients of all inputs, and is warned of those that will have none.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf Tensor")
    blocks = repeated_blocks(denoiser)
    for block in blocks:
        block.compile(dynamic=False, backend=backend)
    if asked == "yes":
        run.say(f"--compile yes: {len(blocks)} blocks are compiled within the first steps")


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """Return the transformer and ResNet blocks, which hold nearly all of the work."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    return [module for module in denoiser.modules() if isinstance(module, BasicTransformerBlock | ResnetBlock2D)]


def _obstacle(run: Run) -> str:
    """Say why blocks cannot be compiled here, or nothing."""
    if run.is_sharded:
        return "not with FSDP, whose blocks are put together and taken apart around each call"
    if run.accelerator.device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "PyTorch's compiler needs Triton on a GPU, and it is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "PyTorch's compiler needs a C++ compiler on a CPU, and there is none (install g++, or set CXX)"
    return ""


def _pays(run: Run, denoiser: nn.Module, batches: Batches, loss: Loss, obstacle: str) -> tuple[bool, str]:
    """Tell whether compiling costs less than it saves, and why."""
    if obstacle:
        return False, obstacle
    if run.accelerator.device.type == "cpu":
        return False, "on a CPU compiled blocks took minutes to make and were no faster; --compile yes does it anyway"
    variants, pass_s = _measure(run, denoiser, batches, loss)
    begun = int(run.checkpoint.name.partition("-")[2]) if run.checkpoint else 0
    passes = (run.total_steps - begun) * run.train.gradient_accumulation_steps
    return estimate_gain(variants, pass_s, passes)


def estimate_gain(variants: int, pass_s: float, passes: int) -> tuple[bool, str]:
    """Tell whether it pays to compile so many blocks for so many passes that take so long each, and why."""
    saved_s, cost_s = _GAIN * pass_s * passes, _BLOCK_S * variants
    return saved_s > cost_s, (
        f"{passes} passes of {pass_s:.3g} s may save {saved_s:.0f} s ({_GAIN:.0%}), and {variants} different blocks "
        f"take about {cost_s:.0f} s to compile"
    )


def _measure(run: Run, denoiser: nn.Module, batches: Batches, loss: Loss) -> tuple[int, float]:
    """Return how many blocks and shapes the first epoch's passes have, and the seconds of a pass of the first update.

    The last update of an epoch may be short: that is one more shape of everything.
    """
    seen: set[object] = set()

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        sizes = [tuple(value.shape) for value in (*given, *block.parameters()) if isinstance(value, Tensor)]
        seen.add((type(block), *sizes))

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in repeated_blocks(denoiser)]
    learning = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    edges = {0, batches.steps_per_epoch - 1}
    taken_s = float("inf")
    try:
        for number in [*sorted(edges), 0]:
            for batch in batches.update(number).batches:
                taken_s = _timed_pass(run, denoiser, batch, loss, learning)
    finally:
        for hook in hooks:
            hook.remove()
    return len(seen), taken_s


def _timed_pass(run: Run, denoiser: nn.Module, batch: Batch, loss: Loss, learning: list[nn.Parameter]) -> float:
    """Run a forward and a backward pass, forget them, and return the seconds they took on the device."""
    _wait(run)
    begun_s = time.perf_counter()
    with run.accelerator.autocast():
        value = loss(denoiser, batch).sum()
    value.backward()
    _wait(run)
    for parameter in learning:
        parameter.grad = None
    return time.perf_counter() - begun_s


def _wait(run: Run) -> None:
    """Wait until the device has done what it was given."""
    if run.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
