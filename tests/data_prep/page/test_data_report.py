"""The page of a dataset: what it says is what is in the folder, and nothing in it is run or fetched."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from configs.errors import InputError, UsageError
from configs.load import load
from data_prep.folders.checks import verify
from data_prep.page.buckets import bucket_of, bucket_shapes, square_of
from data_prep.page.render import render
from data_prep.report import ReportConfig, main
from data_prep.slice import main as cut
from data_prep.slicing.config import SliceConfig

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two volumes, split by region, every second slice, copies dropped."""
    folder = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        volume = rng.normal(1000, 100, (12, 40, 90))
        volume[:, 6:20] = volume[:, 4:5] + rng.normal(0, 0.1, (12, 14, 90))
        tifffile.imwrite(folder / f"{name}.tif", volume.astype(np.float32), photometric="minisblack")
    words = ["--volumes", f"dry={folder}/a.tif", f"injected={folder}/b.tif", "--output_dir", str(folder / "out")]
    words += ["--stride", "2", "--dedupe", "--guard_voxels", "6", "--voxel_size_um", "20"]
    cut(load(SliceConfig, words))
    return folder / "out"


def page_of(dataset: Path) -> str:
    return (dataset / "report.html").read_text()


def rectangles(page: str, label: str, kind: str) -> list[tuple[float, float]]:
    """Return (first, length) of the rectangles of a kind, in each picture with a label."""
    pictures = re.findall(rf'<svg[^>]*aria-label="{label}[^"]*">(.*?)</svg>', page, re.DOTALL)
    return [
        (float(first), float(length))
        for picture in pictures
        for first, length in re.findall(rf'<rect class="{kind}-fill" x="([\d.]+)"[^>]* width="([\d.]+)"', picture)
    ]


