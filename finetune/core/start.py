"""Start a run: the folder and its lock, what was asked for, and which checkpoint it goes on from."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from accelerate import Accelerator

import configs.load
from configs.errors import UsageError
from data_prep.folders.publish import write_whole
from data_prep.folders.run_folder import (
    CARD,
    CONFIG,
    DRIFT,
    DRIFT_FOLDER,
    ENVIRONMENT,
    HELDOUT,
    LOCK,
    METRICS,
    PROVENANCE,
    SELECTION,
)
from finetune.core.loop import checkpoints, sharding, zero
from finetune.core.loop.launch import check_launch, environment, make_accelerator, set_threads
from finetune.core.run import Run, free_folder, read_json
from finetune.core.settings.training import CHANGEABLE, TrainConfig

_DECIDED = ("train_batch_size", "compiled")  # what the machine decided when the run began
_OF_THE_END = frozenset({"drift_policy", "keep"})  # which weights a run leaves, and whether it goes on after drift
# They say where things are put or shown, and leave what is learned alone.
_WITHOUT_EFFECT = CHANGEABLE - {"max_train_steps", "num_train_epochs", "drift_steps"} - _OF_THE_END


def start_run(
    config: object,
    train: TrainConfig,
    *,
    num_images: int,
    data_hash: str,
    weights_file: str,
    more_files: tuple[str, ...] = (),
    base_hash: str | None = None,
) -> Run | None:
    """Start a run, or continue the one in ``--output_dir``; return None if that is finished.

    Nothing is written before the settings, the folder and the lock are found right.

    Args:
        config: the recipe's settings, whole.
        train: the part of them that is about the loop.
        num_images: images of an epoch.
        data_hash: of the images and captions, from ``batches.data_hash``.
        weights_file: what the finished run leaves; goes with ``--overwrite``.
        more_files: what else it leaves, files or folders; they go with it.
        base_hash: of the model to start from, or None if it is not known yet.

    Raises:
        UsageError: a precision or tracker that is not there, a folder that is not a run, is in use by another process,
            or holds a run that began with other settings, another base model or other processes, or one that cannot go
            on; what differs is named.
    """
    folder = train.output_dir
    accelerator, threads = _launched(config, train)
    with ExitStack() as on_refusal:
        leaves = {weights_file, *more_files, CARD}
        lock = _prepare_folder(folder, train, leaves) if accelerator.is_main_process else None
        on_refusal.callback(free_folder, folder, lock)
        accelerator.wait_for_everyone()

        checkpoint = checkpoints.find(folder, train.resume_from_checkpoint)
        if checkpoint is None and train.resume_from_checkpoint is not None:
            accelerator.print(
                f"note: --resume_from_checkpoint latest: {folder} holds no checkpoint; from the beginning"
            )
        before = checkpoint.parent if checkpoint else folder
        saved, machine = _read_yaml(before / CONFIG), read_json(before / ENVIRONMENT)
        seed = _choose_seed(train, saved)
        settings = _lasting(config, seed)
        now = environment(accelerator, threads) | {"data_hash": data_hash, "base_hash": base_hash}
        if saved and (checkpoint or (folder / PROVENANCE).is_file()):
            _refuse_changes(before, settings, saved)
            _refuse_other_inputs(before, settings, now, machine)
        total = train.total_steps(num_images, accelerator.num_processes)
        ends_otherwise = any(settings.get(name) != saved.get(name) for name in _OF_THE_END)
        if _is_finished(folder / weights_file, total) and not ends_otherwise:
            accelerator.print(f"{folder}: this run is finished ({total} steps); --overwrite starts anew")
            return None
        _refuse_no_way_on(folder, weights_file, checkpoint, total)
        accelerator.wait_for_everyone()  # all have read what the first one changes now

        train = _with_known_batch(train, accelerator.num_processes, machine if checkpoint else {})
        now |= {name: machine[name] for name in _DECIDED if checkpoint and name in machine}
        run = Run(
            folder=folder,
            accelerator=accelerator,
            train=dataclasses.replace(train, seed=seed),
            seed=seed,
            total_steps=total,
            config_hash=_hash_settings(settings),
            checkpoint=checkpoint,
            lock=lock,
            is_sharded=sharding.is_asked(),
            zero_stage=zero.stage_asked(),
            began=machine if checkpoint else {},
        )
        _say_what_differs(run, threads, now)
        if run.is_main and not train.dry_run:
            _write_start(run, settings, now)
        if train.report_to != "none" and not train.dry_run:
            done = checkpoints.step_of(checkpoint) if checkpoint else 0
            accelerator.init_trackers(train.tracker_project_name, init_kwargs={"tensorboard": {"purge_step": done + 1}})
        on_refusal.pop_all()
        return run


def _lasting(config: object, seed: int) -> dict[str, Any]:
    """Return the settings that a run keeps, with the seed in force.

    What was asked of this start alone goes: a copy of the file must not clear a folder, look for a checkpoint, or hold
    a secret.
    """
    once = {"seed": seed, "overwrite": False, "resume_from_checkpoint": None, "dry_run": False, "hub_token": None}
    return {**yaml.safe_load(yaml.safe_dump(configs.load.as_dict(config))), **once}


def _say_what_differs(run: Run, threads: int, now: dict[str, Any]) -> None:
    """Say what a continued run does not decide anew, and where its bits may change."""
    if run.checkpoint and run.began.get("threads") != threads:
        then = run.began.get("threads")
        run.say(f"note: {then} threads before, {threads} now: the result will not be bitwise the same")
    if "train_batch_size" in now:
        run.say(f"--train_batch_size auto: {run.train.micro_batch} images a pass, as the run began")


def _launched(config: object, train: TrainConfig) -> tuple[Accelerator, int]:
    """Check how this process was launched, and set up devices and threads; return these."""
    check_launch(train)
    if train.dry_run and train.overwrite:
        raise UsageError("--dry_run: changes nothing; leave out --overwrite, which clears the folder")
    is_sharded, zero_stage = sharding.is_asked(), zero.stage_asked()
    accelerator = make_accelerator(train, train.output_dir)
    threads = set_threads(accelerator)
    if is_sharded:
        sharding.check_settings(configs.load.as_dict(config), accelerator)
    if zero_stage:
        zero.check_settings(configs.load.as_dict(config), accelerator)
    if train.local_rank not in (None, -1, accelerator.local_process_index):
        place = accelerator.local_process_index
        print(f"note: --local_rank {train.local_rank}: this process is {place} on its machine, as the launcher says")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = train.allow_tf32
    return accelerator, threads


def _finished_steps(folder: Path) -> int | None:
    """Return the planned steps of the run that was finished here, or None."""
    finished = read_json(folder / PROVENANCE)
    steps = finished.get("planned_steps", finished.get("steps"))
    return None if steps is None else int(steps)


def _is_finished(weights: Path, total: int) -> bool:
    """Tell whether these weights are of a run of as many steps as are asked for."""
    return weights.is_file() and _finished_steps(weights.parent) == total


def _refuse_no_way_on(folder: Path, weights_file: str, checkpoint: Path | None, total: int) -> None:
    """Refuse a finished run without a checkpoint, one beyond the end, and one of another run."""
    if (folder / weights_file).is_file() and checkpoint is None:
        raise UsageError(
            f"--max_train_steps {total}: {folder} holds the weights of a finished run "
            f"({_finished_steps(folder) or 'unknown'} steps) and no checkpoint to go on from; --overwrite starts anew"
        )
    if checkpoint and checkpoints.step_of(checkpoint) > total:
        raise UsageError(f"{folder}: {checkpoint} is beyond the {total} steps asked for; raise --max_train_steps")
    own = checkpoints.checkpoints(folder)
    if checkpoint and own and checkpoint.resolve() not in [path.resolve() for path in own]:
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint}: {folder} holds {own[-1].name} of its own; leave the option "
            "out to go on from there, or use --overwrite"
        )


def _write_start(run: Run, settings: dict[str, Any], now: dict[str, Any]) -> None:
    """Write what was asked for and on which machine, and drop what lies beyond the checkpoint that is gone on from."""
    folder, done = run.folder, checkpoints.step_of(run.checkpoint) if run.checkpoint else 0
    write_whole(folder / CONFIG, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_whole(folder / ENVIRONMENT, json.dumps(now, indent=2) + "\n")
    _cut_metrics(folder / METRICS, done)
    for begins_at_step_0 in (HELDOUT, DRIFT):
        _cut_metrics(folder / begins_at_step_0, done if run.checkpoint else -1)
    for of_finished in (PROVENANCE, SELECTION):
        (folder / of_finished).unlink(missing_ok=True)
    for path in checkpoints.checkpoints(folder):
        if checkpoints.step_of(path) > done:
            checkpoints.remove(path)
    checkpoints.clear_remains(folder)


def _prepare_folder(folder: Path, train: TrainConfig, weights: set[str]) -> TextIO:
    """Make the folder, lock it for this process, and clear an earlier run if asked to."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {folder}: is a file; name a folder")
    ours = {CONFIG, ENVIRONMENT, METRICS, HELDOUT, PROVENANCE, *weights, "previews", train.logging_dir}
    ours |= {DRIFT, DRIFT_FOLDER, SELECTION}
    if folder.is_dir():
        # Weights beside no config.yaml are somebody's model, not a run of ours.
        strange = {path.name for path in folder.iterdir()} - (ours - weights) - {LOCK, "cache"}
        if strange and not (folder / CONFIG).is_file() and not checkpoints.checkpoints(folder):
            raise UsageError(f"--output_dir {folder}: holds {sorted(strange)[0]} and no run; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    if train.overwrite:
        for path in [*(folder / name for name in ours), *checkpoints.checkpoints(folder)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return lock


def _lock(folder: Path) -> TextIO:
    """Hold the folder's lock; the system frees it when the process ends, however it ends."""
    path = folder / LOCK
    stream = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(stream.fileno())):
            stream.close()  # its holder removed the file between our opening and locking it
            return _lock(folder)
    except BlockingIOError:
        stream.seek(0)
        pid = stream.read().strip() or "unknown"
        stream.close()
        raise UsageError(
            f"--output_dir {folder}: process {pid} trains there; wait for it or name another folder"
        ) from None
    stream.truncate(0)
    stream.write(f"{os.getpid()}\n")
    stream.flush()
    return stream


def _choose_seed(train: TrainConfig, saved: dict[str, Any]) -> int:
    """Return the seed asked for, else that of the run being continued, else a fresh one, equal on all processes."""
    if train.seed is not None:
        return train.seed
    if isinstance(saved.get("seed"), int):
        return int(saved["seed"])
    from accelerate.utils import broadcast_object_list

    return int(broadcast_object_list([secrets.randbelow(2**31)])[0])


def _with_known_batch(train: TrainConfig, num_processes: int, began: dict[str, Any]) -> TrainConfig:
    """Fill in images and forward passes of an update where they are known: asked for, or as the run began."""
    try:
        if train.train_batch_size != "auto":
            return train.with_micro_batch(train.micro_batch, num_processes) if train.global_batch_size else train
        if "train_batch_size" in began:
            return train.with_micro_batch(int(began["train_batch_size"]), num_processes)
        train.with_micro_batch(1, num_processes)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return train


def _refuse_changes(folder: Path, settings: dict[str, Any], saved: dict[str, Any]) -> None:
    """Refuse to continue a run under other settings."""
    names = sorted((settings.keys() | saved.keys()) - CHANGEABLE)
    changed = [name for name in names if settings.get(name) != saved.get(name)]
    if changed:
        text = ", ".join(f"--{name} ({saved.get(name)} then, {settings.get(name)} now)" for name in changed)
        raise UsageError(
            f"--output_dir {folder}: holds a run begun with other settings: {text}; use --overwrite to start anew"
        )


def _refuse_other_inputs(folder: Path, settings: dict[str, Any], now: dict[str, Any], then: dict[str, Any]) -> None:
    """Refuse to continue a run on other images, from another base model, or as other processes."""
    base = f"--pretrained_model_name_or_path {settings.get('pretrained_model_name_or_path')}"
    folders = [*(settings.get("train_data_dir") or []), settings.get("instance_data_dir")]
    flag = "--train_data_dir" if settings.get("train_data_dir") else "--instance_data_dir"
    reasons = {
        "data_hash": f"{flag} {' '.join(str(folder) for folder in folders if folder)}: images or captions differ from",
        "base_hash": f"{base}: its files differ from",
        "processes": f"--num_processes of the launcher is {now['processes']}, not",
        "mixed_precision": f"--mixed_precision of the launcher is {now['mixed_precision']}, not",
    }
    for name, reason in reasons.items():
        if None not in (now[name], then.get(name)) and now[name] != then[name]:
            was = "those" if name.endswith("_hash") else f"the {then[name]}"
            raise UsageError(f"{reason} {was} the run in {folder} began with; use --overwrite to start anew")


def _hash_settings(settings: dict[str, Any]) -> str:
    """Return a SHA-256 over the settings that can change what is learned."""
    kept = {name: value for name, value in settings.items() if name not in _WITHOUT_EFFECT}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after ``step``, and one that was being written when the run was killed."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_whole(path, "".join(kept))


def _read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML mapping, or an empty one if there is no file."""
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
