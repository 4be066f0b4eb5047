"""How much memory training will take, measured on one and two images before the first step, and what to lower."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from configs.errors import TisserandError
from finetune.core.learns.trainable import Learns
from finetune.core.loop.zero import BUCKET
from finetune.core.loss import Loss
from finetune.core.out_of_memory import advice
from finetune.core.run import Batch, Batches, Run
from finetune.core.settings.training import TrainConfig

_MARGIN = 1.25
"""Beyond this many times the free memory a run is refused; between it and the free memory it is warned of."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of one process.

    Attributes:
        weights: of all modules; they are in memory already.
        gradients: of what learns.
        optimizer: its state.
        activations: of one forward and backward pass of a whole batch, temporaries included.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def to_come(self) -> int:
        """What is not in memory yet."""
        return self.gradients + self.optimizer + self.activations


def check_memory(run: Run, denoiser: nn.Module, learns: Learns, batches: Batches, loss: Loss) -> bool:
    """Print what training will take beside what is free; every process must call it.

    Returns:
        Whether to train: not with ``--dry_run``.

    Raises:
        TisserandError: far more is needed than is free; the message says what to lower.
    """
    accelerator, config = run.accelerator, run.train
    update = batches.update(0)
    batch = max(update.batches, key=lambda one: one.latents.numel())
    denoiser.train()
    with accelerator.autocast():
        need = estimate(denoiser, list(learns.parameters.values()), loss, batch, config)
    if run.is_sharded:  # measured as a whole, split afterwards
        split = {name: getattr(need, name) // accelerator.num_processes for name in ("gradients", "optimizer")}
        need = dataclasses.replace(need, **split)
    elif run.zero_stage:  # beside the moments a copy of the weights, and beside a share of the gradients what comes in
        whole, share = need.gradients, need.gradients // accelerator.num_processes
        gradients = min(4 * BUCKET, whole) + share + (whole if run.zero_stage == 1 else share)
        need = dataclasses.replace(
            need, gradients=gradients, optimizer=need.optimizer // accelerator.num_processes + share
        )
    elif accelerator.num_processes > 1:  # the buckets in which gradients are averaged
        need = dataclasses.replace(need, gradients=2 * need.gradients)
    free, sharing = free_here(accelerator.device)
    images, height, width = len(batch.names), *batch.latents.shape[-2:]
    run.say(
        f"memory: weights {_size(need.weights)}; to come: gradients {_size(need.gradients)}, optimizer "
        f"{_size(need.optimizer)}, activations {_size(need.activations)} ({images} x {height}x{width} latents); "
        f"{_size(free)} free" + f" for each of {sharing} processes" * (sharing > 1)
    )
    if need.to_come > _MARGIN * free:
        raise TisserandError(f"memory: {_size(need.to_come)} are needed and {_size(free)} free; {advice(config)}")
    if need.to_come > free:
        run.say(f"warning: memory may not be enough; {advice(config)}")
    if config.dry_run:
        run.say("dry run: everything was checked; leave out --dry_run to train")
    return not config.dry_run


def estimate(
    denoiser: nn.Module, parameters: list[nn.Parameter], loss: Loss, batch: Batch, config: TrainConfig
) -> Need:
    """Measure a pass of one image and of two, and count what is known without measuring."""
    each = [parameter.numel() * 4 for parameter in parameters]
    gradients = sum(each)
    passes = [peaks(denoiser, parameters, loss, _first(batch, count)) for count in (1, 2)[: len(batch.names)]]
    forward, whole = (
        first + max(0, last - first) * (len(batch.names) - 1) for first, last in zip(passes[0], passes[-1], strict=True)
    )
    return Need(
        weights=sum(tensor.nbytes for tensor in (*denoiser.parameters(), *denoiser.buffers())),
        gradients=max(each, default=0) if config.fused_backward else gradients,
        optimizer=_optimizer_bytes(parameters, config),
        activations=max(forward, whole - gradients),
    )


def free_here(device: torch.device) -> tuple[int, int]:
    """Return the bytes that this process can still take on a device, and how many processes share what is there."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    return free_memory(device) // sharing, sharing


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be taken on a device."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + held)
    return int(psutil.virtual_memory().available)


def peaks(denoiser: nn.Module, parameters: list[nn.Parameter], loss: Loss, batch: Batch) -> tuple[int, int]:
    """Return the most bytes held at once in a forward pass, and with the backward pass, gradients included."""
    with _Held() as held:
        value = (loss(denoiser, batch) * batch.weights).sum()
        forward = held.most
        value.backward()
    for parameter in parameters:
        parameter.grad = None
    return forward, held.most


def _first(batch: Batch, count: int) -> Batch:
    """Return the first images of a batch."""
    cut: dict[str, Any] = {"conditions": batch.conditions.rows(range(min(count, len(batch.names))))}
    cut |= {
        field.name: value[:count]
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor | tuple)
    }
    return dataclasses.replace(batch, **cut)


def _optimizer_bytes(parameters: Iterable[nn.Parameter], config: TrainConfig) -> int:
    """Return what the optimizer keeps."""
    if config.optimizer == "adafactor":  # a row and a column of each matrix
        return 4 * sum(sum(p.numel() // side for side in p.shape[-2:]) if p.ndim > 1 else p.numel() for p in parameters)
    per_weight = 16 if config.optimizer == "prodigy" else 2 if config.use_8bit_adam else 8
    return per_weight * sum(parameter.numel() for parameter in parameters)


def _size(count: int) -> str:
    """Return bytes as people read them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


class _Held(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, as long as they live, on any device.

    torch's own counter (``torch.cuda.max_memory_allocated``) knows GPUs only.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it made."""
        result = func(*args, **(kwargs or {}))
        given = {value.untyped_storage()._cdata for value in args if isinstance(value, Tensor)}
        tree_map_only(Tensor, lambda tensor: self._note(tensor, given), result)
        return result

    def _note(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
