"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from configs.errors import UsageError


def write_whole(path: Path, text: str) -> None:
    """Write a text beside its place and rename it: a full disk, or a kill, leaves what was there before."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


_PARTIAL, _LOCK = ".partial-", "lock"
_LONGEST_NAME = 255  # bytes; of file systems in use


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
