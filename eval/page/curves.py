"""Curves of a report, drawn as SVG: the loss of a training, and what it did to the probes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.forgetting.policy import GUARD
from eval.forgetting.reported import FOLLOWED
from eval.page.inputs import ReportedRun, data_uri, part

SETS = {
    "G0": "anchors",
    "G1": "words shared with the captions",
    "G2": "near the trained domain",
    "G3": "far from it",
    "G4": "no prompt",
    "G5": "mixed with captions",
}
"""What each probe set is for."""
INK, LINE, BAND, STOP, KEEP = "#33363b", "#1f4e79", "#dfe6ee", "#982b25", "#2c6a48"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 10,
    "axes.edgecolor": "#9a9a95",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": "#5c6066",
    "ytick.color": "#5c6066",
}


def loss_curve(run: ReportedRun | None) -> dict[str, str] | None:
    """Return the loss curve as an SVG address with a sentence for those who cannot see it."""
    points = [
        (record["step"], record["loss"])
        for record in (run.metrics if run else ())
        if isinstance(record.get("step"), int) and isinstance(record.get("loss"), int | float)
    ]
    points = [(step, loss) for step, loss in points if math.isfinite(float(str(loss)))]
    if len(points) < 2:
        return None
    steps, losses = np.array(points, dtype=float).T
    width = max(1, len(losses) // 12)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    shifted = steps[width - 1 :] - (steps[width - 1 :] - steps[: len(smooth)]) / 2
    text = (
        f"Loss over {int(steps[-1])} steps, logged {len(losses)} times: mean of the first "
        f"{width} {losses[:width].mean():.4f}, of the last {width} {losses[-width:].mean():.4f}."
    )

    def draw(axes: Any) -> None:
        axes.plot(steps, losses, color="#a9bfd4", linewidth=1, label="logged")
        axes.plot(shifted, smooth, color=LINE, linewidth=1.8, label=f"mean of {width}")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend(frameon=False, loc="upper right")

    return {"uri": _svg((7.2, 2.9), draw), "text": text}


def drift_curves(run: ReportedRun | None) -> list[dict[str, str]]:
    """Return a curve for each probe set of a run's checks, and one for its pulses, each with a sentence.

    Steps where the run was stopped and where its weights were chosen are marked; the band is what the base shows
    against itself. Nothing for a run without ``drift.jsonl``, or with fewer than two looks.
    """
    if run is None:
        return []
    marks = marked_steps(run)
    curves = []
    checks = [record for record in run.drift if record.get("kind") == "check"]
    names = dict.fromkeys(
        str(row["set"]) for record in checks for row in _rows(record) if row.get("set") not in {None, "control"}
    )
    for name in names:
        number = next((one for one in FOLLOWED if len(_series(checks, name, one.name)) > 1), None)
        if number is None:
            continue
        points, kept = _series(checks, name, number.name), number.card
        about = f"{name}: {SETS[name]}" if name in SETS else name
        text = f"{about}. {kept.capitalize()} from {points[0][1]:.2f} at step {points[0][0]} to {points[-1][1]:.2f} "
        text += f"at step {points[-1][0]}."
        draw = _draw_set(points, _series(checks, name, f"{number.name}_aa"), kept, marks)
        curves.append({"uri": _svg((4.0, 2.5), draw), "text": text})
    pulses = [
        (int(record["step"]), float(record["ratio"]))
        for record in run.drift
        if record.get("kind") == "pulse" and _is_number(record.get("ratio")) and isinstance(record.get("step"), int)
    ]
    if len(pulses) > 1:
        text = f"Pulse: predictions for the probes moved by {pulses[-1][1]:.2f} of what the captions moved at step "
        curves.append({"uri": _svg((4.0, 2.5), _draw_pulse(pulses, marks)), "text": f"{text}{pulses[-1][0]}."})
    return curves


def marked_steps(run: ReportedRun) -> dict[str, int]:
    """Return the steps that ``selection.json`` names, by what they are called on the page."""
    found = {}
    if run.selection.get("ended") and isinstance(run.selection.get("last_step"), int):
        found["stopped"] = int(run.selection["last_step"])
    if isinstance(run.selection.get("selected_step"), int):
        found["kept"] = int(run.selection["selected_step"])
    return found


def _series(checks: Sequence[Mapping[str, Any]], name: str, metric: str) -> list[tuple[int, float, float, float]]:
    """Return step, value and interval of one measure of one set; a missing interval is the value."""
    found = []
    for record in checks:
        for row in _rows(record):
            if row.get("metric") != metric or row.get("set") != name or row.get("prompt"):
                continue
            if _is_number(row.get("value")) and isinstance(record.get("step"), int):
                value = float(row["value"])
                low, high = (float(row[key]) if _is_number(row.get(key)) else value for key in ("low", "high"))
                found.append((int(record["step"]), value, low, high))
    return found


def _rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of one check that are objects."""
    rows = record.get("rows")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _draw_set(
    points: Sequence[tuple[int, float, float, float]],
    band: Sequence[tuple[int, float, float, float]],
    name: str,
    marks: Mapping[str, int],
) -> Callable[[Any], None]:
    """Return what draws one set: value with interval over steps, on the band of the base against itself."""

    def draw(axes: Any) -> None:
        if band:
            axes.axhspan(min(row[2] for row in band), max(row[3] for row in band), color=BAND, label="base, A/A", lw=0)
        steps, values, low, high = np.array(points, dtype=float).T
        axes.vlines(steps, low, high, color=LINE, linewidth=1)
        axes.plot(steps, values, color=LINE, linewidth=1.6, marker="o", markersize=3.5)
        axes.set_ylim(min(0.0, float(low.min())), max(1.1, float(high.max()) * 1.05))
        axes.set_ylabel(name)
        _mark(axes, marks)

    return draw


