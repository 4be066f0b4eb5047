"""Copies: verdicts from controls and findings, and the whole command on pictures with planted copies."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from configs.errors import InputError
from data_prep.folders.manifest import SliceRow, write_manifest, write_rows
from data_prep.folders.results import Result, read_results
from eval.copying.copies import Matches, planted
from eval.copying.rows import Agreement, Detector, LossGap, Searched, Side, memorization_rows, split_audit
from eval.memorization import MemorizationConfig, main
from eval.tiles.config import SlicesConfig
from eval.tiles.features import Tiles
from prompts.captions import caption

SIDE = 48
LABELS = (("dry", "warp"), ("injected", "weft"))


def side(similarity: np.ndarray, seed: int = 0) -> Side:
    count = len(similarity)
    none = np.zeros(count, dtype=np.int64)
    matches = Matches(similarity=similarity, index=none, symmetry=none, offset=np.zeros((count, 2), dtype=np.int64))
    return Side(matches=matches, cells=np.arange(count) % 2, blocks=np.arange(count) // 4)


def detector(*, copied: float = 0.0, seen: float = 1.0) -> Detector:
    """A detector whose held-out tiles read 0.5 +- 0.05, of whose planted copies it sees a share."""
    random = np.random.default_rng(0)
    generated = random.normal(0.5, 0.05, 96)
    generated[: round(96 * copied)] = 0.9
    found = np.where(np.arange(32) < 32 * seen, 0.9, 0.5)
    return Detector(
        name="ncc",
        generated=side(generated),
        held_out=side(random.normal(0.5, 0.05, 160)),
        planted=side(found),
    )


def judged(*detectors: Detector, num_trained: int = 1000, **changes: object) -> dict[str, Result]:
    none = Tiles(pixels=np.zeros((0, SIDE, SIDE), dtype=np.uint8), cuts=())
    random = np.random.default_rng(1)
    searched = Searched(
        reference=none,
        generated=none,
        held_out=none,
        captions=("a", "b"),
        detectors=detectors,
        agreement=Agreement(generated=random.normal(0.5, 0.05, 60), real=random.normal(0.5, 0.05, 60)),
        notes=("leak unchecked",) if not detectors else (),
    )
    settings = {"loss_gap": None, "no_model": "no model", **changes}
    searched = replace(searched, agreement=settings.pop("agreement", searched.agreement))  # type: ignore[arg-type]
    sound = Result(metric="split_audit", set="control", value=0.0, verdict="ok")
    audit = settings.pop("audit", sound)
    rows = memorization_rows(searched, audit=audit, num_trained=num_trained, draws=100, seed=0, **settings)  # type: ignore[arg-type]
    return {row.metric: row for row in rows if not row.prompt}


def test_tiles_like_held_out_ones_are_no_copies() -> None:
    rows = judged(detector())
    assert (rows["memorisation"].verdict, rows["memorisation"].reason) == ("ok", "no sign of copies")
    assert rows["ncc_copies"].low is not None
    assert rows["ncc_copies"].low < 0.05


def test_copies_beyond_a_tenth_are_likely() -> None:
    rows = judged(detector(copied=0.3))
    assert rows["ncc_copies"].value == pytest.approx(0.3, abs=0.06)
    assert (rows["memorisation"].verdict, rows["memorisation"].reason) == ("stop", "copies likely (ncc copies)")
    assert rows["ncc_closer"].value is not None
    assert rows["ncc_closer"].value > 2


def test_a_detector_that_misses_planted_copies_is_blind_and_says_nothing_of_the_rest() -> None:
    rows = judged(detector(copied=0.3, seen=0.5))
    assert rows["memorisation"].verdict == "grey"
    assert "detector blind" in rows["memorisation"].reason
    assert rows["ncc_copies"].verdict == "grey"


def test_one_detector_that_sees_is_enough() -> None:
    blind = replace(detector(seen=0.0), name="copy_net")
    row = judged(detector(), blind)["memorisation"]
    assert (row.verdict, row.reason) == ("ok", "no sign of copies; detector blind: copy network")


def test_a_few_trained_slices_are_expected_to_be_copied() -> None:
    row = judged(detector(copied=0.5), num_trained=9)["memorisation"]
    assert row.verdict == "warn"
    assert row.reason.startswith("few-shot: copies likely, as to be expected from 9 training slices")


LEAKS = Result(metric="split_audit", set="control", value=1.0, verdict="stop", reason="boxes share voxels")


def test_a_split_that_leaks_leaves_no_claim_of_no_copies() -> None:
    """Held-out tiles that were trained on set a threshold which copies stay below."""
    verdict = judged(detector(), audit=LEAKS)["memorisation"]
    assert (verdict.verdict, verdict.value) == ("grey", None)
    assert verdict.reason.endswith("boxes share voxels")


def test_copies_are_said_even_of_a_split_that_leaks() -> None:
    assert judged(detector(copied=0.5), audit=LEAKS)["memorisation"].verdict == "stop"


@pytest.mark.parametrize(("guard", "verdict"), [([64, 91], "ok"), ([64, 90], "warn")])
def test_a_guard_thinner_than_three_correlation_lengths_is_a_warning(
    dataset: Path, tmp_path: Path, guard: list[int], verdict: str
) -> None:
    shutil.copytree(dataset, tmp_path / "weave")
    split = {"guard": guard, "correlation_length": 9}
    write_manifest(tmp_path / "weave", {"volumes": [{"name": "dry", "split": split}]})
    row = split_audit(tmp_path / "weave")
    assert row.verdict == verdict
    assert ("26 voxels, less than 3 correlation lengths of 9" in row.reason) == (verdict == "warn")


def test_without_held_out_tiles_nothing_is_claimed() -> None:
    rows = judged()
    assert rows["memorisation"].verdict == "grey"
    assert rows["ncc_copies"].reason == "leak unchecked"


def test_seeds_that_agree_more_than_real_slabs_do_are_a_sign() -> None:
    random = np.random.default_rng(0)
    agreement = Agreement(generated=random.normal(0.95, 0.01, 60), real=random.normal(0.5, 0.05, 60))
    rows = judged(detector(), agreement=agreement)
    assert rows["seed_agreement"].verdict == "stop"
    assert rows["memorisation"].reason == "copies likely (seed agreement)"


@pytest.mark.parametrize(("gap", "verdict"), [(0.0, "ok"), (0.2, "stop")])
def test_a_loss_that_fell_more_on_trained_slices_is_a_sign(gap: float, verdict: str) -> None:
    random = np.random.default_rng(0)
    blocks = np.arange(40)
    fall = LossGap(
        trained=random.normal(0.3 + gap, 0.1, 40),
        held_out=random.normal(0.3, 0.1, 40),
        trained_blocks=blocks,
        held_out_blocks=blocks,
    )
    rows = judged(detector(), loss_gap=fall)
    assert rows["loss_gap_auc"].verdict == verdict
    assert rows["loss_gap"].value == pytest.approx(gap, abs=0.05)


def texture(random: np.random.Generator, grain: float) -> np.ndarray:
    smooth = gaussian_filter(random.normal(size=(SIDE, SIDE)), grain)
    return (127 + 45 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of independent textures, 64 a caption and split, four slices a slab."""
    folder = tmp_path_factory.mktemp("copies") / "weave"
    random = np.random.default_rng(0)
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        rows = []
        for number, (state, axis) in enumerate(LABELS):
            for index in range(64):
                name = f"{state}_{index:03d}.png"
                Image.fromarray(texture(random, 2 + number)).save(folder / split / name)
                place = 1000 * (split == "validation") + 10 * index
                rows.append(
                    SliceRow(
                        file_name=name,
                        text=caption(state, axis),
                        volume=state,
                        state=state,
                        axis=axis,
                        index=index,
                        box=(place, place + 1, 0, SIDE, 0, SIDE),
                        width=SIDE,
                        height=SIDE,
                    )
                )
        write_rows(folder / split, rows)
    write_manifest(folder, {"volumes": [{"name": state, "split": {"correlation_length": 1}} for state, _ in LABELS]})
    return folder


