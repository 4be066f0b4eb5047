"""Starting a run: what is refused before anything is loaded, and what its files never hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from configs.errors import UsageError
from configs.load import load
from data_prep.folders.run_folder import LORA_FILE
from finetune.core.settings.training import TrainConfig
from finetune.core.start import start_run
from finetune.lora import LoraRun, main

ROOT = Path(__file__).parents[3]


@pytest.fixture
def asked(toy_sd: Path, captioned_images: Path, tmp_path: Path) -> list[str]:
    values = {"pretrained_model_name_or_path": toy_sd, "train_data_dir": captioned_images, "train_batch_size": 4}
    values |= {"output_dir": tmp_path / "run", "max_train_steps": 4, "checkpointing_steps": 2, "report_to": "none"}
    return [word for name, value in {**values, "seed": 0}.items() for word in (f"--{name}", str(value))]


def start(folder: Path, **options: object) -> None:
    config = TrainConfig(output_dir=folder / "run", **options)
    start_run(config, config, num_images=1, data_hash="", weights_file="w").__exit__()


@pytest.mark.parametrize("form", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]])
def test_an_access_token_is_in_no_file_of_the_run(
    asked: list[str], form: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["finetune/lora.py", *asked, *form])
    main(load(LoraRun))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["command"][-1].endswith("***")
    assert [path for path in files if b"hf_secret" in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "accelerate launch with fsdp_version: 1: must be 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "nothing to split over; use 2 or more"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "accelerate launch with DeepSpeed: "),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "--mixed_precision fp8: must be one of no, fp16, bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "--mixed_precision fp16: needs a GPU"),
    ],
)
def test_a_launcher_that_asks_for_what_is_not_there_is_refused(
    variables: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        start(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_trackers_are_named_as_asked(tmp_path: Path) -> None:
    start(tmp_path, report_to="tensorboard", tracker_project_name="weaves")
    assert [path.name for path in (tmp_path / "run" / "logs").iterdir()] == ["weaves"]


@pytest.mark.parametrize("name", ["adafactor", "prodigy"])
def test_a_recipe_goes_on_bitwise_with_every_optimizer(name: str, asked: list[str], tmp_path: Path) -> None:
    asked = [*asked, "--optimizer", name, "--learning_rate", "1", "--lr_scheduler", "cosine", "--lr_warmup_steps", "1"]
    main(load(LoraRun, asked))
    whole = load_file(tmp_path / "run" / LORA_FILE)
    assert any(float(value.abs().max()) > 0 for name, value in whole.items() if "lora_B" in name)
    asked += ["--output_dir", str(tmp_path / "cut")]
    main(load(LoraRun, [*asked, "--max_train_steps", "2"]))
    # The schedule of the two steps was shorter; what goes on is the state, which the first run had as well.
    main(load(LoraRun, [*asked, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2"), "--overwrite"]))
    again = load_file(tmp_path / "cut" / LORA_FILE)
    assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_launch_config_says_whether_it_has_run(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith(("# Has run: ", "# Has never run: "))
    assert yaml.safe_load(path.read_text())["compute_environment"] == "LOCAL_MACHINE"
