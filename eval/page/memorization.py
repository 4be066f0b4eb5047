"""The part of a report about copies: controls, findings, curves and the closest pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from eval.page.inputs import Pictures, ResultsFolder, is_numbers, shown_name
from eval.page.words import line


def memorization_sections(folders: Sequence[ResultsFolder], pictures: Pictures) -> list[dict[str, Any]]:
    """Return verdict, controls and findings, curves and closest pairs of each memorisation check."""
    found = []
    for folder in folders:
        if folder.module != "eval.memorization":
            continue
        whole = [row for row in folder.rows if not row.prompt]
        overall = next((row for row in whole if row.metric == "memorisation"), None)
        found.append(
            {
                "name": shown_name(folder),
                "overall": line(overall) if overall else None,
                "rows": [line(row) for row in whole if row.metric != "memorisation"],
                "curves": pictures.embed(folder.path, "distances.png"),
                "pairs": _pairs(folder, pictures),
            }
        )
    return found


def _pairs(folder: ResultsFolder, pictures: Pictures) -> list[dict[str, Any]]:
    """Return the closest pairs of a gallery, each with its strip."""
    path = folder.path / "gallery.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except ValueError:
        content = []
    pairs = []
    for entry in content if isinstance(content, list) else ():
        if isinstance(entry, dict) and (uri := pictures.embed(folder.path, str(entry.get("file")))):
            box = entry.get("box")
            place = f"voxels {', '.join(map(str, box or ()))}" if is_numbers(box) else "place unknown"
            texts = {name: str(entry.get(name, "")) for name in ("caption", "generated", "trained", "score")}
            pairs.append({**texts, "place": place, "uri": uri, "is_flagged": entry.get("is_flagged") is True})
    return pairs
