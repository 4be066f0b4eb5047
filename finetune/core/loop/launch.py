"""How this process was launched: trackers, attention, precision, processes and threads; and what the machine is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType, ProjectConfiguration, patch_environment

from configs.errors import UsageError
from finetune.core.learns.optimizer import check_optimizer
from finetune.core.settings.training import TrainConfig

_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")


def check_launch(train: TrainConfig) -> None:
    """Refuse what is not installed or cannot run on this machine, before anything is loaded.

    Raises:
        UsageError: a tracker, an optimizer or a kind of attention that is not there.
    """
    _check_tracker(train.report_to)
    check_optimizer(train)
    _check_attention(train)


def _check_tracker(name: str) -> None:
    """Refuse a tracker that does not exist or is not installed, before anything is loaded."""
    known = [str(kind) for kind in LoggerType if kind != "all"]
    if name not in {*known, "all", "none"}:
        raise UsageError(f"--report_to {name}: must be one of {', '.join([*known, 'all', 'none'])}")
    if name in known and importlib.util.find_spec(name) is None:
        raise UsageError(f"--report_to {name}: the package is not installed; install it, or use --report_to none")


def _check_attention(train: TrainConfig) -> None:
    """Refuse xformers where it cannot run, before anything is loaded."""
    flag = "--enable_xformers_memory_efficient_attention"
    if train.enable_xformers_memory_efficient_attention:
        if not torch.cuda.is_available():
            raise UsageError(f"{flag}: needs a GPU; leave it out, PyTorch's own attention is as frugal")
        if importlib.util.find_spec("xformers") is None:
            raise UsageError(f"{flag}: xformers is not installed; install it, or leave the option out")


def make_accelerator(train: TrainConfig, folder: Path) -> Accelerator:
    """Return the accelerator in the precision asked for, by the flag or by the launcher."""
    precision = train.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "fp16", "bf16"):
        raise UsageError(f"--mixed_precision {precision}: must be one of no, fp16, bf16 (the launcher asks for it)")
    if precision == "fp16" and not torch.cuda.is_available():
        raise UsageError("--mixed_precision fp16: needs a GPU; use bf16 or no")
    started = int(os.environ.get("WORLD_SIZE", 0)) or _asked_of_launcher()
    # finetune.core.loop.sharding and finetune.core.loop.zero do it, on any device.
    with patch_environment(accelerate_use_fsdp="false", accelerate_use_deepspeed="false"):
        accelerator = Accelerator(
            # Without a GPU accelerate connects torchrun's processes only if told; each would train alone, as rank 0.
            cpu=started > 1 and not torch.accelerator.is_available(),
            mixed_precision=precision,
            log_with=None if train.report_to == "none" else train.report_to,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / train.logging_dir)),
        )
    if accelerator.num_processes != started:
        raise UsageError(
            f"--num_processes {started}: {accelerator.num_processes} would train; on CPUs start them with "
            f"torchrun --nproc_per_node {started}"
        )
    return accelerator


def set_threads(accelerator: Accelerator) -> int:
    """Give each process its share of the cores, unless the user set OMP_NUM_THREADS; return the number in force.

    `accelerate launch` and `torchrun` set that variable to 1 for their children by themselves. Whether the user meant
    it shows in the environment and the command line of the launcher, which is our parent.
    """
    if accelerator.device.type != "cpu":
        return torch.get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS")
    if asked is None or (asked == "1" and _launcher_chose_threads()):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(max(1, cores // local))
    return torch.get_num_threads()


def _asked_of_launcher() -> int:
    """Return the processes that `accelerate launch` was told to start: on a CPU it silently starts one."""
    words: list[str] = []
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        with suppress(psutil.Error):
            words = psutil.Process(os.getppid()).cmdline()
    pairs = [word.partition("=")[::2] for word in words] + list(pairwise(words))
    counts = [value for name, value in pairs if name in ("--num_processes", "--num-processes") and value.isdigit()]
    return int(counts[-1]) if counts else 1


def _launcher_chose_threads() -> bool:
    """Tell whether a launcher, not the user, set OMP_NUM_THREADS."""
    if not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return False
    try:
        parent = psutil.Process(os.getppid())
        said = any("num_cpu_threads_per_process" in word for word in parent.cmdline())
        return not said and "OMP_NUM_THREADS" not in parent.environ()
    except psutil.Error:
        return True


def environment(accelerator: Accelerator, threads: int) -> dict[str, Any]:
    """Return what the result may depend on beside the settings."""
    device = accelerator.device
    return {
        "command": _without_token(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()}",
        "processes": accelerator.num_processes,
        "threads": threads,
        "mixed_precision": accelerator.mixed_precision,
        "git_revision": _git_revision(),
    }


def _without_token(words: list[str]) -> list[str]:
    """Return a command line without the value of ``--hub_token``, which must not end up in a file."""
    before = ["", *words]
    hidden = ["***" if previous == "--hub_token" else word for previous, word in zip(before, words, strict=False)]
    return ["--hub_token=***" if word.startswith("--hub_token=") else word for word in hidden]


def _git_revision() -> str | None:
    """Return the revision of this code, with a plus sign if files differ from it; None outside git."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parents[1]),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
