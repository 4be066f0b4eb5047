"""A dataset as one page of HTML: its pictures, its split, what was left out, what a trainer will make of it."""

from __future__ import annotations

import base64
import io
import itertools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from configs.errors import InputError
from data_prep.folders import manifest
from data_prep.folders.checks import FolderCheck, captioned, split_folders
from data_prep.page.buckets import bucket_of, square_of

REPORT_NAME = "report.html"
TEMPLATE = "report.html.jinja"
_AXES = ("thickness", "warp", "weft")
_STORED = "zyx"
# A page that can be mailed: edge of a thumbnail in px, and how much of each kind is shown.
_THUMBNAIL, _MOST_CELLS, _MOST_CAPTIONS, _MOST_SHAPES = 320, 36, 20, 12


def render(dataset: Path, verdict: FolderCheck, *, resolution: int = 512, step: int = 64) -> str:
    """Return the page; every text from a file is escaped by the template.

    Args:
        dataset: the folder.
        verdict: what a check of it found.
        resolution: edge a trainer counts in, in px.
        step: edges of a trainer's buckets are multiples of this.
    """
    folders = split_folders(dataset)
    rows = {split: captioned(folder) for split, folder in folders.items()}
    about = manifest.read_manifest(dataset) if (dataset / manifest.MANIFEST_NAME).is_file() else {}
    volumes: Any = about.get("volumes") or []
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    options: Any = about.get("options")
    options = options if isinstance(options, dict) else {}
    letters = zip(_AXES, _STORED, strict=True)
    try:
        stored = {axis: _STORED.index(str(options.get(f"{axis}_axis", letter))) for axis, letter in letters}
        names = [str(volume.get("name", "?")) for volume in volumes]
        content = {
            "title": f"Slices of {', '.join(names[:4])}{' and others' if len(names) > 4 else ''}"
            if names
            else "Pictures",
            "totals": {split: len(some) for split, some in rows.items()},
            "volumes": [_volume(volume, stored, rows) for volume in volumes],
            "cells": _cells(folders, rows),
            "captions": _captions(rows),
            "left_out": _left_out(volumes),
            "shapes": _shapes(rows, resolution, step),
            "options": {str(name): _words(value) for name, value in options.items()},
        }
    # The files may be anybody's; what is in them has the types of JSON and no others for sure.
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{dataset}: its rows or its manifest are not as data_prep.slice writes them ({said})"
        ) from error
    return environment.get_template(TEMPLATE).render(content, verdict=verdict, resolution=resolution, step=step)


