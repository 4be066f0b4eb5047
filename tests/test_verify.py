from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.errors import InputError
from data_prep.verify import VerifyConfig, main, verify

Rows = list[dict[str, Any]]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two splits of three pictures each, cut apart along X."""
    rng = np.random.default_rng(0)
    for split, x in (("train", 0), ("validation", 30)):
        (tmp_path / split).mkdir()
        rows = []
        for z in range(3):
            pixels = rng.integers(0, 256, (20, 10), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"a-{z}.png")
            box = [z, z + 1, 0, 20, x, x + 10]
            rows.append(
                {"file_name": f"a-{z}.png", "text": "sf_dry", "volume": "a", "box": box, "width": 10, "height": 20}
            )
        write(tmp_path / split, rows)
    return tmp_path


def write(folder: Path, rows: Rows) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(folder: Path) -> Rows:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def save(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


def test_a_good_folder_passes(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(dataset).problems == ()
    main(VerifyConfig(dataset=dataset))
    assert "nothing wrong (train 3, validation 3 pictures)" in capsys.readouterr().out


def test_one_split_alone_can_be_checked(dataset: Path) -> None:
    assert verify(dataset / "train").counts == {"train": 3}


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the second row of the validation split."""

    def apply(dataset: Path) -> None:
        rows = read(dataset / "validation")
        change(rows[1])
        write(dataset / "validation", rows)

    return apply


def noise(*shape: int, high: int = 256) -> np.ndarray:
    return np.random.default_rng(9).integers(0, high, shape)


