from __future__ import annotations

import io

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from data_prep.folders import png
from data_prep.slicing.filters import is_blank, near_duplicates, thumbnail
from data_prep.slicing.fit import Cut, native, tiles

PICTURE = np.random.default_rng(2).integers(0, 256, (50, 90), dtype=np.uint8)


def test_native_is_the_rectangle_itself() -> None:
    (cut,) = native((10, 50), (0, 70))
    assert np.array_equal(cut.apply(PICTURE), PICTURE[10:50, 0:70])
    assert (cut.height, cut.width, cut.is_padded) == (40, 70, False)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_tiles_cover_every_pixel_and_leave_nothing_over(overlap: float) -> None:
    seen = np.zeros_like(PICTURE)
    for cut in tiles((0, 50), (20, 90), size=16, overlap=overlap):
        assert np.array_equal(cut.apply(PICTURE), PICTURE[slice(*cut.rows), slice(*cut.columns)])
        assert cut.apply(PICTURE).shape == (16, 16)
        seen[slice(*cut.rows), slice(*cut.columns)] += 1
    assert seen[:, 20:].min() >= 1
    assert seen[:, :20].max() == 0


def test_the_last_tile_is_shifted_inward() -> None:
    columns = [cut.columns for cut in tiles((0, 32), (0, 80), size=32, overlap=0.0)]
    assert columns == [(0, 32), (32, 64), (48, 80)]


def test_the_overlap_is_a_share_of_the_tile() -> None:
    starts = [cut.columns[0] for cut in tiles((0, 32), (0, 80), size=32, overlap=0.25)]
    assert starts == [0, 24, 48]


def test_a_slice_thinner_than_the_tile_is_reflected_on_both_sides() -> None:
    (cut,) = tiles((0, 4), (0, 6), size=6, overlap=0.0)
    part = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert cut.is_padded
    assert np.array_equal(cut.apply(part), part[[1, 0, 1, 2, 3, 2]])


def test_a_slice_much_thinner_than_the_tile_is_filled_from_itself() -> None:
    cut = Cut(rows=(0, 5), columns=(0, 90), height=64, width=90)
    assert cut.apply(PICTURE).shape == (64, 90)
    assert {row.tobytes() for row in cut.apply(PICTURE)} == {row.tobytes() for row in PICTURE[:5]}


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (50, 90), (127, 129)])
@pytest.mark.parametrize("content", ["noise", "flat", "ramp"])
def test_png_pixels_survive_in_two_independent_readers(shape: tuple[int, int], content: str) -> None:
    pictures = {
        "noise": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8),
        "flat": np.full(shape, 255, np.uint8),
        "ramp": (np.add.outer(np.arange(shape[0]), 3 * np.arange(shape[1])) % 256).astype(np.uint8),
    }
    data = png.encode(pictures[content])
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), pictures[content])
    assert np.array_equal(imagecodecs.png_decode(data), pictures[content])


def test_a_transposed_view_is_encoded_as_it_looks() -> None:
    assert np.array_equal(imagecodecs.png_decode(png.encode(PICTURE.T)), PICTURE.T)


def test_png_is_no_larger_than_pillows_on_a_noisy_scan() -> None:
    rng = np.random.default_rng(0)
    scan = 128 + 60 * np.sin(np.arange(400) / 15) * np.sin(np.arange(300) / 11)[:, None] + rng.normal(0, 12, (300, 400))
    picture, buffer = scan.clip(0, 255).astype(np.uint8), io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    assert len(png.encode(picture)) < 1.02 * len(buffer.getvalue())


def test_blank_pictures_are_told_from_textured_ones() -> None:
    assert is_blank(np.full((40, 40), 90, np.uint8))
    assert not is_blank(PICTURE)


def test_near_copies_are_counted_against_the_last_one_kept() -> None:
    rng = np.random.default_rng(4)
    first, other = rng.normal(128, 40, (2, 64, 64)).clip(0, 255).astype(np.uint8)
    slices = [first, first, first // 2, other, other, first]
    assert near_duplicates([thumbnail(one) for one in slices]) == [1, 2, 4]


@pytest.mark.parametrize("shape", [(3, 5), (31, 500), (700, 900)])
def test_thumbnails_of_any_shape_are_centred_and_of_length_one(shape: tuple[int, int]) -> None:
    small = thumbnail(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    assert float(small.mean()) == pytest.approx(0, abs=1e-6)
    assert float(np.linalg.norm(small)) == pytest.approx(1, abs=1e-5)
