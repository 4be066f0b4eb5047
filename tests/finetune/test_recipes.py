"""Recipes as a user runs them: the files they leave, continuing, refusing, and the real launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configs.errors import InputError, TisserandError, UsageError
from configs.load import load
from data_prep.folders.run_folder import LORA_FILE
from finetune.diffusion.adapters import load_adapter, set_adapter_scale
from finetune.diffusion.models import load_models
from finetune.lora import LoraRun, main

ROOT = Path(__file__).parents[2]
Train = Callable[..., Path]


@pytest.fixture
def arguments(toy_sd: Path, captioned_images: Path, tmp_path: Path) -> list[str]:
    values = {
        "pretrained_model_name_or_path": toy_sd,
        "train_data_dir": captioned_images,
        "output_dir": tmp_path / "run",
        "seed": 0,
        "max_train_steps": 8,
        "train_batch_size": 4,
        "checkpointing_steps": 3,
        "logging_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def train(arguments: list[str], tmp_path: Path) -> Train:
    """Run the recipe in this process; options given again win."""

    def run(*more: object) -> Path:
        main(load(LoraRun, [*arguments, *(str(word) for word in more)]))
        return tmp_path / "run"

    return run


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def untimed(path: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: row[name] for name in row if not name.endswith(("_s", "_per_s"))} for row in rows]


def test_a_run_leaves_exactly_these_files(train: Train) -> None:
    folder = train("--validation_prompt", "sf_dry", "sf_warp", "--validation_steps", 4, "--num_validation_images", 1)
    expected = [
        *(f"checkpoint-{n}/{name}" for n in (3, 6) for name in ("learned.safetensors", "optimizer.safetensors")),
        *(f"checkpoint-{n}/state.json" for n in (3, 6)),
        *(f"previews/step-00000{n}.png" for n in (0, 4, 8)),
        *("README.md", "config.yaml", "environment.json", "metrics.jsonl", "provenance.json", LORA_FILE),
    ]
    assert [name for name in files_of(folder) if not name.startswith("cache/")] == sorted(expected)
    assert [row["step"] for row in untimed(folder / "metrics.jsonl")] == [2, 4, 6, 8]


def test_no_pictures_a_prompt_are_no_previews(train: Train) -> None:
    folder = train("--validation_prompt", "sf_dry", "--num_validation_images", 0, "--max_train_steps", 2)
    assert [name for name in files_of(folder) if name.startswith("previews")] == []


def test_previews_leave_training_as_it_was(train: Train, tmp_path: Path) -> None:
    plain = (train() / LORA_FILE).read_bytes()
    train("--output_dir", tmp_path / "b", "--validation_prompt", "sf_dry", "--validation_steps", 2)
    assert (tmp_path / "b" / LORA_FILE).read_bytes() == plain


def test_provenance_names_what_the_weights_came_from(train: Train, toy_sd: Path) -> None:
    with safe_open(train() / LORA_FILE, framework="pt") as reader:
        told = json.loads(reader.metadata()["provenance"])
    assert told["method"] == "lora"
    assert told["base_model"]["name"] == str(toy_sd)
    assert (told["height"], told["width"], told["steps"]) == (32, 32, 8)
    assert told["captions"] == ["sf_dry sf_compacted sf_thickness", "sf_dry sf_warp", "sf_injected sf_weft"]
    assert told["scheduler"]["prediction_type"] == "epsilon"


def test_a_v_prediction_model_trains_as_one(train: Train, toy_sd_v: Path) -> None:
    folder = train("--pretrained_model_name_or_path", toy_sd_v, "--snr_gamma", 5)
    assert json.loads((folder / "provenance.json").read_text())["scheduler"]["prediction_type"] == "v_prediction"


def test_bfloat16_trains(train: Train) -> None:
    folder = train("--mixed_precision", "bf16", "--lora_targets", "attention+resnet")
    with safe_open(folder / LORA_FILE, framework="pt") as reader:
        assert all(bool(reader.get_tensor(name).isfinite().all()) for name in reader.keys())  # noqa: SIM118


def test_pictures_are_sampled_as_the_prediction_type_trained(train: Train, toy_sd: Path) -> None:
    from eval.tiles.contact_sheet import contact_sheet
    from finetune.diffusion.adapters import set_adapter_scale
    from finetune.diffusion.config import SamplingConfig
    from finetune.diffusion.sampling import sample
    from finetune.diffusion.tuned import load_tuned

    folder = train("--prediction_type", "v_prediction", "--validation_prompt", "sf_dry", "--num_validation_images", 1)
    tuned = load_tuned(str(toy_sd), [folder])
    assert tuned.models.scheduler.config.prediction_type == "v_prediction"
    pictures = sample(tuned.models, [("sf_dry", 0)], SamplingConfig(height=32, width=32))
    with Image.open(folder / "previews" / "step-000008.png") as preview:
        difference = np.asarray(preview, dtype=int) - np.asarray(contact_sheet(pictures, 1, 1, labels=["sf_dry"]))
    assert np.abs(difference).max() <= 1
    set_adapter_scale(tuned.models, 0)
    assert tuned.models.scheduler.config.prediction_type == "epsilon"


def test_adapters_that_predict_different_things_do_not_go_together(train: Train, toy_sd: Path, tmp_path: Path) -> None:
    from finetune.diffusion.tuned import load_tuned

    folder = train("--prediction_type", "v_prediction", "--max_train_steps", 1)
    train("--output_dir", tmp_path / "other", "--max_train_steps", 1)
    with pytest.raises(InputError, match="predicts epsilon, an adapter before it v_prediction"):
        load_tuned(str(toy_sd), [folder, tmp_path / "other"])


def test_a_preview_that_fails_does_not_end_the_training(
    train: Train, toy_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(toy_sd, tmp_path / "base")
    (path,) = (base / "vae").glob("*.safetensors")
    save_file(load_file(path) | {"decoder.conv_out.bias": torch.full((3,), torch.nan)}, path)
    folder = train("--pretrained_model_name_or_path", base, "--validation_prompt", "sf_dry", "--max_train_steps", 1)
    assert "note: no preview at step 1" in capsys.readouterr().out
    assert (folder / LORA_FILE).is_file()


def test_previews_are_decoded_in_float32(train: Train) -> None:
    halved = []

    def watch(module: torch.nn.Module, _: object) -> None:
        if type(module).__name__ == "Decoder":
            halved.append(torch.is_autocast_enabled("cpu"))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(watch)
    try:
        train("--mixed_precision", "bf16", "--validation_prompt", "sf_dry", "--max_train_steps", 1)
    finally:
        handle.remove()
    assert halved == [False, False]  # before the first step and after the last


def test_the_written_config_runs_again_to_the_same_weights(train: Train, tmp_path: Path) -> None:
    folder = train()
    main(load(LoraRun, ["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path / "again")]))
    assert (tmp_path / "again" / LORA_FILE).read_bytes() == (folder / LORA_FILE).read_bytes()


def test_a_missing_seed_is_drawn_once_and_written(train: Train, tmp_path: Path) -> None:
    folder = train("--seed", "null", "--max_train_samples", 4)
    main(load(LoraRun, ["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path / "again")]))
    assert (tmp_path / "again" / LORA_FILE).read_bytes() == (folder / LORA_FILE).read_bytes()


def test_a_finished_run_says_so_and_changes_nothing(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train()
    before = {name: (folder / name).stat().st_mtime_ns for name in files_of(folder)}
    train()
    assert "this run is finished (8 steps)" in capsys.readouterr().out
    assert {name: (folder / name).stat().st_mtime_ns for name in files_of(folder)} == before


def test_a_finished_run_goes_on_to_more_steps(train: Train, tmp_path: Path) -> None:
    folder = train("--max_train_steps", 7)
    train("--max_train_steps", 8)
    train("--output_dir", tmp_path / "whole", "--max_train_steps", 8)
    assert (folder / LORA_FILE).read_bytes() == (tmp_path / "whole" / LORA_FILE).read_bytes()
    assert untimed(folder / "metrics.jsonl") == untimed(tmp_path / "whole" / "metrics.jsonl")


def test_a_finished_run_without_a_checkpoint_is_kept(train: Train) -> None:
    folder = train("--checkpointing_steps", 100)
    before = (folder / LORA_FILE).read_bytes()
    with pytest.raises(UsageError, match=r"--max_train_steps 12: .* finished run \(8 steps\) and no checkpoint"):
        train("--checkpointing_steps", 100, "--max_train_steps", 12)
    assert (folder / LORA_FILE).read_bytes() == before


def test_going_on_keeps_the_weights_until_the_new_ones_are_there(train: Train) -> None:
    folder = train()
    before = (folder / LORA_FILE).read_bytes()
    (folder / "checkpoint-6" / "learned.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="the checkpoint is damaged"):
        train("--max_train_steps", 12)
    assert (folder / LORA_FILE).read_bytes() == before


def test_the_written_config_neither_clears_a_folder_nor_goes_back(train: Train) -> None:
    train()
    folder = train("--resume_from_checkpoint", "checkpoint-3", "--max_train_steps", 9)
    config = load(LoraRun, ["--config", str(folder / "config.yaml")])
    assert config.train.resume_from_checkpoint is None
    folder = train("--overwrite")
    assert not load(LoraRun, ["--config", str(folder / "config.yaml")]).train.overwrite


def test_going_back_leaves_no_later_checkpoint(train: Train) -> None:
    train("--checkpointing_steps", 2)
    folder = train(
        *("--resume_from_checkpoint", "checkpoint-2", "--max_train_steps", 5),
        *("--checkpointing_steps", 2, "--checkpoints_total_limit", 1),
    )
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_checkpoint_elsewhere_does_not_mix_with_those_here(train: Train, tmp_path: Path) -> None:
    folder = train()
    train("--output_dir", tmp_path / "other")
    with pytest.raises(UsageError, match=r"holds checkpoint-6 of its own"):
        train("--max_train_steps", 9, "--resume_from_checkpoint", tmp_path / "other" / "checkpoint-3")
    assert (folder / "checkpoint-6").is_dir()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("processes", 2, "--num_processes of the launcher is 1, not the 2"),
        ("mixed_precision", "bf16", "--mixed_precision of the launcher is no, not the bf16"),
        ("base_hash", "0", r"--pretrained_model_name_or_path .*: its files differ"),
    ],
)
def test_a_run_does_not_continue_in_another_environment(train: Train, name: str, value: object, message: str) -> None:
    path = train() / "environment.json"
    told = json.loads(path.read_text())
    assert name in told
    path.write_text(json.dumps(told | {name: value}))
    with pytest.raises(UsageError, match=message):
        train("--max_train_steps", 12)


@pytest.mark.parametrize("place", ["..", ".", "", "a/../../b", "/"])
def test_trackers_stay_in_the_run_folder(train: Train, tmp_path: Path, place: str) -> None:
    folder = train()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"--logging_dir .*: must be a folder within --output_dir"):
        train("--overwrite", f"--logging_dir={place}")
    assert (tmp_path / "thesis.tex").exists()
    assert (folder / LORA_FILE).exists()


def test_a_checkpoint_elsewhere_is_taken_up(train: Train, tmp_path: Path) -> None:
    folder = train()
    train("--output_dir", tmp_path / "other", "--resume_from_checkpoint", folder / "checkpoint-3")
    assert (tmp_path / "other" / LORA_FILE).read_bytes() == (folder / LORA_FILE).read_bytes()
    with pytest.raises(UsageError, match=r"--rank \(4 then, 2 now\)"):
        train("--output_dir", tmp_path / "third", "--resume_from_checkpoint", folder / "checkpoint-3", "--rank", 2)


def test_fewer_steps_than_are_done_are_refused(train: Train) -> None:
    train()
    with pytest.raises(UsageError, match="checkpoint-6 is beyond the 4 steps asked for"):
        train("--max_train_steps", 4)


def test_trackers_get_what_metrics_get_and_lose_it_on_going_back(train: Train) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train("--report_to", "tensorboard", "--checkpointing_steps", 5, "--max_train_steps", 7)
    train("--report_to", "tensorboard", "--checkpointing_steps", 5)  # goes on from 5, so step 6 is done again
    events = EventAccumulator(str(folder / "logs" / "tisserand")).Reload()
    seen = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(row["step"], row["loss"]) for row in untimed(folder / "metrics.jsonl")]
    assert [step for step, _ in seen] == [step for step, _ in expected]
    assert [value for _, value in seen] == pytest.approx([value for _, value in expected])


@pytest.mark.parametrize(("limit", "kept"), [(2, ["checkpoint-6", "checkpoint-8"]), (0, ["checkpoint-8"])])
def test_only_so_many_checkpoints_are_kept_and_the_newest_always(train: Train, limit: int, kept: list[str]) -> None:
    folder = train("--checkpointing_steps", 2, "--checkpoints_total_limit", limit)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == kept


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rank", 8, r"--rank \(4 then, 8 now\)"),
        ("--learning_rate", 1e-3, r"--learning_rate \(0.01 then, 0.001 now\)"),
        ("--seed", 1, r"--seed \(0 then, 1 now\)"),
        ("--train_batch_size", 2, r"--train_batch_size \(4 then, 2 now\)"),
    ],
)
def test_a_run_does_not_continue_under_other_settings(train: Train, option: str, value: object, message: str) -> None:
    folder = train()
    before = files_of(folder)
    with pytest.raises(UsageError, match=message + r".*--overwrite"):
        train("--max_train_steps", 12, option, value)
    assert files_of(folder) == before


def test_a_run_does_not_continue_on_other_images(train: Train, captioned_images: Path, tmp_path: Path) -> None:
    train()
    changed = shutil.copytree(captioned_images, tmp_path / "images")
    shutil.copy(changed / "00.png", changed / "01.png")
    with pytest.raises(UsageError, match="images or captions differ"):
        train("--train_data_dir", changed, "--max_train_steps", 12)


def test_overwrite_starts_anew(train: Train) -> None:
    folder = train("--checkpointing_steps", 2)
    train("--overwrite", "--rank", 2, "--max_train_steps", 3)
    assert [row["step"] for row in untimed(folder / "metrics.jsonl")] == [2, 3]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_folder_of_something_else_is_refused(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for more in ((), ("--overwrite",)):
        with pytest.raises(UsageError, match=r"holds thesis.tex and no run"):
            train(*more)
    assert files_of(tmp_path / "run") == ["thesis.tex"]


def test_a_folder_in_use_is_refused_with_the_pid(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); f.write('4711'); "
        "f.flush(); print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run" / "run.lock"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="process 4711 trains there"):
            train()
    finally:
        holder.kill()
        holder.communicate()


def test_divergence_leaves_no_weights(train: Train, tmp_path: Path) -> None:
    with pytest.raises(TisserandError, match=r"step \d: the (loss|gradient) is not finite \(images \d\d.png"):
        train("--learning_rate", 1e30, "--checkpointing_steps", 100)
    assert not (tmp_path / "run" / LORA_FILE).exists()


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--train_data_dir", "absent"], InputError, "--train_data_dir absent: there is no such folder"),
        (["--caption_column", "title"], InputError, "no text under 'title'"),
        (["--pretrained_model_name_or_path", "./absent"], UsageError, "there is no such folder"),
        (["--mixed_precision", "fp16"], UsageError, "--mixed_precision fp16: needs a GPU"),
        (["--report_to", "abacus"], UsageError, "--report_to abacus: must be one of"),
        (["--resume_from_checkpoint", "checkpoint-99"], UsageError, "checkpoint-99: there is no such folder"),
        (["--random_flip"], UsageError, "is a slice of axis warp; mirrored it is a slice of another weave"),
        (["--dataset_name", "a/b"], InputError, "--dataset_name a/b: cannot be read"),
        (["--no_safe_serialization"], UsageError, "--no_safe_serialization: weights are written as safetensors"),
        (["--rank", "0"], UsageError, "--rank 0: must be above 0"),
        (["--push_to_hub"], UsageError, "--push_to_hub: HF_HUB_OFFLINE is set; unset it, or leave it out"),
        (["--use_8bit_adam"], UsageError, "--use_8bit_adam: needs a GPU"),
        (
            ["--enable_xformers_memory_efficient_attention"],
            UsageError,
            "--enable_xformers_memory_efficient_attention: needs a GPU",
        ),
        (["--report_to", "wandb"], UsageError, "--report_to wandb: the package is not installed"),
        (["--dry_run", "--overwrite"], UsageError, "--dry_run: changes nothing; leave out --overwrite"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(
    train: Train, tmp_path: Path, words: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(*words)
    written = files_of(tmp_path / "run") if (tmp_path / "run").exists() else []
    assert written == []


def test_an_adapter_of_a_zero_terminal_schedule_brings_it_along(train: Train, toy_sd: Path) -> None:
    folder = train("--prediction_type", "v_prediction", "--rescale_betas_zero_snr", "--max_train_steps", 1)
    models = load_models(str(toy_sd))
    load_adapter(models, folder)
    trained = models.scheduler.config
    assert (trained.prediction_type, trained.timestep_spacing) == ("v_prediction", "trailing")
    assert float(models.scheduler.alphas_cumprod[-1]) == 0.0
    set_adapter_scale(models, 0.0)
    base = models.scheduler.config
    assert (base.prediction_type, base.timestep_spacing) == ("epsilon", "leading")
    assert float(models.scheduler.alphas_cumprod[-1]) > 0.004


def launch(arguments: list[str]) -> subprocess.Popen[str]:
    """Start the recipe through the real launcher, in a process group of its own."""
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "finetune" / "lora.py"), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def kill_after(path: Path, process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signal the whole group as soon as a path exists: a killed launcher leaves its child running."""
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, number)
    process.communicate()


def test_killed_and_started_again_ends_bitwise_as_uninterrupted(
    train: Train, arguments: list[str], tmp_path: Path
) -> None:
    whole = train("--output_dir", tmp_path / "whole", "--max_train_steps", 30)
    more = ["--max_train_steps", "30"]
    kill_after(tmp_path / "run" / "checkpoint-3", launch([*arguments, *more]), signal.SIGKILL)
    assert not (tmp_path / "run" / LORA_FILE).exists()
    again = launch([*arguments, *more])
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert "continuing after step" in output
    assert (tmp_path / "run" / LORA_FILE).read_bytes() == (whole / LORA_FILE).read_bytes()
    assert untimed(tmp_path / "run" / "metrics.jsonl") == untimed(whole / "metrics.jsonl")


def test_terminated_writes_a_checkpoint_first(arguments: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = [sys.executable, str(ROOT / "finetune" / "lora.py"), *arguments]
    more = ["--max_train_steps", "100000", "--checkpointing_steps", "100000"]
    process = subprocess.Popen([*script, *more], cwd=ROOT, text=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors.splitlines()[-1] == "error: terminated"
    assert len(list(folder.glob("checkpoint-*"))) == 1
