"""What is compared: the results of each run, refused unless all were measured alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from data_prep.folders.manifest import read_records
from data_prep.folders.results import Result
from eval.forgetting.reported import WORST_PROMPT
from eval.page.inputs import read_folder
from eval.page.words import MEASURED_BY

SAME = {
    "eval.fidelity": ("train", "validation", "records_grid"),
    "eval.drift": ("base", "probes"),
    "eval.memorization": ("validation", "records_grid"),
}
"""Hashes and grids that must be equal before the numbers of a command are put side by side."""
COLUMNS = tuple((module, number) for module, numbers in MEASURED_BY.items() for number in numbers if number.compared)
"""Command and number of each column of the table."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run: the rows of each command, and what they were measured on.

    Attributes:
        name: as typed.
        rows: command -> its rows over everything.
        settings: command -> name -> hash or grid that must be equal among entries.
    """

    name: str
    rows: Mapping[str, tuple[Result, ...]]
    settings: Mapping[str, Mapping[str, str]]

    def row(self, module: str, metric: str) -> Result | None:
        """Return the row of a metric over everything, or None."""
        found = (row for row in self.rows.get(module, ()) if row.metric == metric)
        return next((row for row in found if not row.prompt or metric == WORST_PROMPT.name), None)


def read_entry(name: str, folder: Path) -> Entry:
    """Read the results below a folder, one folder a command.

    Raises:
        InputError: there are none, or a command has results in two folders.
    """
    if not folder.is_dir():
        raise InputError(f"--runs {name}={folder}: there is no such folder")
    rows: dict[str, tuple[Result, ...]] = {}
    settings: dict[str, dict[str, str]] = {}
    paths: dict[str, Path] = {}
    for path in sorted(folder.rglob("results.jsonl")):
        found = read_folder(path.parent)
        if found.module not in SAME:
            continue
        if found.module in paths:
            raise InputError(
                f"--runs {name}={folder}: {paths[found.module]} and {path.parent} both hold {found.module}; "
                "name a folder with one of them"
            )
        paths[found.module], rows[found.module] = path.parent, found.rows
        known = {**found.rows[0].hashes, **_grid(found.settings, path.parent)}
        settings[found.module] = {key: known[key] for key in SAME[found.module] if key in known}
        size: dict[str, str] = {
            key: str(found.settings[key]) for key in ("tile_size", "num_images") if key in found.settings
        }
        settings[found.module] |= size
    if not rows:
        raise InputError(f"--runs {name}={folder}: holds no results of {', '.join(SAME)}")
    return Entry(name=name, rows=rows, settings=settings)


def check_alike(entries: Sequence[Entry]) -> None:
    """Refuse entries that were not measured alike.

    Raises:
        InputError: naming both entries, the command, and what differs.
    """
    first = entries[0]
    for other in entries[1:]:
        if set(other.rows) != set(first.rows):
            missing = sorted(set(first.rows) ^ set(other.rows))
            raise InputError(f"--runs: {', '.join(missing)} was run for only one of {first.name} and {other.name}")
        for module, settings in first.settings.items():
            for key, value in settings.items():
                if other.settings[module].get(key) != value:
                    raise InputError(
                        f"--runs: {module} of {first.name} and {other.name} differ in {key.replace('_', ' ')}; "
                        "measure both on the same data, prompts and seeds"
                    )
        for module, number in COLUMNS:
            rows = [entry.row(module, number.name) for entry in (first, other)]
            if number == WORST_PROMPT and rows[0] and rows[1] and rows[0].unit != rows[1].unit:
                raise InputError(
                    f"--runs: the worst prompt of {first.name} is judged by {rows[0].unit}, of {other.name} by "
                    f"{rows[1].unit}; give both checks the same --real"
                )
            if module != "eval.memorization" and rows[0] and rows[1] and rows[0].n != rows[1].n:
                raise InputError(
                    f"--runs: {number.name} of {first.name} is made of {rows[0].n} and of {other.name} of {rows[1].n}; "
                    "only equal numbers are compared"
                )


def _grid(settings: Mapping[str, object], folder: Path) -> dict[str, str]:
    """Return the prompts and seeds of the generated folder that a check read, if it is still there."""
    path = Path(str(settings.get("generated", ""))) / "records.jsonl"
    if not settings.get("generated") or not path.is_file():
        return {}
    keys = ("prompt", "seed", "height", "width", "steps", "guidance_scale", "scheduler", "negative_prompt")
    asked = [[record.get(key) for key in keys] for _, record in read_records(path)]
    return {"records_grid": hashlib.sha256(json.dumps(asked).encode()).hexdigest()}
