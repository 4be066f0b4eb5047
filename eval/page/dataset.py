"""The part of a report about the data: volumes, windows, the split, and how many slices are independent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.page.inputs import is_numbers, part

AXES = ("z", "y", "x")


def dataset_box(found: tuple[Path, Mapping[str, Any]] | None) -> dict[str, Any] | None:
    """Return the volumes, counts, windows and split of a dataset."""
    if found is None:
        return None
    folder, manifest = found
    counts = part(manifest, "counts")
    volumes = [_volume(volume) for volume in manifest.get("volumes") or () if isinstance(volume, dict)]
    totals = {name: sum(n for n in split.values() if isinstance(n, int)) for name, split in counts.items()}
    states = [volume["state"] for volume in volumes]
    notes = []
    if volumes and len(set(states)) == len(states):
        notes.append(
            "One volume per state: state, specimen and scan cannot be told apart, and nothing here says how the model "
            "does on another part."
        )
    if not totals.get("validation"):
        notes.append("No held-out region: leaks between training and checking are not excluded.")
    cells = sorted({cell for split in counts.values() if isinstance(split, dict) for cell in split})
    table = [(cell, *(part(counts, name).get(cell, 0) for name in totals)) for cell in cells]
    options = part(manifest, "options")
    cut = {name: options.get(name) for name in ("fit", "tile_size", "stride") if options.get(name) is not None}
    return {
        "folder": str(folder),
        "volumes": volumes,
        "splits": list(totals),
        "totals": totals,
        "counts": table,
        "notes": notes,
        "cut": ", ".join(f"{name} {value}" for name, value in cut.items()),
    }


def _volume(volume: Mapping[str, Any]) -> dict[str, Any]:
    """Write one volume's entry of the manifest in words."""
    window, split = part(volume, "window"), part(volume, "split")
    voxel = volume.get("voxel_um")
    low, high = window.get("low"), window.get("high")
    regions = [f"{name} {_span(split[name])}" for name in ("train", "guard", "validation") if _span(split.get(name))]
    return {
        "name": str(volume.get("name", "")),
        "state": str(volume.get("state", "")),
        "shape": " x ".join(map(str, volume.get("shape") or ())),
        "dtype": str(volume.get("dtype", "")),
        "voxel": " x ".join(f"{size:g}" for size in voxel) + " um" if voxel and is_numbers(voxel) else "unknown",
        "window": f"{low:g} to {high:g}" if is_numbers([low, high]) else "none",
        "split": f"along {split.get('axis')}: {', '.join(regions)}" if regions else "none",
        "map": _split_map(volume, split),
        "length": f"{split['correlation_length']} voxels" if "correlation_length" in split else "unknown",
        "independent": _independent(part(volume, "audit")),
        "sha256": str(volume.get("sha256", ""))[:12],
    }


def _independent(audit: Mapping[str, Any]) -> str:
    """Write how many slices of each direction are independent of their neighbours."""
    found = {axis: part(audit, axis) for axis in audit}
    return ", ".join(
        f"{axis} {one['effective_number']:.0f} of {one['num_slices']}"
        for axis, one in found.items()
        if is_numbers([one.get("effective_number"), one.get("num_slices")])
    )


def _split_map(volume: Mapping[str, Any], split: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a volume along the direction it was split in, in order, each with its share in percent."""
    shape = volume.get("shape") or []
    if not is_numbers(shape) or str(split.get("axis")) not in AXES or len(shape) != len(AXES):
        return []
    length = shape[AXES.index(str(split["axis"]))]
    spans = sorted((split[name], name) for name in ("train", "guard", "validation") if _span(split.get(name)))
    found, end = [], 0
    for (start, stop), name in spans:
        if not end <= start <= stop <= length:
            return []
        found += [{"name": "unused", "share": 100 * (start - end) / length}] if start > end else []
        found.append({"name": name, "share": 100 * (stop - start) / length})
        end = stop
    return found


def _span(value: object) -> str:
    """Write a half-open range."""
    return f"{value[0]}-{value[1]}" if is_numbers(value) and isinstance(value, list) and len(value) == 2 else ""
