from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import InputError, NothingLeftError, UsageError
from data_prep.folders.manifest import SliceRow, write_manifest, write_rows
from data_prep.folders.results import Result, read_results
from eval.fidelity import FidelityConfig, main
from eval.likeness.descriptor_rows import coloured_row
from eval.likeness.reported import NUMBERS
from eval.likeness.rows import Classified, ClassifiedSets, Naming, fidelity_rows
from eval.stats.number import by_name
from eval.tiles.config import SlicesConfig
from eval.tiles.sets import read_real, real_cuts
from prompts.captions import caption
from prompts.vocabulary import DEFAULT

SIDE = 32
STATES, AXES = ("dry", "injected"), ("warp", "weft")
NAMING = Naming(states=STATES, axes=AXES, vocabulary=DEFAULT)


def tile(state: str, axis: str, random: np.random.Generator) -> np.ndarray:
    """Stripes: the state is their pitch, the axis their direction."""
    wave = np.sin(2 * np.pi * np.arange(SIDE) / (5 if state == "dry" else 11) + random.uniform(0, 6))
    plane = np.broadcast_to(wave if axis == "weft" else wave[:, None], (SIDE, SIDE))
    return (125 + 40 * plane + random.normal(0, 8, (SIDE, SIDE))).clip(0, 255).astype(np.uint8)


def write_dataset(folder: Path, *, splits: tuple[str, ...] = ("train", "validation"), each: int = 40) -> Path:
    """Write a dataset folder of striped tiles; slices of one volume and axis are four slabs of ten."""
    random = np.random.default_rng(0)
    for split in splits:
        (folder / split).mkdir(parents=True)
        rows = []
        for state in STATES:
            for axis in AXES:
                for index in range(each):
                    name = f"{state}_{axis}_{index:03d}.png"
                    Image.fromarray(tile(state, axis, random)).save(folder / split / name)
                    rows.append(
                        SliceRow(
                            file_name=name,
                            text=caption(state, axis),
                            volume=state,
                            state=state,
                            axis=axis,
                            index=index,
                            box=(0, 1, 0, SIDE, 0, SIDE),
                            width=SIDE,
                            height=SIDE,
                        )
                    )
        write_rows(folder / split, rows)
    volumes = [{"name": state, "split": {"correlation_length": 3}} for state in STATES]
    write_manifest(folder, {"volumes": volumes})
    return folder


def write_generated(
    folder: Path, prompt_of: Callable[[str, str], str] = caption, *, each: int = 34, base: str = ""
) -> Path:
    """Write a generated folder of striped tiles, which a perfect generator would give."""
    random, records = np.random.default_rng(1), []
    folder.mkdir()
    for state in STATES:
        for axis in AXES:
            for seed in range(each):
                name = f"{state}-{axis}-{seed}.png"
                picture = tile(state, axis, random)
                Image.fromarray(np.stack([picture] * 3, axis=-1)).save(folder / name)
                record = {
                    "file_name": name,
                    "prompt": prompt_of(state, axis),
                    "seed": seed,
                    "height": SIDE,
                    "width": SIDE,
                }
                records.append({**record, "base_model": {"name": base, "hash": ""}})
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def config(real: Path, generated: Path, output: Path) -> FidelityConfig:
    return FidelityConfig(
        slices=SlicesConfig(real=real, generated=generated, bootstrap_draws=100),
        output_dir=output,
        train_tiles=64,
        held_out_tiles=30,
        classifier_steps=60,
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("real") / "weave")


