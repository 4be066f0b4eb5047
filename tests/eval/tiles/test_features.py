from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import InputError
from eval.tiles.features import (
    TileCut,
    draw_cuts,
    match_histograms_to,
    read_grey,
    read_tiles,
    resize,
    tile_corners,
    to_grey,
)


def cut(
    path: Path, row: int = 0, column: int = 0, label: tuple[str, str] = ("dry", "warp"), block: str = "a"
) -> TileCut:
    return TileCut(path=path, row=row, column=column, label=label, block=block)


def picture(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def test_reducing_averages_instead_of_picking() -> None:
    """A one-pixel checkerboard is grey from afar; a resize that does not widen its filter keeps stripes."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert np.abs(resize(board, 16, 16) - 127.5).max() < 1


def test_resize_to_its_own_size_changes_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize(image, 12, 9), image)


def test_grey_is_the_channel_mean() -> None:
    assert to_grey(np.array([[[10, 20, 60]]], dtype=np.uint8)).tolist() == [[30]]


@pytest.mark.parametrize(("height", "width", "tile"), [(64, 64, 64), (100, 64, 64), (197, 773, 196), (65, 130, 32)])
def test_tiles_cover_the_picture_and_stay_in_it(height: int, width: int, tile: int) -> None:
    seen = np.zeros((height, width), dtype=bool)
    for row, column in tile_corners(height, width, tile):
        assert row + tile <= height
        assert column + tile <= width
        seen[row : row + tile, column : column + tile] = True
    assert seen.all()


def test_a_tile_larger_than_the_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        tile_corners(32, 100, 33)


def test_tiles_are_the_pixels_at_their_corner(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)
    path = picture(tmp_path / "a.png", pixels)
    tiles = read_tiles([cut(path, 3, 7), cut(path, 8, 18)], 32)
    np.testing.assert_array_equal(tiles.pixels[0], pixels[3:35, 7:39])
    np.testing.assert_array_equal(tiles.pixels[1], pixels[8:40, 18:50])


def test_flat_tiles_are_left_out_and_counted_unless_kept(tmp_path: Path) -> None:
    flat = picture(tmp_path / "flat.png", np.full((32, 32), 7, dtype=np.uint8))
    structured = picture(tmp_path / "real.png", np.arange(1024, dtype=np.uint8).reshape(32, 32))
    cuts = [cut(flat), cut(structured)]
    assert (len(read_tiles(cuts, 32)), read_tiles(cuts, 32).num_flat) == (1, 1)
    assert len(read_tiles(cuts, 32, keep_flat=True)) == 2


def test_a_picture_smaller_than_its_row_says_is_named(tmp_path: Path) -> None:
    path = picture(tmp_path / "small.png", np.zeros((16, 16), dtype=np.uint8))
    with pytest.raises(InputError, match=r"small\.png: 16 x 16 px"):
        read_tiles([cut(path)], 32)


@pytest.mark.parametrize("content", [None, b"not a picture"])
def test_an_unreadable_picture_is_one_clear_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png"):
        read_grey(tmp_path / "a.png")


def test_a_picture_of_16_bits_is_refused_and_not_cut_off_at_255(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 4000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match=r"deep.png: I;16 pixels, not 8 bits"):
        read_grey(tmp_path / "deep.png")


def test_drawn_cuts_take_blocks_in_turn_and_depend_on_the_seed_alone() -> None:
    cuts = [cut(Path(f"{block}{i}.png"), block=block) for block in "abc" for i in range(10)]
    drawn = draw_cuts(cuts, 6, seed=1)
    assert sorted(one.block for one in drawn) == ["a", "a", "b", "b", "c", "c"]
    assert drawn == draw_cuts(cuts, 6, seed=1)
    assert drawn != draw_cuts(cuts, 6, seed=2)


def test_matched_tiles_share_one_histogram() -> None:
    random = np.random.default_rng(0)
    reference = random.integers(0, 256, (4, 32, 32), dtype=np.uint8)
    dark, bright = (random.integers(low, low + 60, (1, 32, 32), dtype=np.uint8) for low in (0, 180))
    matched = match_histograms_to(np.concatenate([dark, bright]), reference)
    assert abs(float(matched[0].mean()) - float(matched[1].mean())) < 3
    assert (np.argsort(matched[0].ravel()[:50]).size, matched.dtype) == (50, np.uint8)


def test_the_vae_round_trip_keeps_shape_of_sides_it_cannot_divide(toy_sd: Path) -> None:
    from finetune.diffusion.models import load_models
    from finetune.diffusion.vae import round_trip

    pixels = np.random.default_rng(0).integers(0, 256, (3, 30, 30), dtype=np.uint8)
    vae = load_models(str(toy_sd)).vae
    once = round_trip(vae, pixels)
    assert (once.shape, once.dtype) == (pixels.shape, np.uint8)
    np.testing.assert_array_equal(once, round_trip(vae, pixels, batch_size=1))
