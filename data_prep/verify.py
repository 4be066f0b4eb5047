"""Check an image folder before training: rows, pictures, captions and splits.

    python -m data_prep.verify data/weave

Works on any folder with ``train/metadata.jsonl`` (and ``validation/metadata.jsonl``), or with ``metadata.jsonl`` beside
the pictures. Boxes are compared where the rows have them.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs.errors import InputError
from configs.load import Positional, command, one_line
from data_prep.manifest import MANIFEST_NAME, METADATA_NAME, is_box, is_inside, is_storable, read_manifest, read_records

_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
_MODES = {"L", "RGB"}
_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Settings of the check."""

    dataset: Positional[Path]
    """Folder of the dataset, or of one split."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a check found.

    Attributes:
        problems: a line each; empty if the folder can be trained on.
        counts: pictures by split.
    """

    problems: tuple[str, ...]
    counts: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """A row's picture as it is on disk."""

    split: str
    name: str
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    digest: str = ""
    problem: str = ""


def verify(dataset: Path, *, decode: bool = True) -> Verdict:
    """Check a dataset folder and return every problem found.

    Args:
        dataset: the folder that holds the splits, or the folder of one split.
        decode: decode every picture and compare pixels; without it only headers are read and files compared, which
            is enough for pictures that one encoder has just written.

    Raises:
        InputError: there is no ``metadata.jsonl`` to begin with, or one, or ``manifest.json``, is not readable.
    """
    folders = _split_folders(dataset)
    if (dataset / MANIFEST_NAME).exists():
        read_manifest(dataset)
    problems: list[str] = []
    records = {split: [record for _, record in read_records(path / METADATA_NAME)] for split, path in folders.items()}
    problems += _column_problems(records)
    pictures: list[_Picture] = []
    for split, path in folders.items():
        names, row_problems = _check_rows(split, path, records[split])
        problems += row_problems
        with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
            # Loaders print it for every picture of this size; here it is one of the problems.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            pictures += pool.map(lambda name, s=split, p=path: _look_at(s, p, name, decode), names)
    problems += [f"{picture.split}/{picture.name}: {picture.problem}" for picture in pictures if picture.problem]
    problems += _size_problems(pictures, records)
    problems += _duplicate_problems(pictures, folders)
    problems += _overlap_problems(records)
    return Verdict(problems=tuple(problems), counts={split: len(rows) for split, rows in records.items()})


def _split_folders(dataset: Path) -> dict[str, Path]:
    """Find the folders with rows."""
    if not dataset.is_dir():
        is_file = dataset.is_file()
        raise InputError(
            f"{dataset}: {'is a file; name the folder it is in' if is_file else 'there is no such folder'}"
        )
    if (dataset / METADATA_NAME).is_file() and not (dataset / "train").is_dir():
        return {dataset.name: dataset}
    folders = {path.parent.name: path.parent for path in sorted(dataset.glob(f"*/{METADATA_NAME}"))}
    if not folders:
        raise InputError(f"{dataset}: no {METADATA_NAME} in it, nor in the folder of a split; captions come from there")
    return folders


def _check_rows(split: str, folder: Path, records: Sequence[dict[str, object]]) -> tuple[list[str], list[str]]:
    """Return the names whose pictures exist, and the problems of the rows themselves."""
    problems, names = [], []
    if not records:
        problems.append(f"{split}: no rows; leave an empty split out")
    listed: set[str] = set()
    for number, record in enumerate(records, start=1):
        name, text = record.get("file_name"), record.get("text")
        if not isinstance(name, str) or not is_inside(name):
            problems.append(f"{split}: row {number}: file_name {name!r} is not a path inside the folder")
            continue
        if name in listed:
            problems.append(f"{split}/{name}: listed twice")
        elif not (folder / name).is_file():
            problems.append(f"{split}/{name}: in {METADATA_NAME}, but there is no such file")
        else:
            names.append(name)
        listed.add(name)
        if not isinstance(text, str) or not text.strip():
            problems.append(f"{split}/{name}: no caption in column 'text'")
        elif len(text.splitlines()) > 1:
            problems.append(f"{split}/{name}: the caption has more than one line")
        problems += [
            f"{split}/{name}: {column} holds a number that is not finite or has more than 64 bits"
            for column, value in record.items()
            if not all(map(is_storable, value if isinstance(value, list) else [value]))
        ]
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in _PICTURES}
    problems += [f"{split}/{name}: a picture without a row in {METADATA_NAME}" for name in sorted(on_disk - listed)]
    return names, problems


def _column_problems(records: dict[str, list[dict[str, object]]]) -> list[str]:
    """Compare the columns and their types between all rows; loaders refuse folders in which they differ."""
    problems: list[str] = []
    first: dict[str, str] | None = None
    for split, rows in records.items():
        for number, record in enumerate(rows, start=1):
            types = {name: _type_name(value) for name, value in record.items()}
            first = first or types
            if types != first:
                names = sorted(name for name in {*types, *first} if types.get(name) != first.get(name))
                problems.append(f"{split}: row {number}: columns {', '.join(names)} differ from those of the first row")
                break
    seconds = sorted(name for name in first or {} if name.endswith(("_file_name", "_file_names")))
    return problems + [f"column '{name}' would be loaded as a second picture; rename it" for name in seconds]