def write_generated(folder: Path, dataset: Path, copied: int) -> Path:
    """Write 40 pictures a caption, so many of which are training slices, moved and noisy."""
    random, records = np.random.default_rng(1), []
    folder.mkdir()
    for number, (state, axis) in enumerate(LABELS):
        for seed in range(40):
            picture = texture(random, 2 + number)
            if seed < copied:
                trained = np.asarray(Image.open(dataset / "train" / f"{state}_{seed:03d}.png"))
                picture = planted(trained[None], 6)[0]
            picture = (picture + random.normal(0, 4, picture.shape)).clip(0, 255).astype(np.uint8)
            name = f"{state}-{seed:03d}.png"
            Image.fromarray(picture).save(folder / name)
            asked = {"file_name": name, "prompt": caption(state, axis), "seed": seed, "height": SIDE, "width": SIDE}
            records.append({**asked, "base_model": {"name": "", "hash": ""}})
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def settings(dataset: Path, generated: Path, output: Path) -> MemorizationConfig:
    return MemorizationConfig(
        slices=SlicesConfig(real=dataset, generated=generated, bootstrap_draws=100),
        output_dir=output,
        held_out_tiles=64,
        copy_net_steps=0,
        gallery=4,
    )


@pytest.mark.parametrize(("copied", "verdict"), [(0, "ok"), (20, "stop")])
def test_the_command_tells_copies_from_new_slices(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], copied: int, verdict: str
) -> None:
    made = write_generated(tmp_path / "slices", dataset, copied)
    main(settings(dataset, made, tmp_path / "out"))
    rows = {row.metric: row for row in read_results(tmp_path / "out" / "results.jsonl") if not row.prompt}
    assert rows["ncc_recall"].value == 1
    assert rows["ncc_false_alarm"].value is not None
    assert rows["ncc_false_alarm"].value < 0.1
    assert rows["memorisation"].verdict == verdict
    assert rows["ncc_copies"].value == pytest.approx(copied / 40, abs=0.06)
    assert "python -m eval.memorization" in rows["memorisation"].command
    assert "planted training tiles" in capsys.readouterr().out  # the controls stand beside the result


