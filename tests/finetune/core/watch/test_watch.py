"""The held-out loss: at the same triples each time, without a trace in the training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import ttest_1samp, ttest_rel
from test_methods import run_recipe, words_of

from configs.errors import InputError, UsageError
from configs.load import load
from data_prep.folders.run_folder import EMBEDDINGS_FILE, LORA_FILE
from finetune.core.pictures.images import CaptionedImage
from finetune.core.watch.losses import spread_over_captions, summary
from finetune.diffusion.denoiser import Denoiser
from finetune.lora import LoraRun, main

Train = Callable[..., Path]
CAPTIONS = ["sf_dry sf_warp", "sf_injected sf_weft"]


def write_images(folder: Path, seed: int, count: int) -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    lines = []
    for index in range(count):
        Image.fromarray(random.integers(0, 255, (32, 32), dtype=np.uint8)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": CAPTIONS[index % 2]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def train(toy_sd: Path, tmp_path: Path) -> Train:
    """Train a toy adapter on data with a validation folder beside it; options given again win."""
    data = write_images(tmp_path / "data" / "train", 0, 8)
    write_images(tmp_path / "data" / "validation", 1, 5)
    values = {
        "pretrained_model_name_or_path": toy_sd,
        "train_data_dir": data,
        "output_dir": tmp_path / "run",
        "seed": 0,
        "max_train_steps": 6,
        "train_batch_size": 4,
        "checkpointing_steps": 2,
        "logging_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]

    def run(*more: object) -> Path:
        config = load(LoraRun, [*words, *map(str, more)])
        main(config)
        return config.train.output_dir

    return run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]


def test_a_look_says_the_loss_of_both_sets_by_band_and_caption(train: Train) -> None:
    rows = rows_of(train("--heldout_steps", 3, "--heldout_timesteps", 2))
    assert sorted({row["step"] for row in rows}) == [0, 3, 6]
    first = [(row["set"], row["band"], row["caption"], row["n"]) for row in rows if row["step"] == 0]
    both = [(None, None), ([0, 500], None), ([500, 1000], None), *((None, caption) for caption in CAPTIONS)]
    counts = {"validation": [5, 5, 5, 3, 2], "train": [8, 8, 8, 4, 4]}
    expected = [(name, *row, n) for name, ns in counts.items() for row, n in zip(both, ns, strict=True)]
    assert first == expected
    assert all(row["low"] < row["loss"] < row["high"] for row in rows)
    last = [row for row in rows if row["step"] == 6]
    assert [row["change"] for row in last] == pytest.approx(
        [row["loss"] - before["loss"] for row, before in zip(last, rows, strict=False)], abs=1e-12
    )


def test_the_last_look_is_at_what_is_saved_without_the_dropout_of_training(train: Train, tmp_path: Path) -> None:
    """A run that starts from the saved adapter, without dropout and averages, sees the same before its first step."""
    first = train("--heldout_steps", 6, "--use_ema", "--ema_decay", 0.9, "--lora_dropout", 0.5)
    again = train("--init_adapter", first, "--heldout_steps", 6, "--output_dir", tmp_path / "again")
    last = [row["loss"] for row in rows_of(first) if row["step"] == 6]
    start = [row["loss"] for row in rows_of(again) if row["step"] == 0]
    assert start == pytest.approx(last, rel=1e-5)
    assert start != pytest.approx([row["loss"] for row in rows_of(first) if row["step"] == 0], rel=1e-3)


def test_each_band_is_looked_at_all_over_its_timesteps(train: Train) -> None:
    looked: list[int] = []

    def look(module: torch.nn.Module, given: Any) -> None:
        if isinstance(module, Denoiser) and not module.unet.training:
            looked.extend(given[1].tolist())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    train("--heldout_steps", 9, "--heldout_timesteps", 2, "--max_train_steps", 1)
    hook.remove()
    at_start = np.array(looked[: len(looked) // 2])  # the other half is of the last step
    assert len(at_start) == 2 * (5 + 8)
    for low, high in ((0, 500), (500, 1000)):
        within = at_start[(low <= at_start) & (at_start < high)]
        assert len(within) == 5 + 8
        assert np.ptp(within) > 300
    assert at_start.tolist() == looked[len(looked) // 2 :]


def test_looking_leaves_training_bitwise_as_it_was(train: Train, tmp_path: Path) -> None:
    plain = load_file(train("--output_dir", tmp_path / "plain") / LORA_FILE)
    watched = load_file(train("--heldout_steps", 1) / LORA_FILE)
    assert all(np.array_equal(plain[name].numpy(), watched[name].numpy()) for name in plain)


def test_a_resumed_run_saw_the_losses_of_the_uninterrupted_one(train: Train, tmp_path: Path) -> None:
    whole = rows_of(train("--output_dir", tmp_path / "whole", "--heldout_steps", 1))
    folder = train("--heldout_steps", 1)
    for path in folder.glob(f"{LORA_FILE[:8]}*"):
        path.unlink()
    (folder / "provenance.json").unlink()
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(folder / name, ignore_errors=True)
    assert rows_of(train("--heldout_steps", 1)) == whole


@pytest.mark.parametrize("recipe", ["textual_inversion", "pivotal_tuning"])
def test_a_new_word_is_looked_at_in_the_sentences_it_is_learned_in(recipe: str, toy_sd: Path, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data" / "train", 0, 8)
    write_images(tmp_path / "data" / "validation", 1, 5)
    words = words_of(recipe, toy_sd, data, tmp_path)
    words += ["--instance_prompt", "a <new>"]
    run_recipe(recipe, [*words, "--output_dir", str(tmp_path / "plain")])
    run_recipe(recipe, [*words, "--heldout_steps", "2"])
    whole = [row for row in rows_of(tmp_path / "run") if row["band"] is None and row["caption"] is None]
    assert [(row["step"], row["set"], row["n"]) for row in whole] == [
        (step, name, n) for step in (0, 2, 4, 6) for name, n in (("validation", 5), ("train", 8))
    ]
    assert {row["caption"] for row in rows_of(tmp_path / "run")} == {None, "a <new>"}
    assert all(row["change"] != 0 for row in whole[2:])
    plain, watched = (load_file(tmp_path / name / EMBEDDINGS_FILE)["<new>"] for name in ("plain", "run"))
    assert np.array_equal(plain.numpy(), watched.numpy())


def test_another_seed_is_looked_at_with_the_same_triples(train: Train, tmp_path: Path) -> None:
    """At step 0 the adapters do nothing: only the draws could differ."""
    one, two = (rows_of(train("--seed", seed, "--heldout_steps", 6, "--output_dir", tmp_path / seed)) for seed in "12")
    first = [[row for row in rows if row["step"] == 0] for rows in (one, two)]
    assert first[0] == first[1]
    assert one[-1] != two[-1]


def test_batch_size_does_not_matter(train: Train, tmp_path: Path) -> None:
    """Up to the rounding of convolutions over another batch."""
    one, four = (
        rows_of(train("--train_batch_size", size, "--heldout_steps", 6, "--output_dir", tmp_path / str(size)))
        for size in (1, 4)
    )
    first = [[row["loss"] for row in rows if row["step"] == 0] for rows in (one, four)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_buckets_are_looked_at_in_their_own_shapes(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "validation"
    Image.open(folder / "0.png").resize((64, 32)).save(folder / "0.png")
    rows = rows_of(train("--heldout_steps", 6, "--buckets"))
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_an_image_that_is_trained_on_is_not_held_out(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tmp_path / "data" / "train" / "3.png", tmp_path / "data" / "validation" / "2.png")
    rows = rows_of(train("--heldout_steps", 6))
    assert (rows[0]["set"], rows[0]["n"]) == ("validation", 4)
    assert "note: 1 of 5 held-out images are training images; left out" in capsys.readouterr().out


def test_a_folder_that_is_trained_on_is_refused(train: Train, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="all its 8 images are training images; name a folder of others"):
        train("--heldout_steps", 3, "--validation_data_dir", tmp_path / "data" / "train")


def test_trackers_get_the_loss_of_each_set_and_band(train: Train) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train("--heldout_steps", 6, "--heldout_timesteps", 2, "--report_to", "tensorboard")
    (events,) = {path.parent for path in (folder / "logs").rglob("events*")}
    log = EventAccumulator(str(events))
    log.Reload()
    names = {f"heldout/{name}{band}" for name in ("train", "validation") for band in ("", "/0-500", "/500-1000")}
    assert names <= set(log.Tags()["scalars"])
    assert [event.step for event in log.Scalars("heldout/train")] == [0, 6]


def test_without_a_folder_the_option_says_so(train: Train, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "data" / "validation")
    with pytest.raises(UsageError, match=r"--heldout_steps 3: there is no folder .*validation; name one with"):
        train("--heldout_steps", 3)


def test_a_folder_that_nothing_looks_at_is_refused(train: Train, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--validation_data_dir .*: needs --heldout_steps, .* or --drift_probes"):
        train("--validation_data_dir", tmp_path / "data" / "validation")


def test_the_interval_is_that_of_a_t_test() -> None:
    losses = np.random.default_rng(0).random((9, 4))
    (whole, *_) = summary(losses, ["a"] * 9, [(0, 1)] * 4)
    interval = ttest_1samp(losses.mean(axis=1), 0).confidence_interval()
    assert (whole["low"], whole["high"]) == pytest.approx((interval.low, interval.high))


def test_the_change_since_the_start_is_that_of_a_paired_t_test() -> None:
    before, after = np.random.default_rng(0).random((2, 9, 4))
    row = summary(after, ["a"] * 9, [(0, 1)] * 4, before)[2]
    interval = ttest_rel(after[:, 1], before[:, 1]).confidence_interval()
    assert row["change"] == pytest.approx((after - before)[:, 1].mean())
    assert (row["change_low"], row["change_high"]) == pytest.approx((interval.low, interval.high))


def test_one_image_has_no_interval() -> None:
    row = summary(np.ones((1, 1)), ["a"], [(0, 1)])[0]
    assert row == {"band": None, "caption": None, "loss": 1.0, "low": None, "high": None, "n": 1}


def test_a_subset_has_every_caption_equally_often() -> None:
    images = [
        CaptionedImage(
            path=Path(f"{number}"),
            captions=("rare" if number < 3 else "common",),
            where="",
            content="",
            height=1,
            width=1,
        )
        for number in range(50)
    ]
    chosen = [image.caption for image in spread_over_captions(images, 6)]
    assert sorted(chosen) == ["common"] * 3 + ["rare"] * 3
