"""The dataset folder: rows, manifest, hashes and atomic publication."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from configs.errors import InputError, UsageError

METADATA_NAME = "metadata.jsonl"
MANIFEST_NAME = "manifest.json"
_PARTIAL, _LOCK = ".partial-", "lock"
_SIZES = ("um_per_px", "voxels_per_px")  # columns that are absent where nothing is known or changed
_LONGEST_NAME = 255  # bytes; of file systems in use


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


@contextlib.contextmanager
def publish(folder: Path, *, overwrite: bool = False, mark: str) -> Iterator[Path]:
    """Yield a new folder to write into; rename it to ``folder`` on success, remove it on failure.

    It is made beside ``folder`` under a name that nothing had, and locked while this process lives. With ``overwrite``
    the old folder stays in place until the new one is whole. What a killed process left there is cleared away first.

    Args:
        folder: where the output belongs.
        overwrite: replace a folder that holds files.
        mark: a file of every output of the calling command; a folder without it is not replaced at all.

    Raises:
        UsageError: as ``check_free``; or another process is writing to ``folder``.
    """
    check_free(folder, overwrite=overwrite, mark=mark)
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f"{target.name}{_PARTIAL}", dir=target.parent))
    # A folder inside it has the permissions that the user's other folders have.
    partial, old = room / "new", room / "old"
    with _lock(room):
        try:
            _clear_rooms(folder, target, room)
            partial.mkdir()
            yield partial
            if target.exists():
                target.rename(old)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # what was there before is kept, in `room` if it cannot go back
                if old.exists():
                    old.rename(target)
                (room / _LOCK).unlink(missing_ok=True)
                room.rmdir()
            raise
        shutil.rmtree(room, ignore_errors=True)


def _lock(room: Path) -> TextIO:
    """Lock a room for this process; the system gives it free when the process ends, however it ends."""
    # Written elsewhere and renamed, so that a lock is never seen before it is held.
    stream = (room / f"{_LOCK}.new").open("w", encoding="utf-8")
    fcntl.flock(stream, fcntl.LOCK_EX)
    stream.write(f"{os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    (room / f"{_LOCK}.new").rename(room / _LOCK)
    return stream


def _clear_rooms(folder: Path, target: Path, own: Path) -> None:
    """Remove what killed processes left beside the target, and refuse to work beside a living one."""
    for room in sorted(target.parent.glob(f"{glob.escape(target.name + _PARTIAL)}*")):
        if room == own or not (room / _LOCK).is_file():
            continue
        try:
            with (room / _LOCK).open(encoding="utf-8") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (room / "old").exists() and not target.exists():
                    (room / "old").rename(target)  # it died between the two renames
                shutil.rmtree(room, ignore_errors=True)
        except BlockingIOError:
            holder = " ".join((room / _LOCK).read_text(encoding="utf-8", errors="replace").split())[:100]
            raise UsageError(
                f"--output_dir {folder}: process {holder or 'unknown'} is writing there; wait for it or name another "
                "folder"
            ) from None
        except FileNotFoundError:
            continue  # it has just ended


def check_free(folder: Path, *, overwrite: bool = False, mark: str) -> None:
    """Raise UsageError now if ``publish`` would refuse this folder, before any work is done for it.

    Raises:
        UsageError: ``folder`` is a file, or lies where nothing can be written; it is not empty and ``overwrite`` is
            False; or it does not hold the ``mark``.
    """
    check_writable(folder, "--output_dir")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {folder}: is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"--output_dir {folder}: already holds files; name another folder or pass --overwrite")
    if not (folder / mark).is_file():
        raise UsageError(
            f"--output_dir {folder}: --overwrite replaces only an earlier output of this command, which holds {mark}; "
            "this one holds other files; name another folder"
        )


def check_writable(path: Path, flag: str) -> None:
    """Check that ``path`` could be made, by making something beside it, or above it where folders are missing.

    Raises:
        UsageError: it could not; the message names ``flag`` and ``path``.
    """
    try:
        target = path.resolve()
        existing = next(folder for folder in (target.parent, *target.parents) if folder.exists())
        with tempfile.TemporaryDirectory(prefix=f"{target.name}{_PARTIAL}", dir=existing):
            pass
    # Without `strict` a link to itself is a RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "a link that leads to itself"
        raise UsageError(f"{flag} {path}: cannot be written there ({reason}); name another place") from None


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


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of the whole file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
