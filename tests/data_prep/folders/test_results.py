"""A row of results survives the file, and no row can claim what it does not know."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.load import load
from data_prep.folders.results import Result, command_line, read_results, write_results
from finetune.diffusion.config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class Settings:
    name: str
    words: tuple[str, ...] = ()
    flag: bool = True
    folder: Path | None = Path("somewhere")
    sampling: SamplingConfig = SamplingConfig(num_inference_steps=20)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        Result(metric="leak", set="G0", prompt="zw\u00f6lf <b>", value=0.25, low=0.0, high=0.5, n=4, verdict="warn"),
        Result(metric="leak", reason="no slices", hashes={"base": "ab"}, command="python -m eval.drift"),
    ]
    write_results(tmp_path / "results.jsonl", rows)
    assert read_results(tmp_path / "results.jsonl") == rows


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_row_holds_no_number_that_json_cannot(number: float) -> None:
    with pytest.raises(ValueError, match=r"leak: value is (nan|inf)"):
        Result(metric="leak", value=number)


def test_a_number_that_was_not_measured_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="can only be grey, not ok"):
        Result(metric="leak", verdict="ok")


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"metric": "leak"}\n[1]\n')
    with pytest.raises(InputError, match="line 2"):
        read_results(path)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(name="a b"),
        Settings(name="it's", words=("", "two words"), flag=False, folder=None),
        Settings(name="x", sampling=SamplingConfig(num_inference_steps=3, height=16)),
    ],
)
def test_the_printed_command_gives_the_same_settings(settings: Settings) -> None:
    words = shlex.split(command_line("eval.any", settings))
    assert words[:3] == ["python", "-m", "eval.any"]
    assert load(Settings, words[3:]) == settings
