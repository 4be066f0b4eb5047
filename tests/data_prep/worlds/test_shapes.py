"""The small world: pictures show what their captions say, checked by measuring them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from data_prep.shapes import ShapesConfig, main
from data_prep.worlds.shapes import COLOURS, HELD_OUT, SHAPES, TEXTURES, Scene, draw_scene, picture, render
from prompts.captions import all_captions


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_shapes_are_drawn_as_the_caption_says(kind: str, count: int) -> None:
    scene = Scene(kind=kind, colours=("black", "white"), count=count)
    for seed in range(20):
        dark = render(scene, np.random.default_rng(seed)).mean(axis=-1) < 128
        pieces, number = ndimage.label(dark, structure=np.ones((3, 3)))
        sizes = ndimage.sum_labels(dark, pieces, range(1, number + 1))
        assert (sizes > 3).sum() == count  # the tip of a triangle may come loose as one pixel


@pytest.mark.parametrize("kind", TEXTURES)
def test_texture_shows_both_of_its_colours_and_no_third_hue(kind: str) -> None:
    pixels = render(Scene(kind=kind, colours=("red", "blue")), np.random.default_rng(3)).reshape(-1, 3).astype(float)
    ends = np.array([COLOURS["red"], COLOURS["blue"]], dtype=float)
    along = (pixels - ends[0]) @ (ends[1] - ends[0]) / np.square(ends[1] - ends[0]).sum()
    assert np.percentile(along, 5) < 0.35
    assert np.percentile(along, 95) > 0.65
    off = pixels - ends[0] - along[:, None] * (ends[1] - ends[0])
    assert np.linalg.norm(off, axis=1).mean() < 30  # jitter of 12 per channel at both ends, noise of 4


@pytest.mark.parametrize("kind", TEXTURES)
def test_grey_texture_has_equal_channels_and_contrast(kind: str) -> None:
    pixels = render(Scene(kind=kind, colours=()), np.random.default_rng(5))
    assert (pixels == pixels[..., :1]).all()
    assert pixels.std() > 8


def test_pattern_is_the_same_at_twice_the_size() -> None:
    scene = Scene(kind="chequered", colours=("black", "white"))
    small = render(scene, np.random.default_rng(7), 64).mean(axis=-1)
    large = render(scene, np.random.default_rng(7), 128).mean(axis=-1).reshape(64, 2, 64, 2).mean(axis=(1, 3))
    assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.97


def test_held_out_combinations_are_never_drawn() -> None:
    random = np.random.default_rng(11)
    drawn = {(scene.kind, frozenset(scene.colours)) for scene in (draw_scene(random) for _ in range(8000))}
    assert not drawn & HELD_OUT
    assert len(drawn) == 15 * 28 + 10 - len(HELD_OUT)  # everything else is drawn, so their absence is not chance


def test_picture_depends_on_seed_and_index_alone() -> None:
    scene, pixels = picture(4, 17)
    again, same = picture(4, 17)
    assert scene == again
    assert np.array_equal(pixels, same)
    assert not np.array_equal(pixels, picture(4, 18)[1])


def test_small_world_shares_no_caption_word_with_slices() -> None:
    random = np.random.default_rng(13)
    words = {word for _ in range(1000) for word in draw_scene(random).caption.split()}
    assert not words & {word for caption in all_captions() for word in caption.split()}
    assert not any("sf_" in word for word in words)


def test_command_writes_a_captioned_folder(tmp_path: Path) -> None:
    main(ShapesConfig(output_dir=tmp_path / "shapes", num_images=5, resolution=32, seed=2))
    main(ShapesConfig(output_dir=tmp_path / "shapes", num_images=5, resolution=32, seed=2, overwrite=True))
    rows = [json.loads(line) for line in (tmp_path / "shapes/train/metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [f"{index:06d}.png" for index in range(5)]
    scene, pixels = picture(2, 3, 32)
    assert rows[3]["text"] == scene.caption
    assert np.array_equal(np.asarray(Image.open(tmp_path / "shapes/train/000003.png")), pixels)
