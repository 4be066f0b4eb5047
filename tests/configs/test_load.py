"""Settings: every spelling that works, every mistake with its one line, and how a run ends."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from configs.errors import GateError, InputError, NothingLeftError, TisserandError, UsageError
from configs.load import Positional, Repeatable, as_dict, command, load, save


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The noise."""

    noise_offset: float = 0.0
    """Shared part of the noise."""
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        if self.noise_offset < 0:
            raise ValueError(f"--noise_offset {self.noise_offset}: must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a command takes."""

    train_data_dir: Path
    """Folder with the pictures."""
    rank: int = 4
    learning_rate: float = 1e-4
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    random_flip: bool = False
    centre: bool = True
    shape: tuple[int, int, int] = (1, 2, 3)
    prompts: tuple[str, ...] = ("a",)
    only: tuple[int, ...] | None = None
    adapter: Repeatable[tuple[Path, ...]] = ()
    volumes: dict[str, Path] = field(default_factory=dict)
    name: str | None = None
    title: str = ""
    noise: Noise = Noise(noise_offset=0.1)


@dataclass(frozen=True, kw_only=True)
class Verify:
    dataset: Positional[Path]
    others: Positional[tuple[Path, ...]] = ()
    strict: bool = False


REQUIRED = "--train_data_dir=d"


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write ``x.yaml`` in the current folder and return its name, so that messages are short."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path("x.yaml").write_text(text, encoding="utf-8")
        return "x.yaml"

    return write


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--rank", "8"], "rank", 8),
        (["--rank=8"], "rank", 8),
        (["--rank", "8", "--rank", "9"], "rank", 9),
        (["--learning_rate", "3e-5"], "learning_rate", 3e-5),
        (["--learning_rate", "-1"], "learning_rate", -1.0),
        (["--mixed_precision", "no"], "mixed_precision", "no"),
        (["--mixed_precision", "null"], "mixed_precision", None),
        (["--random_flip"], "random_flip", True),
        (["--random_flip", "--no_random_flip"], "random_flip", False),
        (["--random_flip=true"], "random_flip", True),
        (["--no_centre"], "centre", False),
        (["--shape", "359", "702", "970"], "shape", (359, 702, 970)),
        (["--shape", "-1", "2", "-3"], "shape", (-1, 2, -3)),
        (["--prompts", "x y", "z"], "prompts", ("x y", "z")),
        (["--prompts", "x", "y", "--prompts", "z"], "prompts", ("z",)),
        (["--prompts"], "prompts", ()),
        (["--prompts=--x"], "prompts", ("--x",)),
        (["--only", "1", "2"], "only", (1, 2)),
        (["--only", "None"], "only", None),
        (["--adapter", "a", "b", "--adapter", "c"], "adapter", (Path("a"), Path("b"), Path("c"))),
        (["--volumes", "dry=a b.tif", "wet=c=d.tif"], "volumes", {"dry": Path("a b.tif"), "wet": Path("c=d.tif")}),
        (["--name", "none"], "name", "none"),
        (["--title", "null"], "title", "null"),
    ],
)
def test_command_line_spelling_gives_the_value(words: list[str], name: str, value: object) -> None:
    assert as_dict_of(load(Settings, [REQUIRED, *words]))[name] == value


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("rank: 8", "rank", 8),
        ("rank: '8'", "rank", 8),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: .inf", "learning_rate", math.inf),
        ("mixed_precision: no", "mixed_precision", "no"),
        ("mixed_precision: null", "mixed_precision", None),
        ("mixed_precision:", "mixed_precision", None),
        ("mixed_precision: ~", "mixed_precision", None),
        ("random_flip: yes", "random_flip", True),
        ("random_flip: True", "random_flip", True),
        ("centre: off", "centre", False),
        ("shape: [359, 702, 970]", "shape", (359, 702, 970)),
        ("shape:\n- 359\n- 702\n- 970", "shape", (359, 702, 970)),
        ("prompts: sf_dry sf_warp", "prompts", ("sf_dry sf_warp",)),
        ("prompts: []", "prompts", ()),
        ("prompts: [no, 1e-4, 'null', --x]", "prompts", ("no", "1e-4", "null", "--x")),
        ("only: null", "only", None),
        ("volumes: {dry: a b.tif, wet: c=d.tif}", "volumes", {"dry": Path("a b.tif"), "wet": Path("c=d.tif")}),
        ("volumes: [dry=a.tif]", "volumes", {"dry": Path("a.tif")}),
        ("volumes: {}", "volumes", {}),
        ("name: 'null'", "name", "null"),
        ("name: '.inf'", "name", ".inf"),
        ("name: .inf", "name", ".inf"),
        ("name: 2026-11-21", "name", "2026-11-21"),
        ("title: true", "title", "true"),
        ("noise_offset: 0.2", "noise_offset", 0.2),
        ("# nothing but a comment", "rank", 4),
        ("", "rank", 4),
    ],
)
def test_yaml_spelling_gives_the_value(preset: Callable[[str], str], text: str, name: str, value: object) -> None:
    assert as_dict_of(load(Settings, [REQUIRED, "--config", preset(text)]))[name] == value


