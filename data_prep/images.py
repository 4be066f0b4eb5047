"""Make a dataset of a folder of ordinary pictures, with captions from text files, CSV, JSON lines or folder names.

    python -m data_prep.images photos --captions folder --caption_template "a photo of {text}" --output_dir data/photos

Pictures are copied as they are where trainers can use them; others become 8-bit colour, and the count is printed.
"""

from __future__ import annotations

import csv
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from configs.errors import InputError, NothingLeftError, UsageError
from configs.load import Positional, as_dict, command, one_line
from data_prep.folders import manifest
from data_prep.folders.image_folder import publishable
from data_prep.folders.manifest import TRAIN, VALIDATION
from data_prep.folders.pictures import ENDINGS, stems_of, take
from data_prep.folders.publish import check_free, publish

_FILES = {"csv": ("metadata.csv", "captions.csv"), "jsonl": ("metadata.jsonl", "captions.jsonl")}
_LOCAL_OPTIONS = {"source", "output_dir", "overwrite", "dry_run"}
_LARGEST_CAPTION = 10_000  # bytes


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Settings."""

    source: Positional[Path]
    """Folder of the pictures; folders below it are looked into."""
    output_dir: Path
    """Dataset folder to make."""
    overwrite: bool = False
    """Replace a dataset that is already there, once the new one is whole."""
    captions: Literal["auto", "txt", "csv", "jsonl", "folder"] = "auto"
    """Where captions come from: a text file beside each picture, metadata.csv or captions.csv, metadata.jsonl or
    captions.jsonl, or the name of the folder a picture lies in; auto takes what is there."""
    image_column: str = "file_name"
    """CSV, JSON lines: column of the picture's path, from the folder."""
    caption_column: str = "text"
    """CSV, JSON lines: column of the caption."""
    caption_template: str = "{text}"
    """Caption that is written; {text} is the one found."""
    validation_fraction: float = 0.0
    """Share of the pictures that is held out, drawn by --seed; nobody can check ordinary pictures for leaks."""
    seed: int = 0
    """Of that draw."""
    dry_run: bool = False
    """Print what would be done and stop."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"--validation_fraction {self.validation_fraction}: must be at least 0 and below 1")
        rest = self.caption_template.replace("{text}", "")
        if rest == self.caption_template or set(rest) & set("{}\n\r"):
            raise ValueError(
                f"--caption_template {self.caption_template!r}: one line with the field {{text}}, no other"
            )


def main(config: ImagesConfig) -> None:
    """Find captions, copy, verify, publish."""
    check_free(config.output_dir, overwrite=config.overwrite, mark=manifest.MANIFEST_NAME)
    if not config.source.is_dir():
        raise InputError(f"{config.source}: there is no such folder")
    if config.output_dir.resolve().is_relative_to(config.source.resolve()):
        raise UsageError(f"--output_dir {config.output_dir}: lies inside the folder of the pictures; name another one")
    how, captions = find_captions(config)
    held_out = _held_out(len(captions), config)
    texts = Counter(captions.values())
    shown = ", ".join(f"'{one_line(text)}' {count}" for text, count in texts.most_common(5))
    print(f"{len(captions)} pictures, captions from {how}: {shown}{', ...' if len(texts) > 5 else ''}")
    if config.dry_run:
        print(f"dry run: nothing was written to {config.output_dir}")
        return
    with publish(config.output_dir, overwrite=config.overwrite, mark=manifest.MANIFEST_NAME) as folder:
        records: dict[str, list[dict[str, object]]] = {TRAIN: []}
        if held_out:
            records[VALIDATION] = []
        for split in records:
            (folder / split).mkdir()
        changes = Counter[str]()
        stems = stems_of(list(captions))
        for number, ((name, text), stem) in enumerate(zip(captions.items(), stems, strict=True)):
            split = VALIDATION if number in held_out else TRAIN
            path = config.source / name
            taken = take(path.read_bytes(), stem, folder / split, path)
            changes[taken.change] += 1
            row = {"file_name": taken.file_name, "text": text, "width": taken.width, "height": taken.height}
            records[split].append(row | {"source": name})
        publishable(folder, records, options=_options(config), kind="pictures", title=f"Pictures, captions from {how}")
    del changes[""]
    for change, count in changes.items():
        print(f"changed: {count} pictures ({change})")
    print(f"{config.output_dir}: {', '.join(f'{split} {len(rows)}' for split, rows in records.items())}. Next:\n")
    train = shlex.quote(str(config.output_dir / TRAIN))
    print(
        "  accelerate launch finetune/lora.py --pretrained_model_name_or_path assets/tiny-sd "
        f"--train_data_dir {train} --output_dir runs/lora"
    )


def find_captions(config: ImagesConfig) -> tuple[str, dict[str, str]]:
    """Return where the captions came from, and the caption of each picture by its path from the folder, sorted.

    Raises:
        InputError: no picture, no captions, several kinds of them, or a picture without one.
        NothingLeftError: the folder holds no pictures.
    """
    names = sorted(
        path.relative_to(config.source).as_posix()
        for path in config.source.rglob("*")
        if path.suffix.lower() in ENDINGS and path.is_file()
    )
    if not names:
        raise NothingLeftError(f"{config.source}: no pictures in it ({', '.join(ENDINGS)})")
    how = config.captions if config.captions != "auto" else _kind(config.source, names)
    if how == "folder":
        found = {name: Path(name).parent.name.replace("_", " ") for name in names}
        if loose := [name for name in names if not found[name]]:
            raise InputError(f"{config.source}: {loose[0]} lies in no folder below it that could name it")
    elif how == "txt":
        found = {name: _text_beside(config.source / name) for name in names}
    else:
        found = _table(config, how)
    if gone := sorted(found.keys() - set(names)):
        raise InputError(
            f"{config.source}: {len(gone)} captions are for pictures that are not there, such as {gone[0]}"
        )
    if bare := [name for name in names if not found.get(name, "").strip()]:
        raise InputError(
            f"{config.source}: {len(bare)} of {len(names)} pictures have no caption ({how}), such as {bare[0]}; give "
            "them one or take them out"
        )
    texts = {name: config.caption_template.replace("{text}", " ".join(found[name].split())) for name in names}
    return how, texts


def _kind(folder: Path, names: list[str]) -> str:
    """Return which kind of captions is there."""
    kinds = [kind for kind, files in _FILES.items() if any((folder / name).is_file() for name in files)]
    if any((folder / name).with_suffix(".txt").is_file() for name in names):
        kinds.append("txt")
    if len(kinds) > 1:
        raise UsageError(f"--captions auto: {folder} has several kinds ({', '.join(kinds)}); name one of them")
    if not kinds and all(Path(name).parent.name for name in names):
        kinds = ["folder"]
    if not kinds:
        raise InputError(
            f"{folder}: no captions: no {', '.join(name for files in _FILES.values() for name in files)}, no text "
            "beside the pictures, no folders that could name them"
        )
    return kinds[0]


def _text_beside(picture: Path) -> str:
    """Return the caption in the text file beside a picture, empty without one."""
    path = picture.with_suffix(".txt")
    if not path.is_file():
        return ""
    if path.stat().st_size > _LARGEST_CAPTION:
        raise InputError(f"{path}: has more than {_LARGEST_CAPTION} bytes; a caption is one line")
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    if len(lines) > 1:
        raise InputError(f"{path}: has {len(lines)} lines; a caption is one, and trainers disagree on the others")
    return lines[0] if lines else ""


def _table(config: ImagesConfig, how: str) -> dict[str, str]:
    """Read captions by picture from CSV or JSON lines."""
    path = next((config.source / name for name in _FILES[how] if (config.source / name).is_file()), None)
    if path is None:
        raise InputError(f"{config.source}: --captions {how}: none of {', '.join(_FILES[how])} is in it")
    if how == "jsonl":
        rows: list[dict[str, object]] = [record for _, record in manifest.read_records(path)]
    else:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = [dict(row) for row in csv.DictReader(file)]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: not readable as CSV ({one_line(str(error))[:100]})") from None
    found: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        name, text = row.get(config.image_column), row.get(config.caption_column)
        if not isinstance(name, str) or not isinstance(text, str):
            raise InputError(
                f"{path}: row {number} has no text in the columns '{config.image_column}' and "
                f"'{config.caption_column}'; name others with --image_column and --caption_column"
            )
        if not manifest.is_inside(name):
            raise InputError(f"{path}: row {number}: {name!r} leaves the folder")
        if found.setdefault(name, text) != text:
            raise InputError(f"{path}: row {number}: {name} has a second caption")
    return found


def _held_out(count: int, config: ImagesConfig) -> set[int]:
    """Draw the pictures that are held out."""
    number = round(count * config.validation_fraction)
    if number and number >= count:
        raise UsageError(f"--validation_fraction {config.validation_fraction}: none of {count} pictures would be left")
    return set(np.random.default_rng(config.seed).permutation(count)[:number].tolist())


def _options(config: ImagesConfig) -> dict[str, object]:
    """Return the settings that are a property of the data."""
    return {name: value for name, value in as_dict(config).items() if name not in _LOCAL_OPTIONS}


if __name__ == "__main__":
    command(ImagesConfig, main)