def test_the_gallery_names_the_training_slice_and_its_place(dataset: Path, tmp_path: Path) -> None:
    made = write_generated(tmp_path / "slices", dataset, 20)
    main(settings(dataset, made, tmp_path / "out"))
    shown = json.loads((tmp_path / "out" / "gallery.json").read_text())
    assert [entry["trained"] == entry["generated"].replace("-", "_") for entry in shown] == [True] * 4
    assert all(entry["is_flagged"] for entry in shown)
    assert shown[0]["box"][2:] == [0, SIDE, 0, SIDE]
    with Image.open(tmp_path / "out" / shown[0]["file"]) as strip:
        assert strip.size == (4 * SIDE, SIDE)


def test_a_folder_of_few_slices_is_what_is_searched(dataset: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    names = ["dry_000.png", "injected_001.png"]
    lines = [json.loads(line) for line in (dataset / "train" / "metadata.jsonl").read_text().splitlines()]
    for name in names:
        Image.open(dataset / "train" / name).save(few / name)
    chosen = [{"file_name": line["file_name"], "text": line["text"]} for line in lines if line["file_name"] in names]
    (few / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen))
    made = write_generated(tmp_path / "slices", dataset, 0)
    for state, number in (("dry", 0), ("injected", 1)):
        trained = np.asarray(Image.open(few / f"{state}_{number:03d}.png"))
        for seed in range(30):
            Image.fromarray(planted(trained[None], seed % 7)[0]).save(made / f"{state}-{seed:03d}.png")
    main(replace(settings(dataset, made, tmp_path / "out"), train_data_dir=few))
    rows = {row.metric: row for row in read_results(tmp_path / "out" / "results.jsonl") if not row.prompt}
    assert rows["memorisation"].reason.startswith("few-shot: copies likely")
    assert rows["seed_agreement"].verdict == "stop"


def test_a_tile_larger_than_the_slices_is_refused(dataset: Path, tmp_path: Path) -> None:
    made = write_generated(tmp_path / "slices", dataset, 0)
    large = SlicesConfig(real=dataset, generated=made, tile_size=64)
    with pytest.raises(InputError, match="--tile_size 64: the shortest side of a slice is 48 px"):
        main(replace(settings(dataset, made, tmp_path / "out"), slices=large))
    assert not (tmp_path / "out").exists()


def test_every_picture_of_a_few_counts_in_the_loss_gap(dataset: Path, toy_sd: Path, tmp_path: Path) -> None:
    """A slice has many small tiles; drawn tile by tile, the first slice of a caption would stand for all of them."""
    few = tmp_path / "few"
    few.mkdir()
    lines = [json.loads(line) for line in (dataset / "train" / "metadata.jsonl").read_text().splitlines()]
    chosen = [line for text in sorted({line["text"] for line in lines}) for line in lines if line["text"] == text][::7]
    chosen = [{"file_name": line["file_name"], "text": line["text"]} for line in chosen]
    for line in chosen:
        Image.open(dataset / "train" / line["file_name"]).save(few / line["file_name"])
    (few / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen))
    made = write_generated(tmp_path / "slices", dataset, 0)
    config = settings(dataset, made, tmp_path / "out")
    model = replace(config.slices, pretrained_model_name_or_path=str(toy_sd))
    main(
        replace(
            config, slices=model, base=str(toy_sd), train_data_dir=few, loss_slices=2 * len(chosen), num_timesteps=1
        )
    )
    rows = {row.metric: row for row in read_results(tmp_path / "out" / "results.jsonl")}
    assert rows["loss_gap_auc"].n == len(chosen)
    assert rows["loss_gap_auc"].value == 0.5  # one model against itself
