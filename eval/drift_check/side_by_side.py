"""The pictures of a drift check: base and tuned side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from eval.drift_check.gather import DriftRequest
from eval.forgetting.evidence import Evidence
from eval.tiles.contact_sheet import contact_sheet

SHEET_SEEDS = 3
SHEET_ROWS = 60


def save_pictures(
    folder: Path,
    request: DriftRequest,
    evidence: Evidence,
    per_picture: Sequence[dict[str, float]],
    weaker: Mapping[float, Evidence],
) -> None:
    """Write all pictures, their records, and the sheet with base and tuned side by side."""
    seeds, probes = request.seeds, request.probes
    records = []
    swept = {f"strength-{strength:g}": found.tuned for strength, found in weaker.items()}
    for role, pictures in {"base": evidence.base, **swept, "tuned": evidence.tuned}.items():
        (folder / role).mkdir()
        for p, probe in enumerate(probes):
            for s, seed in enumerate(seeds):
                name = f"{role}/{probe.set}-{probe.id}-seed{seed:04d}.png"
                Image.fromarray(pictures[p, s]).save(folder / name)
                numbers = per_picture[p * len(seeds) + s] if role == "tuned" else {}
                record = {"file_name": name, "model": role, "set": probe.set, "id": probe.id, "prompt": probe.prompt}
                records.append({**record, "seed": seed, **numbers})
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "records.jsonl").write_text(text, encoding="utf-8")

    columns, shown = min(len(seeds), SHEET_SEEDS), probes[:SHEET_ROWS]
    images = [
        pictures[p, s]
        for p in range(len(shown))
        for s in range(columns)
        for pictures in (evidence.base, evidence.tuned)
    ]
    headers = [f"{role}, seed {seed}" for seed in seeds[:columns] for role in ("base", "tuned")]
    labels = [f"{probe.set}  {probe.shown}" for probe in shown]
    contact_sheet(images, len(shown), 2 * columns, labels, headers).save(folder / "side_by_side.png")
