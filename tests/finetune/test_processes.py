"""Several processes on one machine, started by torchrun as a user would: what they see, and where they end."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_methods import BASE, PRIOR, run_recipe, words_of

from configs.load import load
from configs.recipes import RECIPES
from data_prep.folders.run_folder import LORA_FILE
from finetune.lora import LoraRun, main

ROOT = Path(__file__).parents[2]
# Runs the recipe and leaves what its process saw, as the process itself knows it.
RECORDER = """
import hashlib, json, os, sys
import torch
from configs.load import load
from finetune.core.data.batches import CaptionedBatches
from finetune.lora import LoraRun, main

seen, update = {}, CaptionedBatches.update

def watched(self, number):
    result = update(self, number)
    rows = [
        (name, hashlib.sha256(noise.numpy().tobytes()).hexdigest(), int(timestep), bool(weight))
        for batch in result.batches
        for name, noise, timestep, weight in zip(batch.names, batch.noise, batch.timesteps, batch.weights)
    ]
    seen[number] = rows
    seen["world"] = torch.distributed.get_world_size()
    return result

CaptionedBatches.update = watched
main(load(LoraRun, sys.argv[2:]))
with open(f"{sys.argv[1]}/rank-{os.environ['RANK']}.json", "w") as stream:
    json.dump({"world": seen.pop("world"), "threads": torch.get_num_threads(), "seen": seen}, stream)
"""


def words(base: Path, images: Path, folder: Path, **options: object) -> list[str]:
    values = {
        "pretrained_model_name_or_path": base,
        "train_data_dir": images,
        "output_dir": folder,
        "seed": 0,
        "max_train_steps": 6,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "caption_dropout": 0.2,
        "noise_offset": 0.1,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 2,
        "logging_steps": 1,
        "report_to": "none",
        **options,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def torchrun(*arguments: object, largest_file: int | None = None) -> subprocess.Popen[str]:
    """Start two processes in a group of their own; with ``largest_file`` as on a disk that is full."""
    limit = resource.RLIM_INFINITY if largest_file is None else largest_file
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, toy_sd: Path, captioned_images: Path) -> Path:
    """Return the folder of a run of two processes, two images each; rank-0.json and rank-1.json lie beside it."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "recorder.py").write_text(RECORDER)
    asked = words(toy_sd, captioned_images, folder / "run", train_batch_size=2)
    process = torchrun(folder / "recorder.py", folder, *asked)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return folder / "run"


