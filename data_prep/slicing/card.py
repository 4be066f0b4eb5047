"""What stands beside the pictures of a dataset folder: an entry and notices per volume, and the card for people."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_prep.folders.manifest import VALIDATION, SliceRow
from data_prep.slicing.audit import audit, histogram
from data_prep.slicing.config import AXES, SliceConfig
from data_prep.slicing.cut import Found
from data_prep.slicing.drops import Drops
from data_prep.slicing.plan import Plan

_CLIPPED = 0.1  # share of the voxels outside the window that nobody asks for
# How far an edge may differ from another before a picture would look stretched.
_CUBE_WITHIN = 0.01


def entry(plan: Plan, found: Found, drops: Drops, config: SliceConfig) -> dict[str, Any]:
    """Return what the manifest says of one volume; nothing in it depends on machine, time or folder.

    Args:
        plan: what was cut from it.
        found: what was seen while it was cut.
        drops: what became of its slices.
        config: the settings.
    """
    volume, info = plan.volume, plan.volume.info
    origin, region = volume.origin, volume.region
    names = dict(zip(config.roles, AXES, strict=True))
    audits = audit(found.samples, {axis: numbers for axis, numbers in volume.wanted.items() if numbers})
    return {
        "name": volume.name,
        "file": info.path.name,
        "sha256": found.digest,
        "num_bytes": info.num_bytes,
        "state": volume.state,
        "shape": list(volume.stored_shape),
        "box": [edge for ends in volume.box for edge in ends],
        "dtype": info.dtype,
        "storage": info.storage,
        "voxel_um": None if volume.voxel_um is None else list(volume.voxel_um),
        "window": volume.window.as_dict(),
        "histogram": histogram(found.samples, volume.window.window),
        "num_non_finite_voxels": sum(found.samples.num_non_finite.values()),
        "split": None if region is None else region.as_dict(origin[region.axis]),
        "blocks": [block.as_dict(origin[axis]) for axis, block in sorted(volume.blocks.items())],
        "is_held_out": volume.split == VALIDATION,
        "audit": {names[axis]: dataclasses.asdict(audits[axis]) for axis in config.roles if axis in audits},
        "num_padded_pictures": sum(picture.cut.is_padded for picture in drops.kept),
        "num_blank_pictures": sum(drops.blank.values()),
        "num_near_duplicate_slices": {name: len(some) for name, some in drops.near_duplicates.items()},
        "left_out": drops.reasons,
        "dropped_slices": _dropped_slices(drops),
        "notes": list(info.notes),
        "bad_planes": [z + origin[0] for z in info.bad_planes],
        "warnings": notices(plan, config),
    }


def notices(plan: Plan, config: SliceConfig) -> list[str]:
    """Return what is doubtful about one volume and its slices, a line each, without its name.

    Args:
        plan: what is cut from it.
        config: the settings it was planned with.
    """
    volume, shape, window = plan.volume, plan.volume.info.shape, plan.volume.window
    found = list(volume.info.warnings)
    if volume.info.is_inverted:
        if window.window.low > window.window.high:
            found.append("the file says that low values are white; grey levels are turned round")
        else:
            found.append(f"the file says that low values are white; they stay black ({_direction(config)})")
    elif window.window.low > window.window.high and config.grey.window == "manifest":
        found.append("--window_manifest turns grey levels round, and the file does not ask for it")
    if shape[config.roles[0]] > min(shape):
        found.append(
            f"--thickness_axis {config.thickness_axis} is {shape[config.roles[0]]} voxels long and not the shortest "
            "axis; check the three --*_axis options"
        )
    # Pixels of one size in micrometres are square whatever the voxels are.
    edges = None if config.resize_um_per_px else volume.voxel_um
    if edges is not None and max(edges) > min(edges) * (1 + _CUBE_WITHIN):
        found.append(
            f"voxels are not cubes, {' x '.join(f'{edge:g}' for edge in edges)} um (z y x), and slices look "
            "stretched; --fit resize --resize_um_per_px evens it out"
        )
    padded = Counter(picture.row.axis for picture in plan.all_pictures if picture.cut.is_padded)
    found += [
        f"{count} {axis} tiles are larger than their slice and padded by reflection" for axis, count in padded.items()
    ]
    if window.non_finite > 0:
        grey = "black" if window.window.fill == 0 else f"grey level {window.window.fill}"
        found.append(f"{window.non_finite:.1%} of the voxels are not finite and become {grey}")
    if window.clipped_low + window.clipped_high > _CLIPPED:
        found.append(
            f"{window.clipped_low:.1%} of the voxels lie below the window and {window.clipped_high:.1%} above it; "
            "check --window"
        )
    return found


def _direction(config: SliceConfig) -> str:
    """Return the option that decided against turning grey levels round."""
    return "--window manifest" if config.grey.window == "manifest" else f"--invert {config.grey.invert}"


def _dropped_slices(drops: Drops) -> dict[str, list[int]]:
    """Return, by axis, the slices of which filters left no picture, in stored voxels."""
    kept = {(picture.row.axis, picture.row.index) for picture in drops.kept}
    gone = sorted({(picture.row.axis, picture.row.index) for picture in drops.left_out} - kept)
    return {name: [index for axis, index in gone if axis == name] for name in AXES}


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
        edges, window = one["voxel_um"], one["window"]
        voxel = "unknown" if edges is None else " x ".join(f"{edge:g}" for edge in edges)
        shape, ends = " x ".join(map(str, one["shape"])), [f"{window['low']:g}", f"{window['high']:g}"]
        volumes.append([one["name"], one["state"], shape, one["dtype"], voxel, *ends, one["file"]])
        for split in [one["split"]] if one["split"] else one["blocks"]:
            ranges = ", ".join(
                f"{name} {split[name][0]} to {split[name][1]}" for name in ("train", "guard", "validation")
            )
            parts.append(f"- {one['name']}, along {split['axis']}, in voxels: {ranges}")
    counts = {split: count_pictures(some) for split, some in rows.items()}
    table = [["state", "axis", *rows]]
    for state, axis in dict.fromkeys(key for some in counts.values() for key in some):
        table.append([state, axis, *(str(counts[split][state, axis]) for split in rows)])
    audits = [["volume", "axis", "slices", "correlation length (voxels)", "effective number"]]
    for one in entries:
        for axis, found in one["audit"].items():
            length, number = found["correlation_length"], found["effective_number"]
            audits.append([one["name"], axis, str(found["num_slices"]), str(length), f"{number:.0f}"])
    return f"""# Slices of tomography volumes

