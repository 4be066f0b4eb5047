"""Several runs or checkpoints on one table: which is nearest to real slices, and which has forgotten least?

    python -m eval.compare --runs full=out/full lora=out/lora --output_dir out/compare

Each entry is a name and a folder that holds the results of its checks: any folders below it with results.jsonl of
eval.fidelity, eval.drift and eval.memorization. Only what was measured alike is compared: the same held-out slices, the
same prompts and seeds, the same probes, the same numbers of pictures. Otherwise it is refused, naming the difference.

Writes results.jsonl, table.json, pareto.png and config.yaml.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import InputError
from configs.load import command, save

if TYPE_CHECKING:
    from data_prep.folders.results import Result

SAME = {
    "eval.fidelity": ("train", "validation", "records_grid"),
    "eval.drift": ("base", "probes"),
    "eval.memorization": ("validation", "records_grid"),
}
"""Hashes and grids that must be equal before the numbers of a command are put side by side."""
COLUMNS = (
    ("eval.fidelity", "descriptor_floor_ratio", "distance / real to real", False),
    ("eval.fidelity", "kid_floor_ratio", "KID / real to real", False),
    ("eval.fidelity", "agreement_state", "state as asked", True),
    ("eval.fidelity", "agreement_axis", "axis as asked", True),
    ("eval.drift", "worst_prompt", "worst prompt kept", True),
    ("eval.memorization", "memorisation", "signs of copies", False),
)
"""Command, metric, heading, and whether more is better."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Put several runs on one table."""

    runs: dict[str, Path]
    """Name and folder of each, as name=FOLDER; the results are looked for below it."""
    output_dir: Path
    """Folder to write."""
    overwrite: bool = False
    """Replace the folder if it is there."""

    def __post_init__(self) -> None:
        """Refuse a comparison of one thing."""
        if len(self.runs) < 2:
            raise ValueError(f"--runs: {len(self.runs)} given; name at least two, as name=FOLDER")


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
        return next((row for row in found if not row.prompt or metric == "worst_prompt"), None)


