"""What a training run says about itself: the data it saw, the captions, the size; torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml


def run_settings(adapter: Path) -> dict[str, object]:
    """Return the ``config.yaml`` of the run that an adapter, or a checkpoint, belongs to; empty if there is none."""
    folder = adapter if (adapter / "config.yaml").is_file() else adapter.parent
    try:
        content = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def pipeline_provenance(name_or_path: str) -> dict[str, object]:
    """Return the ``provenance.json`` of a tuned pipeline folder, empty if there is none."""
    try:
        content = json.loads((Path(name_or_path) / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def dataset_of(runs: Sequence[Path]) -> Path | None:
    """Return the dataset folder (that holds ``train/``) the first of the runs was trained on, if still there."""
    for run in runs:
        for folder in map(Path, training_folders(run_settings(run))):
            if folder.is_dir():
                return folder.parent if folder.name == "train" else folder
    return None


def training_folders(settings: Mapping[str, object]) -> list[str]:
    """Return the folders that a run's settings name as training data: one, several or none."""
    named = settings.get("train_data_dir")
    return [name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)]


def captions_of(provenances: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the training captions of all adapters, sorted, each once."""
    found: set[str] = set()
    for provenance in provenances:
        captions = provenance.get("captions")
        found |= {str(text) for text in captions} if isinstance(captions, list) else set()
    return sorted(found)


def size_of(provenances: Sequence[Mapping[str, object]], prompt: str | None = None) -> tuple[int, int] | None:
    """Return (height, width) in pixels that a prompt is generated at, if the adapters say so.

    For a training caption it is the size that came with it most often; else that of most pictures of the last adapter.
    """
    asked = [shape for shape in shapes_of(provenances) if _count(shape, prompt)]
    sizes = [_size(told) for told in (*sorted(asked, key=lambda shape: -_count(shape, prompt)), *reversed(provenances))]
    return next((size for size in sizes if size), None)


def bucket_size_of(provenances: Sequence[Mapping[str, object]]) -> tuple[int, int] | None:
    """Return the (height, width) in px of most training pictures of the last adapter that was trained in buckets.

    None if none was: without buckets all pictures have one square shape.
    """
    for provenance in reversed(provenances):
        sizes = [_size(shape) for shape in shapes_of([provenance])]
        if sizes and sizes[0] is not None and (len(sizes) > 1 or sizes[0][0] != sizes[0][1]):
            return sizes[0]
    return None


def shapes_of(provenances: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Return the shapes that adapters were trained in, each with its captions, those of the last adapter first."""
    listed = [provenance.get("shapes") for provenance in reversed(provenances)]
    return [shape for shapes in listed if isinstance(shapes, list) for shape in shapes if isinstance(shape, dict)]


def _count(shape: Mapping[str, object], prompt: str | None) -> int:
    """Return how many training pictures of a shape came with a prompt as their caption."""
    captions = shape.get("captions")
    count = captions.get(prompt) if isinstance(captions, dict) else None
    return count if isinstance(count, int) else 0


def _size(told: Mapping[str, object]) -> tuple[int, int] | None:
    """Return the height and width that something tells, or None."""
    height, width = told.get("height"), told.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def base_mismatch(provenances: Sequence[Mapping[str, object]], base_hash: str) -> str:
    """Return the name of the base an adapter was trained on if it is not this one, else an empty string."""
    for provenance in provenances:
        base = provenance.get("base_model")
        if isinstance(base, dict) and base.get("hash") not in {None, base_hash}:
            return str(base.get("name") or base.get("hash"))
    return ""