def test_every_dataset_has_a_page_and_the_command_makes_the_same(dataset: Path, tmp_path: Path) -> None:
    main(ReportConfig(dataset=dataset, output=tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_text() == page_of(dataset)


def test_it_counts_what_is_in_the_folder(dataset: Path) -> None:
    for split in ("train", "validation"):
        count = len(list((dataset / split).glob("*.png")))
        assert re.search(rf'<p class="word">{count}</p><p>pictures in <code>{split}</code>', page_of(dataset))
    assert "no voxel is in two splits" in page_of(dataset)


def test_the_map_of_slices_is_that_of_the_rows(dataset: Path) -> None:
    rows = [json.loads(line) for line in (dataset / "train" / "metadata.jsonl").read_text().splitlines()]
    for axis in ("thickness", "warp", "weft"):
        for volume in ("a", "b"):
            shown = rectangles(page_of(dataset), f"{axis} slices", "train")
            taken = {row["index"] for row in rows if row["axis"] == axis and row["volume"] == volume}
            covered = {n for first, length in shown for n in range(int(first), int(first + length))}
            assert taken <= covered
    assert rectangles(page_of(dataset), "weft slices", "guard") == [(70, 6), (70, 6)]
    # Every second of 14 like rows is taken, and all but the first look like it.
    assert sum(length for _, length in rectangles(page_of(dataset), "warp slices", "dropped")) >= 2 * 2 * 6


def test_the_plan_shows_the_parts_of_the_split(dataset: Path) -> None:
    assert rectangles(page_of(dataset), "planes of z", "train") == [(0, 70), (0, 70)]
    assert rectangles(page_of(dataset), "planes of z", "validation") == [(76, 14), (76, 14)]


def test_reasons_are_counted(dataset: Path) -> None:
    entries = json.loads((dataset / "manifest.json").read_text())["volumes"]
    number = sum(sum(entry["left_out"]["near copies of a neighbour"].values()) for entry in entries)
    assert number > 0
    text = " ".join(re.sub(r"<[^>]+>", " ", page_of(dataset)).split())
    assert re.search(rf"near copies of a neighbour (\d+ )*{number}\b", text)


def test_it_asks_for_nothing_from_outside_and_runs_nothing(dataset: Path) -> None:
    assert "<script" not in page_of(dataset)
    assert "default-src 'none'" in page_of(dataset)
    assert not re.search(r'(src|href)="(?!data:)', page_of(dataset))


def test_text_from_files_is_shown_as_text(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "train" / "a.png")
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": EVIL}))
    volume = {"name": EVIL, "state": EVIL, "file": EVIL, "warnings": [EVIL]}
    (tmp_path / "manifest.json").write_text(json.dumps({"volumes": [volume], "options": {EVIL: EVIL}}))
    page = render(tmp_path, verify(tmp_path))
    assert "<script>" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 6


def test_no_picture_outside_the_folder_is_shown(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "secret.png")
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps({"file_name": "../secret.png", "text": "x"}))
    page = render(tmp_path / "data", verify(tmp_path / "data"))
    assert "data:image" not in page
    assert "is not a path inside the folder" in page


def test_a_manifest_of_another_make_is_refused_in_one_line(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x"}))
    (tmp_path / "manifest.json").write_text(json.dumps({"volumes": [{"window": {"low": "black"}}]}))
    with pytest.raises(InputError, match=r"not as data_prep\.slice writes them"):
        render(tmp_path, verify(tmp_path))


def test_ordinary_pictures_have_a_page_without_volumes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a black square")
    page = render(tmp_path, verify(tmp_path))
    assert "a black square" in page
    assert "How many of them are independent" not in page


def test_a_page_that_is_there_is_not_replaced_unasked(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        main(ReportConfig(dataset=dataset, output=tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_text() == "mine"


# ---- Buckets ----


@pytest.mark.parametrize(
    ("size", "bucket", "scale", "kept"),
    [
        ((970, 702), (576, 448), 0.64, 0.93),
        ((970, 359), (768, 320), 0.89, 0.89),
        ((702, 359), (704, 320), 1.00, 0.89),
        ((773, 197), (1024, 256), 1.32, 0.98),
        ((863, 197), (1024, 256), 1.30, 0.91),
        ((633, 287), (704, 320), 1.11, 1.00),
    ],
)
def test_slices_of_the_study_fall_into_the_known_buckets(
    size: tuple[int, int], bucket: tuple[int, int], scale: float, kept: float
) -> None:
    found = bucket_of(*size, resolution=512, step=64)
    assert (found.width, found.height) == bucket
    assert (found.scale, found.kept) == (pytest.approx(scale, abs=0.006), pytest.approx(kept, abs=0.006))


@pytest.mark.parametrize(
    ("size", "scale", "kept"), [((970, 702), 0.73, 0.72), ((970, 359), 1.43, 0.37), ((773, 197), 2.60, 0.25)]
)
def test_a_square_crop_sees_the_known_share(size: tuple[int, int], scale: float, kept: float) -> None:
    found = square_of(*size, resolution=512)
    assert (found.scale, found.kept) == (pytest.approx(scale, abs=0.006), pytest.approx(kept, abs=0.006))


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (768, 64), (1024, 32), (64, 8)])
def test_buckets_keep_the_area_and_the_step(resolution: int, step: int) -> None:
    shapes = bucket_shapes(resolution, step)
    assert (resolution // step * step,) * 2 in shapes
    assert all(width * height <= resolution**2 and width % step == height % step == 0 for width, height in shapes)
    assert {(height, width) for width, height in shapes} == set(shapes)


# ---- In a browser ----


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_fits_the_screen_and_is_drawn(dataset: Path, tmp_path: Path, width: int) -> None:
    from test_browser import browse

    widths = "root.scrollWidth + '/' + root.clientWidth"
    probe = f"<script>onload = () => {{ const root = document.documentElement; root.title = {widths} }}</script>"
    text = re.sub(r"<meta http-equiv[^>]*>", "", page_of(dataset)).replace("</body>", probe + "</body>")
    (tmp_path / "probe.html").write_text(text)
    dom = browse(tmp_path, f"--window-size={width},2000", "--dump-dom", (tmp_path / "probe.html").as_uri()).stdout
    found = re.search(r'<html[^>]*title="(\d+)/(\d+)"', dom)
    assert found is not None
    assert int(found.group(1)) <= int(found.group(2))
    shot = tmp_path / "shot.png"
    browse(tmp_path, f"--window-size={width},4000", f"--screenshot={shot}", (dataset / "report.html").as_uri())
    pixels = np.asarray(Image.open(shot).convert("RGB"), dtype=int)
    for colour in ((0x1F, 0x4E, 0x79), (0xC7, 0x7F, 0x1A), (0xA5, 0xA4, 0x9F), (0x98, 0x2B, 0x25)):
        assert (np.abs(pixels - colour).max(axis=2) <= 2).sum() > 200, colour
