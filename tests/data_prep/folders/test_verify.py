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
from data_prep.folders.checks import verify
from data_prep.verify import VerifyConfig, main

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


# ---- Captions against columns ----

WORDS = {
    "prefix": "",
    "states": {"wet": ["resin", "rich"], "dry": ["bare"]},
    "axes": {"thickness": "top", "warp": "front", "weft": "side"},
    "template": "a {axis} view at {position} percent, {state}",
}


def captioned(dataset: Path, texts: list[str], states: list[str], axes: list[str], words: object = None) -> None:
    """Give both splits the same three captions and columns; with words, a manifest that holds them."""
    for split in ("train", "validation"):
        columns = zip(read(dataset / split), texts, states, axes, strict=True)
        write(dataset / split, [row | {"text": t, "state": s, "axis": a} for row, t, s, a in columns])
    if words is not None:
        (dataset / "manifest.json").write_text(json.dumps({"volumes": [], "vocabulary": words}))


DRY = ["sf_dry sf_thickness", "sf_dry sf_warp", "sf_dry sf_weft"]
AXES = ["thickness", "warp", "weft"]


def test_captions_with_two_directions_exchanged_are_counted(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captioned(dataset, [DRY[0], DRY[2], DRY[1]], ["dry"] * 3, AXES)
    with pytest.raises(InputError, match="2 problems"):
        main(VerifyConfig(dataset=dataset))
    assert capsys.readouterr().out.splitlines() == [
        f"{split}: 2 of 3 captions contradict their rows: 'sf_dry sf_weft' of a-1.png is dry weft, its columns state "
        "and axis say dry warp; slice the volumes again"
        for split in ("train", "validation")
    ]


def test_a_caption_of_another_state_is_found(dataset: Path) -> None:
    captioned(dataset, ["sf_dry sf_compacted sf_warp", *DRY[1:]], ["dry"] * 3, ["warp", *AXES[1:]])
    assert [problem.partition(":")[0] for problem in verify(dataset).problems] == ["train", "validation"]
    assert "1 of 3" in verify(dataset).problems[0]


@pytest.mark.parametrize("swapped", [False, True])
def test_captions_are_read_with_the_words_of_the_manifest(dataset: Path, swapped: bool) -> None:
    front, side = ("side", "front") if swapped else ("front", "side")
    texts = ["a top view at 10 percent, bare", f"a {front} view at 5 percent, resin rich"]
    captioned(dataset, [*texts, f"a {side} view at 99 percent, bare"], ["dry", "wet", "dry"], AXES, WORDS)
    for folder, number in ((dataset, 2), (dataset / "train", 1)):  # the manifest of a split lies above it
        assert len(verify(folder).problems) == (number if swapped else 0)
    assert not swapped or "2 of 3 captions contradict" in verify(dataset / "train").problems[0]


@pytest.mark.parametrize(
    ("texts", "states", "axes", "words"),
    [
        (["a horse", "sf_dry sf_warp, by hand", "sf_weft"], ["dry"] * 3, AXES, None),  # no caption of the vocabulary
        (DRY, ["dry"] * 3, ["z", "y", "x"], None),  # columns of somebody else
        (DRY, ["resin", "soaked", "hot"], AXES, None),
        (["bare"] * 3, ["dry"] * 3, AXES, WORDS | {"template": "{state}"}),  # a caption that does not tell the axis
        (["top", "front", "side"], ["wet", "dry", "wet"], AXES, WORDS | {"template": "{axis}"}),
        (DRY, ["dry"] * 3, AXES, {}),
    ],
)
def test_captions_that_say_nothing_against_their_rows_pass(
    dataset: Path, texts: list[str], states: list[str], axes: list[str], words: object
) -> None:
    captioned(dataset, texts, states, axes, words)
    assert verify(dataset).problems == ()


def test_columns_of_state_or_axis_alone_are_not_compared(dataset: Path) -> None:
    for split in ("train", "validation"):
        write(dataset / split, [row | {"text": DRY[1], "axis": "weft"} for row in read(dataset / split)])
    assert verify(dataset).problems == ()


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "a web page"}'])
def test_a_file_of_somebody_above_one_split_does_not_matter(dataset: Path, content: str) -> None:
    (dataset / "manifest.json").write_text(content)
    assert verify(dataset / "train").problems == ()


@pytest.mark.parametrize("words", [[], {"states": 1}, {"template": "{"}, {"axes": {"warp": "a", "weft": "a"}}])
def test_words_of_a_manifest_that_captions_cannot_be_written_with_are_named(dataset: Path, words: object) -> None:
    captioned(dataset, DRY, ["dry"] * 3, AXES, words)
    with pytest.raises(InputError, match=r"vocabulary in manifest\.json: .*; slice the volumes again"):
        verify(dataset)


