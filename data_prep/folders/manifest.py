"""The dataset folder: rows, manifest, hashes and atomic publication."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from configs.errors import InputError
from data_prep.folders.publish import _LONGEST_NAME

METADATA_NAME = "metadata.jsonl"
MANIFEST_NAME = "manifest.json"
_SIZES = ("um_per_px", "voxels_per_px")  # columns that are absent where nothing is known or changed


@dataclass(frozen=True, kw_only=True)
class SliceRow:
    """One picture of a dataset folder, as a line of ``metadata.jsonl``.

    Attributes:
        file_name: the picture's name, relative to the folder of its split.
        text: the caption.
        volume: name of the volume it was cut from, unique within the dataset.
        state: state of the material.
        axis: the direction the slice is perpendicular to.
        index: position of the slice along that direction, in stored voxels.
        box: (z0, z1, y0, y1, x0, x1), half-open, in stored voxels. Smaller than the picture where it was padded.
        width: columns, in px.
        height: rows, in px.
        um_per_px: (row, column) size of a pixel in micrometres; None if unknown, and then absent from the file.
        voxels_per_px: the same in voxels, if the picture was resampled; None, and absent, if a pixel is a voxel.
    """

    file_name: str
    text: str
    volume: str
    state: str
    axis: str
    index: int
    box: tuple[int, int, int, int, int, int]
    width: int
    height: int
    um_per_px: tuple[float, float] | None = None
    voxels_per_px: tuple[float, float] | None = None


def write_rows(split_folder: Path, rows: Iterable[SliceRow]) -> None:
    """Write ``metadata.jsonl`` into ``split_folder``, with the same keys in every row.

    Raises:
        ValueError: the size of a pixel is known for some rows and unknown for others.
    """
    rows = list(rows)
    for name in _SIZES:
        if len({getattr(row, name) is None for row in rows}) > 1:
            raise ValueError(f"{name} must be given for all rows or for none")
    lines = (json.dumps(_without_unknown(row)) + "\n" for row in rows)
    (split_folder / METADATA_NAME).write_text("".join(lines), encoding="utf-8")


def _without_unknown(row: SliceRow) -> dict[str, object]:
    """Return the row as a dict, without a pixel size that is not known."""
    record = dataclasses.asdict(row)
    for name in _SIZES:
        if record[name] is None:
            del record[name]
        else:
            record[name] = [float(size) for size in record[name]]
    return record


def write_records(split_folder: Path, records: Sequence[Mapping[str, object]]) -> None:
    """Write ``metadata.jsonl`` into ``split_folder`` from rows that are not of a volume.

    Raises:
        ValueError: the rows have different keys.
    """
    if len({tuple(record) for record in records}) > 1:
        raise ValueError("all rows must have the same keys in the same order")
    lines = (json.dumps(record) + "\n" for record in records)
    (split_folder / METADATA_NAME).write_text("".join(lines), encoding="utf-8")


def read_rows(split_folder: Path) -> list[SliceRow]:
    """Read the rows of one split, such as ``data/weave/train``; columns beyond ours are left out.

    Raises:
        InputError: no ``metadata.jsonl``, a line that is not JSON or lacks a column, or a file name that leaves the
            folder.
    """
    path = split_folder / METADATA_NAME
    rows = []
    for number, record in read_records(path):
        try:
            rows.append(_row_from(record))
        except KeyError as error:
            raise InputError(f"{path}:{number}: no column {error}; slice the volumes again or add it") from None
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}:{number}: {error}") from None
    return rows


def read_records(path: Path) -> list[tuple[int, dict[str, object]]]:
    """Read a JSON-lines file as (line number, object) pairs.

    Raises:
        InputError: the file is missing or not readable, a line of it is not a JSON object, or its ``file_name`` is
            longer than file systems allow.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; is {path.parent} the folder of a split?") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _object_from(line, f"{path}:{number}")
        longest = max(len(part.encode()) for part in str(record.get("file_name")).split("/"))
        if longest > _LONGEST_NAME:
            raise InputError(f"{path}:{number}: file_name has {longest} bytes; at most {_LONGEST_NAME} make a file")
        records.append((number, record))
    return records


