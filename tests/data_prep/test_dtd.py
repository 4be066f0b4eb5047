"""The Describable Textures Dataset, in a synthetic copy of its layout: no picture of it is here."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import InputError, TisserandError, UsageError
from data_prep.dtd import DtdConfig, main
from data_prep.folders.checks import captioned, verify

CLASSES = ("braided", "polka-dotted", "woven")
PER_CLASS = 6


@pytest.fixture
def dtd(tmp_path: Path) -> Path:
    """Three textures of six pictures, two for each split of partitions 1 and 2."""
    root = tmp_path / "dtd"
    (root / "labels").mkdir(parents=True)
    (root / "imdb").mkdir()
    (root / "imdb" / "imdb.mat").write_bytes(b"\0")
    for number, name in enumerate(CLASSES):
        (root / "images" / name).mkdir(parents=True)
        for index in range(PER_CLASS):
            pixels = np.random.default_rng(100 * number + index).integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{name}_{index:04d}.jpg")
    for partition in (1, 2):
        for part, split in enumerate(("train", "val", "test")):
            numbers = [(2 * part + offset + partition) % PER_CLASS for offset in (0, 1)]
            lines = [f"{name}/{name}_{number:04d}.jpg\n" for name in CLASSES for number in numbers]
            (root / "labels" / f"{split}{partition}.txt").write_text("".join(lines))
    return root


def make(source: Path, out: Path, **settings: object) -> Path:
    main(DtdConfig(source=source, output_dir=out, **settings))  # type: ignore[arg-type]
    return out


def torchvision_root(root: Path) -> Path:
    new = root.parent / "torchvision" / "dtd"
    new.mkdir(parents=True)
    root.rename(new / "dtd")
    return new.parent


@pytest.mark.parametrize("where", ["root", "parent", "torchvision", "archive"])
def test_the_dataset_is_found_wherever_it_was_unpacked(dtd: Path, tmp_path: Path, where: str) -> None:
    if where == "archive":
        with tarfile.open(tmp_path / "dtd-r1.0.1.tar.gz", "w:gz") as tar:
            tar.add(dtd, "dtd")
    places = {"root": dtd, "parent": dtd.parent, "archive": tmp_path / "dtd-r1.0.1.tar.gz"}
    out = make(places.get(where) or torchvision_root(dtd), tmp_path / "out")
    assert [row["text"] for row in captioned(out / "train")] == ["dtd_braided"] * 2
    assert verify(out).problems == ()


def test_the_official_partition_decides_the_split(dtd: Path, tmp_path: Path) -> None:
    out = make(dtd, tmp_path / "out", partition=2, splits=("train", "val", "test"))
    names = {split: [row["file_name"] for row in captioned(out / split)] for split in ("train", "validation", "test")}
    assert names == {
        "train": ["braided-0002.jpg", "braided-0003.jpg"],
        "validation": ["braided-0004.jpg", "braided-0005.jpg"],
        "test": ["braided-0000.jpg", "braided-0001.jpg"],
    }


def test_all_textures_can_be_taken_with_spoken_names(dtd: Path, tmp_path: Path) -> None:
    out = make(dtd, tmp_path / "out", classes=("all",), caption_template="{class} texture")
    rows = captioned(out / "train")
    assert {row["text"] for row in rows} == {"braided texture", "polka dotted texture", "woven texture"}
    assert {row["texture"] for row in rows} == set(CLASSES)


def test_pictures_are_the_very_bytes(dtd: Path, tmp_path: Path) -> None:
    out = make(dtd, tmp_path / "out")
    original = (dtd / "images" / "braided" / "braided_0001.jpg").read_bytes()
    assert (out / "train" / "braided-0001.jpg").read_bytes() == original


def test_the_card_forbids_passing_it_on_and_names_the_files_that_are_there(dtd: Path, tmp_path: Path) -> None:
    card = (make(dtd, tmp_path / "out") / "README.md").read_text()
    assert "Do not pass these pictures on" in card
    assert '"train/*.jpg"' in card


@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/evil.jpg", "dtd/images/../../evil.jpg", "link", "device"])
def test_an_archive_with_an_unsafe_member_is_refused_as_a_whole(dtd: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "dtd.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(dtd, "dtd")
        member = tarfile.TarInfo(name if name.endswith(".jpg") else f"dtd/images/braided/{name}.jpg")
        if name == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        elif name == "device":
            member.type = tarfile.CHRTYPE
        tar.addfile(member, io.BytesIO())
    with pytest.raises(InputError, match=r"leaves the folder|is a link or a device"):
        make(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"classes": ("braidd",)}, UsageError, "no such texture .* did you mean braided"),
        ({"partition": 3}, InputError, "missing, such as labels/train3.txt"),
    ],
)
def test_what_is_not_there_is_named(
    dtd: Path, tmp_path: Path, settings: dict[str, object], error: type[TisserandError], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(dtd, tmp_path / "out", **settings)


def test_a_missing_picture_is_named_and_counted(dtd: Path, tmp_path: Path) -> None:
    (dtd / "images" / "braided" / "braided_0001.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 2 files .* images/braided/braided_0001.jpg"):
        make(dtd, tmp_path / "out")


def test_a_list_that_leaves_the_folder_is_refused(dtd: Path, tmp_path: Path) -> None:
    (dtd / "labels" / "train1.txt").write_text("../secret.jpg\n")
    with pytest.raises(InputError, match=r"which is not class/file\.jpg"):
        make(dtd, tmp_path / "out")


def test_a_link_out_of_the_folder_is_not_followed(dtd: Path, tmp_path: Path) -> None:
    path = dtd / "images" / "braided" / "braided_0001.jpg"
    path.rename(tmp_path / "outside.jpg")
    path.symlink_to(tmp_path / "outside.jpg")
    with pytest.raises(InputError, match="missing"):
        make(dtd, tmp_path / "out")


def test_something_else_is_not_taken_for_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folders images and labels"):
        make(tmp_path, tmp_path.parent / "out")
    (tmp_path / "x.tar").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a readable archive"):
        make(tmp_path / "x.tar", tmp_path / "out")
