"""Image folders: which images there are, with which captions, and whether they can be trained on at all.

Nothing is decoded that the header does not call for. All that is wrong with a folder is named at once, with its files.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

from configs.errors import InputError, UsageError
from data_prep.folders.hashes import sha256_of
from data_prep.folders.manifest import MANIFEST_NAME, METADATA_NAME, is_inside, read_manifest, read_records
from finetune.core.settings.images import ImageFolderConfig
from finetune.core.settings.methods import InstanceConfig
from finetune.diffusion.draws import permutation

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
"""Endings of image files, where no ``metadata.jsonl`` names them."""
_ON_THEIR_SIDE = (5, 6, 7, 8)  # EXIF orientations that exchange rows and columns
_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class CaptionedImage:
    """An image file that passed the checks, with its captions and the hash of its content.

    Attributes:
        path: of the file.
        captions: one of them is drawn each time the image is used; mostly there is one.
        where: the place the captions come from, for messages.
        content: SHA-256 of the file.
        height: rows of the upright image, in px.
        width: columns of the upright image, in px.
        um_per_px: (row, column) size of a pixel in micrometres, or None if unknown.
        columns: the single values of its row as text: state, axis, volume, ...
    """

    path: Path
    captions: tuple[str, ...]
    where: str
    content: str
    height: int
    width: int
    um_per_px: tuple[float, float] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def caption(self) -> str:
        """The first of its captions."""
        return self.captions[0]


def read_images(config: ImageFolderConfig) -> list[CaptionedImage]:
    """Read the folders of ``--train_data_dir``, one after the other, and check every image without decoding it.

    Raises:
        InputError: as ``read_folder``.
        UsageError: a key of ``--balance`` that a row does not have.
    """
    images = [
        image
        for folder in config.train_data_dir
        for image in read_folder(
            folder, "--train_data_dir", image_column=config.image_column, caption_column=config.caption_column
        )
    ]
    for key in config.balanced_keys:
        if without := [image for image in images if key not in image.columns]:
            keys = ", ".join(without[0].columns) or "none"
            raise UsageError(f"--balance {key}: {without[0].where} has no such key; its keys: {keys}")
    if config.max_train_samples is not None:
        # Not by the run's seed, which may not be drawn yet; seeds then compare on the same images, too.
        chosen = permutation(0, -1, len(images))[: config.max_train_samples]
        images = [images[place] for place in sorted(chosen.tolist())]
    return images


def read_instance_images(config: InstanceConfig) -> list[CaptionedImage]:
    """Read the folder of a subject: all images with one prompt, or with captions of their own.

    Raises:
        InputError: as ``read_folder``.
        UsageError: a key of ``--balance`` that a row does not have.
    """
    return read_folder(config.instance_data_dir, "--instance_data_dir", captions=config.captions)


def read_folder(
    folder: Path,
    flag: str,
    *,
    captions: Sequence[str] = (),
    image_column: str = "image",
    caption_column: str = "text",
) -> list[CaptionedImage]:
    """Read a folder of images and check each of them, without decoding it.

    ``metadata.jsonl`` names the images if it is there; else they are the image files of the folder, by name. Captions
    are those given, for every image; else the caption column; else the text of the ``.txt`` file beside an image.

    Args:
        folder: with the images.
        flag: the option it was given with, for messages.
        captions: of every image, such as an instance prompt, or the templates around a new word.
        image_column: as in ``ImageFolderConfig``.
        caption_column: key of the caption, a text or a list of them.

    Raises:
        InputError: naming files and lines, all of them at once: no such folder, no image in it, no caption, an empty
            one, an image that is missing, unreadable, outside the folder, not 8-bit, or partly transparent.
    """
    if not folder.is_dir():
        raise InputError(f"{flag} {folder}: there is no such folder")
    metadata = folder / METADATA_NAME
    images, problems = [], []
    reads: list[Callable[[], CaptionedImage]]
    if metadata.is_file():
        keys = (image_column, caption_column)
        reads = [
            partial(_from_row, folder, f"{metadata}:{line}", row, captions, keys)
            for line, row in read_records(metadata)
        ]
        if not reads:
            raise InputError(f"{metadata}: names no image")
    else:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise InputError(f"{flag} {folder}: holds neither images nor a {METADATA_NAME} that names them")
        reads = [partial(_from_file, path, flag, captions) for path in paths]
    for read in reads:
        try:
            images.append(read())
        except InputError as error:
            problems.append(str(error))
    raise_together(problems)
    return images


def raise_together(problems: Sequence[str]) -> None:
    """Raise one InputError about all problems, the first few in full; none for no problem."""
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise InputError("; ".join(problems[:_LISTED]) + more)


def _from_row(
    folder: Path, where: str, row: Mapping[str, object], captions: Sequence[str], keys: tuple[str, str]
) -> CaptionedImage:
    """Check one line of metadata.jsonl and the header of the image it names."""
    image_column, caption_column = keys
    name_key = "file_name" if image_column == "image" else f"{image_column}_file_name"
    name, text = row.get(name_key), row.get(caption_column)
    texts: list[object] = [*captions] or (text if isinstance(text, list) else [text])
    for flag, key, values in (("image_column", name_key, [name]), ("caption_column", caption_column, texts)):
        if not values or not all(isinstance(value, str) for value in values):
            raise InputError(f"{where}: no text under '{key}' (--{flag}); the keys are {', '.join(row)}")
    if not is_inside(str(name)):
        raise InputError(f"{where}: '{name}' lies outside the folder")
    if not all(str(caption).strip() for caption in texts):
        raise InputError(f"{where}: the caption of {name} is empty; write one, or use --caption_dropout")
    # What many rows say alike is kept once.
    columns = {
        sys.intern(key): str(value) if value is name else sys.intern(str(value))
        for key, value in row.items()
        if isinstance(value, str | int | float | bool)
    }
    return _checked(
        folder / str(name),
        where,
        tuple(sys.intern(str(caption)) for caption in texts),
        um_per_px=_um_per_px(row.get("um_per_px")),
        columns=columns,
    )


def _um_per_px(size: object) -> tuple[float, float] | None:
    """Return the pixel size of a row, or None for anything but two positive numbers."""
    if not isinstance(size, list) or len(size) != 2:
        return None
    known = all(type(edge) in (int, float) and 0 < edge < 1e9 for edge in size)
    return (float(size[0]), float(size[1])) if known else None


def _from_file(path: Path, flag: str, captions: Sequence[str]) -> CaptionedImage:
    """Check an image that no metadata.jsonl names, and the text beside it if no caption was given."""
    if captions:
        return _checked(path, str(path), tuple(captions), columns={})
    sidecar = path.with_suffix(".txt")
    try:
        text = " ".join(sidecar.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError:
        raise InputError(
            f"{path}: has no caption: {flag} holds neither {METADATA_NAME} (a line an image: "
            f'{{"file_name": "a.png", "text": "its caption"}}) nor {sidecar.name}'
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{sidecar}: cannot be read as UTF-8 text ({error})") from None
    if not text:
        raise InputError(f"{sidecar}: the caption of {path.name} is empty; write one, or use --caption_dropout")
    return _checked(path, str(sidecar), (text,), columns={"text": text})


def _checked(
    path: Path,
    where: str,
    captions: tuple[str, ...],
    *,
    um_per_px: tuple[float, float] | None = None,
    columns: Mapping[str, str],
) -> CaptionedImage:
    """Check the header of an image file."""
    try:
        with Image.open(path) as image:
            if reason := _unfit(image):
                raise InputError(f"{path}: {reason}")
            rows_first = (image.height, image.width)
            # Not `image.getexif()`: of a PNG it decodes the whole image, in case the tag comes last.
            if Image.Image.getexif(image).get(ExifTags.Base.Orientation) in _ON_THEIR_SIDE:
                rows_first = rows_first[::-1]
        return CaptionedImage(
            path=path,
            captions=captions,
            where=where,
            content=sha256_of(path),
            height=rows_first[0],
            width=rows_first[1],
            um_per_px=um_per_px,
            columns=columns,
        )
    except FileNotFoundError:
        raise InputError(f"{where}: there is no {path}") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read as an image ({' '.join(str(error).split())})") from None


def _unfit(image: Image.Image) -> str:
    """Return why an opened image cannot be trained on as it is, or an empty text."""
    # Pillow opens 16-bit colour as 8-bit mode RGB and keeps the high byte alone; only its decoder knows.
    deep = any(re.search(";16[BLN]", str(tile)) for tile in getattr(image, "tile", ()))
    if deep or image.mode not in ("L", "RGB", "P", "LA", "RGBA", "PA"):
        mode = f"mode {image.mode}" + (" with 16 bits a channel" if deep and ";16" not in image.mode else "")
        return (
            f"has {mode}, not 8-bit grey or colour; convert it with a window you choose "
            "(python -m data_prep.slice does), or values above 255 would turn white"
        )
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a photograph with its own preview
        return f"holds {image.n_frames} pictures, of which only the first would be seen; write each to a file"  # type: ignore[attr-defined]
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        return "is partly transparent, and what lies behind would be anybody's guess; paste it on a background"
    return ""


def data_hash(images: Sequence[CaptionedImage]) -> str:
    """Return a SHA-256 over contents, captions and columns, in order: a run does not continue on other images."""
    text = json.dumps([(image.content, image.captions, dict(image.columns)) for image in images], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def data_provenance(images: Sequence[CaptionedImage], folders: Sequence[Path]) -> dict[str, object]:
    """Return what the weights file says about the data: names of the folders, a hash, its size, captions and windows.

    The hash is that of ``manifest.json`` where a folder belongs to a data set, else of ``metadata.jsonl``, else of the
    images; of several folders it is a hash of theirs.
    """
    hashes, volumes = [], []
    for folder in folders:
        manifest, metadata = folder.resolve().parent / MANIFEST_NAME, folder / METADATA_NAME
        if manifest.is_file():
            volumes += _volumes(manifest.parent)
        known = next((path for path in (manifest, metadata) if path.is_file()), None)
        hashes.append(sha256_of(known) if known else data_hash(images))
    joined = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return {
        "data": {
            "train_data_dir": ", ".join(folder.name for folder in folders),
            "manifest_hash": hashes[0] if len(hashes) == 1 else joined,
            "n_images": len(images),
        },
        "window": {str(volume.get("name", place)): volume.get("window") for place, volume in enumerate(volumes)},
        "captions": sorted({caption for image in images for caption in image.captions}),
    }


def _volumes(dataset: Path) -> list[dict[str, Any]]:
    """Return the volumes a data set was cut from."""
    volumes: Any = read_manifest(dataset)["volumes"]
    return list(volumes)
