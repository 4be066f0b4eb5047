"""Filmstrips of a report: the same prompt and seed from the base model through checkpoints or strengths.

A slider shows one frame of every row at a time; without scripts, and on paper, the frames stand side by side.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from eval.page.inputs import Pictures, ReportedRun, ResultsFolder, shown_name

MOST_FRAMES = 8
MOST_ROWS = 10
FRAME_PX = 160
SHEET_PX = 900
"""Longest side of a frame that is a whole sheet of previews."""
FEWEST_FRAMES = 3


def films(run: ReportedRun | None, folders: Sequence[ResultsFolder], pictures: Pictures) -> list[dict[str, Any]]:
    """Return the filmstrips: previews of the run, each check with several strengths, and the checks one after another.

    Each has ``title``, ``frames`` (names) and ``rows`` (label and an address a frame, empty where there is none).
    """
    checks = [folder for folder in folders if folder.module == "eval.drift" and folder.records]
    found = [_previews(run, pictures)]
    found += [_strengths(folder, pictures) for folder in checks]
    found += [_checks(checks, pictures)]
    return [film for film in found if film is not None]


def _previews(run: ReportedRun | None, pictures: Pictures) -> dict[str, Any] | None:
    """Return the preview sheets of a run, a frame each."""
    folder = run.path / "previews" if run else None
    if folder is None or not folder.is_dir():
        return None
    steps = {
        int(found.group(1)): path.name
        for path in folder.glob("*.png")
        if (found := re.fullmatch(r"step-(\d+)\.png", path.name))
    }
    if len(steps) < FEWEST_FRAMES:
        return None
    chosen = _spread(sorted(steps))
    images = [pictures.embed(folder, steps[step], longest=SHEET_PX) for step in chosen]
    names = ["base" if step == 0 else f"step {step}" for step in chosen]
    return _film("Previews during training", names, [{"label": "preview sheet", "images": images}])


def _strengths(folder: ResultsFolder, pictures: Pictures) -> dict[str, Any] | None:
    """Return one check's pictures from the base through weaker adapters to the whole."""
    models = list(dict.fromkeys(str(record.get("model")) for record in folder.records))
    models = [name for name in models if name in {"base", "tuned"} or re.fullmatch(r"strength-[\d.]+", name)]
    if len(models) < FEWEST_FRAMES:
        return None
    rows = [
        {"label": label, "images": [_picture(folder, model, key, pictures) for model in models]}
        for label, key in _asked(folder)
    ]
    names = [{"tuned": "whole"}.get(model, model.replace("-", " ")) for model in models]
    return _film(f"From the base to the whole adapter, {folder.path.name}", names, rows)


def _checks(checks: Sequence[ResultsFolder], pictures: Pictures) -> dict[str, Any] | None:
    """Return the tuned pictures of several checks of the same probes, after those of the base."""
    if len(checks) + 1 < FEWEST_FRAMES:
        return None
    chosen = [checks[index] for index in _spread(list(range(len(checks))))]
    alike = ("base", "probes")
    if any(folder.rows[0].hashes.get(key) != chosen[0].rows[0].hashes.get(key) for folder in chosen for key in alike):
        return None
    rows = []
    for label, key in _asked(chosen[0]):
        images = [_picture(chosen[0], "base", key, pictures)]
        rows.append({"label": label, "images": images + [_picture(one, "tuned", key, pictures) for one in chosen]})
    return _film("From the base through the checks", ["base", *map(shown_name, chosen)], rows)


def _asked(folder: ResultsFolder) -> list[tuple[str, tuple[str, int]]]:
    """Return label and key (prompt, seed) of the first picture of each prompt."""
    first: dict[str, tuple[str, int]] = {}
    for record in folder.records:
        prompt, seed = record.get("prompt"), record.get("seed")
        if isinstance(prompt, str) and isinstance(seed, int):
            first.setdefault(prompt or "(empty prompt)", (prompt, seed))
    return [(f"{label}, seed {key[1]}", key) for label, key in first.items()][:MOST_ROWS]


def _picture(folder: ResultsFolder, model: str, key: tuple[str, int], pictures: Pictures) -> str:
    """Return the picture of a model for a prompt and seed, empty if there is none."""
    for record in folder.records:
        if (record.get("model"), record.get("prompt"), record.get("seed")) == (model, *key):
            return pictures.embed(folder.path, str(record.get("file_name")), longest=FRAME_PX)
    return ""


def _film(title: str, frames: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return a film, or None if it would show nothing."""
    if not any(uri for row in rows for uri in row["images"]):
        return None
    return {"title": title, "frames": list(frames), "rows": list(rows)}


def _spread(steps: Sequence[int]) -> list[int]:
    """Return at most ``MOST_FRAMES`` of them, the first and the last among them, evenly spread."""
    if len(steps) <= MOST_FRAMES:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (MOST_FRAMES - 1))] for place in range(MOST_FRAMES)]
