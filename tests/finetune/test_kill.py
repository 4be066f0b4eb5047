"""A run that is killed again and again ends bitwise as one that never was: every method, through the real launcher."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_methods import BASE, PRIOR, words_of

from configs.recipes import RECIPES

ROOT = Path(__file__).parents[2]
KILLS = 10
STEPS = 60
OPTIONS = {
    "full": f"--train_text_encoder --use_ema {BASE}",
    "dreambooth": f"--train_text_encoder --use_ema {PRIOR}",
    "lora": "--train_text_encoder --use_ema --use_dora --lora_dropout 0.2",
    "lora_dreambooth": f"--train_text_encoder {PRIOR}",
    "textual_inversion": "--use_ema --num_vectors 2",
    "pivotal_tuning": f"--use_ema {BASE}",
}


def launch(recipe: str, words: list[str]) -> subprocess.Popen[str]:
    """Start a recipe through the launcher, in a process group of its own."""
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "finetune" / f"{recipe}.py"), *words]
    return subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def step_of(run: Path) -> int:
    """Return the last step that metrics.jsonl tells of."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except json.JSONDecodeError:  # being written
        return 0


def weights_of(run: Path) -> dict[str, bytes]:
    """Return the weights a user gets, and the rows of metrics.jsonl without their times, as bytes."""
    paths = [path for path in run.rglob("*.safetensors") if not {"cache", "checkpoint"} & set(where(path, run))]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: row[name] for name in row if not name.endswith("_s")} for row in rows]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths} | {"metrics": json.dumps(kept).encode()}


def where(path: Path, run: Path) -> list[str]:
    return [part.partition("-")[0] for part in path.relative_to(run).parts]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_ten_times_at_random_ends_bitwise_as_uninterrupted(
    recipe: str, toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    """Each kill comes at a random moment of a random stretch: while starting, within a step, within a checkpoint."""
    words = words_of(recipe, toy_sd, captioned_images, tmp_path) + OPTIONS[recipe].format(root=tmp_path).split()
    words += ["--max_train_steps", str(STEPS), "--logging_steps", "1"]
    if recipe == "pivotal_tuning":
        words += ["--token_steps", "20"]
    whole = launch(recipe, [*words, "--output_dir", str(tmp_path / "whole")])
    output, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, output

    run, chance, killed = tmp_path / "run", random.Random(0), []
    for number in range(KILLS):
        # The k-th kill lies in the k-th tenth of the run, so that all of it is cut up; a quarter come while starting.
        aim = -1 if number % 4 == 3 else round((number + chance.random()) * (STEPS - 5) / KILLS)
        process = launch(recipe, words)
        deadline = time.monotonic() + (chance.uniform(1, 6) if aim < 0 else 300)
        while process.poll() is None and time.monotonic() < deadline and (aim < 0 or step_of(run) < aim):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed.append(process.returncode)
    assert killed == [-signal.SIGKILL] * KILLS
    last = launch(recipe, words)
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0, output
    assert "continuing after step" in output
    expected, found = weights_of(tmp_path / "whole"), weights_of(run)
    assert sorted(expected) == sorted(found)
    assert [name for name in expected if expected[name] != found[name]] == []
