"""The Describable Textures Dataset as it is passed on: an archive, or a folder it was unpacked into."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from configs.errors import InputError
from configs.load import one_line

_MOST_MEMBERS = 100_000


@dataclass(frozen=True, kw_only=True)
class Archive:
    """The dataset on disk: an unpacked folder, or files read out of the archive; nothing is unpacked beside it.

    Attributes:
        where: folder or archive.
        files: path from the dataset's root (``images/braided/braided_0002.jpg``) -> path, or member of the archive.
    """

    where: Path
    files: Mapping[str, Path | tarfile.TarInfo]

    def read(self, wanted: list[str], largest: int) -> dict[str, bytes]:
        """Return the content of some files.

        Raises:
            InputError: one is missing, or larger than it can be.
        """
        if missing := [name for name in wanted if name not in self.files]:
            raise InputError(
                f"{self.where}: {len(missing)} of {len(wanted)} files that the lists name are missing, such as "
                f"{missing[0]}; unpack the archive again"
            )
        members = {name: self.files[name] for name in wanted}
        found: dict[str, bytes] = {}
        for name, path in members.items():
            if isinstance(path, Path):
                _check_size(path.stat().st_size, largest, path)
                found[name] = path.read_bytes()
        packed = {member.name: name for name, member in members.items() if isinstance(member, tarfile.TarInfo)}
        if packed:
            # One pass, because a compressed archive cannot be entered in the middle.
            with tarfile.open(self.where) as tar:
                for member in tar:
                    if member.name in packed and member.isfile():
                        _check_size(member.size, largest, member.name)
                        content = tar.extractfile(member)
                        assert content is not None
                        found[packed[member.name]] = content.read()
        return found


def open_archive(source: Path) -> Archive:
    """Find the dataset in what was given.

    Raises:
        InputError: it is not there, or an archive has members that would leave the folder it is unpacked in.
    """
    if source.is_file():
        return _open_tar(source)
    if not source.is_dir():
        raise InputError(f"{source}: there is no such folder or archive")
    # The archive's root, its parent, and torchvision's root with its two folders of one name.
    for root in (source, source / "dtd", source / "dtd" / "dtd"):
        if (root / "images").is_dir() and (root / "labels").is_dir():
            files = {
                path.relative_to(root).as_posix(): path
                for folder in ("images", "labels")
                for path in (root / folder).rglob("*")
                if path.is_file() and path.resolve().is_relative_to(root.resolve())
            }
            return Archive(where=root, files=files)
    packed = next(iter(sorted(source.glob("dtd*.tar*"))), None)
    advice = f"; {packed.name} is there, give that" if packed else ""
    raise InputError(f"{source}: no folders images and labels in it, in dtd or in dtd/dtd{advice}")


def _open_tar(path: Path) -> Archive:
    """List an archive, and refuse it as a whole if one member is unsafe."""
    files: dict[str, Path | tarfile.TarInfo] = {}
    try:
        with tarfile.open(path) as tar:
            for number, member in enumerate(tar):
                parts = PurePosixPath(member.name).parts
                if member.name.startswith("/") or ".." in parts or "\\" in member.name:
                    raise InputError(f"{path}: member {one_line(member.name)!r} leaves the folder it is unpacked in")
                if not member.isfile() and not member.isdir():
                    raise InputError(f"{path}: member {one_line(member.name)!r} is a link or a device, not a file")
                if number >= _MOST_MEMBERS:
                    raise InputError(f"{path}: more than {_MOST_MEMBERS} members; the dataset has 5,700")
                place = next((i for i, part in enumerate(parts) if part in ("images", "labels")), None)
                if member.isfile() and place is not None:
                    files["/".join(parts[place:])] = member
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable archive ({one_line(str(error))[:100]})") from None
    if not any(name.startswith("images/") for name in files):
        raise InputError(f"{path}: no folders images and labels in the archive")
    return Archive(where=path, files=files)


def _check_size(size: int, largest: int, where: object) -> None:
    """Refuse what is larger than any file of the dataset before it is read."""
    if size > largest:
        raise InputError(f"{where}: has {size} bytes; no such file of the dataset has more than {largest}")
