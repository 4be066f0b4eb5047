"""A run that goes on from a checkpoint ends bit for bit as one that nothing stopped: every method, on a real base.

Everything that is random or remembered is on: dropout in the adapters, dropped captions, offset noise, class images or
the base model's predictions, running averages, and a rate that still rises. The checkpoint lies within an epoch, within
a line of the metrics, and after updates of two forward passes, so that a run that takes up one update too early or too
late ends elsewhere. ``test_kill`` does the same with real kills, for minutes.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from configs.load import load
from configs.recipes import RECIPES
from data_prep.folders.run_folder import PIPELINE_FILE

ROOT = Path(__file__).parents[2]
STEPS, KEPT = 4, 3
"""Updates of the whole run, and the last that a checkpoint holds: the first of the second epoch."""
COMMON = (
    f"--pretrained_model_name_or_path {ROOT}/assets/tiny-sd --seed 7 --report_to none --resolution 32 "
    "--train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 0.002 --lr_scheduler constant_with_warmup "
    f"--lr_warmup_steps 9 --max_train_steps {STEPS} --checkpointing_steps {KEPT} --logging_steps 2 "
    "--caption_dropout 0.3 --noise_offset 0.1 "
)
PRIOR = "--with_prior_preservation --class_prompt dots --class_data_dir {class_images} --num_class_images 3"
BASE = "--with_prior_preservation --class_prompt dots --prior_source base_prediction"
WORD = "--placeholder_token <new> --initializer_token woven --repeats 1 --num_vectors 2 --instance_prompt <new>"
DROPOUT = "--rank 2 --lora_dropout 0.4"
METHODS = {
    "full": f"--train_data_dir {{images}} --use_ema --snr_gamma 5 {BASE}",
    "dreambooth": (f"--instance_data_dir {{images}} --instance_prompt sks --train_text_encoder {PRIOR}"),
    "lora": f"--train_data_dir {{images}} --train_text_encoder --use_ema --use_dora {DROPOUT} {PRIOR}",
    "lora_dreambooth": (f"--instance_data_dir {{images}} --instance_prompt sks --random_flip {DROPOUT} {BASE}"),
    "textual_inversion": f"--train_data_dir {{images}} --use_ema {WORD}",
    "pivotal_tuning": (
        f"--instance_data_dir {{images}} --use_ema --token_steps 2 --token_lr_after 0.001 {WORD} {DROPOUT} {BASE}"
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six pictures, an update and a half of them, and three of the class."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    found = {}
    for name, count in (("images", 6), ("class_images", 3)):
        found[name] = root / name
        found[name].mkdir()
        for number in range(count):
            pixels = random.integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(found[name] / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"dots {number % 3}"}) for number in range(6)]
    (found["images"] / "metadata.jsonl").write_text("\n".join(lines))
    return found


@pytest.fixture
def updates() -> Iterator[list[int]]:
    """Count the updates that optimizers do."""
    done = [0]

    def count(*_: object) -> None:
        done[0] += 1

    hook = register_optimizer_step_post_hook(count)
    yield done
    hook.remove()


def train(method: str, folders: dict[str, Path], run: Path, others: int) -> None:
    """Run a recipe, or go on with it, as a new process would: with random numbers that something else left behind."""
    settings, own = RECIPES[method].settings, METHODS[method]
    module = importlib.import_module(f"finetune.{method}")
    torch.manual_seed(others)
    words = f"{COMMON} {own.format(**folders)} --output_dir {run}"
    try:
        module.main(load(getattr(module, settings), words.split()))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def weights(run: Path) -> dict[str, bytes]:
    """Return the weights that a user gets, as bytes."""
    paths = [path.relative_to(run) for path in run.rglob("*.safetensors")]
    return {
        str(path): (run / path).read_bytes() for path in paths if path.parts[0] not in ("cache", f"checkpoint-{KEPT}")
    }


def losses(run: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if not name.endswith("_s")} for row in rows]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_ends_bit_for_bit_as_a_whole_one(
    folders: dict[str, Path], tmp_path: Path, updates: list[int], method: str
) -> None:
    run = tmp_path / "run"
    train(method, folders, run, others=1)
    expected, rows = weights(run), losses(run)
    assert updates == [STEPS]
    assert [row["step"] for row in rows] == [2, 4]
    # What came after the checkpoint is lost, as when the process is killed; a line of the metrics may be left.
    for name in {*expected, PIPELINE_FILE}:
        (run / name).unlink(missing_ok=True)
    train(method, folders, run, others=2)
    assert updates == [STEPS + STEPS - KEPT]
    found = weights(run)
    assert expected.keys() == found.keys()
    assert expected
    assert [name for name in expected if expected[name] != found[name]] == []
    assert losses(run) == rows
