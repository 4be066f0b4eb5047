"""Every command: its help is quick, its mistakes are one line, and the presets that name it fit it."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs.options import convert, options_of, read_yaml

ROOT = Path(__file__).parents[2]
PACKAGES = ("data_prep", "eval", "finetune", "prompts")
HEAVY = ("torch", "diffusers", "transformers", "peft", "datasets", "accelerate")


def commands() -> dict[str, str]:
    """Return the modules that end in ``command(SomeConfig, main)`` with the name of their config class."""
    found = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id="command"), args=[ast.Name(id=config_class), _]):
                    found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = config_class
    return found


COMMANDS = commands()
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))

# Starts the program as a user does, first for its help and then with a mistake, and prints what each left behind.
# One process for both, because most of the time goes into starting it.
RUN = """
import contextlib, io, json, runpy, sys, time
name, found = sys.argv[1], []
for words in (["--help"], ["--rnak_zzz", "1"]):
    sys.argv[1:], code = words, 0
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
    loaded = [heavy for heavy in {heavy} if heavy in sys.modules]
    ended = {{"code": code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}}
    found.append(ended | {{"loaded": loaded, "seconds": time.process_time()}})
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Answer:
    """How a command ended: what it printed, the heavy libraries it loaded, the processor time since the start."""

    code: int | str
    stdout: str
    stderr: str
    loaded: list[str]
    seconds: float


@pytest.fixture(scope="module", params=COMMANDS)
def answers(request: pytest.FixtureRequest) -> tuple[Answer, Answer]:
    """Return what a command answers to ``--help``, and to an option that it does not have."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")}
    program = [sys.executable, "-c", RUN.format(heavy=HEAVY), request.param]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    helped, mistaken = (Answer(**answer) for answer in json.loads(done.stdout))
    return helped, mistaken


def test_help_answers_within_the_second_without_the_libraries(answers: tuple[Answer, Answer]) -> None:
    helped, _ = answers
    assert (helped.code, helped.stderr, helped.loaded) == (0, "", [])
    assert "--print_config" in helped.stdout
    # Processor time, because the wall clock of a busy machine says nothing about us.
    assert helped.seconds < 1.5


def test_unknown_option_is_one_line_without_the_libraries(answers: tuple[Answer, Answer]) -> None:
    _, mistaken = answers
    assert (mistaken.code, mistaken.stdout, mistaken.loaded) == (2, "", [])
    assert mistaken.stderr == "error: unknown option '--rnak_zzz'\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_module_says_what_it_is_for_and_how_to_run_it(name: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))) or ""
    started_as = (f"python -m {name}", f"finetune/{name.rpartition('.')[2]}.py")
    assert any(form in text for form in started_as)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_preset_names_its_command_and_fits_it(preset: Path) -> None:
    comment = preset.read_text(encoding="utf-8")
    started = re.search(rf"^# .*?(?:-m )?(\S+) --config configs/{preset.name}", comment, re.MULTILINE)
    assert started, f"{preset.name} says in no comment how it is run: ... --config configs/{preset.name}"
    name = started[1].removesuffix(".py").replace("/", ".")
    options = options_of(getattr(importlib.import_module(name), COMMANDS[name]))
    for key, given in read_yaml(preset, options).items():
        convert(options[key], given)


def test_launcher_hands_our_options_over() -> None:
    """``accelerate launch`` and a script of ours both have a ``--config``-like flag; each gets its own."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launch += ["--config_file", "configs/accelerate/cpu.yaml", "finetune/lora.py"]
    words = ["--pretrained_model_name_or_path", "a b", "--train_data_dir", "d", "--output_dir", "o", "--rank", "8"]
    done = subprocess.run([*launch, *words, "--print_config"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"rank: 8", "pretrained_model_name_or_path: a b"} <= set(done.stdout.splitlines())
