"""One picture of the speed figures: training, class images, memory, and what more slices cost.

    python benchmarks/plots.py

Reads what training.py, sampling.py, memory.py and scale.py left in ``results`` and measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import InputError
from configs.load import command

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METHODS = {
    "lora": "LoRA",
    "full": "full",
    "textual_inversion": "Textual\nInversion",
    "dreambooth": "DreamBooth,\ntext encoder",
}
ARMS = {"ours": "ours", "b1": "script, best flags", "b0": "script, as shipped"}
COLOURS = {"ours": "#0072b2", "b1": "#e69f00", "b0": "#999999"}
WAYS = {
    "class images, the script": "script, 50 steps",
    "class images, the script, bf16": "script, 50 steps, bf16",
    "class images, equal steps": "50 steps",
    "class images, equal steps, bf16": "50 steps, bf16",
    "class images, half the steps": "25 steps",
    "previews, the script": "script, previews,\n50 steps",
    "previews": "previews,\n25 steps",
}


@dataclass(frozen=True, kw_only=True)
class PlotsConfig:
    """Settings of ``benchmarks/plots.py``."""

    results: Path = Path("benchmarks/results")
    """Folder of the figures."""
    output: Path = Path("docs/speed.png")
    """Where the picture goes."""


def main(config: PlotsConfig) -> None:
    """Draw and write."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), dpi=100, layout="constrained")
    axes = figure.subplots(2, 2)
    draw_training(axes[0, 0], read(config, "training")["measured"])
    draw_sampling(axes[0, 1], read(config, "sampling"))
    draw_memory(axes[1, 0], read(config, "memory"))
    draw_scale(axes[1, 1], read(config, "scale"))
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(config.output)
    print(config.output)


def read(config: PlotsConfig, name: str) -> Any:
    """Return the figures of one benchmark."""
    path = config.results / f"{name}.json"
    if not path.is_file():
        raise InputError(f"{path}: is not there; run python benchmarks/{name}.py first")
    return json.loads(path.read_text(encoding="utf-8"))


def draw_training(axes: Axes, measured: Sequence[dict[str, Any]]) -> None:
    """Draw pictures a second of each method at the largest micro-batch, with how many times as fast ours is."""
    rows = [one for one in measured if one["stage"] == "steps"]
    batch_size = max(one["batch_size"] for one in rows)
    rows = [one for one in rows if one["batch_size"] == batch_size]
    draw_arms(axes, rows, lambda row, arm: row["arms"][arm]["images_per_s"])
    for place, row in enumerate(rows):
        top = row["arms"]["ours"]["images_per_s"]
        axes.text(place - 0.27, top, f"{row['speedup_of_ours']['b1']['median']:.2f}x", ha="center", va="bottom")
    axes.set_ylabel("pictures a second")
    axes.set_title(f"Training, {rows[0]['model']} model, micro-batch {batch_size}, {rows[0]['device']}")


def draw_memory(axes: Axes, found: dict[str, Any]) -> None:
    """Draw the most memory of each method at the largest micro-batch."""
    batch_size = max(row["batch_size"] for row in found["rows"])
    rows = [row for row in found["rows"] if row["batch_size"] == batch_size]
    draw_arms(axes, rows, lambda row, arm: row[arm])
    if alone := found["libraries_alone_gb"]:
        axes.axhline(alone, color="black", linewidth=0.8, linestyle=":", label="libraries alone")
        axes.legend(frameon=False, loc="upper left")
    axes.set_ylabel(f"GB, {found['measure']}")
    axes.set_title(f"Peak memory, micro-batch {batch_size}")


def draw_arms(axes: Axes, rows: Sequence[dict[str, Any]], value: Any) -> None:
    """Draw a group of bars for each method, one for each arm that was measured."""
    arms = [arm for arm in ARMS if all(arm in row.get("arms", row) for row in rows)]
    for number, arm in enumerate(arms):
        places = [place + 0.27 * (number - (len(arms) - 1) / 2) for place in range(len(rows))]
        axes.bar(places, [value(row, arm) for row in rows], width=0.25, color=COLOURS[arm], label=ARMS[arm])
    axes.set_xticks(range(len(rows)), [METHODS[row["method"]] for row in rows])
    axes.margins(y=0.3)
    axes.legend(frameon=False, loc="upper left")


def draw_sampling(axes: Axes, found: dict[str, Any]) -> None:
    """Draw pictures a second of each way of sampling."""
    rates = {text: found["images_per_s"][name]["median"] for name, text in WAYS.items()}
    colours = [COLOURS["b0" if "script" in text else "ours"] for text in rates]
    bars = axes.barh(list(rates), list(rates.values()), color=colours)
    texts = [f"{found['speedup'][name]['median']:.2f}x" if name in found["speedup"] else "" for name in WAYS]
    axes.bar_label(bars, texts, padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("pictures a second")
    axes.set_title(f"Class images and previews, {found['settings']['size']} model")


def draw_scale(axes: Axes, found: dict[str, Any]) -> None:
    """Draw seconds and memory of a start against the number of slices."""
    rows = found["folders"]
    counts = [row["num_images"] for row in rows]
    for key, text in (
        ("first_start_s", "first start"),
        ("start_with_cache_s", "with the cache"),
        ("resume_s", "resume"),
    ):
        axes.plot(counts, [row[key] for row in rows], marker="o", label=f"{text}, s")
    axes.plot(counts, [row["report_s"] for row in rows], marker="o", label="report, s")
    axes.set_xscale("log")
    axes.set_xlabel("slices of 32 px, 40 steps")
    axes.set_ylabel("seconds")
    memory = axes.twinx()
    memory.plot(counts, [row["first_start_peak_mb"] for row in rows], color="black", linestyle=":", marker="s")
    memory.set_ylabel("peak memory, MB (dotted)")
    memory.set_ylim(bottom=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.set_title("More slices")


if __name__ == "__main__":
    command(PlotsConfig, main)
