"""A folder of ordinary pictures becomes a dataset."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import InputError, NothingLeftError, TisserandError, UsageError
from data_prep.images import ImagesConfig, main
from data_prep.verify import captioned, verify


def noise(seed: int, *shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two folders with two colour pictures each."""
    for number, name in enumerate(("red_fox/a.png", "red_fox/b.png", "cat/a.png", "cat/c.png")):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        noise(number, 20, 30, 3).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def make(photos: Path, **settings: object) -> dict[str, dict[str, object]]:
    main(ImagesConfig(source=photos, output_dir=photos.parent / "out", **settings))  # type: ignore[arg-type]
    return {str(row["file_name"]): row for row in captioned(photos.parent / "out" / "train")}


def test_folder_names_become_captions(photos: Path) -> None:
    rows = make(photos, caption_template="a photo of a {text}")
    assert {name: row["text"] for name, row in rows.items()} == {
        "cat-a.png": "a photo of a cat",
        "cat-c.png": "a photo of a cat",
        "red-fox-a.png": "a photo of a red fox",
        "red-fox-b.png": "a photo of a red fox",
    }
    assert rows["cat-a.png"]["width"] == 30
    assert verify(photos.parent / "out").leak == "one split only"


def test_pictures_that_trainers_open_are_copied_byte_for_byte(photos: Path) -> None:
    make(photos)
    assert (photos / "cat/a.png").read_bytes() == (photos.parent / "out/train/cat-a.png").read_bytes()


@pytest.mark.parametrize("how", ["txt", "csv", "jsonl"])
def test_captions_come_from_files(photos: Path, how: str) -> None:
    texts = {f"{name}.png": f"caption, of {name}" for name in ("red_fox/a", "red_fox/b", "cat/a", "cat/c")}
    if how == "txt":
        for name, text in texts.items():
            (photos / name).with_suffix(".txt").write_text(f"{text}\n")
    elif how == "csv":
        (photos / "captions.csv").write_text("file_name,text\n" + "".join(f'{n},"{t}"\n' for n, t in texts.items()))
    else:
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in texts.items()]
        (photos / "metadata.jsonl").write_text("\n".join(lines))
    rows = make(photos)
    assert {str(row["source"]): row["text"] for row in rows.values()} == texts


def test_columns_can_have_other_names(photos: Path) -> None:
    names = ("red_fox/a.png", "red_fox/b.png", "cat/a.png", "cat/c.png")
    (photos / "captions.csv").write_text("path,words\n" + "".join(f"{name},hello\n" for name in names))
    rows = make(photos, image_column="path", caption_column="words")
    assert {row["text"] for row in rows.values()} == {"hello"}


def test_a_held_out_share_is_drawn_by_seed_and_called_unchecked(photos: Path) -> None:
    make(photos, validation_fraction=0.5, seed=3)
    verdict = verify(photos.parent / "out")
    assert verdict.counts == {"train": 2, "validation": 2}
    assert verdict.leak.startswith("leak unchecked")
    manifest = json.loads((photos.parent / "out" / "manifest.json").read_text())
    assert manifest["leak"] == "unchecked"


@pytest.mark.parametrize(
    ("mode", "ending", "expected"),
    [("L", ".png", "L"), ("RGB", ".jpg", "RGB"), ("RGBA", ".png", "RGB"), ("P", ".png", "RGB"), ("1", ".png", "RGB"),
     ("CMYK", ".jpg", "RGB"), ("L", ".tif", "L")],
)  # fmt: skip
def test_every_kind_becomes_8_bit_grey_or_colour(tmp_path: Path, mode: str, ending: str, expected: str) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    noise(0, 16, 16, 3).convert(mode).save(tmp_path / "photos" / "cat" / f"x{ending}")
    (name,) = make(tmp_path / "photos")
    with Image.open(tmp_path / "out" / "train" / name) as image:
        assert image.mode == expected


def test_a_turned_photograph_is_set_upright(tmp_path: Path) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(0, 10, 20, 3).save(tmp_path / "photos" / "cat" / "x.jpg", exif=exif)
    (row,) = make(tmp_path / "photos").values()
    assert (row["width"], row["height"]) == (10, 20)


def spoil(photos: Path, how: str) -> None:
    path = photos / "cat" / "a.png"
    if how == "deep":
        Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(path)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:500])
    elif how == "text":
        path.with_suffix(".txt").write_text("one")
    elif how == "lines":
        for picture in photos.rglob("*.png"):
            picture.with_suffix(".txt").write_text("one\ntwo\n")
    elif how == "extra":
        (photos / "captions.csv").write_text("file_name,text\nnone.png,x\n")
    elif how == "outside":
        (photos / "captions.csv").write_text("file_name,text\n../x.png,x\n")
    elif how == "both":
        (photos / "captions.csv").write_text("file_name,text\n")
        path.with_suffix(".txt").write_text("one")
    elif how == "same":
        noise(1, 9, 9, 3).save(photos / "cat" / "a.bmp")
    elif how == "none":
        for picture in photos.rglob("*.png"):
            picture.unlink()


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("deep", InputError, "more than 8 bits a channel"),
        ("cut", InputError, "not a readable picture"),
        ("text", InputError, "3 of 4 pictures have no caption"),
        ("lines", InputError, "has 2 lines"),
        ("extra", InputError, "captions are for pictures that are not there, such as none.png"),
        ("outside", InputError, "leaves the folder"),
        ("both", UsageError, "has several kinds"),
        ("same", InputError, "would both be called 'cat-a'"),
        ("none", NothingLeftError, "no pictures in it"),
    ],
)
def test_what_would_be_a_wrong_dataset_is_refused(
    photos: Path, how: str, error: type[TisserandError], message: str
) -> None:
    spoil(photos, how)
    with pytest.raises(error, match=message) as caught:
        make(photos)
    assert "\n" not in str(caught.value)
    assert not (photos.parent / "out").exists()


def test_a_dry_run_writes_nothing(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(ImagesConfig(source=photos, output_dir=photos.parent / "out", dry_run=True))
    assert "4 pictures, captions from folder" in capsys.readouterr().out
    assert not (photos.parent / "out").exists()
