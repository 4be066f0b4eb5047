"""State to resume from: ``checkpoint-N`` folders of safetensors and JSON, never pickles.

    checkpoint-200/learned.safetensors     what learns, by name, float32
                   optimizer.safetensors   the optimizer's tensors, as NAME/KEY
                   averages.safetensors    running averages of what learns, by name, with --use_ema
                   state.json              step, and the scalars of the loop

A folder appears under its name only when it is whole; the oldest goes after the new one is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from configs.errors import InputError, TisserandError, UsageError
from finetune.core.loop.sharding import gathered, shared_as
from finetune.core.loop.zero import Moment, put_state, state_of

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the number of updates a checkpoint stands after."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise UsageError(f"--resume_from_checkpoint {path}: a checkpoint is a folder named checkpoint-N")
    return int(match[1])


def find(folder: Path, asked: str | None) -> Path | None:
    """Return the checkpoint to start from: the newest, or the one asked for by name or path; None to start anew.

    Raises:
        UsageError: the one asked for is not there.
    """
    if asked in (None, "latest"):
        return next(iter(reversed(checkpoints(folder))), None)
    for path in (folder / str(asked), Path(str(asked))):
        if path.is_dir():
            step_of(path)
            return path
    have = ", ".join(path.name for path in checkpoints(folder)) or "none"
    raise UsageError(f"--resume_from_checkpoint {asked}: there is no such folder; {folder} has {have}")


def write(
    folder: Path,
    step: int,
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    state: Mapping[str, object],
    averages: Mapping[str, Tensor] | None = None,
    writes: bool = True,
) -> Path:
    """Write ``checkpoint-STEP`` into the run folder.

    Every process must call it, since each may hold a share of the tensors; the one that ``writes`` gets them whole.

    Raises:
        TisserandError: it cannot be written, the disk being full, say; those before it are as they were.
    """
    target = folder / f"checkpoint-{step}"
    partial = folder / f"checkpoint-{step}.partial"
    tensors, scalars = _optimizer_state(parameters, optimizer)
    parts = {"learned": parameters, "optimizer": tensors, "averages": averages or {}}
    whole = {name: gathered(values, keeps=writes) for name, values in parts.items()}
    if not writes:
        return target
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, values in whole.items():
            if values or name != "averages":
                save_file(values, partial / f"{name}.safetensors")
        entries = {"step": step, **state, "optimizer": scalars, "optimizer_groups": _group_numbers(optimizer)}
        text = json.dumps(entries, indent=1)
        (partial / "state.json").write_text(text + "\n", encoding="utf-8")
        for path in partial.iterdir():
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        older = checkpoints(folder)
        kept = f"{older[-1].name} is whole, the same command goes on from it" if older else "no checkpoint is there yet"
        raise TisserandError(f"{target}: cannot be written ({error}); {kept}; make room on the disk first") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def prune(folder: Path, limit: int | None) -> None:
    """Remove the oldest checkpoints of a run folder beyond ``limit``; None keeps all."""
    if limit is not None:
        for old in checkpoints(folder)[: -max(1, limit)]:
            remove(old)


def remove(path: Path) -> None:
    """Remove a checkpoint; where that is cut short, what is left does not look like one."""
    doomed = path.with_name(f"{path.name}.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def clear_remains(folder: Path) -> None:
    """Remove what a process that was killed left half-written in a run folder; no other may write there."""
    for path in folder.glob("*.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def read(
    path: Path,
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    averages: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Put a checkpoint's tensors into what learns, its optimizer and its averages; return ``state.json``.

    Raises:
        InputError: the checkpoint is damaged, or belongs to other parameters.
    """
    try:
        learned = load_file(path / "learned.safetensors")
        tensors = load_file(path / "optimizer.safetensors")
        means = load_file(path / "averages.safetensors") if averages else {}
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: the checkpoint is damaged ({error}); remove it to go on from an older one"
        ) from error
    shapes = {name: tuple(value.shape) for name, value in learned.items()}
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if shapes != expected or (averages and {name: tuple(value.shape) for name, value in means.items()} != expected):
        raise InputError(
            f"{path}: belongs to a run in which other weights learn; use --overwrite or another --output_dir"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shared_as(learned[name], parameter))
            if averages:
                averages[name].copy_(shared_as(means[name], averages[name]))
            entries = {key: value for key, value in state["optimizer"].get(name, {}).items()}
            prefix = f"{name}/"
            for key, value in tensors.items():
                if key.startswith(prefix):
                    entries[key.removeprefix(prefix)] = shared_as(value, parameter)
            if entries:
                put_state(optimizer, parameter, entries)
    for group, numbers in zip(optimizer.param_groups, state["optimizer_groups"], strict=True):
        group.update(numbers)
    return state


def _flush(path: Path) -> None:
    """Have a file on the disk: some file systems find that it is full only then."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _group_numbers(optimizer: Optimizer) -> list[dict[str, float]]:
    """Return what the optimizer counts for a whole group, where it does: Prodigy's estimate of the distance."""
    return [
        {
            name: value
            for name, value in group.items()
            if isinstance(value, int | float)
            and name not in ("lr", "base_lr")
            and value != optimizer.defaults.get(name)
        }
        for group in optimizer.param_groups
    ]


def _optimizer_state(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> tuple[dict[str, Tensor | Moment], dict[str, dict[str, object]]]:
    """Split the optimizer's state, by parameter name, into tensors and plain numbers."""
    tensors: dict[str, Tensor | Moment] = {}
    scalars: dict[str, dict[str, object]] = {}
    for name, parameter in parameters.items():
        for key, value in state_of(optimizer, parameter).items():
            if isinstance(value, Tensor | Moment):
                tensors[f"{name}/{key}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars
