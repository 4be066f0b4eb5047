"""What stands beside the pictures of a dataset folder: an entry of the manifest per volume, and the card for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_prep.manifest import SliceRow
from data_prep.plan import Plan


def entry(
    plan: Plan, *, digest: str, num_non_finite: int, num_blank: int, num_near_duplicates: Mapping[str, int]
) -> dict[str, Any]:
    """Return what the manifest says of one volume; nothing in it depends on machine, time or folder.

    Args:
        plan: what was cut from it.
        digest: SHA-256 of its file.
        num_non_finite: voxels that are NaN or infinite, in the planes that were read.
        num_blank: pictures that show nothing; they are written all the same.
        num_near_duplicates: by axis, slices that are like the last one before them that was not.
    """
    info, region = plan.volume.info, plan.volume.region
    split = None
    if region is not None:
        split = {
            "axis": "zyx"[region.axis],
            "train": list(region.train),
            "guard": list(region.guard),
            "validation": list(region.validation),
            "correlation_length": region.correlation_length,
        }
    return {
        "name": plan.volume.name,
        "file": info.path.name,
        "sha256": digest,
        "num_bytes": info.num_bytes,
        "state": plan.volume.state,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "storage": info.storage,
        "voxel_um": None if plan.volume.voxel_um is None else list(plan.volume.voxel_um),
        "window": plan.volume.window.as_dict(),
        "num_non_finite_voxels": num_non_finite,
        "split": split,
        "num_padded_pictures": sum(picture.cut.is_padded for picture in plan.all_pictures),
        "num_blank_pictures": num_blank,
        "num_near_duplicate_slices": dict(num_near_duplicates),
        "warnings": list(info.warnings),
    }


def count_pictures(rows: Iterable[SliceRow]) -> Counter[tuple[str, str]]:
    """Return the number of pictures by (state, axis)."""
    return Counter((row.state, row.axis) for row in rows)


def card(entries: Sequence[Mapping[str, Any]], rows: Mapping[str, Sequence[SliceRow]]) -> str:
    """Return the card's text in Markdown.

    Args:
        entries: the manifest's entries.
        rows: split -> its rows.
    """
    volumes = [["volume", "state", "shape (Z, Y, X)", "type", "voxel (um)", "black", "white", "file"]]
    parts = []
    for one in entries:
        edges, window, split = one["voxel_um"], one["window"], one["split"]
        voxel = "unknown" if edges is None else " x ".join(f"{edge:g}" for edge in edges)
        shape, ends = " x ".join(map(str, one["shape"])), [f"{window['low']:g}", f"{window['high']:g}"]
        volumes.append([one["name"], one["state"], shape, one["dtype"], voxel, *ends, one["file"]])
        if split is not None:
            ranges = ", ".join(
                f"{name} {split[name][0]} to {split[name][1]}" for name in ("train", "guard", "validation")
            )
            parts.append(f"- {one['name']}, along {split['axis']}, in voxels: {ranges}")
    counts = {split: count_pictures(some) for split, some in rows.items()}
    table = [["state", "axis", *rows]]
    for state, axis in dict.fromkeys(key for some in counts.values() for key in some):
        table.append([state, axis, *(str(counts[split][state, axis]) for split in rows)])
    rule = "No voxel of `validation` is in `train`, and nothing is written from the guard slab between them."
    return f"""# Slices of tomography volumes

Made by `python -m data_prep.slice`. Every option is in `config.yaml`, every measured value in `manifest.json`.

{_table(volumes)}

A slice is named by the direction it is perpendicular to; `box` is [z0, z1, y0, y1, x0, x1], half-open, in stored
voxels.

## Counts

{_table(table)}

## Split

{rule if parts else "None: all pictures are in `train`."}
{"".join(chr(10) + part for part in parts)}

Train on the folder `train` alone: some scripts search a whole folder for pictures and would mix the splits.
"""


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; names come from files and are reduced to plain characters."""
    lines = [
        "| " + " | ".join(re.sub(r"[^\w .,()+-]", "_", cell, flags=re.ASCII) for cell in row) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
