"""The table of a comparison: a line a run, and which runs no other beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from data_prep.folders.results import Result
from eval.comparison.entries import COLUMNS, Entry
from eval.forgetting.reported import WORST_PROMPT
from eval.likeness.reported import DESCRIPTOR_FLOOR_RATIO

DISTANCE = ("eval.fidelity", DESCRIPTOR_FLOOR_RATIO.name)
KEPT = ("eval.drift", WORST_PROMPT.name)
"""Command and metric of what is gained and of what is lost."""


def compare_rows(entries: Sequence[Entry]) -> list[Result]:
    """Return a row per entry and metric, and which entries no other is better than in both fidelity and retention."""
    rows = [
        replace(row, set=entry.name, metric=number.name)
        for module, number in COLUMNS
        for entry in entries
        if (row := entry.row(module, number.name)) is not None
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
        far, kept = entry.row(*DISTANCE), entry.row(*KEPT)
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
    columns = [(module, one) for module, one in COLUMNS if any(entry.row(module, one.name) for entry in entries)]
    best = pareto_best(entries)
    lines = []
    for entry in entries:
        cells = []
        for module, number in columns:
            row = entry.row(module, number.name)
            cells.append(
                None
                if row is None
                else {"value": row.value, "low": row.low, "high": row.high, "n": row.n, "verdict": row.verdict,
                      "note": row.prompt if number == WORST_PROMPT else row.reason}
            )  # fmt: skip
        lines.append({"name": entry.name, "is_best": entry.name in best, "cells": cells})
    return {
        "columns": [{"name": one.compared, "is_more_better": one.bad == "low"} for _, one in columns],
        "lines": lines,
    }


def written(table: Mapping[str, Any]) -> str:
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
