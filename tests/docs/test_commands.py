"""Every command on a page is one: the program exists, and takes the words that stand there."""

from __future__ import annotations

import functools
import importlib
import itertools
import re
import tomllib
from pathlib import Path

import pytest
from pages import PAGES, ROOT, Command, commands_of, flags_of

from configs.errors import TisserandError
from configs.load import Common, load
from configs.options import convert, options_of, read_words
from configs.reference import commands

OTHERS = {"cd", "cp", "export", "find", "git", "hf", "ls", "mkdir", "sha256sum", "source", "tensorboard"}
"""Programs of others that a page may start."""
OTHER_MODULES = {"http.server", "pip", "venv"}
OTHER_FLAGS = {
    "help",
    "include",
    "exclude",
    "local-dir",
    "requirement",
    "dest",
    "index-url",
    "extra-index-url",
    "logdir",
}


def ours(name: str, words: list[str], is_whole: bool) -> str | None:
    """Return what a command of ours says of its words, None if it takes them."""
    kind = of_benchmark(name) if name.startswith("benchmarks.") else commands().get(name)
    if kind is None:
        return f"no command {name}"
    presets = [Path(value) for flag, value in itertools.pairwise(words) if flag == "--config"]
    written = [path for path in presets if path.parts[0] in ("configs", "prompts")]
    if gone := [path for path in written if not (ROOT / path).is_file()]:
        return f"no file {gone[0]}"
    try:
        if not is_whole or written != presets:  # the rest of the options is elsewhere
            options = options_of(kind) | options_of(Common)
            for option, given in read_words([word for word in words if word != "..."], options).items():
                convert(options[option], given)
        else:
            load(kind, words)
    except TisserandError as error:
        return str(error)
    except SystemExit as error:  # --help, --print_config
        return None if error.code == 0 else str(error)
    return None


def of_benchmark(name: str) -> type | None:
    path = ROOT / f"{name.replace('.', '/')}.py"
    found = re.search(r"^    command\((\w+), main\)$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return getattr(importlib.import_module(path.stem), found[1]) if found else None


def of_script(script: str, words: list[str], is_whole: bool) -> str | None:
    return ours(script.removesuffix(".py").replace("/", "."), words, is_whole)


def launched(words: list[str], is_whole: bool) -> str | None:
    """Check ``accelerate launch [its options] script.py [ours]``."""
    from accelerate.commands.launch import launch_command_parser

    place = next((place for place, word in enumerate(words) if word.endswith(".py")), None)
    if place is None:
        return None if not is_whole else "starts no script"
    launcher = launch_command_parser().parse_args(words[: place + 1])
    if launcher.config_file and not (ROOT / launcher.config_file).is_file():
        return f"no file {launcher.config_file}"
    return of_script(words[place], words[place + 1 :], is_whole)


def torchrun(words: list[str], is_whole: bool) -> str | None:
    """Check ``torchrun [its options] script.py [ours]``, or ``-m module``."""
    from torch.distributed.run import get_args_parser

    run = get_args_parser().parse_args(words)
    inner = list(run.training_script_args)
    return ours(run.training_script, inner, is_whole) if run.module else of_script(run.training_script, inner, is_whole)


@functools.cache
def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@functools.cache
def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])


def complaint(command: Command) -> str | None:
    """Return what is wrong with a command of a page, None if nothing is."""
    match list(command.words):
        case ["python", "-m", name, *_] if name in OTHER_MODULES:
            return None
        case ["python", "-m", "configs.reference"]:
            return None
        case ["python", "-m", name, *words]:
            return ours(name, words, command.is_whole)
        case ["python", script, *words] if script.endswith(".py"):
            return of_script(script, words, command.is_whole)
        case ["accelerate", "launch", *words]:
            return launched(words, command.is_whole)
        case ["torchrun", *words]:
            return torchrun(words, command.is_whole)
        case ["make", *words]:
            unknown = [word for word in words if word not in targets() and "=" not in word]
            return f"no target {unknown[0]}" if unknown else None
        case ["pip", *words]:
            named = {extra for word in words for part in re.findall(r"\[(.*)\]", word) for extra in part.split(",")}
            return f"no extra {', '.join(sorted(named - extras()))}" if named - extras() else None
        case [program, *_] if program in OTHERS:
            return None
    return f"{command.words[0]} is none of ours, and not on the list of others"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_taken_by_its_program(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    wrong = [f"{command}\n    {said}" for command in commands_of(page) if (said := complaint(command))]
    assert wrong == [], "\n".join(wrong)


def test_every_option_that_a_page_names_belongs_to_a_command() -> None:
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    known = {name for kind in commands().values() for name in options_of(kind)} | set(options_of(Common)) | OTHER_FLAGS
    known |= {f"no_{name}" for name in known}
    for parser in (launch_command_parser(), get_args_parser()):
        known |= {flag.lstrip("-") for action in parser._actions for flag in action.option_strings}
    unknown = [f"{page.name}:{line}: --{flag}" for page in PAGES for line, flag in flags_of(page) if flag not in known]
    assert unknown == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("python -m eval.drfit --probes tiny", "no command eval.drfit"),
        ("python -m data_prep.verify data/weave --strikt", "unknown option '--strikt'"),
        ("python -m data_prep.verify", "missing DATASET"),
        ("python -m data_prep.slice --config configs/slices.yaml --output_dir a", "no file configs/slices.yaml"),
        ("accelerate launch finetune/lora.py --rank four --output_dir a ...", "--rank: expected a whole number"),
        (
            "accelerate launch --config_file configs/accelerate/no.yaml finetune/lora.py ...",
            "no file configs/accelerate",
        ),
        ("make tset", "no target tset"),
        ("pip install 'tisserand[hfd5]'", "no extra hfd5"),
        ("(cd a && curl b)", "curl is none of ours"),
    ],
)
def test_wrong_command_is_found(line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n```\n{line}\n```\n\n```text\nnot a command\n```\n", encoding="utf-8")
    told = [answer for command in commands_of(page) if (answer := complaint(command))]
    assert len(told) == 1
    assert said in told[0]
