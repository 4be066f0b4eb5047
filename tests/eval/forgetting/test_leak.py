"""The leak network finds training slices in pictures, and says so when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from configs.errors import InputError
from eval.forgetting.leak import LeakNet, read_slices, round_trip, train_leak_net
from eval.forgetting.picture_scores import is_leaked
from finetune.diffusion.models import load_models

SIDE = 32


def weave(index: int) -> NDArray[np.uint8]:
    """Return a noisy grey weave of yarns 8 px apart."""
    random = np.random.default_rng((1, index))
    y, x = np.mgrid[0:SIDE, 0:SIDE] + random.uniform(0, 8, 2)[:, None, None]
    return noisy(120 + 60 * np.sin(2 * np.pi * x / 8) * np.sin(2 * np.pi * y / 8), random)


def stripes(index: int) -> NDArray[np.uint8]:
    """Return a coloured picture of the probes' kind: slanted stripes of the same pitch."""
    random = np.random.default_rng((2, index))
    y, x = np.mgrid[0:SIDE, 0:SIDE] + random.uniform(0, 8, 2)[:, None, None]
    grey = noisy(120 + 60 * np.sin(2 * np.pi * (x + y) / 11), random)
    return np.stack([grey, grey // 2, 255 - grey], axis=-1)


def noisy(picture: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.uint8]:
    return (picture + random.normal(0, 8, picture.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def detector() -> LeakNet:
    return train_leak_net([weave(index) for index in range(24)], [stripes(index) for index in range(24)])


def test_half_of_the_pictures_replaced_by_slices_give_a_leak_of_a_half(detector: LeakNet) -> None:
    mixed = [stripes(100 + index) for index in range(20)] + [weave(100 + index) for index in range(20)]
    assert is_leaked(detector.patch_shares(mixed)).mean() == pytest.approx(0.5, abs=0.05)


def test_a_slice_is_found_whatever_its_tint_and_brightness(detector: LeakNet) -> None:
    tinted = [np.stack([weave(200 + i) // 2, weave(200 + i) // 3, weave(200 + i) // 2], -1) + 60 for i in range(20)]
    assert is_leaked(detector.patch_shares(tinted)).mean() >= 0.9


def test_a_slice_pasted_into_a_corner_shows_in_the_share_of_patches(detector: LeakNet) -> None:
    picture = stripes(300)
    picture[: SIDE // 2, : SIDE // 2] = weave(300)[: SIDE // 2, : SIDE // 2, None]
    share = detector.patch_shares([picture])[0]
    assert 0 < share < 0.7


def test_the_same_training_gives_the_same_network() -> None:
    groups = [weave(index) for index in range(2)], [stripes(index) for index in range(2)]
    first, second = (train_leak_net(*groups, seed=3).net.state_dict() for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)


def test_calibration_keeps_the_slices_and_calls_fewer_other_patches_slices(detector: LeakNet) -> None:
    kept, others = [weave(400 + i) for i in range(20)], [stripes(400 + i) for i in range(20)]
    strict = detector.calibrated(kept)
    assert 0 < strict.threshold <= 3
    assert strict.patch_shares(kept).mean() >= 0.9
    assert strict.patch_shares(others).mean() <= detector.patch_shares(others).mean()


def write_split(folder: Path, shapes: dict[str, int]) -> Path:
    """Write a split with so many pictures of each caption."""
    folder.mkdir()
    names = [(f"{text}-{index}.png", text) for text, count in shapes.items() for index in range(count)]
    for name, _ in names:
        Image.fromarray(weave(len(name)).repeat(2, axis=1)).save(folder / name)
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in names]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def test_slices_are_read_evenly_over_the_captions_at_the_generated_size(tmp_path: Path) -> None:
    slices = read_slices(write_split(tmp_path / "train", {"a": 30, "b": 4}), (16, 16), limit=12)
    assert len(slices) == 6 + 4
    assert {picture.shape for picture in slices} == {(16, 16)}


def test_a_row_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "../secret.png", "text": "a"}\n')
    with pytest.raises(InputError, match=r"metadata.jsonl:1: no file_name inside this folder"):
        read_slices(tmp_path, (16, 16), limit=4)


def test_the_round_trip_is_the_vaes_own(toy_sd: Path) -> None:
    import torch

    models = load_models(str(toy_sd))
    slices = [weave(index) for index in range(3)]
    pixels = torch.from_numpy(slices[2]).float().expand(1, 3, SIDE, SIDE) / 127.5 - 1
    decoded = models.vae(pixels).sample  # encoded to the mode and decoded, no scaling in between
    expected = ((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).detach().numpy().mean(axis=0)
    # Three channels and their mean are rounded to whole grey levels: half a level each time.
    assert np.abs(round_trip(models, slices)[2] - expected).max() <= 1.01
