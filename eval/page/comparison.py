"""The part of a report that compares runs: the table and the plot of ``eval.compare``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.page.inputs import Pictures, ResultsFolder, read_json
from eval.page.words import WORDS


def compare_table(folders: Sequence[ResultsFolder], pictures: Pictures) -> dict[str, Any] | None:
    """Return the table and the plot of a comparison of runs."""
    for folder in folders:
        if folder.module != "eval.compare":
            continue
        table = read_json(folder.path / "table.json")
        lines = []
        for entry in table.get("lines") or ():
            cells = [_compared(cell) for cell in entry.get("cells") or ()]
            lines.append({"name": str(entry.get("name", "")), "is_best": entry.get("is_best") is True, "cells": cells})
        columns = [str(column.get("name", "")) for column in table.get("columns") or ()]
        best = next((row.reason for row in folder.rows if row.metric == "pareto_best"), "")
        return {"columns": columns, "lines": lines, "best": best, "plot": pictures.embed(folder.path, "pareto.png")}
    return None


def _compared(cell: object) -> dict[str, str]:
    """Write one cell of a comparison."""
    if not isinstance(cell, dict) or not isinstance(cell.get("value"), int | float):
        return {"value": "-", "interval": "", "verdict": "grey", "note": ""}
    low, high = cell.get("low"), cell.get("high")
    interval = f"{low:.2f} to {high:.2f}" if isinstance(low, int | float) and isinstance(high, int | float) else ""
    verdict = str(cell.get("verdict"))
    return {
        "value": f"{cell['value']:.2f}",
        "interval": interval,
        "verdict": verdict if verdict in WORDS else "grey",
        "note": str(cell.get("note", "")),
    }