def ranks(run: Path) -> list[dict[str, object]]:
    return [json.loads((run.parent / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_there_are_two_processes_and_they_share_the_threads(two: Path) -> None:
    environment = json.loads((two / "environment.json").read_text())
    assert [rank["world"] for rank in ranks(two)] == [2, 2]
    assert environment["processes"] == 2
    assert [rank["threads"] for rank in ranks(two)] == [environment["threads"]] * 2


def test_two_processes_see_each_image_once_an_epoch(two: Path) -> None:
    for epoch in (0, 1):
        seen = [
            name
            for rank in ranks(two)
            for number in range(3 * epoch, 3 * epoch + 3)
            for name, _, _, counts in rank["seen"][str(number)]
            if counts
        ]
        assert sorted(seen) == [f"{index:02d}.png" for index in range(10)]


def test_a_seed_does_not_give_every_process_the_same_noise(two: Path) -> None:
    draws = [draw for rank in ranks(two) for number in rank["seen"] for _, draw, _, _ in rank["seen"][number]]
    assert len(set(draws)) == len(draws) == 20


@pytest.mark.parametrize("cut", [{"train_batch_size": 4}, {"train_batch_size": 1, "gradient_accumulation_steps": 4}])
def test_two_processes_end_where_one_does(
    two: Path, cut: dict[str, int], toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    main(load(LoraRun, words(toy_sd, captioned_images, tmp_path / "one", **cut)))
    alone, together = load_file(tmp_path / "one" / LORA_FILE), load_file(two / LORA_FILE)
    assert alone.keys() == together.keys()
    for name in alone:
        # Adam divides by the root of a mean square, so that rounding in tiny gradients shows in the weights: they moved
        # by about 3e-3 in six steps, and differ by less than a thousandth of that.
        torch.testing.assert_close(together[name], alone[name], atol=3e-6, rtol=0)
    # A scheduler that accelerate steps would run twice as fast with two processes.
    rates = [[row["learning_rate"] for row in rows(folder)] for folder in (two, tmp_path / "one")]
    assert rates[0] == rates[1]
    for ours, theirs in zip(rows(two), rows(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_two_processes_leave_one_set_of_files(two: Path) -> None:
    names = sorted(path.name for path in two.iterdir() if path.name != "cache")
    expected = ["README.md", "checkpoint-4", "checkpoint-6", "config.yaml", "environment.json", "metrics.jsonl"]
    assert names == [*expected, "provenance.json", LORA_FILE]


@pytest.mark.slow
def test_a_launcher_that_would_start_one_process_for_two_is_refused(
    toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    asked = words(toy_sd, captioned_images, tmp_path / "run")
    done = subprocess.run(
        [*launch, str(ROOT / "finetune" / "lora.py"), *asked], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert "error: --num_processes 2: 1 would train; on CPUs start them with torchrun --nproc_per_node 2" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["group", "one worker"])
def test_all_processes_agree_to_stop_and_go_on(
    whom: str, two: Path, toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    asked = words(toy_sd, captioned_images, tmp_path / "run", train_batch_size=2, max_train_steps=4000)
    asked += ["--checkpointing_steps", "100000"]
    process = torchrun(ROOT / "finetune" / "lora.py", *asked)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 600
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 5:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.2)
    if whom == "group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert f"terminated; continue from {checkpoint.name} with the same command" in output
    assert not (tmp_path / "run" / LORA_FILE).exists()
    if whom == "one worker":  # the launcher was not told to stop, and says how each of its workers ended
        assert output.count("exitcode  : 143") + output.count("exitcode: 143") >= 1
    done = int(checkpoint.name.removeprefix("checkpoint-"))
    process = torchrun(ROOT / "finetune" / "lora.py", *asked, "--max_train_steps", str(done + 2))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert f"continuing after step {done}" in output


OPTIONS = {
    "full": f"--train_text_encoder --use_ema {BASE}",
    "dreambooth": f"--train_text_encoder --use_ema {PRIOR}",
    "lora": f"--train_text_encoder --use_ema --use_dora --gradient_checkpointing {BASE}",
    "lora_dreambooth": f"--train_text_encoder {PRIOR}",
    "textual_inversion": "--use_ema --num_vectors 2 --caption_dropout 0.3",
    "pivotal_tuning": f"--use_ema --token_steps 3 --train_text_encoder {PRIOR}",
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_with_every_method_two_processes_end_where_one_does(
    recipe: str, toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    """Parameters that rest, or have no part in some pass, must not make the processes wait for one another."""
    line = words_of(recipe, toy_sd, captioned_images, tmp_path) + OPTIONS[recipe].format(root=tmp_path).split()
    # A large epsilon: where a gradient is next to nothing, Adam would make its rounding as large as any other.
    line += ["--learning_rate", "1e-3", "--adam_epsilon", "1e-4"]
    halves = ["--train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    process = torchrun(ROOT / "finetune" / f"{recipe}.py", *line, *halves)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    run_recipe(recipe, [*line, "--output_dir", str(tmp_path / "one")])
    paths = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.safetensors")]
    for path in [path for path in paths if path.parts[0] != "cache"]:
        alone, together = load_file(tmp_path / "one" / path), load_file(tmp_path / "run" / path)
        assert alone.keys() == together.keys()
        for name in alone:
            torch.testing.assert_close(together[name], alone[name], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_full_disk_ends_all_processes_with_one_message(
    two: Path, toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    asked = words(toy_sd, captioned_images, tmp_path / "run", train_batch_size=2, max_train_steps=2)
    process = torchrun(ROOT / "finetune" / "lora.py", *asked)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    (tmp_path / "run" / LORA_FILE).unlink()
    asked += ["--max_train_steps", "6"]
    process = torchrun(ROOT / "finetune" / "lora.py", *asked, largest_file=8192)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert output.count("\nerror: ") == 1
    assert "checkpoint-4: cannot be written" in output
    assert "SIGKILL" not in output  # the other one did not wait for the first until it was killed
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
