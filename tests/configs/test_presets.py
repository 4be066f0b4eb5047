"""Presets are commands: each names the ones it is for, and the program reads every line of it."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from configs.load import as_dict, load

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"^#   ((?:accelerate launch|python -m|python) .+)$", re.MULTILINE)
COMMANDS = [
    (path.name, command)
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    for command in COMMAND.findall(path.read_text(encoding="utf-8"))
]
# What the study says of each run: effective batch, epochs, and what else it names.
STUDY = {
    "full_dtd.yaml": {"batch": 128, "num_train_epochs": 334, "noise_offset": 0.1},
    "ti_slices.yaml": {"batch": 16, "num_train_epochs": 40, "learnable_property": "object"},
    "dreambooth_zigzagged.yaml": {
        "batch": 128,
        "num_train_epochs": 800,
        "learning_rate": 2e-6,
        "num_class_images": 200,
        "instance_prompt": "a dtd_zigzagged texture",
        "class_prompt": "a texture",
        "train_text_encoder": True,
    },
    "lora_slices.yaml": {"batch": 64, "num_train_epochs": 88, "rank": 4, "resolution": 512},
    "lora_dreambooth_slices.yaml": {"batch": 64, "num_train_epochs": 500},
}


def settings_of(command: str) -> dict[str, object]:
    """Read a command as its program does, up to where the work would start."""
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py") or word.startswith(("data_prep.", "eval.")))
    name = script.removesuffix(".py").replace("/", ".")
    module = importlib.import_module(name)
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    found = re.search(r"^    command\((\w+), main\)$", source, re.MULTILINE)
    assert found is not None
    return as_dict(load(getattr(module, found[1]), words[words.index(script) + 1 :]))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_preset_names_a_command_that_reads_it(path: Path) -> None:
    assert any(f"--config configs/{path.name}" in command for name, command in COMMANDS if name == path.name)


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_command_of_a_preset_is_read_by_its_program(name: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert settings_of(command)


@pytest.mark.parametrize("name", STUDY)
def test_preset_has_the_numbers_of_the_study(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = settings_of(next(command for preset, command in COMMANDS if preset == name))
    assert settings["train_batch_size"] * settings["gradient_accumulation_steps"] == STUDY[name]["batch"]
    assert settings["max_train_steps"] is None
    assert {key: settings[key] for key in STUDY[name] if key != "batch"} == {
        key: value for key, value in STUDY[name].items() if key != "batch"
    }


@pytest.mark.parametrize(("name", "command"), [pair for pair in COMMANDS if pair[0].startswith("tiny_")])
def test_tiny_preset_uses_the_embedded_model(name: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert settings_of(command)["pretrained_model_name_or_path"] == "assets/tiny-sd"
