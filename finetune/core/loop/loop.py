"""The one training loop: accumulate, check, clip, step, yield, checkpoint."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from configs.errors import TisserandError, UsageError
from configs.load import Terminated
from finetune.core.learns.averages import Averages
from finetune.core.learns.optimizer import learning_rate_factor, make_optimizer
from finetune.core.learns.trainable import Learns
from finetune.core.loop import checkpoints, zero
from finetune.core.loop.compilation import compile_blocks
from finetune.core.loop.fused_backward import FusedBackward, fused_backward
from finetune.core.loop.sharding import clip, no_sync, shard
from finetune.core.loss import Loss
from finetune.core.run import Batches, Run, Step, Update
from finetune.diffusion.draws import counter_seed

SMALLEST_SCALE = 1e-4
"""Below it a gradient scaler has given up; the limit of fairseq's ``--min-loss-scale``."""


@dataclass
class _Window:
    """What happened since the last line of metrics.jsonl; kept on the device until somebody reads it."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    per_image: list[tuple[int, list[Tensor]]] = field(default_factory=list)
    images: int = 0
    started_s: float = field(default_factory=time.perf_counter)


@dataclass(kw_only=True)
class _Training:
    """What the steps of one run share.

    Attributes:
        model: the module that is called, as the processes share it.
        optimizer: that steps, as the processes share it; ``bare_optimizer`` is torch's own.
        factor: of the learning rate, by updates done.
        fused: steps within the backward pass, or None.
        reads_are_free: a loss may be looked at after every step.
        begun_s: when the run began, had it never stopped.
    """

    run: Run
    model: nn.Module
    learns: Learns
    batches: Batches
    loss: Loss
    averages: Averages | None
    optimizer: Any
    bare_optimizer: Any
    factor: Callable[[int], float]
    reads_are_free: bool
    fused: FusedBackward | None = None
    begun_s: float = field(default_factory=time.perf_counter)
    window: _Window = field(default_factory=_Window)


def train(
    run: Run,
    denoiser: nn.Module,
    learns: Learns,
    batches: Batches,
    loss: Loss,
    averages: Averages | None = None,
    until: int | None = None,
) -> Generator[Step, bool | None, None]:
    """Train, yielding once per optimizer update, after the update and before its checkpoint.

    What the caller changes in the parameters while it holds a step is therefore in the checkpoint. The learning rate of
    a step is base x share of the group x factor(updates done). The loss of an update is the sum of weight x loss over
    all its images, on all processes and forward passes, divided by the sum of their weights.

    The caller ends the run with the step it holds by sending True (``generator.send``); a checkpoint is written then,
    so that the run can go on all the same. A ``for`` loop sends nothing, and trains to the end.

    Args:
        run: where to, on what, with which settings of the loop, and which checkpoint to start from.
        denoiser: the module that is called by ``loss``; only what ``learns`` names has gradients.
        learns: parameters and base learning rates.
        batches: the images of every update.
        loss: one value per image.
        averages: kept in the checkpoints; it is the caller who updates them.
        until: the last update, where the run ends before its plan.

    Raises:
        TisserandError: a loss or gradient that is not finite, naming step, images and timesteps; nothing is written
            after it.
        Terminated: SIGTERM came; a checkpoint of the last finished update has been written.
    """
    compile_blocks(run, denoiser, batches, loss)
    training, config = _prepared(run, denoiser, learns, batches, loss, averages), run.train
    done = _take_up(training)
    total = run.total_steps if until is None else until
    with (
        _termination() as terminated,
        tqdm(total=total, initial=done, desc="training", unit="step", disable=None if run.is_main else True) as bar,
        fused_backward(
            training.bare_optimizer, is_on=config.fused_backward, leaves_out=training.reads_are_free
        ) as training.fused,
    ):
        for number in range(done + 1, total + 1):
            value = _update(training, number)
            is_last = number == total
            stop = _agreed(run.accelerator, bool(terminated))
            metrics = _line(training, number) if number % config.logging_steps == 0 or is_last else None
            if metrics is not None:
                bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
            bar.update()
            step = Step(number=number, total=total, loss=value, metrics=metrics)
            is_ended = bool((yield step)) and not is_last
            if is_ended and metrics is None:
                run.log(replace(step, metrics=_line(training, number)))
            is_terminated = stop and not is_last and not is_ended
            if number % config.checkpointing_steps == 0 or is_ended or is_terminated:
                _write_checkpoint(training, number)
            if is_terminated:
                run.say(f"terminated; continue from checkpoint-{number} with the same command")
                raise Terminated
            if is_ended:
                return


def drive(steps: Generator[Step, bool | None, None], after: Callable[[Step], bool]) -> int | None:
    """Run training to its end, or to the step after which ``after`` says so; return the last step, or None."""
    last, ends = None, None
    with suppress(StopIteration):
        while True:
            step = steps.send(ends)
            last, ends = step.number, after(step)
    return last


def _prepared(
    run: Run, denoiser: nn.Module, learns: Learns, batches: Batches, loss: Loss, averages: Averages | None
) -> _Training:
    """Make the optimizer, and split or wrap model and optimizer as the processes share them."""
    config, accelerator = run.train, run.accelerator
    if run.is_sharded:
        shard(denoiser, learns, averages, accelerator)
    bare_optimizer = make_optimizer(learns, config)
    model, optimizer = denoiser, cast(Any, bare_optimizer)
    if run.zero_stage:
        stage, largest = run.zero_stage, config.max_grad_norm
        model, optimizer = zero.split(denoiser, bare_optimizer, accelerator, stage=stage, largest=largest)
    elif not run.is_sharded:
        model, optimizer = accelerator.prepare(denoiser, bare_optimizer)
    model.train()
    return _Training(
        run=run,
        model=model,
        learns=learns,
        batches=batches,
        loss=loss,
        averages=averages,
        optimizer=optimizer,
        bare_optimizer=bare_optimizer,
        factor=learning_rate_factor(config, run.total_steps),
        reads_are_free=reading_waits_for_nothing(accelerator.device),
    )


def _take_up(training: _Training) -> int:
    """Put everything as the checkpoint left it, if there is one; return the updates done."""
    run, averages = training.run, training.averages
    if run.checkpoint is None:
        return 0
    state = checkpoints.read(
        run.checkpoint,
        parameters=training.learns.parameters,
        optimizer=training.bare_optimizer,
        averages=averages.tensors if averages else None,
    )
    done = int(state["step"])
    training.begun_s -= float(state["elapsed_s"])
    if changed := [name for name, value in state.get("inputs", {}).items() if run.inputs.get(name) != value]:
        raise UsageError(f"--{changed[0]}: differs from what {run.checkpoint} began with; --overwrite starts anew")
    if averages:
        averages.restore(done)
    _restore(training.window, state, run.accelerator)
    run.say(f"continuing after step {done}, from {run.checkpoint}")
    return done


def _update(training: _Training, number: int) -> Tensor:
    """Do one optimizer update; return its mean loss, a scalar on the device."""
    run, config, fused, window = training.run, training.run.train, training.fused, training.window
    learns, optimizer, accelerator = training.learns, training.optimizer, training.run.accelerator
    # Module dropout, where there is any: not the same in every process, whose images differ.
    torch.manual_seed(counter_seed(run.seed, "update", number) + accelerator.process_index)
    shares = [group.share(number - 1) for group in learns.groups]
    for group, share in zip(training.bare_optimizer.param_groups, shares, strict=True):
        group["lr"] = group["base_lr"] * share * training.factor(number - 1)
    update = training.batches.update(number - 1)
    if fused:
        fused.begin(shares)
    value, per_image = _backward(run, training.model, training.loss, update)
    _rest(learns, shares)
    if run.zero_stage:  # which clips as it steps
        norm = optimizer.scaled_global_norm()
    else:
        norm = fused.norm() if fused else clip(accelerator, learns.parameters, config.max_grad_norm)
    window.losses.append(value)
    window.norms.append(norm.detach())
    window.per_image.append((number, per_image))
    window.images += update.num_images
    if training.reads_are_free:
        _check_finite(window, training.batches, accelerator)
    if not fused:
        optimizer.step()
        optimizer.zero_grad(set_to_none=config.set_grads_to_none)
    return value


def _line(training: _Training, number: int) -> dict[str, Any]:
    """Return a line of metrics.jsonl, and begin a new window."""
    window, accelerator = training.window, training.run.accelerator
    _check_finite(window, training.batches, accelerator)
    line = _metrics(number, window, training.batches, training.bare_optimizer, accelerator, training.begun_s)
    training.window = _Window()
    return line


def _write_checkpoint(training: _Training, number: int) -> None:
    """Write the state after this update; every process must call it."""
    run, window, averages = training.run, training.window, training.averages
    _check_finite(window, training.batches, run.accelerator)
    state = {
        "elapsed_s": time.perf_counter() - training.begun_s,
        "inputs": run.inputs,
        **_keep(window, run.accelerator),
    }
    with _together(run.accelerator):
        checkpoints.write(
            run.folder,
            number,
            parameters=training.learns.parameters,
            optimizer=training.bare_optimizer,
            state=state,
            averages=averages.tensors if averages else None,
            writes=run.is_main,
        )
    if run.is_main:
        checkpoints.prune(run.folder, run.train.checkpoints_total_limit)


def reading_waits_for_nothing(device: torch.device) -> bool:
    """Tell whether a loss may be looked at after every step.

    Reading a number off a GPU waits for it, so there finite values are checked where numbers are read anyway.
    """
    return device.type == "cpu"


def _backward(run: Run, model: nn.Module, loss: Loss, update: Update) -> tuple[Tensor, list[Tensor]]:
    """Run the forward and backward passes of one update; return its mean loss and the losses of its images."""
    accelerator, per_image = run.accelerator, []
    # DDP averages gradients over processes; the loss wants their sum.
    share = accelerator.num_processes / update.weight
    for place, batch in enumerate(update.batches, start=1):
        is_last = place == len(update.batches)
        with nullcontext() if is_last or run.zero_stage else no_sync(accelerator, model):
            losses = loss(model, batch)
            value = (losses * batch.weights).sum() * share
            zero.backward(model, value, is_last=is_last) if run.zero_stage else accelerator.backward(value)
        per_image.append((losses * batch.weights).detach())
    return torch.cat(per_image).sum() * share, per_image


def _rest(learns: Learns, shares: list[float]) -> None:
    """Drop the gradients of groups that rest; only now, so that DDP finds the same parameters used in every update."""
    for group, share in zip(learns.groups, shares, strict=True):
        if not share:
            for parameter in group.parameters.values():
                parameter.grad = None


def _check_finite(window: _Window, batches: Batches, accelerator: Any) -> None:
    """Stop at the first loss or gradient since the last look that is not finite.

    With a gradient scaler (fp16) a gradient may overflow: the scaler then leaves the update out and lowers its scale,
    which has its end.
    """
    if not window.losses:
        return
    watched = torch.stack(window.losses)
    if accelerator.scaler is None:
        watched = watched + torch.stack(window.norms)
    bad = (~watched.isfinite()).float()
    if accelerator.num_processes > 1:  # all must stop together, whichever of them holds the image
        bad = accelerator.reduce(bad, reduction="sum")
    if not bool(bad.any()):
        if accelerator.scaler is not None and accelerator.scaler.get_scale() < SMALLEST_SCALE:
            raise TisserandError(
                f"step {window.per_image[-1][0]}: the gradient is not finite at any scale; no weights were written; "
                "lower --learning_rate, or use --mixed_precision bf16 or no"
            )
        window.per_image.clear()
        return
    place = int(bad.nonzero()[0])
    number, per_image = window.per_image[place - len(window.losses)]
    rows = [
        f"{name} at timestep {timestep}"
        for batch in batches.update(number - 1).batches
        for name, timestep in zip(batch.names, batch.timesteps.tolist(), strict=True)
    ]
    wrong = [row for row, good in zip(rows, torch.cat(per_image).isfinite().tolist(), strict=True) if not good]
    wrong, rows = gather_object(wrong), gather_object(rows)
    what = "loss" if wrong else "gradient"
    shown = ", ".join((wrong or rows)[:8]) + (", ..." if len(wrong or rows) > 8 else "")
    raise TisserandError(
        f"step {number}: the {what} is not finite (images {shown}); no weights were written; "
        "lower --learning_rate, or use --mixed_precision no"
    )


def _metrics(
    number: int, window: _Window, batches: Batches, optimizer: Any, accelerator: Any, begun_s: float
) -> dict[str, Any]:
    """Return a line of metrics.jsonl: means since the line before."""
    losses = torch.stack(window.losses).double().mean()
    loss = accelerator.reduce(losses, reduction="mean")
    norms = torch.stack(window.norms).double()
    norms = norms[norms.isfinite()]  # with a gradient scaler others are those of updates that were left out
    now_s = time.perf_counter()
    return {
        "step": number,
        "epoch": number / batches.steps_per_epoch,
        "loss": float(loss),
        # Of the first group that learns: others may rest.
        "learning_rate": next((group["lr"] for group in optimizer.param_groups if group["lr"]), 0.0),
        "grad_norm": float(norms.mean()) if len(norms) else None,
        "images_per_s": round(window.images / (now_s - window.started_s), 3),
        "elapsed_s": round(now_s - begun_s, 3),
    }


def _keep(window: _Window, accelerator: Any) -> dict[str, object]:
    """Return the window as plain numbers: a mean must come out the same whether or not the run stopped within it."""
    losses = [float(value) for value in window.losses]
    scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    return {"losses": losses, "norms": [float(value) for value in window.norms], "grad_scaler": scaler}


def _restore(window: _Window, state: dict[str, Any], accelerator: Any) -> None:
    """Take up the window, and the gradient scaler, where the checkpoint left them."""
    device = accelerator.device
    window.losses = [torch.tensor(value, device=device) for value in state["losses"]]
    window.norms = [torch.tensor(value, device=device) for value in state["norms"]]
    if accelerator.scaler is not None and state["grad_scaler"] is not None:
        accelerator.scaler.load_state_dict(state["grad_scaler"])


def _agreed(accelerator: Any, flag: bool) -> bool:
    """Tell whether any process raises its flag."""
    if accelerator.num_processes == 1:
        return flag
    raised = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(raised, reduction="sum") > 0)


@contextmanager
def _together(accelerator: Any) -> Iterator[None]:
    """Wait for one another at the end of a block; what fails in one process fails in all, and none waits forever."""
    failed: list[TisserandError] = []
    try:
        yield
    except TisserandError as error:
        failed.append(error)
    if _agreed(accelerator, bool(failed)):
        raise failed[0] if failed else TisserandError("another process failed; its message says why")


@contextmanager
def _termination() -> Iterator[list[bool]]:
    """Note SIGTERM instead of dying of it; yields a list that is empty until it comes."""
    came: list[bool] = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)
