"""A full disk: the checkpoint before stays, the message says so, and the same command goes on."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_methods import run_recipe, words_of

from configs.errors import TisserandError
from configs.load import load
from data_prep.folders.publish import write_whole
from data_prep.folders.run_folder import LORA_FILE
from finetune.core.loop import checkpoints
from finetune.lora import LoraRun, main


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let the system refuse to write any file beyond a size, as it does on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on_as_if_nothing_was(
    toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    def train(folder: str, **options: object) -> Path:
        values = {
            "pretrained_model_name_or_path": toy_sd,
            "train_data_dir": captioned_images,
            "output_dir": tmp_path / folder,
            "seed": 0,
            "max_train_steps": 6,
            "train_batch_size": 4,
            "checkpointing_steps": 2,
            "checkpoints_total_limit": 1,
            "report_to": "none",
            **options,
        }
        main(load(LoraRun, [word for name, value in values.items() for word in (f"--{name}", str(value))]))
        return tmp_path / folder

    whole = train("whole")
    train("cut", max_train_steps=2)
    (tmp_path / "cut" / LORA_FILE).unlink()
    # Its tensors take 16 kB and 32 kB, its texts less than 8 kB each.
    with (
        files_up_to(8192),
        pytest.raises(
            TisserandError, match=r"checkpoint-4: cannot be written \(.*too large.*\); checkpoint-2 is whole"
        ),
    ):
        train("cut")
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-2"]
    ended = train("cut")
    expected, got = load_file(whole / LORA_FILE), load_file(ended / LORA_FILE)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert [path.name for path in ended.glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize(("recipe", "weights"), [("lora", LORA_FILE), ("full", "model_index.json")])
def test_weights_that_find_no_room_are_written_when_there_is(
    recipe: str, weights: str, toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    words = [*words_of(recipe, toy_sd, captioned_images, tmp_path), "--max_train_steps", "2"]
    words += ["--checkpointing_steps", "100", "--latent_cache_dir", str(tmp_path / "cache")]
    run_recipe(recipe, [*words, "--output_dir", str(tmp_path / "whole")])
    with files_up_to(12288), pytest.raises(TisserandError, match=r"the weights cannot be written \(.*; make room"):
        run_recipe(recipe, words)
    assert not (tmp_path / "run" / weights).exists()
    assert not list((tmp_path / "run").rglob("*.partial"))
    run_recipe(recipe, words)
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_a_text_that_finds_no_room_leaves_the_one_before(tmp_path: Path) -> None:
    write_whole(tmp_path / "told.json", "{}")
    with files_up_to(100), pytest.raises(OSError, match="too large"):
        write_whole(tmp_path / "told.json", "[" + "0, " * 100)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("told.json", "{}")]


def test_a_full_disk_leaves_both_checkpoints_that_are_kept(tmp_path: Path) -> None:
    learned = {"a": torch.nn.Parameter(torch.zeros(4000))}
    optimizer = torch.optim.AdamW(learned.values())
    for step in (1, 2):
        checkpoints.write(tmp_path, step, parameters=learned, optimizer=optimizer, state={})
        checkpoints.prune(tmp_path, 2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for size in (0, 8192, 16 << 10):  # not a byte, not the tensors, not state.json after them
        learned["a"].grad = torch.ones(4000)
        optimizer.step()
        with files_up_to(size), pytest.raises(TisserandError, match="checkpoint-2 is whole"):
            checkpoints.write(tmp_path, 3, parameters=learned, optimizer=optimizer, state={})
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_old_checkpoint_goes_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    learned = {"a": torch.nn.Parameter(torch.zeros(4000))}
    optimizer = torch.optim.AdamW(learned.values())
    checkpoints.write(tmp_path, 1, parameters=learned, optimizer=optimizer, state={})
    checkpoints.prune(tmp_path, 1)
    with files_up_to(8192), pytest.raises(TisserandError, match="checkpoint-1 is whole"):
        checkpoints.write(tmp_path, 2, parameters=learned, optimizer=optimizer, state={})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    checkpoints.write(tmp_path, 2, parameters=learned, optimizer=optimizer, state={})
    checkpoints.prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
