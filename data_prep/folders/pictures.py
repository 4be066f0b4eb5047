"""Ordinary pictures on their way into a dataset: looked at, copied as they are, or made 8-bit colour."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from configs.errors import InputError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# Kinds that every trainer opens, with the endings they are kept under.
_KEPT = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp"}
_ORIENTATION = 0x0112
_LARGEST_FILE = 300_000_000  # bytes


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A picture as it stands in the dataset.

    Attributes:
        file_name: its name there.
        width: columns, in px.
        height: rows, in px.
        change: what was done to it, empty if it was copied.
    """

    file_name: str
    width: int
    height: int
    change: str


def take(data: bytes, stem: str, folder: Path, where: object) -> Taken:
    """Write a picture into a dataset folder: its own bytes if any trainer can use them, else as 8-bit colour PNG.

    Args:
        data: the file's bytes.
        stem: its new name without an ending.
        folder: of the split.
        where: the file, for messages.

    Raises:
        InputError: it is no picture, is cut off, has several frames, is too large, or has more than 8 bits a channel.
    """
    if len(data) > _LARGEST_FILE:
        raise InputError(f"{where}: has {len(data) / 1e6:.0f} MB; more than {_LARGEST_FILE / 1e6:.0f} is no picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return _write(image, data, stem, folder, where)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{where}: not a readable picture ({reason})") from None


def _write(image: Image.Image, data: bytes, stem: str, folder: Path, where: object) -> Taken:
    """Write a picture that was decoded in full."""
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"{where}: mode {image.mode}, more than 8 bits a channel; trainers would clip it to white. Choose a window "
            "and save it as 8 bit"
        )
    if getattr(image, "n_frames", 1) > 1:
        raise InputError(f"{where}: holds {getattr(image, 'n_frames', 1)} pictures; save them one by one")
    is_turned = image.getexif().get(_ORIENTATION, 1) != 1
    ending = _KEPT.get(image.format or "")
    if image.mode in ("L", "RGB") and ending and not is_turned:
        (folder / f"{stem}{ending}").write_bytes(data)
        return Taken(file_name=f"{stem}{ending}", width=image.width, height=image.height, change="")
    change = ", ".join(
        [f"{image.mode} to colour"] * (image.mode not in ("L", "RGB"))
        + ["turned upright"] * is_turned
        + [f"{image.format} to PNG"] * (ending is None)
    )
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        clear = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
        change += ", transparent parts to white"
    if upright.mode not in ("L", "RGB"):
        upright = upright.convert("RGB")
    upright.save(folder / f"{stem}.png", icc_profile=None)
    return Taken(file_name=f"{stem}.png", width=upright.width, height=upright.height, change=change)


def stems_of(names: Sequence[str]) -> list[str]:
    """Return a plain name for each file: ASCII letters, digits and hyphens, folders joined.

    Raises:
        InputError: two files would have the same name.
    """
    stems: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9.]+", "-", name.rpartition(".")[0] or name).strip("-.")[:120] or "picture"
        stem = stem.replace(".", "-")
        if stem in stems:
            raise InputError(f"{stems[stem]} and {name} would both be called '{stem}'; rename one of them")
        stems[stem] = name
    return list(stems)
