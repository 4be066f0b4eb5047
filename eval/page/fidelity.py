"""The part of a report about likeness: samples, confusion of classes, and distances to real slices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.folders.results import Result
from eval.page.inputs import Pictures, ResultsFolder, part, read_json, shown_name
from eval.page.words import line, sentence, words_of

KINDS = {"real": "real, held out", "vae": "through the VAE", "generated": "generated"}


def fidelity_checks(folders: Sequence[ResultsFolder], pictures: Pictures) -> list[dict[str, Any]]:
    """Return the tables of each fidelity check; ``name`` is empty where there is one only."""
    checks = [folder for folder in folders if folder.module == "eval.fidelity"]
    return [
        {
            "name": shown_name(folder) if len(checks) > 1 else "",
            "table": fidelity_table(folder),
            "confusion": confusion_tables(folder),
            "descriptors": descriptor_table(folder, pictures),
        }
        for folder in checks
    ]


def sample_cards(folders: Sequence[ResultsFolder], pictures: Pictures) -> list[dict[str, Any]]:
    """Return, for each check that has them, the strips of each caption: real, through the VAE, generated."""
    found = []
    for folder in folders:
        overview = read_json(folder.path / "overview.json")
        if not isinstance(overview.get("captions"), list):
            continue
        cards = []
        for entry in overview["captions"]:
            files = part(entry, "files") if isinstance(entry, dict) else {}
            strips = [
                {"kind": words, "uri": pictures.embed(folder.path, str(files[kind])) if kind in files else ""}
                for kind, words in KINDS.items()
            ]
            cards.append({"caption": str(entry.get("caption", "")), "strips": strips})
        found.append({"name": shown_name(folder), "cards": cards, "tile_px": overview.get("tile_px")})
    return found


def contact_sheet(folders: Sequence[ResultsFolder], pictures: Pictures) -> str:
    """Return the sheet of the generated folder, for a report without a fidelity check."""
    for folder in folders:
        if folder.module == "eval.generate":
            return pictures.embed(folder.path, "contact_sheet.png")
    return ""


def confusion_tables(folder: ResultsFolder) -> list[dict[str, Any]]:
    """Return the tables of both heads, held-out real and generated, as rows of cells with count and share."""
    tables = []
    confusion = part(read_json(folder.path / "overview.json"), "confusion")
    for head, content in confusion.items():
        names = [str(name) for name in content.get("names", ())]
        for key, title in (("held_out", "held-out real"), ("generated", "generated")):
            counts = np.asarray(content.get(key, []), dtype=float)
            if counts.shape != (len(names), len(names)):
                continue
            shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            rows = [
                {
                    "name": name.replace("_", " "),
                    "cells": [
                        {"count": int(count), "share": round(float(share), 3), "on": i == j}
                        for j, (count, share) in enumerate(zip(counts[i], shares[i], strict=True))
                    ],
                }
                for i, name in enumerate(names)
            ]
            columns = [name.replace("_", " ") for name in names]
            asked = "is" if key == "held_out" else "asked for"
            tables.append({"title": f"{head}, {title}", "names": columns, "rows": rows, "asked": asked})
    return tables


def fidelity_table(folder: ResultsFolder) -> dict[str, Any]:
    """Return the numbers over all captions, and a row per caption with a column per measure."""
    rows = [row for row in folder.rows if not row.set.startswith("descriptor")]
    single = [row for row in rows if row.prompt]
    by_key = {(row.prompt, row.metric): line(row) for row in single}
    metrics = list(dict.fromkeys(row.metric for row in single))
    return {
        "whole": [line(row) for row in rows if not row.prompt],
        "columns": [words_of(metric) for metric in metrics],
        "captions": [
            (prompt, [by_key.get((prompt, metric)) for metric in metrics])
            for prompt in dict.fromkeys(row.prompt for row in single)
        ],
        "reasons": list(dict.fromkeys(sentence(row.reason) for row in single if row.reason and row.verdict != "ok")),
    }


def descriptor_table(folder: ResultsFolder, pictures: Pictures) -> dict[str, Any]:
    """Return the floor ratio of each descriptor with its reference lines and captions, and the curves of each caption.

    Ratios are shaded on a logarithmic scale: 1 is white, 10 and more the darkest.
    """
    found: dict[str, Any] = {"captions": [], "rows": [], "overlays": []}
    rows = [row for row in folder.rows if row.set.startswith("descriptor")]
    single = {(row.metric, row.prompt): row for row in rows if row.prompt}
    lines = {(row.metric, row.set): row for row in rows if not row.prompt}
    found["captions"] = list(dict.fromkeys(row.prompt for row in rows if row.prompt))
    for metric in dict.fromkeys(row.metric for row in rows):
        own, vae, state = (
            lines.get((metric, name)) for name in ("descriptor", "descriptor_vae", "descriptor_nearest_states")
        )
        if own is None:
            continue
        found["rows"].append(
            {
                **line(own),
                "vae": f"{vae.value:.1f}" if vae and vae.value is not None else "-",
                "state": f"{state.value:.1f}" if state and state.value is not None else "-",
                "cells": [_ratio_cell(single.get((metric, prompt))) for prompt in found["captions"]],
            }
        )
    for entry in read_json(folder.path / "overview.json").get("overlays") or ():
        if isinstance(entry, dict) and (uri := pictures.embed(folder.path, str(entry.get("file")))):
            found["overlays"].append({"caption": str(entry.get("caption", "")), "uri": uri})
    return found


def _ratio_cell(row: Result | None) -> dict[str, Any]:
    """Return a ratio as text with how dark its cell is, in [0, 1]."""
    if row is None or row.value is None:
        return {"value": "-", "share": 0.0}
    return {"value": f"{row.value:.1f}", "share": round(min(1.0, max(0.0, math.log10(max(row.value, 1e-6)))), 2)}
