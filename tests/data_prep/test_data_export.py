"""A dataset in the layouts of other trainers, read back by their own libraries or by the rules they state."""

from __future__ import annotations

import io
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.errors import InputError, UsageError
from data_prep.export import ExportConfig, main
from data_prep.folders.checks import verify
from data_prep.folders.manifest import SliceRow, write_card, write_manifest, write_rows


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Five pictures to learn from and two held out."""
    folder = tmp_path / "weave"
    splits: dict[str, list[SliceRow]] = {}
    for number in range(7):
        split = "train" if number < 5 else "validation"
        row = SliceRow(
            file_name=f"dry-warp-{number:05d}.png", text=f"sf_dry sf_warp {number}", volume="dry", state="dry",
            axis="warp", index=number, box=(0, 12, number, number + 1, 0, 16), width=16, height=12,
            um_per_px=(12.5, 12.5),
        )  # fmt: skip
        (folder / split).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / split / row.file_name)
        splits.setdefault(split, []).append(row)
    for split, rows in splits.items():
        write_rows(folder / split, rows)
    write_card(folder, body="", splits=splits, num_pictures=7)
    write_manifest(folder, {"volumes": []})
    return folder


def export(dataset: Path, form: str, **settings: Any) -> Path:
    out = dataset.parent / form
    main(ExportConfig(dataset=dataset, output_dir=out, format=form, **settings))  # type: ignore[arg-type]
    return out


def pixels(image: Image.Image | bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image)


def original(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (12, 16), dtype=np.uint8)


def test_a_text_file_stands_beside_each_picture(dataset: Path) -> None:
    out = export(dataset, "txt")
    assert (out / "validation" / "dry-warp-00005.txt").read_text() == "sf_dry sf_warp 5\n"
    assert len(list(out.glob("train/*.png"))) == len(list(out.glob("train/*.txt"))) == 5
    assert verify(out).problems == ()


def test_text_files_do_not_hide_the_pictures_from_datasets(dataset: Path, tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(str(export(dataset, "txt")), cache_dir=str(tmp_path / "cache"))
    assert {split: len(loaded[split]) for split in loaded} == {"train": 5, "validation": 2}
    assert {"image", "text"} <= set(loaded["train"].column_names)


def test_kohya_finds_pictures_and_captions_in_the_folder_its_settings_name(dataset: Path) -> None:
    out = export(dataset, "kohya", resolution=768, num_repeats=4)
    settings = tomllib.loads((out / "dataset.toml").read_text())
    (group,) = settings["datasets"]
    (subset,) = group["subsets"]
    # The rules of its dataset documentation: pictures lie directly in image_dir, each with a caption of its ending;
    # bucket edges are divisible by the step; a subset has num_repeats, a dataset resolution and batch_size.
    folder = Path(subset["image_dir"])
    assert folder == (out / "train").resolve()
    pictures = [path for path in folder.iterdir() if path.suffix == ".png"]
    assert len(pictures) == 5
    assert all(path.with_suffix(settings["general"]["caption_extension"]).read_text().strip() for path in pictures)
    assert all(group[f"{end}_bucket_reso"] % group["bucket_reso_steps"] == 0 for end in ("min", "max"))
    assert (group["resolution"], group["batch_size"], subset["num_repeats"]) == (768, 1, 4)
    # What it would read as something else: a file of metadata makes a subset another kind, five parts between
    # underscores point to another caption.
    assert not (folder / "metadata.jsonl").exists()
    assert all(path.stem.count("_") < 4 for path in pictures)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("form", "files"), [("webdataset", "train-*.tar"), ("parquet", "data/train-*.parquet")])
def test_shards_are_loaded_whole_and_streamed(
    dataset: Path, tmp_path: Path, form: str, files: str, streaming: bool
) -> None:
    import datasets

    datasets.disable_progress_bars()
    out = export(dataset, form, shard_size=2)
    assert len(list(out.glob(files))) == 3
    loaded = datasets.load_dataset(
        form, data_files={"train": str(out / files)}, split="train", streaming=streaming, cache_dir=str(tmp_path / "c")
    )
    rows = list(loaded)
    image, text = ("png", "txt") if form == "webdataset" else ("image", "text")
    assert [row[text] for row in rows] == [f"sf_dry sf_warp {number}" for number in range(5)]
    assert all(np.array_equal(pixels(row[image]), original(number)) for number, row in enumerate(rows))
    place = rows[3]["json"] if form == "webdataset" else rows[3]
    assert (place["box"], place["um_per_px"]) == ([0, 12, 3, 4, 0, 16], [12.5, 12.5])


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_shards_are_the_same_bytes_each_time(dataset: Path, form: str) -> None:
    def read(out: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    first = read(export(dataset, form))
    assert read(export(dataset, form, overwrite=True)) == first


def test_an_archive_names_no_user_and_no_time(dataset: Path) -> None:
    with tarfile.open(export(dataset, "webdataset") / "train-00000.tar") as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


def test_a_folder_with_problems_is_not_exported(dataset: Path) -> None:
    (dataset / "train" / "dry-warp-00001.png").unlink()
    with pytest.raises(InputError, match=r"1 problems, the first: .*no such file"):
        export(dataset, "txt")
    assert not (dataset.parent / "txt").exists()


def test_an_export_into_the_dataset_is_refused(dataset: Path) -> None:
    with pytest.raises(UsageError, match="lies inside the dataset"):
        main(ExportConfig(dataset=dataset, output_dir=dataset / "kohya"))


def test_a_dry_run_writes_nothing(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not export(dataset, "kohya", dry_run=True).exists()
    assert "would write train 5, validation 2 pictures" in capsys.readouterr().out