def _type_name(value: object) -> str:
    """Return the type a loader would give a value, with that of the items of a list."""
    if isinstance(value, list):
        return f"list of {'/'.join(sorted({type(item).__name__ for item in value}))}"
    return type(value).__name__


def _look_at(split: str, folder: Path, name: str, decode: bool) -> _Picture:
    """Read one picture."""
    path = folder / name
    try:
        with Image.open(path) as image:
            mode, size = image.mode, image.size
            content = image.tobytes() if decode else path.read_bytes()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return _Picture(split=split, name=name, problem=f"not a readable picture ({one_line(str(error))[:100]})")
    digest = hashlib.sha256(f"{mode}{size}".encode() if decode else b"")
    digest.update(content)
    problem = "" if mode in _MODES else f"mode {mode}; training reads 8-bit L or RGB only and clips the rest"
    return _Picture(split=split, name=name, mode=mode, size=size, digest=digest.hexdigest(), problem=problem)


def _size_problems(pictures: Iterable[_Picture], records: dict[str, list[dict[str, object]]]) -> list[str]:
    """Compare the size of each picture with its row, where the row says it."""
    said = {(split, str(record.get("file_name"))): record for split, rows in records.items() for record in rows}
    problems = []
    for picture in pictures:
        record = said[picture.split, picture.name]
        width, height = record.get("width", picture.size[0]), record.get("height", picture.size[1])
        if picture.mode and (width, height) != picture.size:
            actual = f"{picture.size[0]}x{picture.size[1]}"
            problems.append(
                f"{picture.split}/{picture.name}: {actual} px wide and high, its row says {width!r} and {height!r}"
            )
    return problems


def _duplicate_problems(pictures: Iterable[_Picture], folders: dict[str, Path]) -> list[str]:
    """Find pictures of one split that are also in another; a picture of one grey level holds nothing to leak."""
    seen: dict[str, _Picture] = {}
    problems = []
    for picture in pictures:
        first = seen.setdefault(picture.digest, picture) if picture.digest else picture
        if first.split != picture.split and not _is_flat(folders[picture.split] / picture.name):
            problems.append(f"{picture.split}/{picture.name}: identical to {first.split}/{first.name}")
    return problems


def _is_flat(path: Path) -> bool:
    """Return whether a picture has one value everywhere."""
    with Image.open(path) as image:
        return bool(np.ptp(np.asarray(image)) == 0)


def _overlap_problems(records: dict[str, list[dict[str, object]]]) -> list[str]:
    """Find volumes of which a voxel is in boxes of two splits."""
    names: dict[tuple[str, str], list[object]] = defaultdict(list)
    boxes: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for split, rows in records.items():
        for record in rows:
            box = record.get("box")
            if is_box(box) and isinstance(record.get("volume"), str):
                names[str(record["volume"]), split].append(record.get("file_name"))
                boxes[str(record["volume"]), split].append(box)
    problems = []
    for volume in sorted({volume for volume, _ in boxes}):
        splits = [split for split in records if (volume, split) in boxes]
        for position, split in enumerate(splits):
            for other in splits[position + 1 :]:
                pair = _first_overlap(np.array(boxes[volume, split]), np.array(boxes[volume, other]))
                if pair is not None:
                    one, two = names[volume, split][pair[0]], names[volume, other][pair[1]]
                    problems.append(f"volume '{volume}': {split}/{one} and {other}/{two} share voxels")
    return problems


def _first_overlap(boxes: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> tuple[int, int] | None:
    """Return the positions of the first two boxes (n, 6), (m, 6) that share a voxel."""
    # Two whole sets apart along one axis are apart box by box; a cut through the volume is found so at once.
    low, high, other_low, other_high = boxes[:, ::2], boxes[:, 1::2], others[:, ::2], others[:, 1::2]
    if np.any((high.max(axis=0) <= other_low.min(axis=0)) | (other_high.max(axis=0) <= low.min(axis=0))):
        return None
    for position in range(len(boxes)):
        meets = np.all((low[position] < other_high) & (other_low < high[position]), axis=1)
        if meets.any():
            return position, int(np.flatnonzero(meets)[0])
    return None


def main(config: VerifyConfig) -> None:
    """Check the folder, print what was found, and fail if anything was."""
    verdict = verify(config.dataset)
    for problem in verdict.problems[:_LISTED]:
        print(one_line(problem))
    if len(verdict.problems) > _LISTED:
        print(f"... and {len(verdict.problems) - _LISTED} more")
    if verdict.problems:
        raise InputError(f"{config.dataset}: {len(verdict.problems)} problems, listed above")
    counts = ", ".join(f"{split} {count}" for split, count in verdict.counts.items())
    print(f"{config.dataset}: nothing wrong ({counts} pictures)")


if __name__ == "__main__":
    command(VerifyConfig, main)
