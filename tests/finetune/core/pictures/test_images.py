"""Image folders: captions from three places, and every file that cannot be trained on named before anything begins."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import InputError, UsageError
from finetune.core.pictures.images import data_hash, data_provenance, read_folder, read_images
from finetune.core.settings.images import ImageFolderConfig

GREY = np.arange(12 * 20, dtype=np.uint8).reshape(12, 20)


def write(folder: Path, name: str, image: Image.Image | None = None, **options: object) -> Path:
    folder.mkdir(exist_ok=True)
    (image or Image.fromarray(GREY)).save(folder / name, **options)
    return folder / name


def list_images(folder: Path, *rows: dict[str, object]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_captions_come_from_the_text_beside_an_image(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg"):
        write(tmp_path, name)
        (tmp_path / name).with_suffix(".txt").write_text(f" caption of\n{name} \n")
    images = read_folder(tmp_path, "--train_data_dir")
    assert [(image.path.name, image.captions) for image in images] == [
        ("a.jpg", ("caption of a.jpg",)),
        ("b.png", ("caption of b.png",)),
    ]


def test_one_prompt_captions_all_images_whatever_else_lies_there(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    list_images(tmp_path, {"file_name": "a.png", "text": "another"})
    assert read_folder(tmp_path, "--instance_data_dir", captions=("a sks dog",))[0].captions == ("a sks dog",)


def test_files_that_are_no_images_are_left_alone(tmp_path: Path) -> None:
    """A caption file or a list of them crashed diffusers' DreamBooth scripts in the middle of an epoch."""
    write(tmp_path, "a.png")
    for name in ("notes.md", "a.caption", ".DS_Store"):
        (tmp_path / name).write_text("x")
    assert len(read_folder(tmp_path, "--instance_data_dir", captions=("x",))) == 1


def test_a_list_of_captions_is_kept_whole(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    list_images(tmp_path, {"file_name": "a.png", "text": ["one", "two"]})
    (image,) = read_folder(tmp_path, "--train_data_dir")
    assert (image.captions, image.caption) == (("one", "two"), "one")


def test_an_image_without_caption_is_named_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    with pytest.raises(
        InputError, match=r"a.png: has no caption: --train_data_dir holds neither metadata.jsonl .* nor a"
    ):
        read_folder(tmp_path, "--train_data_dir")


def test_an_empty_sidecar_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"a.txt: the caption of a.png is empty"):
        read_folder(tmp_path, "--train_data_dir")


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    rows = [{"file_name": f"{number}.png", "text": "x"} for number in range(8)]
    write(tmp_path, "3.png")
    list_images(tmp_path, *rows)
    with pytest.raises(InputError) as caught:
        read_folder(tmp_path, "--train_data_dir")
    text = str(caught.value)
    assert [text.count(f"/{number}.png") for number in (0, 1, 2, 3, 4, 5)] == [1, 1, 1, 0, 1, 1]
    assert text.endswith("; and 2 more")


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(np.full((8, 8), 4000, dtype=np.uint16)), "mode I;16, not 8-bit"),
        (Image.fromarray(np.zeros((8, 8), dtype=np.float32)), "mode F, not 8-bit"),
        (Image.new("CMYK", (8, 8)), "mode CMYK, not 8-bit"),
        (Image.new("RGBA", (8, 8), (9, 9, 9, 128)), "is partly transparent"),
        (Image.new("LA", (8, 8), (9, 0)), "is partly transparent"),
    ],
)
def test_an_image_that_would_come_out_wrong_is_refused(tmp_path: Path, image: Image.Image, reason: str) -> None:
    """Pillow turns 16-bit grey white above 255, and transparent parts into whatever colour lies under them."""
    write(tmp_path, "a.tif", image)
    with pytest.raises(InputError, match=f"a.tif: .*{reason}"):
        read_folder(tmp_path, "--train_data_dir", captions=("x",))


def test_16_bit_colour_is_refused_although_pillow_calls_it_rgb(tmp_path: Path) -> None:
    import imagecodecs

    data = np.full((8, 8, 3), 3000, dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(data))
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.mode == "RGB"
    with pytest.raises(InputError, match="mode RGB with 16 bits a channel, not 8-bit"):
        read_folder(tmp_path, "--train_data_dir", captions=("x",))


def test_a_file_of_several_pictures_is_refused(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), level) for level in (10, 200)]
    write(tmp_path, "a.tif", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="holds 2 pictures, of which only the first would be seen"):
        read_folder(tmp_path, "--train_data_dir", captions=("x",))


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "LA"])
def test_opaque_8_bit_images_are_read(tmp_path: Path, mode: str) -> None:
    write(tmp_path, "a.png", Image.fromarray(GREY).convert(mode))
    (image,) = read_folder(tmp_path, "--train_data_dir", captions=("x",))
    assert (image.height, image.width) == (12, 20)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_an_image_taken_on_its_side_has_the_size_it_is_seen_in(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path, f"a.{suffix}", exif=exif)
    (image,) = read_folder(tmp_path, "--train_data_dir", captions=("x",))
    assert (image.height, image.width) == (20, 12)


def test_a_row_keeps_its_columns_and_its_pixel_size(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    list_images(tmp_path, {"file_name": "a.png", "text": "x", "axis": "warp", "index": 3, "um_per_px": [4, 8.5]})
    (image,) = read_folder(tmp_path, "--train_data_dir")
    assert (image.columns["axis"], image.columns["index"], image.um_per_px) == ("warp", "3", (4.0, 8.5))


def test_several_folders_are_read_one_after_the_other(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(tmp_path / folder, "a.png")
        list_images(tmp_path / folder, {"file_name": "a.png", "text": folder})
    folders = (tmp_path / "one", tmp_path / "two")
    images = read_images(ImageFolderConfig(train_data_dir=folders))
    assert [image.caption for image in images] == ["one", "two"]
    told = data_provenance(images, folders)
    assert told["data"]["train_data_dir"] == "one, two"
    assert told["captions"] == ["one", "two"]


def test_a_key_to_balance_that_a_row_lacks_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    list_images(tmp_path, {"file_name": "a.png", "text": "x", "state": "dry"})
    config = ImageFolderConfig(train_data_dir=(tmp_path,), balance=("state,axis",))
    with pytest.raises(
        UsageError, match=r"--balance axis: .*metadata.jsonl:1 has no such key; its keys: file_name, text"
    ):
        read_images(config)


def test_data_hash_sees_a_column(tmp_path: Path) -> None:
    """Balanced by a column, other values of it are another training."""
    write(tmp_path, "a.png")
    hashes = set()
    for state in ("dry", "injected"):
        list_images(tmp_path, {"file_name": "a.png", "text": "x", "state": state})
        hashes.add(data_hash(read_folder(tmp_path, "--train_data_dir")))
    assert len(hashes) == 2


def test_thousands_of_images_leave_no_file_open(tmp_path: Path) -> None:
    """One handle an image ran out of descriptors in a script of diffusers."""
    import psutil

    for number in range(40):
        write(tmp_path, f"{number}.png")
    before = psutil.Process().num_fds()
    read_folder(tmp_path, "--train_data_dir", captions=("x",))
    assert psutil.Process().num_fds() <= before
