"""Peak memory of training, by method and micro-batch, beside what diffusers' scripts take.

    python benchmarks/memory.py --diffusers ~/diffusers --size reduced

Each case is a process of its own that trains three steps: on a GPU what torch allocated at most, on a CPU the largest
resident size, beside that of the interpreter with its libraries. ``--options`` is given to our recipes, such as
``--options "--gradient_checkpointing"``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configs.errors import TisserandError
from configs.load import command
from slicing import cpu_name
from training import (
    METHODS,
    MethodName,
    TrainingConfig,
    arm_words,
    environment_of,
    has_gpu,
    prepare,
    run_through,
    versions,
    why_no_script,
)

HERE = Path(__file__).parent
STEPS = 3
NOTHING = "import accelerate, diffusers, paced, peft, torch, transformers; print(paced.peak_resident_gb())"


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Settings of ``benchmarks/memory.py``."""

    diffusers: Path | None = None
    """A checkout of diffusers; without it only our recipes run."""
    size: Literal["grain", "reduced", "sd15", "sd21"] = "reduced"
    """The model, made from its config with random weights."""
    methods: tuple[MethodName, ...] = ("lora", "full", "textual_inversion", "dreambooth")
    """What to measure."""
    train_batch_size: tuple[int, ...] = (1, 4, 8)
    """Micro-batches."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Of both arms."""
    options: str = ""
    """More options of our recipes, as one text."""
    work_dir: Path | None = None
    """Folder for models, pictures and runs; a temporary one by default."""
    output: Path = Path("benchmarks/results/memory.json")
    """Where the figures go."""
    dry_run: bool = False
    """Print what would be measured."""


def main(config: MemoryConfig) -> None:
    """Run every case, print a table and write the figures."""
    shared: dict[str, Any] = {
        name: getattr(config, name) for name in ("diffusers", "size", "methods", "mixed_precision", "work_dir")
    }
    training = TrainingConfig(num_images=16, **shared)
    reason = why_no_script(training)
    arms = ("ours",) if reason else ("ours", "b0")
    if reason:
        print(f"the arms of diffusers' scripts are left out: {reason}")
    print(f"{', '.join(config.methods)} at micro-batches {config.train_batch_size}, {STEPS} steps each: {arms}")
    if config.dry_run:
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=config.work_dir, prefix="memory-") as name:
        place = prepare(training, Path(name))
        for method in config.methods:
            for batch_size in config.train_batch_size:
                row: dict[str, Any] = {"method": method, "batch_size": batch_size}
                for arm in arms:
                    words = arm_words(training, place, method, arm, batch_size, STEPS, folder="memory")
                    words += config.options.split() if arm == "ours" else []
                    try:
                        found = run_through(arm, words, place.work)
                        row[arm] = found.get("peak_allocated_gb", found["peak_resident_gb"])
                    except TisserandError as error:
                        row[arm], row[f"{arm}_failed"] = None, str(error).splitlines()[-1]
                rows.append(row)
                shown = ", ".join(f"{arm} {row[arm]:.2f} GB" if row[arm] else f"{arm} failed" for arm in arms)
                print(f"  {METHODS[method].recipe}, {batch_size}: {shown}", flush=True)
    import torch

    content = {
        "command": "python benchmarks/memory.py",
        "model": config.size,
        "mixed_precision": config.mixed_precision,
        "options": config.options,
        "device": torch.cuda.get_device_name() if has_gpu() else cpu_name(),
        "measure": "allocated by torch" if has_gpu() else "largest resident size of the process",
        "libraries_alone_gb": None if has_gpu() else libraries_gb(),
        "rows": rows,
        "versions": versions(),
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def libraries_gb() -> float:
    """Return the resident size of an interpreter with the libraries and nothing else, in 10^9 bytes."""
    words = [sys.executable, "-c", NOTHING]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment_of("ours"), cwd=HERE)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    command(MemoryConfig, main)
