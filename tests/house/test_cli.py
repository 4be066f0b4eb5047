"""Every command: its help is quick, its mistakes are one line, and the presets that name it fit it."""

from __future__ import annotations

import ast
import importlib
import os
import re
import resource
import subprocess
import sys
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

# The program as started by a user; what it has imported by the end goes to stderr.
RUN = """
import runpy, sys
name, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
finally:
    print("loaded", *(heavy for heavy in {heavy} if heavy in sys.modules), file=sys.stderr)
"""


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")}
    program = [sys.executable, "-c", RUN.format(heavy=HEAVY), name, *words]
    return subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_within_the_second_without_the_libraries(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(name, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "loaded\n")
    assert "--print_config" in done.stdout
    # Processor time, because the wall clock of a busy machine says nothing about us.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


@pytest.mark.parametrize("name", COMMANDS)
def test_unknown_option_is_one_line_without_the_libraries(name: str) -> None:
    done = run(name, "--rnak_zzz", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown option '--rnak_zzz'\nloaded\n"


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
