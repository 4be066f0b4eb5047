"""The plot of a comparison: distance to real slices against what was kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from data_prep.folders.results import Result
from eval.comparison.entries import Entry
from eval.comparison.table import DISTANCE, KEPT, pareto_best, points


def save_pareto(path: Path, entries: Sequence[Entry]) -> None:
    """Draw distance to real slices against retention of the worst prompt; good is at the upper left."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    best, known = pareto_best(entries), points(entries)
    for entry in entries:
        if entry.name not in known:
            continue
        far, kept = entry.row(*DISTANCE), entry.row(*KEPT)
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
