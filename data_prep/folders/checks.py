"""Check any image folder before training: captions, sizes, duplicates, leaks; no torch."""

from __future__ import annotations

import csv
import hashlib
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs.errors import InputError
from configs.load import one_line
from data_prep.folders.manifest import (
    MANIFEST_NAME,
    METADATA_NAME,
    is_box,
    is_inside,
    is_storable,
    read_manifest,
    read_records,
)
from prompts.captions import readings
from prompts.vocabulary import DEFAULT, Vocabulary, vocabulary_of

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
_MODES = {"L", "RGB"}
_CSV_NAME = "metadata.csv"
_LARGEST_CAPTION = 100_000  # bytes
_SPLIT_NAME = re.compile(r"(train|test|val|valid|validation|dev|eval)[-_. ]", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class FolderCheck:
    """What a check found.

    Attributes:
        problems: a line each; empty if the folder can be trained on.
        counts: pictures by split.
        leak: what is known of voxels in two splits.
    """

    problems: tuple[str, ...]
    counts: dict[str, int]
    leak: str


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """A row's picture as it is on disk."""

    split: str
    name: str
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    digest: str = ""
    problem: str = ""


def verify(dataset: Path, *, decode: bool = True) -> FolderCheck:
    """Check a dataset folder and return every problem found.

    Args:
        dataset: the folder that holds the splits, or the folder of one split.
        decode: decode every picture and compare pixels; without it only headers are read and files compared, which
            is enough for pictures that one encoder has just written.

    Raises:
        InputError: there are no captions to begin with, or a file of them, or ``manifest.json``, is not readable.
    """
    folders = split_folders(dataset)
    manifest = read_manifest(dataset) if (dataset / MANIFEST_NAME).exists() else {}
    records = {split: captioned(path) for split, path in folders.items()}
    problems = _trap_problems(dataset, folders)
    problems += _column_problems(records)
    problems += _caption_problems(records, _words(dataset, folders, manifest))
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
    options = manifest.get("options")
    axes = {record.get("axis") for rows in records.values() for record in rows}
    by_axis = isinstance(options, dict) and options.get("split") == "index" and len(axes) > 1
    problems += _overlap_problems(records, by_axis=by_axis)
    counts = {split: len(rows) for split, rows in records.items()}
    return FolderCheck(problems=tuple(problems), counts=counts, leak=_leak(records, by_axis))


def _leak(records: dict[str, list[dict[str, object]]], by_axis: bool) -> str:
    """Say what the comparison of boxes is worth."""
    if len(records) < 2:
        return "one split only"
    if not all(is_box(record.get("box")) and "volume" in record for rows in records.values() for record in rows):
        return "leak unchecked: not every row has the volume and box it was cut from"
    if by_axis:
        return "split by index: slices of different directions cross and share lines of voxels"
    return "no voxel is in two splits"


def split_folders(dataset: Path) -> dict[str, Path]:
    """Find the folders of captioned pictures, by split.

    Raises:
        InputError: there are none.
    """
    if not dataset.is_dir():
        is_file = dataset.is_file()
        raise InputError(
            f"{dataset}: {'is a file; name the folder it is in' if is_file else 'there is no such folder'}"
        )
    children = sorted(path for path in dataset.iterdir() if path.is_dir() and not path.name.startswith("."))
    for names in ((METADATA_NAME, _CSV_NAME), ()):
        if _has_captions(dataset, names) and not (dataset / "train").is_dir():
            return {dataset.resolve().name: dataset}
        if folders := {path.name: path for path in children if _has_captions(path, names)}:
            return folders
    raise InputError(
        f"{dataset}: no {METADATA_NAME} in it, nor in the folder of a split, and no text beside the pictures; captions "
        "come from there; python -m data_prep.images makes them"
    )


def _has_captions(folder: Path, names: Sequence[str]) -> bool:
    """Return whether a folder has one of the files, or, without any named, pictures with text beside them."""
    if names:
        return any((folder / name).is_file() for name in names)
    return any(path.with_suffix(".txt").is_file() for path in folder.iterdir() if path.suffix.lower() in PICTURES)


def captioned(folder: Path) -> list[dict[str, object]]:
    """Read the rows of one folder: from ``metadata.jsonl``, ``metadata.csv`` or the text beside each picture.

    Raises:
        InputError: the file is not readable.
    """
    if (folder / METADATA_NAME).is_file():
        return [record for _, record in read_records(folder / METADATA_NAME)]
    try:
        if (folder / _CSV_NAME).is_file():
            with (folder / _CSV_NAME).open(encoding="utf-8-sig", newline="") as file:
                rows = [{str(name): value for name, value in row.items()} for row in csv.DictReader(file)]
            return [{name: row[name] for name in ("file_name", "text") if name in row} for row in rows]
        return [
            {"file_name": path.name, "text": _first_line(path.with_suffix(".txt"))}
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in PICTURES
        ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{folder}: captions are not readable ({one_line(str(error))[:100]})") from None


def _first_line(path: Path) -> str:
    """Return the caption in a text file, empty if there is no file."""
    if not path.is_file():
        return ""
    if path.stat().st_size > _LARGEST_CAPTION:
        raise InputError(f"{path}: has more than {_LARGEST_CAPTION} bytes; a caption is one line")
    return path.read_text(encoding="utf-8-sig").rstrip("\n")


def _trap_problems(dataset: Path, folders: dict[str, Path]) -> list[str]:
    """Find layouts that loaders read as something else."""
    problems = []
    if dataset not in folders.values() and any((dataset / name).is_file() for name in (METADATA_NAME, _CSV_NAME)):
        problems.append(
            f"{METADATA_NAME} lies above the folders of the splits, where loaders ignore it; put one into each folder"
        )
    has_card = (dataset / "README.md").is_file() and "data_files" in (dataset / "README.md").read_text(
        "utf-8", "replace"
    )
    for split, folder in folders.items():
        if sum((folder / name).is_file() for name in (METADATA_NAME, _CSV_NAME, "metadata.parquet")) > 1:
            problems.append(f"{split}: more than one file of metadata; loaders refuse that")
        names = [path.name for path in folder.iterdir() if path.is_file()]
        num_texts = sum(name.endswith(".txt") for name in names)
        num_pictures = sum(Path(name).suffix.lower() in PICTURES for name in names)
        if (folder / METADATA_NAME).is_file() and num_texts >= num_pictures > 0 and not has_card:
            problems.append(
                f"{split}: as many text files as pictures and no card that names the files; loaders take the text for "
                "the data set; add README.md with a 'configs' block"
            )
        trapped = next((name for name in names if folder == dataset and _SPLIT_NAME.match(name)), None)
        if trapped is not None and Path(trapped).suffix.lower() in PICTURES:
            problems.append(f"{trapped}: begins like the name of a split; loaders would take it for one, alone")
    return problems


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
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in PICTURES}
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


def _words(dataset: Path, folders: dict[str, Path], manifest: dict[str, object]) -> Vocabulary:
    """Return the words that the captions of a folder were written with: the manifest's, or the built-in ones.

    Raises:
        InputError: the manifest's words are none that captions could be written with.
    """
    if not manifest and dataset in folders.values():
        # One split was named, and the manifest is that of all of them; what lies there may be no manifest of ours.
        with suppress(InputError):
            manifest = read_manifest(dataset.resolve().parent)
    try:
        return vocabulary_of(manifest["vocabulary"]) if "vocabulary" in manifest else DEFAULT
    except ValueError as error:
        raise InputError(f"{dataset}: vocabulary in {MANIFEST_NAME}: {error}; slice the volumes again") from None


def _caption_problems(records: dict[str, list[dict[str, object]]], words: Vocabulary) -> list[str]:
    """Find captions of another state or axis than their rows say, a line a split; those of other words say neither."""
    problems = []
    for split, rows in records.items():
        told: dict[tuple[str, str, str], list[object]] = defaultdict(list)
        for record in rows:
            text, state, axis = (str(record.get(name)) for name in ("text", "state", "axis"))
            if state in words.states and axis in words.axes:
                told[text, state, axis].append(record.get("file_name"))
        read = {row: readings(row[0], words) for row in told}
        wrong = [row for row, found in read.items() if found and row[1:] not in found]
        if wrong:
            (text, state, axis), number = wrong[0], sum(len(told[row]) for row in wrong)
            problems.append(
                f"{split}: {number} of {len(rows)} captions contradict their rows: '{text}' of {told[wrong[0]][0]} is "
                f"{' '.join(read[wrong[0]][0])}, its columns state and axis say {state} {axis}; slice the volumes again"
            )
    return problems


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


def _overlap_problems(records: dict[str, list[dict[str, object]]], *, by_axis: bool) -> list[str]:
    """Find volumes of which a voxel is in boxes of two splits; ``by_axis`` compares slices of one direction only."""
    names: dict[tuple[str, str], list[object]] = defaultdict(list)
    boxes: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for split, rows in records.items():
        for record in rows:
            box = record.get("box")
            if is_box(box) and isinstance(record.get("volume"), str):
                volume = f"{record['volume']} {record.get('axis')}" if by_axis else str(record["volume"])
                names[volume, split].append(record.get("file_name"))
                boxes[volume, split].append(box)
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