def as_dict_of(config: Settings) -> dict[str, Any]:
    """Return the fields as they are, the inner dataclass's among them."""
    return {**vars(config), **vars(config.noise)}


@pytest.mark.parametrize("words", [["--prompts", "z", "--config", "x.yaml"], ["--config", "x.yaml", "--prompts", "z"]])
def test_command_line_wins_over_yaml_in_any_order(preset: Callable[[str], str], words: list[str]) -> None:
    preset("prompts: [x, y]\nadapter: [x]\nrank: 8")
    config = load(Settings, [REQUIRED, "--adapter", "z", *words])
    assert (config.prompts, config.adapter, config.rank) == (("z",), (Path("z"),), 8)


def test_inner_dataclass_keeps_its_own_default_beside_a_given_field() -> None:
    assert load(Settings, [REQUIRED, "--snr_gamma", "5"]).noise == Noise(noise_offset=0.1, snr_gamma=5.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rnak", "8"], "unknown option '--rnak'; did you mean '--rank'?"),
        (["--ran", "8"], "unknown option '--ran'; did you mean '--rank'?"),
        (["--learning-rate", "1"], "unknown option '--learning-rate'; did you mean '--learning_rate'?"),
        (["--no_rank"], "unknown option '--no_rank'; did you mean '--rank'?"),
        (["--zzz"], "unknown option '--zzz'"),
        (
            ["--config_file", "x"],
            "unknown option '--config_file'; it belongs to accelerate launch, before the script; ",
        ),
        (["--rank", "eight"], "--rank: expected a whole number, got 'eight'"),
        (["--rank", "8.0"], "--rank: expected a whole number, got '8.0'"),
        (["--rank"], "--rank: expected a whole number, got nothing"),
        (["--rank", "null"], "--rank: expected a whole number, got 'null'"),
        (["--snr_gamma", "x"], "--snr_gamma: expected a number or null, got 'x'"),
        (["--mixed_precision", "fp8"], "--mixed_precision: expected one of no, fp16, bf16 or null, got 'fp8'"),
        (["--shape", "1", "2"], "--shape: expected 3 values, each a whole number, got '1 2'"),
        (["--shape", "1", "2", "x"], "--shape: expected 3 values, each a whole number, got '1 2 x'"),
        (["--only", "1", "x"], "--only: expected a list, each a whole number or null, got '1 x'"),
        (["--volumes", "a.tif"], "--volumes: expected name=value, each name once, got 'a.tif'"),
        (["--volumes", "d=a", "d=b"], "--volumes: expected name=value, each name once, got 'd=a d=b'"),
        (["--random_flip=maybe"], "--random_flip: expected true or false, got 'maybe'"),
        (["--no_random_flip=true"], "--no_random_flip takes no value, got 'true'"),
        (["--random_flip", "true"], "'true' belongs to no option (after --random_flip, which takes no more); "),
        (["stray"], "'stray' belongs to no option"),
        (["--noise_offset", "-1"], "--noise_offset -1.0: must be 0 or more"),
        (["--config", "none.yaml"], "--config none.yaml: No such file or directory"),
        (["--config", "."], "--config .: Is a directory"),
    ],
)
def test_command_line_mistake_is_named_as_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        load(Settings, [REQUIRED, *words])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 8", "x.yaml:1: unknown key 'rnak'; did you mean 'rank'?"),
        ("rank: 8\nlearning-rate: 1", "x.yaml:2: unknown key 'learning-rate'; did you mean 'learning_rate'?"),
        ("noise:\n  noise_offset: 1", "x.yaml:1: unknown key 'noise'; did you mean 'noise_offset'?"),
        ("config: y.yaml", "x.yaml:1: unknown key 'config'"),
        ("rank: 8\n\nrank: 9", "x.yaml:3: 'rank' is given twice (first on line 1)"),
        ("\nrank: eight", "x.yaml:2: rank: expected a whole number, got 'eight'"),
        ("rank: null", "x.yaml:1: rank: expected a whole number, got null"),
        ("title:", "x.yaml:1: title: expected text, got null"),
        ("rank: [1, 2]", "x.yaml:1: rank: expected a whole number, got '1 2'"),
        ("rank: {a: 1}", "x.yaml:1: rank: expected a whole number, got 'a=1'"),
        ("random_flip: maybe", "x.yaml:1: random_flip: expected true or false, got 'maybe'"),
        ("random_flip: [true, true]", "x.yaml:1: random_flip: expected true or false, got 'true true'"),
        ("mixed_precision: fp8", "x.yaml:1: mixed_precision: expected one of no, fp16, bf16 or null, got 'fp8'"),
        ("prompts: [[a]]", "x.yaml:1: prompts: expected a value, a list or a mapping of values"),
        ("only: [1, null]", "x.yaml:1: only: expected a list, each a whole number or null, got '1 null'"),
        ("noise_offset: -1", "x.yaml:1: noise_offset: --noise_offset -1.0: must be 0 or more"),
        ("- rank", "x.yaml:1: expected lines of 'key: value'"),
        ("rank", "x.yaml:1: expected lines of 'key: value'"),
        ("rank: 8\nrank 9: [", "x.yaml:2: not readable as YAML: "),
        ("a: *b", "x.yaml:1: not readable as YAML: found undefined alias"),
        ("[a]: 1", "x.yaml:1: unknown key "),
        ("rank: 1\n---\nrank: 2", "x.yaml:2: not readable as YAML: "),
        ("rank: \x01", "x.yaml: not readable as YAML: "),
        ("[" * 20_000, "x.yaml:1: not readable as YAML: nested too deeply"),
        ("- " * 20_000, "x.yaml:1: not readable as YAML: nested too deeply"),
        ("volumes:\n  dry: a\n  wet: b\n  dry: c", "x.yaml:4: 'dry' is given twice (first on line 2)"),
        ("adapter: ''", "x.yaml:1: adapter: expected a list, each a path, got ''"),
        ('adapter: "a\\0b"', "x.yaml:1: adapter: expected a list, each a path, got "),
    ],
)
def test_yaml_mistake_names_file_line_and_key(preset: Callable[[str], str], text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(Settings, [REQUIRED, "--config", preset(text)])
    assert str(caught.value).startswith(message)


def test_config_that_is_not_text_is_refused_without_reading_it_whole(preset: Callable[[str], str]) -> None:
    name = preset("a" * 100_001)
    with pytest.raises(UsageError, match="larger than 100000 bytes"):
        load(Settings, ["--config", name])


def test_every_missing_required_option_is_named() -> None:
    with pytest.raises(UsageError, match=r"^missing --train_data_dir; give it on the command line"):
        load(Settings, ["--rank", "8"])
    with pytest.raises(UsageError, match=r"^missing DATASET;"):
        load(Verify, [])


def test_positional_words_are_taken_in_order_around_flags() -> None:
    assert load(Verify, ["a", "--strict", "b", "c"]) == Verify(
        dataset=Path("a"), others=(Path("b"), Path("c")), strict=True
    )


def test_positional_can_come_from_yaml(preset: Callable[[str], str]) -> None:
    assert load(Verify, ["--config", preset("dataset: a")]).dataset == Path("a")


ODD_WORDS = (
    "",
    "null",
    "None",
    "~",
    "true",
    "no",
    "1e-4",
    "08",
    "a=b",
    "--x",
    "é ☃",
    " a ",
    "#",
    "a: b",
    "\n",
    "\x85",
    "\u2028",
    "\x1b",
    "\udcff",
    ".inf",
    "-",
)


@pytest.mark.parametrize(
    "config",
    [
        Settings(train_data_dir=Path("a b/é")),
        Settings(train_data_dir=Path("null"), prompts=(), only=(), adapter=()),
        Settings(train_data_dir=Path(), prompts=ODD_WORDS, volumes={"dry": Path("a=b c.tif"), "no": Path("null")}),
        Settings(train_data_dir=Path("1e-4"), random_flip=True, centre=False, only=(1,), mixed_precision="no"),
        Settings(train_data_dir=Path("~"), learning_rate=1e-12, noise=Noise(noise_offset=math.inf, snr_gamma=1e22)),
        *(Settings(train_data_dir=Path("d"), name=word, title=word) for word in ODD_WORDS),
    ],
)
def test_saved_config_reloads_equal(tmp_path: Path, config: Settings) -> None:
    save(config, tmp_path / "config.yaml")
    assert load(Settings, ["--config", str(tmp_path / "config.yaml")]) == config


def test_saved_config_means_the_same_to_any_yaml_reader(tmp_path: Path) -> None:
    config = Settings(train_data_dir=Path("d"), prompts=ODD_WORDS, learning_rate=1e-5)
    save(config, tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")) == as_dict(config)


def test_as_dict_is_flat_and_plain() -> None:
    flat = as_dict(Settings(train_data_dir=Path("d"), adapter=(Path("a"),)))
    assert (flat["train_data_dir"], flat["adapter"], flat["noise_offset"]) == ("d", ["a"], 0.1)
    assert "noise" not in flat


def test_print_config_prints_what_reloads_and_exits_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        load(Settings, [REQUIRED, "--prompts", "null", "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert stop.value.code == 0
    assert load(Settings, ["--config", str(tmp_path / "printed.yaml")]).prompts == ("null",)


def test_help_shows_field_docs_and_flat_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load(Settings, ["--help"])
    page = capsys.readouterr().out
    assert stop.value.code == 0
    for expected in ("Folder with the pictures.", "--noise_offset FLOAT", "--no_centre", "NAME=PATH", "--config"):
        assert expected in page


def test_field_named_like_a_common_option_is_a_programming_error() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Clash:
        rank: int = 1
        debug: bool = False

    with pytest.raises(TypeError, match="debug"):
        load(Clash, [])


# ---- How a run ends ----


@pytest.fixture
def outcome(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[object, str]]]:
    """Run a command that raises, and return its exit code and what it wrote to stderr."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)

    def run(error: BaseException | None, *words: str) -> tuple[object, str]:
        def main(config: Verify) -> None:
            if error is not None:
                raise error

        monkeypatch.setattr(sys, "argv", ["program", *(words or ["dataset"])])
        try:
            command(Verify, main)
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TisserandError("loss is nan at step 3"), 1, "error: loss is nan at step 3\n"),
        (UsageError("--rank 0: must be 1 or more"), 2, "error: --rank 0: must be 1 or more\n"),
        (InputError("a.tif: truncated"), 3, "error: a.tif: truncated\n"),
        (NothingLeftError("no slice left"), 4, "error: no slice left\n"),
        (GateError("drift 0.9"), 5, "error: drift 0.9\n"),
        (InputError("two\nlines \x1b[31m"), 3, "error: two lines \\x1b[31m\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/a.png"),
            1,
            "error: out/a.png: No space left on device\n",
        ),
        (OSError("odd picture"), 1, "error: odd picture\n"),
        (MemoryError("Unable to allocate 3 TiB"), 1, "error: out of memory Unable to allocate 3 TiB\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (
            KeyError("x"),
            1,
            "error: KeyError: 'x' (unexpected; run again with --debug for the traceback)\n",
        ),
        (SystemExit(143), 143, ""),
        (None, 0, ""),
    ],
)
def test_error_becomes_one_line_and_its_exit_code(
    outcome: Callable[..., tuple[object, str]], error: BaseException | None, code: int, line: str
) -> None:
    assert outcome(error) == (code, line)


def test_mistake_in_the_settings_exits_2(outcome: Callable[..., tuple[object, str]]) -> None:
    assert outcome(None, "--strcit") == (2, "error: unknown option '--strcit'; did you mean '--strict'?\n")


def test_debug_shows_the_traceback_and_keeps_the_code(outcome: Callable[..., tuple[object, str]]) -> None:
    code, text = outcome(InputError("a.tif: truncated"), "dataset", "--debug")
    assert (code, text.splitlines()[0], text.splitlines()[-1]) == (
        3,
        "Traceback (most recent call last):",
        "error: a.tif: truncated",
    )


@pytest.mark.parametrize(("rank", "shown"), [("0", "error: x\n"), ("1", "")])
def test_only_rank_0_prints(
    outcome: Callable[..., tuple[object, str]], monkeypatch: pytest.MonkeyPatch, rank: str, shown: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert outcome(InputError("x")) == (3, shown)


def test_sigterm_clears_up_and_exits_143(tmp_path: Path) -> None:
    script = tmp_path / "wait.py"
    script.write_text(
        "import time\n"
        "from configs.load import command\n"
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Config:\n"
        "    seed: int = 0\n"
        "def main(config):\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('cleared', flush=True)\n"
        "command(Config, main)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (143, "cleared\n", "error: terminated\n")