def _object_from(text: str, where: str) -> dict[str, object]:
    """Read a JSON object that anybody may have written; what no program can use is an InputError naming ``where``."""
    try:
        record = json.loads(text)
        if "\\u" in text:
            # Half of a character, which JSON can write and no file can hold.
            json.dumps(record, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg})") from None
    except UnicodeEncodeError:
        raise InputError(f"{where}: text with half of a character (a lone surrogate)") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except ValueError:
        raise InputError(f"{where}: a number with too many digits") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(record).__name__}")
    return record


def is_inside(file_name: str) -> bool:
    """Return whether a relative file name stays inside the folder it is relative to."""
    path = PurePosixPath(file_name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and not set("\\\0") & set(file_name)


def _row_from(record: Mapping[str, object]) -> SliceRow:
    """Check the types of one record and make a row of it."""
    text = {name: record[name] for name in ("file_name", "text", "volume", "state", "axis")}
    whole = {name: record[name] for name in ("index", "width", "height")}
    box = record["box"]
    if not all(isinstance(value, str) for value in text.values()):
        raise ValueError(f"{', '.join(text)} must be text")
    if not all(_is_whole(value) for value in whole.values()):
        raise ValueError(f"{', '.join(whole)} must be whole numbers")
    if not is_box(box):
        raise ValueError(f"box must be six whole numbers z0, z1, y0, y1, x0, x1, got {box}")
    sizes: dict[str, tuple[float, float] | None] = {}
    for name in _SIZES:
        size: Any = record.get(name)
        if size is not None and not _is_size(size):
            raise ValueError(f"{name} must be two positive numbers, row and column, got {size}")
        sizes[name] = None if size is None else (float(size[0]), float(size[1]))
    if not is_inside(str(text["file_name"])):
        raise ValueError(f"file_name {text['file_name']!r} leaves its folder")
    return SliceRow(**text, **whole, box=tuple(box), **sizes)  # type: ignore[arg-type]  # checked above


def is_box(value: object) -> bool:
    """Return whether a value of a row is six whole numbers of at most 64 bits."""
    return isinstance(value, list) and len(value) == 6 and all(map(_is_whole, value))


def _is_whole(value: object) -> bool:
    return type(value) is int and is_storable(value)


def _is_size(value: object) -> bool:
    """Return whether a value is two positive finite numbers."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(edge) in (int, float) and is_storable(edge) and edge > 0 for edge in value)
    )


def is_storable(value: object) -> bool:
    """Return whether a table can hold a value: a number must be finite, and a whole one have at most 64 bits."""
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def write_manifest(dataset: Path, manifest: Mapping[str, object]) -> None:
    """Write ``manifest.json`` into a dataset folder."""
    (dataset / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_manifest(dataset: Path) -> dict[str, object]:
    """Read ``manifest.json`` of a dataset folder, such as ``data/weave``.

    Raises:
        InputError: the file is missing or not readable, is not a JSON object, or lists no objects under ``volumes``.
    """
    path = dataset / MANIFEST_NAME
    try:
        manifest = _object_from(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; is {dataset} a dataset folder?") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    volumes = manifest.get("volumes")
    if not isinstance(volumes, list) or not all(isinstance(volume, dict) for volume in volumes):
        raise InputError(f"{path}: expected a list of objects under 'volumes'; slice the volumes again")
    return manifest


def write_card(
    dataset: Path, *, body: str, splits: Iterable[str], num_pictures: int, endings: Sequence[str] = (".png",)
) -> None:
    """Write ``README.md``, the card that tells a loader which files belong to which split.

    The globs are explicit: without them a loader may take captions in text files for the data set itself.
    """
    sizes = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
    size = next((name for limit, name in sizes.items() if num_pictures < limit), "n>1M")
    front = [
        "---",
        "license: other",
        "task_categories:",
        "- text-to-image",
        "size_categories:",
        f"- {size}",
        "configs:",
    ]
    front += ["- config_name: default", "  data_files:"]
    for split in splits:
        pictures = [f'    - "{split}/*{ending}"' for ending in endings]
        front += [f"  - split: {split}", "    path:", *pictures, f'    - "{split}/{METADATA_NAME}"']
    (dataset / "README.md").write_text("\n".join([*front, "---", "", body]), encoding="utf-8")


TRAIN, VALIDATION = "train", "validation"
