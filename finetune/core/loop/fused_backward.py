"""The optimizer's step within the backward pass: each gradient is used and freed as soon as it is whole.

All gradients together take as much memory as what learns; so only the largest one does (LOMO, Lv et al. 2023,
arXiv:2306.09782, with any optimizer that looks at one tensor at a time). The weights are those of the ordinary step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from configs.errors import UsageError
from finetune.core.data.batches import CaptionedBatches
from finetune.core.run import Run

if TYPE_CHECKING:
    from torch.optim import Optimizer


def check_fused_backward(run: Run, batches: CaptionedBatches) -> None:
    """Refuse ``--fused_backward`` where a gradient is not whole after one backward pass of one process.

    Raises:
        UsageError: naming the reason and what to do.
    """
    if not run.train.fused_backward:
        return
    if run.accelerator.num_processes > 1:
        raise UsageError(
            f"--fused_backward: {run.accelerator.num_processes} processes add up their gradients after the step would "
            "be done; train in one, or leave it out"
        )
    if run.accelerator.mixed_precision == "fp16":
        raise UsageError("--fused_backward: with fp16 all gradients are looked at before a step; use bf16 or no")
    if len(batches.shapes) > 1:
        raise UsageError(
            f"--fused_backward: pictures of {len(batches.shapes)} shapes, and each shape of an update has a backward "
            "pass of its own; leave out --buckets"
        )


class FusedBackward:
    """Steps a parameter when its gradient is there; to be asked for the norm after each backward pass."""

    def __init__(self, optimizer: Optimizer, *, leaves_out: bool) -> None:
        """Take the optimizer; with ``leaves_out`` a gradient that is not finite makes no step."""
        self._optimizer, self._leaves_out = optimizer, leaves_out
        self._groups = optimizer.param_groups
        self._rests: Sequence[bool] = [False] * len(self._groups)
        self._norms: dict[int, Tensor] = {}
        places = [(group, p) for group, entry in enumerate(self._groups) for p in entry["params"]]
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._step, place, group))
            for place, (group, parameter) in enumerate(places)
        ]

    def begin(self, shares: Sequence[float]) -> None:
        """Say which share of its learning rate each group has in the coming step; at 0 it rests."""
        self._rests = [not share for share in shares]
        self._norms.clear()

    def norm(self) -> Tensor:
        """Return the norm over the gradients of this step, as clipping would have found it, a scalar on the device."""
        return torch.linalg.vector_norm(torch.stack([self._norms[place] for place in sorted(self._norms)]))

    def _step(self, place: int, group: int, parameter: nn.Parameter) -> None:
        """Update one parameter; the optimizer sees no other."""
        if not self._rests[group]:
            assert parameter.grad is not None
            norm = torch.linalg.vector_norm(parameter.grad)
            self._norms[place] = norm
            if not self._leaves_out or bool(norm.isfinite()):
                one: dict[str, Any] = {**self._groups[group], "params": [parameter]}
                self._optimizer.param_groups = [one]
                try:
                    self._optimizer.step()
                finally:
                    self._optimizer.param_groups = self._groups
        parameter.grad = None


@contextmanager
def fused_backward(optimizer: Optimizer, *, is_on: bool, leaves_out: bool) -> Iterator[FusedBackward | None]:
    """Let backward passes within the block step the parameters of the optimizer; yields None if it is not on."""
    fused = FusedBackward(optimizer, leaves_out=leaves_out) if is_on else None
    try:
        yield fused
    finally:
        for hook in fused.hooks if fused else ():
            hook.remove()