Made by `python -m data_prep.slice`. Every option is in `config.yaml`, every measured value in `manifest.json`.

{_table(volumes)}

A slice is named by the direction it is perpendicular to; `box` is [z0, z1, y0, y1, x0, x1], half-open, in stored
voxels.

## Counts

{_table(table)}

## Split

{_rule(entries)}
{"".join(chr(10) + part for part in parts)}

## Neighbours

Slices close to each other are near copies. The effective number is how many independent slices tell as much.

{_table(audits)}

Train on the folder `train` alone: some scripts search a whole folder for pictures and would mix the splits.
"""


def _rule(entries: Sequence[Mapping[str, Any]]) -> str:
    """Say what the split promises."""
    if any(one["split"] or len(one["blocks"]) == 1 for one in entries):
        return "No voxel of `validation` is in `train`, and nothing is written from the guard slab between them."
    if any(len(one["blocks"]) > 1 for one in entries):
        return (
            "By index, along each axis on its own: slices of one direction share no voxel between `train` and "
            "`validation`, but **slices of different directions cross and share lines of voxels**."
        )
    held_out = ", ".join(re.sub(r"[^\w.-]", "_", str(one["name"])) for one in entries if one["is_held_out"])
    return f"Whole volumes are held out: {held_out}." if held_out else "None: all pictures are in `train`."


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; names come from files and are reduced to plain characters."""
    lines = [
        "| " + " | ".join(re.sub(r"[^\w .,()+-]", "_", cell, flags=re.ASCII) for cell in row) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