def _draw_pulse(points: Sequence[tuple[int, float]], marks: Mapping[str, int]) -> Callable[[Any], None]:
    """Return what draws the pulses, with the line above which pictures are looked at."""

    def draw(axes: Any) -> None:
        steps, values = np.array(points, dtype=float).T
        if GUARD.divergence_ratio is not None:
            axes.axhline(GUARD.divergence_ratio, color="#8a8d92", linewidth=1, linestyle=":", label="look at pictures")
        axes.plot(steps, values, color=LINE, linewidth=1.6, marker="o", markersize=3)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("moved, of the captions")
        _mark(axes, marks)

    return draw


def _mark(axes: Any, marks: Mapping[str, int]) -> None:
    """Mark the step a run was stopped at and the one whose weights were kept."""
    for name, step in marks.items():
        style = {"stopped": (STOP, "-"), "kept": (KEEP, "--")}[name]
        axes.axvline(step, color=style[0], linestyle=style[1], linewidth=1.3, label=f"{name}, step {step}")
    axes.set_xlabel("step")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")


def _svg(size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """Draw one picture of ``size`` inches and return it as an SVG address."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e3de", linewidth=0.8)
        axes.set_axisbelow(True)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    # Text is laid out with the font matplotlib brings along, and shown in the page's own.
    return data_uri("image/svg+xml", buffer.getvalue().replace(b"'DejaVu Sans'", b"system-ui, 'Segoe UI', Arial"))


def selection_line(run: ReportedRun | None) -> dict[str, str] | None:
    """Return which weights a watched run kept, why, and what it cost; None without ``selection.json``."""
    if run is None or not run.selection:
        return None
    found, cost = run.selection, part(run.selection, "cost")
    planned, last = found.get("planned_steps"), found.get("last_step")
    kept = f"Weights kept: step {found.get('selected_step')} of {last}"
    if found.get("ended"):
        kept += f"; stopped at step {last} of {planned}: {found['ended']}"
    share = cost.get("share")
    spent = f"Looking took {share:.1%} of the time." if isinstance(share, int | float) else ""
    return {"kept": kept, "reason": str(found.get("reason", "")), "spent": spent}
