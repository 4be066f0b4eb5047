"""What a report is made of: a run folder, results folders and the dataset behind them, read as they are.

Everything read here is data from files: it is checked for type, kept inside its folder, and escaped where it is shown.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from configs.errors import InputError, UsageError
from data_prep.folders.manifest import MANIFEST_NAME, is_inside, read_manifest, read_records
from data_prep.folders.provenance import training_folders
from data_prep.folders.results import Result, read_results

LARGEST_PAGE = 10_000_000
"""Bytes a page may have, so that it can be mailed."""
FOR_PICTURES = 7_000_000
"""Bytes of picture files in it; base64 adds a third."""
LONGEST_SIDE = 1600
"""Pictures are reduced to this many px."""


@dataclass(frozen=True, kw_only=True)
class ResultsFolder:
    """One results folder.

    Attributes:
        path: as typed.
        module: the command that wrote it, such as ``eval.drift``, as its rows say.
        rows: of results.jsonl, empty without one.
        records: of records.jsonl, empty without one.
        settings: of config.yaml, empty without one.
    """

    path: Path
    module: str
    rows: tuple[Result, ...]
    records: tuple[dict[str, object], ...]
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """A training run: its settings, its curve, what was looked at while it learned, and its surroundings."""

    path: Path
    settings: dict[str, Any]
    metrics: tuple[dict[str, object], ...]
    environment: dict[str, Any]
    provenance: dict[str, Any]
    drift: tuple[dict[str, Any], ...] = ()
    selection: dict[str, Any] = field(default_factory=dict)


class Pictures:
    """Turns picture files into data URIs until ``room`` bytes are full."""

    def __init__(self, room: int = FOR_PICTURES) -> None:
        self.left = room
        self.num_left_out = 0

    def embed(self, folder: Path, name: str, *, longest: int = LONGEST_SIDE) -> str:
        """Return a PNG data URI of ``folder/name``, or an empty string if there is no such picture or no room."""
        path = folder / name
        if not is_inside(name) or not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            return ""
        try:
            with Image.open(path) as opened:
                picture = opened.convert("L" if opened.mode == "L" else "RGB")
        except (OSError, Image.DecompressionBombError):
            return ""
        picture.thumbnail((longest, longest * 4))
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        if buffer.tell() > self.left:
            self.num_left_out += 1
            return ""
        self.left -= buffer.tell()
        return data_uri("image/png", buffer.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """Return content as an address that needs no network."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def read_run(path: Path) -> ReportedRun:
    """Read a run folder.

    Raises:
        UsageError: there is no such folder.
        InputError: it is no run folder, or a file in it cannot be read.
    """
    if not path.is_dir():
        raise UsageError(f"--run {path}: there is no such folder")
    if not (path / "config.yaml").is_file():
        raise InputError(f"--run {path}: no config.yaml; give the output folder of a training run")
    metrics, drift = path / "metrics.jsonl", path / "drift.jsonl"
    return ReportedRun(
        path=path,
        settings=_read_settings(path),
        metrics=tuple(record for _, record in read_records(metrics)) if metrics.is_file() else (),
        environment=read_json(path / "environment.json"),
        provenance=read_json(path / "provenance.json"),
        drift=tuple(record for _, record in read_records(drift)) if drift.is_file() else (),
        selection=read_json(path / "selection.json"),
    )


def read_folder(path: Path) -> ResultsFolder:
    """Read a results folder of any evaluation.

    Raises:
        UsageError: there is no such folder.
        InputError: it holds no results, or they cannot be read.
    """
    if not path.is_dir():
        raise UsageError(f"--results {path}: there is no such folder")
    results, records = path / "results.jsonl", path / "records.jsonl"
    if not results.is_file() and not records.is_file():
        raise InputError(
            f"--results {path}: holds neither results.jsonl nor records.jsonl; give the output folder of eval.*"
        )
    rows = tuple(read_results(results)) if results.is_file() else ()
    named = re.match(r"python -m (eval\.\w+)", rows[0].command) if rows else None
    return ResultsFolder(
        path=path,
        module=named.group(1) if named else "eval.generate" if not rows else "",
        rows=rows,
        records=tuple(record for _, record in read_records(records)) if records.is_file() else (),
        settings=_read_settings(path),
    )


def shown_name(folder: ResultsFolder) -> str:
    """Return what a check is called among several: its folder, or the one above if that is named after the command."""
    name = folder.path.name
    return folder.path.parent.name if name == folder.module.removeprefix("eval.") else name


def find_dataset(run: ReportedRun | None, folders: Sequence[ResultsFolder]) -> tuple[Path, dict[str, Any]] | None:
    """Return the dataset folder that the run or a check names, with its manifest, if it is still there."""
    named: list[object] = [*training_folders(run.settings)] if run else []
    named += [folder.settings.get("real") for folder in folders]
    for name in named:
        if not isinstance(name, str):
            continue
        for folder in (Path(name), Path(name).parent):
            if (folder / MANIFEST_NAME).is_file():
                return folder, read_manifest(folder)
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file.

    Raises:
        InputError: it is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def part(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the object under a name, empty if there is none."""
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def is_numbers(value: object) -> bool:
    """Return whether this is a list of numbers."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, int | float) for item in value)


def _read_settings(folder: Path) -> dict[str, Any]:
    """Read config.yaml; empty if there is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    return content if isinstance(content, dict) else {}