# ---- Folders of others ----


def as_text_files(dataset: Path) -> None:
    for split in ("train", "validation"):
        for row in read(dataset / split):
            (dataset / split / row["file_name"]).with_suffix(".txt").write_text("a caption\n")
        (dataset / split / "metadata.jsonl").unlink()


def as_csv(dataset: Path) -> None:
    for split in ("train", "validation"):
        lines = [f"{row['file_name']},a caption\n" for row in read(dataset / split)]
        (dataset / split / "metadata.csv").write_text("file_name,text\n" + "".join(lines))
        (dataset / split / "metadata.jsonl").unlink()


@pytest.mark.parametrize("change", [as_text_files, as_csv])
def test_captions_in_other_files_are_checked_too(dataset: Path, change: Callable[[Path], None]) -> None:
    change(dataset)
    verdict = verify(dataset)
    assert (verdict.problems, verdict.counts) == ((), {"train": 3, "validation": 3})
    (dataset / "train" / "a-1.png").write_bytes(b"")
    assert "not a readable picture" in verify(dataset).problems[0]


def test_a_picture_without_text_beside_it_is_named(dataset: Path) -> None:
    as_text_files(dataset)
    (dataset / "train" / "a-2.txt").unlink()
    assert verify(dataset).problems == ("train/a-2.png: no caption in column 'text'",)


def test_rows_without_a_place_leave_the_leak_unchecked(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(dataset).leak == "no voxel is in two splits"
    rows = read(dataset / "train")
    for row in rows:
        del row["box"]
    write(dataset / "train", rows)
    others = read(dataset / "validation")
    for row in others:
        del row["box"]
    write(dataset / "validation", others)
    main(VerifyConfig(dataset=dataset))
    assert "leak unchecked: not every row has the volume and box" in capsys.readouterr().out


def test_an_index_split_is_compared_direction_by_direction(dataset: Path) -> None:
    (dataset / "manifest.json").write_text(json.dumps({"volumes": [], "options": {"split": "index"}}))
    for split, axis, box in (("train", "warp", [0, 9, 0, 1, 0, 9]), ("validation", "weft", [0, 9, 0, 9, 0, 1])):
        rows = read(dataset / split)
        for number, row in enumerate(rows):
            row |= {"axis": axis if number == 0 else "thickness", "box": box if number == 0 else row["box"]}
        write(dataset / split, rows)
    verdict = verify(dataset)
    assert verdict.problems == ()
    assert "cross and share lines of voxels" in verdict.leak
    (dataset / "manifest.json").unlink()
    assert "share voxels" in verify(dataset).problems[0]


def sidecars(dataset: Path) -> None:
    for number in range(3):
        (dataset / "train" / f"a-{number}.txt").write_text("sf_dry\n")


def metadata_above(dataset: Path) -> None:
    (dataset / "metadata.jsonl").write_text("")


def two_kinds(dataset: Path) -> None:
    (dataset / "train" / "metadata.csv").write_text("file_name,text\n")


@pytest.mark.parametrize(
    ("trap", "message"),
    [
        (sidecars, "loaders take the text for the data set"),
        (metadata_above, "above the folders of the splits, where loaders ignore it"),
        (two_kinds, "more than one file of metadata"),
    ],
)
def test_layouts_that_loaders_misread_are_problems(dataset: Path, trap: Callable[[Path], None], message: str) -> None:
    trap(dataset)
    assert message in verify(dataset).problems[0]


def test_text_files_beside_a_card_are_fine(dataset: Path) -> None:
    sidecars(dataset)
    (dataset / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: []\n---\n")
    assert verify(dataset).problems == ()


def test_a_picture_named_like_a_split_is_a_trap_in_a_flat_folder(dataset: Path) -> None:
    flat = dataset / "train"
    (flat / "a-0.png").rename(flat / "test-0.png")
    rows = read(flat)
    rows[0]["file_name"] = "test-0.png"
    write(flat, rows)
    assert "begins like the name of a split" in verify(flat).problems[0]
    assert verify(dataset).problems == ()


def test_it_can_be_loaded_as_trainers_do(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(VerifyConfig(dataset=dataset, load=True))
    assert "nothing wrong" in capsys.readouterr().out


def test_a_dry_run_names_what_would_be_checked(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(VerifyConfig(dataset=dataset, dry_run=True))
    assert "would check train in" in capsys.readouterr().out
