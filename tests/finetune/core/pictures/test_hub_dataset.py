"""Data sets that `datasets` reads become a folder, once, with the same pictures and captions."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_processes import torchrun

from configs.errors import InputError
from finetune.core.pictures.hub_dataset import local_images
from finetune.core.pictures.images import read_images
from finetune.core.settings.images import ImageFolderConfig


def config(name: Path, **more: str) -> ImageFolderConfig:
    return ImageFolderConfig(dataset_name=str(name), **more)


def test_a_data_set_gives_the_pictures_and_captions_of_its_folder(captioned_images: Path, tmp_path: Path) -> None:
    found = read_images(local_images(config(captioned_images), tmp_path))
    expected = read_images(ImageFolderConfig(train_data_dir=(captioned_images,)))
    assert sorted((image.content, image.captions) for image in found) == sorted(
        (image.content, image.captions) for image in expected
    )


def test_it_is_written_once(captioned_images: Path, tmp_path: Path) -> None:
    first = local_images(config(captioned_images), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.train_data_dir[0].iterdir()}
    assert local_images(config(captioned_images), tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in first.train_data_dir[0].iterdir()} == before


@pytest.mark.slow
def test_two_processes_write_it_once_and_both_read_it(captioned_images: Path, tmp_path: Path) -> None:
    script = tmp_path / "both.py"
    script.write_text(
        f"""
from pathlib import Path
from finetune.core.settings.images import ImageFolderConfig
from finetune.core.pictures.hub_dataset import local_images
from finetune.core.pictures.images import read_images
config = ImageFolderConfig(dataset_name={str(captioned_images)!r})
print("found", len(read_images(local_images(config, Path({str(tmp_path / "cache")!r})))), flush=True)
"""
    )
    process = torchrun(script)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert output.count("found 10") == 2


def test_folders_are_left_as_they_are(captioned_images: Path) -> None:
    given = ImageFolderConfig(train_data_dir=(captioned_images,))
    assert local_images(given, None) is given


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"caption_column": "title"}, "--caption_column title: not a column of .*: image, text"),
        ({"image_column": "text"}, "--image_column text: a column of .* without images"),
        ({"dataset_config_name": "second"}, "--dataset_name .*: cannot be read"),
    ],
)
def test_what_is_missing_is_named(captioned_images: Path, tmp_path: Path, more: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        local_images(config(captioned_images, **more), tmp_path)


def test_nothing_half_written_is_left(captioned_images: Path, tmp_path: Path) -> None:
    (captioned_images / "09.png").rename(tmp_path / "kept.png")
    try:
        (captioned_images / "09.png").write_bytes(b"no picture")
        with pytest.raises(InputError, match="row 9 holds no image of a known kind"):
            local_images(config(captioned_images), tmp_path / "cache")
        assert list((tmp_path / "cache" / "folders").iterdir()) == []
    finally:
        (tmp_path / "kept.png").rename(captioned_images / "09.png")