def huge() -> bytes:
    """The beginning of a picture of 10000x10000 px."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 10_000, 10_000, 8, 0, 0, 0, 0)
    chunks = [struct.pack(">I", 13), header, struct.pack(">I", zlib.crc32(header)), struct.pack(">I", 9), b"IDAT"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing picture": (lambda d: (d / "train" / "a-1.png").unlink(), "train/a-1.png: in metadata.jsonl, but"),
    "missing row": (lambda d: write(d / "train", read(d / "train")[:2]), "train/a-2.png: a picture without a row"),
    "listed twice": (lambda d: write(d / "train", [*read(d / "train"), read(d / "train")[0]]), "listed twice"),
    "no rows": (lambda d: write(d / "validation", []), "validation: no rows"),
    "16 bit": (lambda d: save(d / "train" / "a-0.png", noise(20, 10).astype(np.uint16)), "mode I;16"),
    "transparent": (lambda d: save(d / "train" / "a-0.png", noise(20, 10, 4).astype(np.uint8)), "mode RGBA"),
    "not a picture": (lambda d: (d / "train" / "a-0.png").write_text("hello"), "not a readable picture"),
    "cut picture": (
        lambda d: (d / "train" / "a-0.png").write_bytes((d / "train" / "a-0.png").read_bytes()[:120]),
        "not a readable picture",
    ),
    "other size": (lambda d: save(d / "train" / "a-0.png", noise(20, 11).astype(np.uint8)), "11x20 px"),
    "no caption": (edit(lambda row: row.update(text=" ")), "no caption in column 'text'"),
    "caption column missing": (edit(lambda row: row.pop("text")), "no caption in column 'text'"),
    "two lines": (edit(lambda row: row.update(text="a\nb")), "more than one line"),
    "other type": (edit(lambda row: row.update(width=10.0)), "columns width differ"),
    "extra column": (edit(lambda row: row.update(um_per_px=[1.0, 1.0])), "columns um_per_px differ"),
    "other item type": (edit(lambda row: row.update(box=[0.5, 1, 0, 20, 30, 40])), "columns box differ"),
    "second picture column": (
        lambda d: [
            write(d / s, [row | {"mask_file_name": "a"} for row in read(d / s)]) for s in ("train", "validation")
        ],
        "'mask_file_name' would be loaded as a second picture",
    ),
    "path out of the folder": (edit(lambda row: row.update(file_name="../train/a-0.png")), "not a path inside"),
    "name that is no text": (edit(lambda row: row.update(file_name=["a-1.png"])), "not a path inside"),
    "name with a zero byte": (edit(lambda row: row.update(file_name="a\0.png")), "not a path inside"),
    "box of words": (edit(lambda row: row.update(box=["a"] * 6)), "columns box differ"),
    "same picture in both": (
        lambda d: (d / "validation" / "a-0.png").write_bytes((d / "train" / "a-2.png").read_bytes()),
        "validation/a-0.png: identical to train/a-2.png",
    ),
    "width as text": (edit(lambda row: row.update(width="10")), "10x20 px wide and high, its row says '10' and 20"),
    "pixel size without end": (edit(lambda row: row.update(um_per_px=[1.0, float("inf")])), "um_per_px holds a number"),
    "box beyond 64 bits": (edit(lambda row: row.update(box=[0, 1, 0, 20, 30, 2**63])), "box holds a number"),
    "too many pixels": (lambda d: (d / "train" / "a-0.png").write_bytes(huge()), "not a readable picture (Image size"),
    "boxes meet": (
        edit(lambda row: row.update(box=[1, 2, 19, 39, 9, 19])),
        "train/a-1.png and validation/a-1.png share",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_fault_is_found_and_named(dataset: Path, case: str) -> None:
    breaks, message = BROKEN[case]
    breaks(dataset)
    assert any(message in problem for problem in verify(dataset).problems)
    with pytest.raises(InputError, match="problems, listed above"):
        main(VerifyConfig(dataset=dataset))


def test_the_same_pixels_in_another_encoding_are_a_copy_too(dataset: Path) -> None:
    with Image.open(dataset / "train" / "a-2.png") as image:
        image.save(dataset / "validation" / "a-0.png", compress_level=0)
    assert any("identical" in problem for problem in verify(dataset).problems)


def test_pictures_of_one_grey_level_leak_nothing(dataset: Path) -> None:
    for split in ("train", "validation"):
        save(dataset / split / "a-0.png", np.zeros((20, 10), np.uint8))
    assert verify(dataset).problems == ()
    assert verify(dataset, decode=False).problems == ()


def test_boxes_of_two_volumes_may_cover_the_same_numbers(dataset: Path) -> None:
    rows = [row | {"volume": "b", "box": [0, 1, 0, 20, 0, 10]} for row in read(dataset / "validation")]
    write(dataset / "validation", rows)
    assert verify(dataset).problems == ()


def test_a_long_list_of_problems_is_cut_short(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(50):
        save(dataset / "train" / f"x-{number}.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(InputError, match="50 problems"):
        main(VerifyConfig(dataset=dataset))
    assert "... and 30 more" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_rows_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError):
        verify(tmp_path / name)


def test_a_file_is_told_from_a_missing_folder(dataset: Path) -> None:
    with pytest.raises(InputError, match="is a file; name the folder"):
        verify(dataset / "train" / "metadata.jsonl")


def test_control_characters_of_names_and_captions_stay_off_the_terminal(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(lambda row: row.update(file_name="a\x1b[2J.png"))(dataset)
    with pytest.raises(InputError):
        main(VerifyConfig(dataset=dataset))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "a\\x1b[2J.png" in out


@pytest.mark.parametrize("content", ["{", '{"volumes": 1}'])
def test_a_manifest_that_training_could_not_read_is_named(dataset: Path, content: str) -> None:
    (dataset / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json: "):
        verify(dataset)


def test_a_row_of_nested_lists_does_not_end_the_check(dataset: Path) -> None:
    path = dataset / "train" / "metadata.jsonl"
    path.write_text(path.read_text().replace('"text": "sf_dry"', '"text": ' + "[" * 700 + "]" * 700, 1))
    assert any("no caption" in problem for problem in verify(dataset).problems)