def main(config: CompareConfig) -> None:
    """Read, check that like is compared with like, write the table and the plot."""
    from data_prep.folders.publish import check_free, publish
    from data_prep.folders.results import command_line, write_results

    check_free(config.output_dir, overwrite=config.overwrite, mark="results.jsonl")
    entries = [read_entry(name, folder) for name, folder in config.runs.items()]
    check_alike(entries)
    rows = compare_rows(entries)
    again = command_line("eval.compare", config)
    rows = [replace(row, command=again) for row in rows]
    table = table_of(entries)
    with publish(config.output_dir, overwrite=config.overwrite, mark="results.jsonl") as folder:
        write_results(folder / "results.jsonl", rows)
        (folder / "table.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        save_pareto(folder / "pareto.png", entries)
        save(config, folder / "config.yaml")
    print(_written(table))
    for row in rows:
        if row.metric == "pareto_best":
            print(row.reason)
    print(f"look at {config.output_dir / 'pareto.png'}")
    words = ["--results", str(config.output_dir), "--output", str(config.output_dir.parent / "report.html")]
    print(f"next: python -m eval.report {shlex.join(words)}")


def read_entry(name: str, folder: Path) -> Entry:
    """Read the results below a folder, one folder a command.

    Raises:
        InputError: there are none, or a command has results in two folders.
    """
    from eval.page.inputs import read_folder

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
        for module, metric, _, _ in COLUMNS:
            rows = [entry.row(module, metric) for entry in (first, other)]
            if metric == "worst_prompt" and rows[0] and rows[1] and rows[0].unit != rows[1].unit:
                raise InputError(
                    f"--runs: the worst prompt of {first.name} is judged by {rows[0].unit}, of {other.name} by "
                    f"{rows[1].unit}; give both checks the same --real"
                )
            if metric != "memorisation" and rows[0] and rows[1] and rows[0].n != rows[1].n:
                raise InputError(
                    f"--runs: {metric} of {first.name} is made of {rows[0].n} and of {other.name} of {rows[1].n}; "
                    "only equal numbers are compared"
                )


def compare_rows(entries: Sequence[Entry]) -> list[Result]:
    """Return a row per entry and metric, and which entries no other is better than in both fidelity and retention."""
    from data_prep.folders.results import Result

    rows = [
        replace(row, set=entry.name, metric=metric)
        for module, metric, _, _ in COLUMNS
        for entry in entries
        if (row := entry.row(module, metric)) is not None
    ]
    best = pareto_best(entries)
    if best:
        names = ", ".join(best)
        reason = f"no other is both nearer to real slices and forgot less: {names}"
        rows.append(Result(metric="pareto_best", value=float(len(best)), n=len(entries), unit="entries", reason=reason))
    return rows


def points(entries: Sequence[Entry]) -> dict[str, tuple[float, float]]:
    """Return distance to real slices and retention of the worst prompt of each entry that has both."""
    found = {}
    for entry in entries:
        far, kept = entry.row("eval.fidelity", "descriptor_floor_ratio"), entry.row("eval.drift", "worst_prompt")
        if far is not None and kept is not None and far.value is not None and kept.value is not None:
            found[entry.name] = far.value, kept.value
    return found


def pareto_best(entries: Sequence[Entry]) -> list[str]:
    """Return the entries that no other beats in one of distance and retention without losing in the other."""
    known = points(entries)

    def is_beaten(name: str) -> bool:
        far, kept = known[name]
        return any(a <= far and b >= kept and (a, b) != (far, kept) for other, (a, b) in known.items() if other != name)

    return [name for name in known if not is_beaten(name)]


def table_of(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return headings and one line per entry: value, interval and verdict of each column that somebody has."""
    columns = [column for column in COLUMNS if any(entry.row(column[0], column[1]) for entry in entries)]
    best = pareto_best(entries)
    lines = []
    for entry in entries:
        cells = []
        for module, metric, _, _ in columns:
            row = entry.row(module, metric)
            cells.append(
                None
                if row is None
                else {"value": row.value, "low": row.low, "high": row.high, "n": row.n, "verdict": row.verdict,
                      "note": row.prompt if metric == "worst_prompt" else row.reason}
            )  # fmt: skip
        lines.append({"name": entry.name, "is_best": entry.name in best, "cells": cells})
    return {"columns": [{"name": words, "is_more_better": more} for _, _, words, more in columns], "lines": lines}


def save_pareto(path: Path, entries: Sequence[Entry]) -> None:
    """Draw distance to real slices against retention of the worst prompt; good is at the upper left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    best, known = pareto_best(entries), points(entries)
    for entry in entries:
        if entry.name not in known:
            continue
        far, kept = (
            entry.row(*key) for key in (("eval.fidelity", "descriptor_floor_ratio"), ("eval.drift", "worst_prompt"))
        )
        x, y = known[entry.name]
        colour = "#1f4e79" if entry.name in best else "#8a8d92"
        errors = [_error(row, value) for row, value in ((far, x), (kept, y))]
        axes.errorbar(x, y, xerr=errors[0], yerr=errors[1], fmt="o", color=colour, elinewidth=1, capsize=2)
        axes.annotate(entry.name, (x, y), xytext=(6, 6), textcoords="offset points", color=colour, fontsize=9)
    if not known:
        axes.text(0.5, 0.5, "needs eval.fidelity and eval.drift of each run", ha="center", transform=axes.transAxes)
    axes.set_xlabel("distance to real slices, real to real = 1")
    axes.set_ylabel("kept of the worst probe")
    axes.set_title("Upper left is better; blue: no other is better in both", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _error(row: Result | None, value: float) -> list[list[float]] | None:
    """Return the lengths of an error bar below and above a value."""
    if row is None or row.low is None or row.high is None:
        return None
    return [[max(0.0, value - row.low)], [max(0.0, row.high - value)]]


def _grid(settings: Mapping[str, object], folder: Path) -> dict[str, str]:
    """Return the prompts and seeds of the generated folder that a check read, if it is still there."""
    import hashlib

    from data_prep.folders.manifest import read_records

    path = Path(str(settings.get("generated", ""))) / "records.jsonl"
    if not settings.get("generated") or not path.is_file():
        return {}
    keys = ("prompt", "seed", "height", "width", "steps", "guidance_scale", "scheduler", "negative_prompt")
    asked = [[record.get(key) for key in keys] for _, record in read_records(path)]
    return {"records_grid": hashlib.sha256(json.dumps(asked).encode()).hexdigest()}


def _written(table: Mapping[str, Any]) -> str:
    """Write the table as text."""
    columns, lines = table["columns"], table["lines"]
    text = [["run", *(column["name"] for column in columns)]]
    for line in lines:
        cells = [
            "-" if cell is None or cell["value"] is None else f"{cell['value']:.2f} {cell['verdict']}"
            for cell in line["cells"]
        ]
        text.append([line["name"], *cells])
    widths = [max(len(row[place]) for row in text) for place in range(len(text[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in text)


if __name__ == "__main__":
    command(CompareConfig, main)
