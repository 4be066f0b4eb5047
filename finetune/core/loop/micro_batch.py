"""How many images go through the model at once: as many as memory holds, an update's images divided evenly.

Fewer and larger passes are faster, and the result is the same but for rounding: noise, timestep and crop belong to the
image's position, and the loss is a mean over the update.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from configs.errors import UsageError
from finetune.core.learns.trainable import Learns
from finetune.core.loop.memory import estimate, free_here, peaks
from finetune.core.loss import Loss
from finetune.core.out_of_memory import is_out_of_memory
from finetune.core.run import Batch, Batches, Run
from finetune.core.settings.training import TrainConfig

T = TypeVar("T")

_USABLE = 0.9
"""Share of the free memory that is planned with: an allocator loses some in gaps, a kernel takes room to work."""


def fit_micro_batch(run: Run, denoiser: nn.Module, learns: Learns, batches: Batches, loss: Loss) -> TrainConfig:
    """Return the settings of the loop, with ``--train_batch_size auto`` chosen; every process must call it.

    The number is the largest divisor of a process's images whose pass fits by the estimate, and then does: one pass of
    that size is run. It is printed, kept in environment.json, and a continued run keeps it.

    Raises:
        UsageError: the model will be split over the processes, and a whole one is measured.
    """
    train, accelerator = run.train, run.accelerator
    if train.train_batch_size == "auto":
        if run.is_sharded:
            raise UsageError("--train_batch_size auto: not with FSDP: what is measured is a whole model; give a number")
        share = train.images_per_update(accelerator.num_processes) // accelerator.num_processes
        denoiser.train()
        with accelerator.autocast():
            size, needs, usable = _largest(run, denoiser, list(learns.parameters.values()), batches, loss, share)
        size = min(gather_object([size]))
        train = train.with_micro_batch(size, accelerator.num_processes)
        run.note(train_batch_size=size)
        run.say(
            f"--train_batch_size auto: {size} images a pass ({needs / 1e9:.2f} of {usable / 1e9:.2f} GB), "
            f"{train.gradient_accumulation_steps} passes an update; a continued run keeps this"
        )
    return train


def _largest(
    run: Run, denoiser: nn.Module, parameters: list[nn.Parameter], batches: Batches, loss: Loss, share: int
) -> tuple[int, int, int]:
    """Return the images of a pass that fit in memory, what they need, and what may be used, in bytes."""
    whole = batches.cut(run.train.with_micro_batch(share, run.accelerator.num_processes))
    updates = [whole.update(number) for number in (0, run.total_steps - 1)]  # a method may have two stages
    batch = max((one for update in updates for one in update.batches), key=lambda one: one.latents.numel())
    # Prior rows go through the model beside the images.
    rows = max(
        round(sum(len(one.names) for one in update.batches) * run.accelerator.num_processes / update.num_images)
        for update in updates
    )
    one = estimate(denoiser, parameters, loss, _rows(batch, 1), run.train)
    two = _tried(partial(estimate, denoiser, parameters, loss, _rows(batch, 2), run.train), parameters)
    usable = int(_USABLE * free_here(run.accelerator.device)[0])
    fixed, each = one.gradients + one.optimizer, max(0, two.activations - one.activations) if two else usable
    for size in (number for number in range(share, 1, -1) if share % number == 0):
        if fixed + one.activations + each * (size * rows - 1) > usable:
            continue
        held = _tried(partial(peaks, denoiser, parameters, loss, _rows(batch, size * rows)), parameters)
        if held and one.optimizer + max(*held, one.gradients) <= usable:
            return size, one.optimizer + max(held), usable
    return 1, fixed + one.activations + each * (rows - 1), usable


def _rows(batch: Batch, count: int) -> Batch:
    """Return a batch of this many rows, of one that may have fewer: they come round again."""
    places = [place % len(batch.names) for place in range(count)]
    chosen: dict[str, Any] = {"conditions": batch.conditions.rows(places)}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            chosen[field.name] = value[torch.tensor(places, device=value.device)]
        elif isinstance(value, tuple):
            chosen[field.name] = tuple(value[place] for place in places)
    return dataclasses.replace(batch, **chosen)


def _tried(work: Callable[[], T], parameters: list[nn.Parameter]) -> T | None:
    """Return what a pass tells of memory, or None if memory runs out in it; then give back what it left behind."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    for parameter in parameters:
        parameter.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
