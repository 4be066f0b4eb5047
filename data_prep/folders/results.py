"""One measured number with everything needed to judge and to repeat it; a row of ``results.jsonl``."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from configs.errors import InputError

Verdict = Literal["ok", "warn", "stop", "grey"]
VERDICTS: tuple[Verdict, ...] = ("ok", "warn", "stop", "grey")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A number, its interval, what it is made of and what it means.

    Attributes:
        metric: what was measured, such as ``leak``.
        set: the group of prompts or slices it belongs to (``G0``, ``dry``), empty for the whole.
        prompt: the prompt, empty for a number over a set.
        value: the number; None where it could not be measured.
        low: lower end of the 95 % interval, None without one.
        high: upper end of the 95 % interval, None without one.
        n: pictures, tiles or predictions it is made of.
        n_eff: how many of them are independent.
        floor: what the same measurement reads where nothing changed; None without such a reference.
        unit: ``share``, ``ratio``, ``px``, ...
        tier: ``A`` needs no outside weights, ``B`` local weights, ``C`` further packages.
        verdict: ``ok``, ``warn``, ``stop``, or ``grey`` for not measurable or not judged.
        reason: why the verdict is what it is, in words.
        hashes: name -> hash of the models, data and probe lists it depends on.
        command: the command that gives this row again.
    """

    metric: str
    set: str = ""
    prompt: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    n_eff: float | None = None
    floor: float | None = None
    unit: str = ""
    tier: str = "A"
    verdict: Verdict = "grey"
    reason: str = ""
    hashes: dict[str, str] = field(default_factory=dict)
    command: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict '{self.verdict}' is not one of {', '.join(VERDICTS)}")
        for name in ("value", "low", "high", "n_eff", "floor"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{self.metric}: {name} is {number}; a row holds finite numbers or null")
        if self.value is None and self.verdict != "grey":
            raise ValueError(f"{self.metric}: a row without a value can only be grey, not {self.verdict}")


def command_line(module: str, config: object) -> str:
    """Write the command that gives this config: ``python -m MODULE`` and every option that is not at its default."""
    words = ["python", "-m", module]
    for name, value in _changed(config).items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, dict):
            words += [f"--{name}", *(f"{key}={item}" for key, item in value.items())]
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def _changed(config: Any) -> dict[str, Any]:
    """Return the fields that differ from their default, those of nested dataclasses under their own names."""
    changed: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        if is_dataclass(value):
            inner = {} if default is MISSING else {f.name: getattr(default, f.name) for f in fields(value)}
            mine = {f.name: getattr(value, f.name) for f in fields(value)}
            changed |= {name: item for name, item in mine.items() if name not in inner or inner[name] != item}
        elif value != default:
            changed[entry.name] = value
    return {name: "null" if value is None else value for name, value in changed.items()}


def write_results(path: Path, rows: Iterable[Result]) -> None:
    """Write one JSON object a line, in the order given."""
    lines = [json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_results(path: Path) -> list[Result]:
    """Read what ``write_results`` wrote; keys this version does not know are ignored.

    Raises:
        InputError: the file is missing, or a line is not such a row, naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no readable results ({type(error).__name__})") from None
    known = {entry.name for entry in fields(Result)}
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            rows.append(Result(**{key: value for key, value in content.items() if key in known}))
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: not a result row ({error})") from None
    return rows
