"""A data set that the library ``datasets`` reads, written out once as a captioned folder."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from configs.errors import InputError, UsageError
from data_prep.folders.manifest import METADATA_NAME
from data_prep.folders.publish import publish
from finetune.core.settings.images import ImageFolderConfig

_SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "GIF": ".gif"}


def local_images(config: ImageFolderConfig, cache_dir: Path | None) -> ImageFolderConfig:
    """Return settings that name folders alone: those given, or the one that ``--dataset_name`` was written out to.

    The folder lies in ``cache_dir``, or beside what ``datasets`` keeps, under the fingerprint of the data set; what is
    there is used again.

    Raises:
        UsageError: the library is not installed.
        InputError: no such data set, or it lacks a split `train` or a column.
    """
    if config.dataset_name is None:
        return config
    if importlib.util.find_spec("datasets") is None:
        raise UsageError(f"--dataset_name {config.dataset_name}: needs `pip install datasets`, or use --train_data_dir")
    import datasets

    rows = _load(config, cache_dir)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(config.dataset_name).name).strip("-")
    keys = f"{config.image_column}-{config.caption_column}"
    folder = (cache_dir or Path(datasets.config.HF_DATASETS_CACHE)) / "folders" / f"{name}-{rows._fingerprint}-{keys}"
    # Two processes may not write it at once, and none of them knows of the others yet. Where the one that writes fails,
    # the launcher ends those that wait.
    while int(os.environ.get("LOCAL_RANK", 0)) and not (folder / METADATA_NAME).is_file():
        time.sleep(0.1)
    if not (folder / METADATA_NAME).is_file():
        with publish(folder, overwrite=True, mark=METADATA_NAME) as partial:
            _write(rows, config, partial)
    # The columns have the folder's own names from here on.
    return dataclasses.replace(
        config,
        train_data_dir=(folder,),
        dataset_name=None,
        dataset_config_name=None,
        image_column="image",
        caption_column="text",
    )


def _load(config: ImageFolderConfig, cache_dir: Path | None) -> Any:
    """Return the rows of the split `train`, their images as files."""
    import datasets

    place = f"--dataset_name {config.dataset_name}"
    inner = str(config.train_data_dir[0]) if config.train_data_dir else None
    try:
        found = datasets.load_dataset(
            config.dataset_name,
            config.dataset_config_name,
            data_dir=inner,
            cache_dir=None if cache_dir is None else str(cache_dir),
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{place}: cannot be read ({' '.join(str(error).split())[:300]})") from error
    if "train" not in found:
        raise InputError(f"{place}: has no split train; it has {', '.join(found)}")
    rows = found["train"]
    for flag, column in (("image_column", config.image_column), ("caption_column", config.caption_column)):
        if column not in rows.column_names:
            raise InputError(
                f"--{flag} {column}: not a column of {config.dataset_name}: {', '.join(rows.column_names)}"
            )
    if not isinstance(rows.features[config.image_column], datasets.Image):
        raise InputError(f"--image_column {config.image_column}: a column of {config.dataset_name} without images")
    return rows.cast_column(config.image_column, datasets.Image(decode=False))


def _write(rows: Any, config: ImageFolderConfig, folder: Path) -> None:
    """Write every image as the bytes it is, and the captions."""
    from PIL import Image, UnidentifiedImageError

    lines = []
    for index, row in enumerate(rows):
        image = row[config.image_column]
        data = image["bytes"] or Path(image["path"]).read_bytes()
        try:
            with Image.open(io.BytesIO(data)) as picture:
                suffix = _SUFFIXES.get(str(picture.format))
        except UnidentifiedImageError:
            suffix = None
        if suffix is None:
            raise InputError(f"--dataset_name {config.dataset_name}: row {index} holds no image of a known kind")
        (folder / f"{index:06d}{suffix}").write_bytes(data)
        lines.append(json.dumps({"file_name": f"{index:06d}{suffix}", "text": row[config.caption_column]}) + "\n")
    (folder / METADATA_NAME).write_text("".join(lines), encoding="utf-8")