def _volume(
    volume: Mapping[str, Any], stored: Mapping[str, int], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Return what the page shows of one volume; ``stored`` maps a direction to its stored axis."""
    window, edges = volume.get("window") or {}, volume.get("voxel_um")
    audit = volume.get("audit") or {}
    return {
        "name": volume.get("name", "?"),
        "state": volume.get("state", "?"),
        "facts": {
            "file": volume.get("file", "?"),
            "shape (z, y, x)": " x ".join(map(str, volume.get("shape") or ())),
            "stored as": f"{volume.get('dtype', '?')}, {volume.get('storage', '?')}",
            "voxel": "size unknown" if not edges else " x ".join(f"{edge:g}" for edge in edges) + " um",
            "window": f"{window.get('low', 0):g} to {window.get('high', 0):g}",
            "clipped": f"{window.get('clipped_low', 0) + window.get('clipped_high', 0):.2%}",
        },
        "warnings": volume.get("warnings") or [],
        "plan": _plan(volume),
        "lanes": [_lane(volume, axis, stored[axis], rows) for axis in _AXES if axis in audit],
        "histogram": _histogram(volume),
        "audit": [
            {
                "axis": axis,
                "num_slices": audit[axis]["num_slices"],
                "length": audit[axis]["correlation_length"],
                "effective": f"{audit[axis]['effective_number']:.0f}",
            }
            for axis in _AXES
            if axis in audit
        ],
    }


def _plan(volume: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the volume seen along z, as rectangles in voxels: what is cut, and its parts."""
    shape, box, split = volume.get("shape"), volume.get("box"), volume.get("split")
    if not shape or not box:
        return None
    parts: list[tuple[str, dict[int, list[int]]]] = []
    area = {1: box[2:4], 2: box[4:6]}
    if split and split["axis"] != "z":
        axis = _STORED.index(split["axis"])
        parts = [(name, area | {axis: split[name]}) for name in ("train", "guard", "validation")]
    else:
        parts = [("validation" if volume.get("is_held_out") else "train", area)]
    rectangles = [
        {"kind": name, "x": x[0], "y": y[0], "width": x[1] - x[0], "height": y[1] - y[0]}
        for name, area in parts
        for y, x in [(area[1], area[2])]
    ]
    return {"width": shape[2], "height": shape[1], "parts": rectangles, "cut": split["axis"] if split else None}


def _lane(
    volume: Mapping[str, Any], axis: str, stored: int, rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Return the slices of one direction along their axis: which are in which split, which were dropped.

    Args:
        volume: its entry of the manifest.
        axis: the direction.
        stored: the stored axis along it.
        rows: split -> its rows.
    """
    taken: dict[str, set[int]] = {}
    for split, some in rows.items():
        for row in some:
            if row.get("volume") == volume.get("name") and row.get("axis") == axis:
                taken.setdefault(split, set()).add(int(row["index"]))
    dropped = set((volume.get("dropped_slices") or {}).get(axis, []))
    numbers = sorted(dropped.union(*taken.values()))
    gaps = sorted(second - first for first, second in itertools.pairwise(numbers))
    step = gaps[len(gaps) // 2] if gaps else 1
    spans = [
        {"kind": kind, "lane": 1 if kind == "validation" else 0, "first": first, "length": length}
        for kind, some in [*taken.items(), ("dropped", dropped)]
        for first, length in _runs(sorted(some), step)
    ]
    blocks = [volume["split"]] if volume.get("split") else volume.get("blocks") or []
    guards = [block["guard"] for block in blocks if _STORED.index(block["axis"]) == stored]
    return {
        "axis": axis,
        "letter": _STORED[stored],
        "length": volume["shape"][stored],
        "spans": spans,
        "guards": [{"first": first, "length": end - first} for first, end in guards],
        "counts": {kind: len(some) for kind, some in [*taken.items(), ("dropped", dropped)] if some},
    }


def _runs(numbers: Sequence[int], step: int) -> list[tuple[int, int]]:
    """Join slices that follow each other at the usual distance into (first, length)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number - (runs[-1][0] + runs[-1][1]) <= 0:
            runs[-1] = (runs[-1][0], number + step - runs[-1][0])
        else:
            runs.append((number, step))
    return runs


def _histogram(volume: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return bars between 0 and 1, and where the window's ends lie between the first and the last bar."""
    found, window = volume.get("histogram") or {}, volume.get("window") or {}
    counts, low, high = found.get("counts") or [], found.get("low", 0.0), found.get("high", 0.0)
    if not counts or not max(counts) or not low < high:
        return None
    ends = [(window[name] - low) / (high - low) for name in ("low", "high")]
    return {
        "bars": [count / max(counts) for count in counts],
        "ends": [min(1.0, max(0.0, end)) for end in sorted(ends)],
        "low": f"{low:g}",
        "high": f"{high:g}",
        "is_turned": ends[0] > ends[1],
    }


def _cells(folders: Mapping[str, Path], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return a picture from the middle of each state, direction and split, or of each caption without states."""
    groups: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for split, some in rows.items():
        for row in some:
            key = (str(row["state"]), str(row["axis"])) if "state" in row and "axis" in row else (str(row["text"]), "")
            groups.setdefault(key, {}).setdefault(split, []).append(row)
    cells = []
    for (state, axis), splits in list(groups.items())[:_MOST_CELLS]:
        pictures = []
        for split, some in splits.items():
            row = some[len(some) // 2]
            if (shown := _thumbnail(folders[split], str(row.get("file_name")))) is None:
                continue
            source, width, height = shown
            size = f"{width} x {height} px"
            name = str(row["file_name"])
            pictures.append(
                {"split": split, "source": source, "size": size, "width": width, "name": name, "count": len(some)}
            )
        example = next(iter(splits.values()))[0]
        cells.append({"title": f"{state} {axis}".strip(), "text": str(example["text"]), "pictures": pictures})
    return cells


def _thumbnail(folder: Path, name: str) -> tuple[str, int, int] | None:
    """Return a picture in small as a data URL, and its own width and height; None if it cannot be shown."""
    if not manifest.is_inside(name):
        return None
    try:
        with warnings.catch_warnings(), Image.open(folder / name) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            small = image.convert("RGB" if image.mode == "RGB" else "L")
            small.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
            stream = io.BytesIO()
            small.save(stream, "jpeg", quality=85)
            width, height = image.size
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}", width, height


def _captions(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Count the captions."""
    texts = Counter(str(row.get("text")) for some in rows.values() for row in some)
    return {"listed": texts.most_common(_MOST_CAPTIONS), "more": max(0, len(texts) - _MOST_CAPTIONS)}


def _left_out(volumes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add up what was left out, by reason and direction."""
    found: dict[str, Counter[str]] = {}
    for volume in volumes:
        for reason, counts in (volume.get("left_out") or {}).items():
            found.setdefault(str(reason), Counter()).update(counts)
    return [
        {"reason": reason, "counts": [counts[axis] for axis in _AXES], "total": counts.total()}
        for reason, counts in found.items()
        if counts.total()
    ]


def _shapes(rows: Mapping[str, Sequence[Mapping[str, Any]]], resolution: int, step: int) -> dict[str, Any]:
    """Return, for each shape of picture, what trainers would make of it."""
    found: Counter[tuple[Any, ...]] = Counter()
    for some in rows.values():
        for row in some:
            if isinstance(row.get("width"), int) and isinstance(row.get("height"), int):
                scale = row.get("um_per_px")
                found[row["width"], row["height"], row.get("axis", ""), tuple(scale) if scale else None] += 1
    shapes = []
    for (width, height, axis, um_per_px), count in found.most_common(_MOST_SHAPES):
        bucket = bucket_of(width, height, resolution=resolution, step=step)
        square = square_of(width, height, resolution=resolution)
        shapes.append(
            {
                "count": count,
                "axis": axis,
                "size": f"{width} x {height}",
                "um": "" if um_per_px is None else " x ".join(f"{size:.4g}" for size in um_per_px),
                "ways": [
                    {
                        "size": f"{way.width} x {way.height}",
                        "scale": f"x{way.scale:.2f}",
                        "kept": f"{way.kept:.0%}",
                        "um": "" if um_per_px is None else f"{um_per_px[0] / way.scale:.4g} um/px",
                        "is_enlarged": way.scale > 1,
                    }
                    for way in (bucket, square)
                ],
            }
        )
    scales = {way["scale"] for shape in shapes for way in shape["ways"][:1]}
    return {"rows": shapes, "more": max(0, len(found) - _MOST_SHAPES), "num_scales": len(scales)}


def _words(value: object) -> str:
    """Write a setting as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
