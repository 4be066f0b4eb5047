"""Runs that two processes split between them, started as a user would, and what each process held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from test_processes import ROOT, words

FULL = {"train_text_encoder": True, "use_ema": True, "train_batch_size": 1, "gradient_accumulation_steps": 2}
# Runs the recipe, and leaves what a few lines of watching have put into ``held``.
RECORDER = """
import json, os, sys
from configs.load import load
from finetune.full import FullRun, main

held = {{}}
{watching}
main(load(FullRun, sys.argv[2:]))
with open(f"{{sys.argv[1]}}/rank-{{os.environ['RANK']}}.json", "w") as stream:
    json.dump(held, stream)
"""


def launch(config: str, *arguments: object, precision: str = "no") -> str:
    """Start two processes with a config that users start GPUs with, and return what they printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", precision]
    file = ["--config_file", str(ROOT / "configs" / "accelerate" / f"{config}.yaml"), "--main_process_port", "0"]
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        [*command, *file, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def asked(toy_sd: Path, images: Path, folder: Path, **options: object) -> list[str]:
    """Return a command line; options that are true become bare flags."""
    flags = [f"--{name}" for name, value in options.items() if value is True]
    return words(toy_sd, images, folder, **{k: v for k, v in options.items() if v is not True}) + flags


def recorded(config: str, watching: str, toy_sd: Path, images: Path, folder: Path) -> Path:
    """Run two processes with two passes each, and return their folder; rank-0.json and rank-1.json lie beside it."""
    (folder / "recorder.py").write_text(RECORDER.format(watching=watching))
    launch(config, folder / "recorder.py", folder, *asked(toy_sd, images, folder / "run", **FULL))
    return folder / "run"


def ranks(split: Path) -> list[dict[str, int]]:
    """Return what each process of a recorded run held."""
    return [json.loads((split.parent / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
