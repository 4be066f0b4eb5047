"""Where a volume lies: a path on this machine, or a URL that fsspec opens (``s3://``, ``https://``, ``memory://``)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError


@dataclass(frozen=True)
class Url:
    """A file or folder elsewhere."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self.text.partition("://")[2].rstrip("/")).name

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    def resolved(self) -> tuple[Any, str]:
        """Return the file system and the path in it.

        Raises:
            InputError: the protocol is unknown or needs a package that is not installed.
        """
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.text)
        except ImportError as error:
            raise InputError(
                f"{self}: cannot be opened ({one_line(error)}); for http and s3: pip install 'tisserand[remote]'"
            ) from error
        # Each file system raises errors of its own kind; whichever it is, nothing can be read.
        except Exception as error:
            raise InputError(f"{self}: cannot be opened ({one_line(error)})") from error


Place: TypeAlias = Path | Url


class UnreachableError(InputError):
    """What lies elsewhere could not be read, which says nothing about what is in it."""


class _Elsewhere(io.RawIOBase):
    """An open file elsewhere, whose errors are of one kind whatever the file system."""

    def __init__(self, url: Url, file: Any) -> None:
        self._url, self._file = url, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        # As above: of any kind.
        except Exception as error:
            if "range requests" in str(error) or "more bytes" in str(error):
                raise UnreachableError(f"{self._url}: its server sends whole files only; download it first") from error
            raise UnreachableError(
                f"{self._url}: cannot be read ({one_line(error)}); try again, or download it first"
            ) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def place_of(text: str) -> Place:
    """Return the place that somebody typed."""
    return Url(text) if "://" in text else Path(text).expanduser()  # no shell expands a ~ after state=


def open_place(place: Place) -> BinaryIO:
    """Open a file for reading; what is read from it is what was asked for, nothing ahead, on this machine.

    Raises:
        InputError: it is missing, a folder, or cannot be read.
    """
    try:
        if isinstance(place, Path):
            return place.open("rb", buffering=0)
        files, path = place.resolved()
        return cast(BinaryIO, _Elsewhere(place, files.open(path, "rb")))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{place}: there is no such file") from None
    except IsADirectoryError:
        raise InputError(f"{place}: is a folder") from None
    except Exception as error:
        kind = UnreachableError if isinstance(place, Url) else InputError
        raise kind(f"{place}: cannot be read ({getattr(error, 'strerror', None) or one_line(error)})") from None


def read_into(file: BinaryIO, offset: int, array: NDArray[Any]) -> int:
    """Fill a contiguous array from a file and return the bytes that were there."""
    view = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # an array has a buffer
    file.seek(offset)
    filled = 0
    while filled < len(view):
        # A raw file may return less than asked for, 2 GB at most at a time.
        count = file.readinto(view[filled:])  # type: ignore[attr-defined]  # every binary file has it
        if not count:
            break
        filled += count
    return filled


def size_of(place: Place) -> int:
    """Return the size of a file, in bytes."""
    if isinstance(place, Path):
        return place.stat().st_size
    files, path = place.resolved()
    try:
        size = files.size(path)
    except FileNotFoundError:
        raise InputError(f"{place}: there is no such file") from None
    except Exception as error:
        raise UnreachableError(f"{place}: cannot be read ({one_line(error)})") from None
    if size is None:
        raise InputError(f"{place}: the server does not say how large the file is; download it first")
    return int(size)


def is_folder(place: Place) -> bool:
    """Return whether a place is a folder."""
    if isinstance(place, Path):
        return place.is_dir()
    files, path = place.resolved()
    try:
        return bool(files.isdir(path))
    except Exception as error:
        raise InputError(f"{place}: cannot be read ({one_line(error)})") from None


def names_in(folder: Place) -> list[str]:
    """Return the names of the files in a folder, sorted, without those below it."""
    if isinstance(folder, Path):
        return sorted(path.name for path in folder.iterdir() if path.is_file())
    files, path = folder.resolved()
    found = files.ls(path, detail=True)
    return sorted(PurePosixPath(one["name"]).name for one in found if one["type"] == "file")


def inside(folder: Place, name: str) -> Place:
    """Return a file of a folder."""
    return folder / name if isinstance(folder, Path) else Url(f"{folder.text.rstrip('/')}/{name}")


def beside(place: Place, name: str) -> Place:
    """Return a file in the folder of another."""
    return place.parent / name if isinstance(place, Path) else Url(f"{place.text.rpartition('/')[0]}/{name}")


def all_files(folder: Place) -> Sequence[Place]:
    """Return every file below a folder, sorted by path."""
    if isinstance(folder, Path):
        return sorted(path for path in folder.rglob("*") if path.is_file())
    files, path = folder.resolved()
    return [Url(files.unstrip_protocol(name)) for name in sorted(files.find(path))]


def identity(place: Place) -> object:
    """Return what two names of the same file have in common."""
    if isinstance(place, Url):
        return place.text
    status = place.stat()
    return status.st_dev, status.st_ino


def is_below(place: Place, folder: Path) -> bool:
    """Return whether a place lies in a folder of this machine."""
    return isinstance(place, Path) and place.resolve().is_relative_to(folder.resolve())


def sha256_of(place: Place, files: Sequence[Place]) -> str:
    """Return the SHA-256 of a volume: of the file, or of the listing ``sha256sum`` gives of several, sorted by name.

    Args:
        place: the volume.
        files: what it is made of; empty for the file itself.
    """
    if len(files) < 2:
        return _sha256(files[0] if files else place)
    root = str(place).rstrip("/")
    lines = sorted(f"{str(one).removeprefix(root).lstrip('/')}\0{_sha256(one)}" for one in files)
    listing = "".join("{1}  {0}\n".format(*line.split("\0")) for line in lines)
    return hashlib.sha256(listing.encode()).hexdigest()


def _sha256(place: Place) -> str:
    """Return the SHA-256 of one file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open_place(place) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def one_line(error: object) -> str:
    """Return a message of a library as one bounded line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
