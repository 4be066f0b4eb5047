"""The part of a report about drift: sets and probes beside their A/A band, and prompts over several checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.folders.results import Result, read_results
from eval.forgetting.reported import FOLLOWED, NUMBERS, WORST_PROMPT
from eval.forgetting.table import unmeasured
from eval.forgetting.verdicts import worst
from eval.page.curves import SETS
from eval.page.inputs import Pictures, ReportedRun, ResultsFolder, shown_name
from eval.page.words import WORDS, line
from eval.stats.number import Number

NOTHING: dict[str, Any] = {"value": "-", "share": 0.0}


def drift_heats(run: ReportedRun | None, folders: Sequence[ResultsFolder]) -> list[dict[str, Any]]:
    """Return what was kept of each prompt (rows) at several looks (columns), of a watched run and of several checks."""
    found = []
    checks = [folder for folder in folders if folder.module == "eval.drift"]
    looks = [(shown_name(folder), [vars(row) for row in folder.rows]) for folder in checks]
    watched = [
        (f"step {record.get('step')}", [row for row in record["rows"] if isinstance(row, dict)])
        for record in (run.drift if run else ())
        if record.get("kind") == "check" and isinstance(record.get("rows"), list)
    ]
    for title, columns in (("During the run", watched), ("Check by check", looks)):
        if len(columns) > 1:
            found.append({"title": title, "columns": [name for name, _ in columns], "rows": _heat_rows(columns)})
    return [heat for heat in found if heat["rows"]]


def _heat_rows(looks: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> list[dict[str, Any]]:
    """Return a row per prompt with a cell per look."""
    prompts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for place, (_, rows) in enumerate(looks):
        for number in reversed(FOLLOWED):  # what was measured last wins
            for row in rows:
                value = row.get("value")
                if row.get("metric") == number.name and row.get("prompt") and isinstance(value, int | float):
                    key = str(row.get("set")), str(row["prompt"])
                    cells = prompts.setdefault(key, [NOTHING] * len(looks))
                    lost = min(1.0, max(0.0, 1.0 - value))
                    cells[place] = {"value": f"{value:.2f}", "share": round(lost, 2)}
    return [{"set": name, "prompt": prompt, "cells": cells} for (name, prompt), cells in sorted(prompts.items())]


def drift_sections(
    folders: Sequence[ResultsFolder], pictures: Pictures, numbers: Sequence[Number] = NUMBERS
) -> list[dict[str, Any]]:
    """Return each drift check, set by set: scores beside the A/A band, base and tuned pictures.

    Args:
        folders: all results.
        pictures: takes those that are shown.
        numbers: that a check may hold; those with a ``card`` are shown.
    """
    cards = {number.name: number for number in sorted(numbers, key=lambda one: one.card_place) if number.card}
    return [_drift(folder, pictures, cards) for folder in folders if folder.module == "eval.drift"]


def _drift(folder: ResultsFolder, pictures: Pictures, cards: Mapping[str, Number]) -> dict[str, Any]:
    """Lay out one drift check."""
    sets = dict.fromkeys(row.set for row in folder.rows if row.set not in {"", "control", "captions"})
    overall = next((row for row in folder.rows if row.metric == WORST_PROMPT.name), None)
    return {
        "path": str(folder.path),
        "name": shown_name(folder),
        "sweep": [line(row) for row in _sweep(folder)],
        "overall": line(overall) if overall else None,
        "controls": [line(row) for row in folder.rows if row.set == "control"],
        "unmeasured": [row.reason for row in unmeasured(folder.rows)],
        "sets": [_drift_set(folder, name, pictures, cards) for name in sets],
        "names": {
            metric: number.card for metric, number in cards.items() if any(row.metric == metric for row in folder.rows)
        },
    }


def _sweep(folder: ResultsFolder) -> list[Result]:
    """Return the rows of a check at several strengths of the adapters."""
    path = folder.path / "sweep.jsonl"
    return read_results(path) if path.is_file() else []


def _drift_set(folder: ResultsFolder, name: str, pictures: Pictures, cards: Mapping[str, Number]) -> dict[str, Any]:
    """Lay out one probe set: a line for the whole, a card per prompt."""
    rows = [row for row in folder.rows if row.set == name]
    prompts = dict.fromkeys(row.prompt for row in rows if row.prompt)
    own = [row for row in rows if not row.prompt and not row.metric.endswith("_aa")]
    return {
        "name": name,
        "about": SETS.get(name, ""),
        "verdict": worst([row.verdict for row in own]),
        "word": WORDS[worst([row.verdict for row in own])],
        "scores": _scores(rows, "", cards),
        "cards": [_probe(folder, name, prompt, rows, pictures, cards) for prompt in prompts],
    }


def _probe(
    folder: ResultsFolder,
    name: str,
    prompt: str,
    rows: Sequence[Result],
    pictures: Pictures,
    cards: Mapping[str, Number],
) -> dict[str, Any]:
    """Lay out one probe of a set."""
    own = [row for row in rows if row.prompt == prompt]
    shown = {"base": [], "tuned": []}  # type: dict[str, list[str]]
    for record in folder.records:
        asked = record.get("prompt") or "(empty prompt)"
        model = str(record.get("model"))
        if record.get("set") == name and asked == prompt and model in shown and len(shown[model]) < 2:
            shown[model].append(pictures.embed(folder.path, str(record.get("file_name"))))
    verdict = worst([row.verdict for row in own])
    return {
        "prompt": prompt,
        "verdict": verdict,
        "word": WORDS[verdict],
        "scores": _scores(rows, prompt, cards),
        "pictures": {model: [uri for uri in uris if uri] for model, uris in shown.items()},
    }


def _scores(rows: Sequence[Result], prompt: str, cards: Mapping[str, Number]) -> list[dict[str, str]]:
    """Write the scores of one prompt, or of the whole set for an empty one, each beside its A/A band."""
    own = {row.metric: row for row in rows if row.prompt == prompt}
    return [
        {**_score(row, own.get(f"{metric}_aa")), "name": cards[metric].card}
        for metric, row in own.items()
        if metric in cards
    ]


def _score(row: Result, band: Result | None) -> dict[str, str]:
    """Write one drift score with its A/A band; the divergence, at equal seeds, has none."""
    beside = f"A/A {band.low:.2f} to {band.high:.2f}" if band and band.low is not None and band.high is not None else ""
    return {**line(row), "value": f"{row.value:.2f}" if row.value is not None else "-", "beside": beside}