@pytest.fixture(scope="module")
def checked(dataset: Path, toy_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The check of a perfect generator; its VAE is random, so nothing behind it can be believed."""
    folder = tmp_path_factory.mktemp("checked")
    main(config(dataset, write_generated(folder / "slices", base=str(toy_sd)), folder / "fidelity"))
    return folder / "fidelity"


def only(rows: list[Result], metric: str, which: str, prompt: str = "") -> Result:
    (row,) = [row for row in rows if (row.metric, row.set, row.prompt) == (metric, which, prompt)]
    return row


def test_it_writes_exactly_these_files(checked: Path) -> None:
    samples = {
        f"samples/{state}_{axis}_{kind}.png"
        for state in STATES
        for axis in AXES
        for kind in ("real", "vae", "generated")
    }
    files = {str(path.relative_to(checked)) for path in checked.rglob("*") if path.is_file()}
    named = {"results.jsonl", "overview.json", "confusion.png", "samples.png", "config.yaml"}
    curves = {f"descriptors/{state}_{axis}_curves.png" for state in STATES for axis in AXES}
    assert files == samples | curves | named


def test_real_slices_as_generated_ones_agree_with_their_prompts_and_lie_within_the_floor(checked: Path) -> None:
    rows = read_results(checked / "results.jsonl")
    for head in ("state", "axis"):
        assert only(rows, f"accuracy_{head}", "held_out").value > 0.95
        assert only(rows, f"agreement_{head}", "generated").value > 0.95
    distance, floor = only(rows, "kid", "generated"), only(rows, "kid", "real")
    assert distance.low < floor.high
    assert only(rows, "kid", "nearest_states").value > distance.high


def test_a_vae_that_destroys_the_slices_greys_what_is_said_of_generated_ones(checked: Path) -> None:
    rows = read_results(checked / "results.jsonl")
    for row in (only(rows, "agreement_state", "generated"), only(rows, "kid_floor_ratio", "generated")):
        assert row.verdict == "grey"
        assert "after the VAE round trip" in row.reason


def test_the_confusion_of_generated_slices_sums_to_the_pictures(checked: Path) -> None:
    tables = json.loads((checked / "overview.json").read_text())["confusion"]
    for head in ("state", "axis"):
        assert np.sum(tables[head]["generated"]) == 4 * 34
        assert np.sum(tables[head]["held_out"], axis=1).tolist() == [2 * 34, 2 * 34]


def test_slices_that_are_not_grey_are_counted(tmp_path: Path) -> None:
    for number, apart in enumerate((0, 1, 3, 40)):
        picture = np.full((8, 8, 3), 100, dtype=np.uint8)
        picture[..., 2] += apart
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    row = coloured_row(sorted(tmp_path.glob("*.png")))
    assert (row.value, row.n, row.verdict) == (0.5, 4, "grey")
    assert "; 11.0 over all;" in row.reason


def test_rows_have_the_unit_and_the_tier_that_their_number_declares(checked: Path) -> None:
    declared = by_name(NUMBERS)
    rows = [row for row in read_results(checked / "results.jsonl") if row.metric in declared]
    assert {row.metric for row in rows} == set(declared)
    assert [row for row in rows if (row.unit, row.tier) != (declared[row.metric].unit, declared[row.metric].tier)] == []


def test_rows_name_what_they_depend_on_and_how_to_get_them_again(checked: Path) -> None:
    for row in read_results(checked / "results.jsonl"):
        assert {"train", "validation", "records", "base_model"} <= set(row.hashes)
        assert row.command.startswith("python -m eval.fidelity --real ")


def test_shuffled_prompts_give_chance_agreement_and_a_second_run_the_same_rows(dataset: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(3)

    def any_caption(state: str, axis: str) -> str:
        return caption(STATES[random.integers(2)], AXES[random.integers(2)])

    generated = write_generated(tmp_path / "slices", any_caption)
    rows = []
    for name in ("one", "two"):
        main(config(dataset, generated, tmp_path / name))
        rows.append([replace(row, command="") for row in read_results(tmp_path / name / "results.jsonl")])
    assert rows[0] == rows[1]
    for head in ("state", "axis"):
        row = only(rows[0], f"agreement_{head}", "generated")
        assert row.low < 0.5 < row.high


def test_other_prompts_are_left_out_and_counted(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generated = write_generated(tmp_path / "slices", lambda s, a: "a horse" if s == "dry" else caption(s, a), each=3)
    main(replace(config(dataset, generated, tmp_path / "out"), classifier_steps=1))
    assert "note: 6 pictures whose prompt is not a caption of the dataset are left out" in capsys.readouterr().out


def test_without_validation_everything_is_grey_as_leak_unchecked(tmp_path: Path) -> None:
    real = write_dataset(tmp_path / "weave", splits=("train",))
    main(replace(config(real, write_generated(tmp_path / "slices", each=4), tmp_path / "out"), classifier_steps=1))
    rows = read_results(tmp_path / "out" / "results.jsonl")
    for row in rows:
        if row.set == "generated" and row.metric != "coloured":  # which needs no real slices
            assert row.verdict == "grey"
            assert "leak unchecked" in row.reason


def test_slices_of_another_size_are_compared_with_a_warning(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generated = write_generated(tmp_path / "slices", each=2)
    for path in generated.glob("*.png"):
        Image.open(path).resize((48, 40)).save(path)
    records = (
        (generated / "records.jsonl").read_text().replace('"height": 32, "width": 32', '"height": 40, "width": 48')
    )
    (generated / "records.jsonl").write_text(records)
    main(replace(config(dataset, generated, tmp_path / "out"), classifier_steps=1))
    assert "note: real slices have another size than generated ones" in capsys.readouterr().out


def test_a_folder_without_records_is_one_clear_line(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--generated .*: no records\.jsonl; give a folder written by python -m eval"):
        main(config(dataset, tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_no_caption_among_the_prompts_is_nothing_left(dataset: Path, tmp_path: Path) -> None:
    generated = write_generated(tmp_path / "slices", lambda state, axis: "two zebras", each=1)
    with pytest.raises(NothingLeftError, match=r"none of 4 prompts is a caption of .*two zebras"):
        main(config(dataset, generated, tmp_path / "out"))


def test_a_split_folder_instead_of_the_dataset_is_pointed_at(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"did you mean {dataset}"):
        main(config(dataset / "train", tmp_path, tmp_path / "out"))


def test_a_tile_larger_than_the_slices_is_refused(dataset: Path, tmp_path: Path) -> None:
    generated = write_generated(tmp_path / "slices", each=1)
    large = SlicesConfig(real=dataset, generated=generated, tile_size=64)
    with pytest.raises(InputError, match="--tile_size 64: the shortest side of a slice is 32 px"):
        main(replace(config(dataset, generated, tmp_path / "out"), slices=large))


def test_a_model_named_on_the_command_line_must_be_there(dataset: Path, tmp_path: Path) -> None:
    settings = config(dataset, write_generated(tmp_path / "slices", each=1), tmp_path / "out")
    model = replace(settings.slices, pretrained_model_name_or_path=str(tmp_path / "missing"))
    with pytest.raises(UsageError, match="--pretrained_model_name_or_path"):
        main(replace(settings, classifier_steps=1, slices=model))


def test_blocks_kept_for_the_floor_are_not_learned_from(dataset: Path) -> None:
    cuts = real_cuts(read_real(dataset, DEFAULT), SIDE)
    learning, aside = ({cut.block for cut in side} for side in (cuts.learning, cuts.aside))
    assert not learning & aside
    assert {block.split()[:2] == [state, axis] for block in aside for state in STATES for axis in AXES} == {True, False}
    # Three correlation lengths of 3 slices: slab 1 holds slices 9 to 17.
    assert len([cut for cut in cuts.aside if cut.label == ("dry", "warp")]) == 9


def seen(each: int, *, wrong: float = 0.0, shift: float = 0.0, seed: int = 0) -> Classified:
    """Pictures of all four captions, a share of whose states is read wrong, with features moved by ``shift``."""
    random = np.random.default_rng(seed)
    state, axis = np.repeat([0, 0, 1, 1], each), np.repeat([0, 1, 0, 1], each)
    flipped = random.permutation(4 * each) < wrong * 4 * each
    features = random.normal(size=(4 * each, 8)) + shift
    features[:, 0] += 4 * state
    return Classified(
        features=features,
        truth={"state": state, "axis": axis},
        predicted={"state": np.where(flipped, 1 - state, state), "axis": axis},
        blocks=np.tile(np.arange(each) // 2, 4),
    )


def all_rows(**changes: object) -> list[Result]:
    """Return the rows of a check in which everything is in order, but for the changes."""
    sets = ClassifiedSets(
        held_out=seen(40, seed=1),
        held_out_matched=seen(40, seed=1),
        held_out_vae=seen(40, seed=1),
        aside=seen(40, seed=2),
        aside_vae=seen(40, seed=3),
        generated=seen(40, seed=4),
        generated_tiles=seen(40, seed=4),
        no_vae="",
        leak_unchecked="",
    )
    return fidelity_rows(replace(sets, **changes), NAMING, draws=100, seed=0)


def judged(**changes: object) -> dict[tuple[str, str], Result]:
    """Return those over all captions."""
    rows = all_rows(**changes)
    return {(row.metric, row.set): row for row in rows if not row.prompt}


def test_a_perfect_generator_is_in_order() -> None:
    rows = judged()
    for metric in ("agreement_state", "agreement_axis", "kid_floor_ratio"):
        assert rows[metric, "generated"].verdict == "ok", rows[metric, "generated"]


@pytest.mark.parametrize(("wrong", "verdict"), [(0.05, "ok"), (0.25, "warn"), (0.5, "stop")])
def test_agreement_is_judged_against_what_is_asked_and_against_chance(wrong: float, verdict: str) -> None:
    row = judged(generated=seen(40, wrong=wrong))["agreement_state", "generated"]
    assert row.value == pytest.approx(1 - wrong)
    assert row.verdict == verdict


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "ok"), (0.5, "warn"), (3.0, "stop")])
def test_a_distance_is_judged_against_the_floor_and_the_nearest_other_state(shift: float, verdict: str) -> None:
    assert judged(generated_tiles=seen(40, shift=shift, seed=4))["kid_floor_ratio", "generated"].verdict == verdict


@pytest.mark.parametrize("which", ["held_out", "held_out_vae"])
def test_a_head_that_cannot_read_real_slices_is_not_believed(which: str) -> None:
    rows = judged(**{which: seen(40, wrong=0.1)})
    assert rows["agreement_state", "generated"].verdict == "grey"
    assert "below 0.95" in rows["agreement_state", "generated"].reason
    assert rows["agreement_axis", "generated"].verdict == "ok"


def test_a_state_recognised_by_grey_level_is_flagged() -> None:
    row = judged(held_out_matched=seen(40, wrong=0.2))["agreement_state", "generated"]
    assert (row.verdict, row.reason) == ("warn", "below 0.90 without grey levels: state is recognised by grey level")


def test_without_a_vae_the_prompt_cells_are_grey_and_the_distance_is_not() -> None:
    rows = judged(held_out_vae=None, aside_vae=None, no_vae="no VAE round trip: the model is gone")
    assert rows["agreement_state", "generated"].reason == "no VAE round trip: the model is gone"
    assert rows["agreement_state", "generated"].verdict == "grey"
    assert rows["kid_floor_ratio", "generated"].verdict == "ok"


def test_the_distance_of_a_caption_never_promises_a_verdict() -> None:
    single = [row for row in all_rows() if row.prompt and row.metric == "kid"]
    assert [(row.verdict, row.reason) for row in single] == [("grey", "shown per caption, not judged")] * 4


def test_few_pictures_are_shown_and_not_judged() -> None:
    rows = judged(generated=seen(4), generated_tiles=seen(4))
    assert rows["agreement_state", "generated"].reason == "16 pictures, judged from 64"
    assert rows["kid_floor_ratio", "generated"].reason == "16 tiles a side, judged from 128"
