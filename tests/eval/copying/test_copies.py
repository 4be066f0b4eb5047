"""Finding copies: shift, flips, turns, thresholds from held-out tiles, and the small network."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from eval.copying.copies import aligned, best_matches, calibrate, margin_of, planted
from eval.copying.copy_net import net_matches, train_copy_net

SIDE = 64


def blobs(count: int, seed: int) -> np.ndarray:
    """Tiles of random smooth structure with some grain, (N, t, t)."""
    random = np.random.default_rng(seed)
    smooth = gaussian_filter(random.normal(size=(count, SIDE, SIDE)), (0, 3, 3))
    tiles = 127 + 300 * smooth + random.normal(0, 6, smooth.shape)
    return tiles.clip(0, 255).astype(np.uint8)


def noisy(tiles: np.ndarray, seed: int) -> np.ndarray:
    grain = np.random.default_rng(seed).normal(0, 6, tiles.shape)
    return (tiles + grain).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def references() -> np.ndarray:
    return blobs(40, 0)


# The eight flips and quarter turns of a square, from mirrors and the transpose alone.
WAYS = {
    "as it is": lambda tile: tile,
    "left to right": lambda tile: tile[:, ::-1],
    "top to bottom": lambda tile: tile[::-1],
    "half turn": lambda tile: tile[::-1, ::-1],
    "transposed": lambda tile: tile.T,
    "quarter turn": lambda tile: tile.T[::-1],
    "other quarter turn": lambda tile: tile.T[:, ::-1],
    "transposed the other way": lambda tile: tile.T[::-1, ::-1],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_found_however_it_is_flipped_or_turned(references: np.ndarray, way: str) -> None:
    query = noisy(WAYS[way](planted(references[[17]], 8)[0])[None], 1)
    found = best_matches(query, references)
    assert found.index[0] == 17
    assert found.similarity[0] > 0.85
    # The symmetry that is told lays the asked tile on the one found.
    laid = aligned(query[0], int(found.symmetry[0]), found.offset[0])[:48, :48].astype(float)
    assert np.corrcoef(laid.ravel(), references[17][:48, :48].ravel())[0, 1] > 0.85


def test_the_offset_moves_the_tile_onto_its_match(references: np.ndarray) -> None:
    query = planted(references[[5]], 8)
    found = best_matches(query, references)
    assert found.offset[0].tolist() == [-8, -8]
    inner = np.s_[8:-9, 8:-9]
    moved = aligned(query[0], int(found.symmetry[0]), found.offset[0])
    assert np.array_equal(moved[:48, :48], references[5][:48, :48])
    assert not np.array_equal(query[0][inner], references[5][inner])


def test_other_tiles_are_less_similar_than_any_copy(references: np.ndarray) -> None:
    copies = best_matches(noisy(planted(references[:10], 8), 1), references)
    others = best_matches(blobs(10, 1), references)
    assert copies.similarity.min() > others.similarity.max() + 0.2


def test_the_similarity_is_the_correlation_of_the_overlap(references: np.ndarray) -> None:
    """A tile against itself is 1 at both scales; darker and flatter is still the same tile."""
    darker = (references[[3]] * 0.5 + 20).astype(np.uint8)
    assert best_matches(references[[3]], references).similarity[0] == pytest.approx(1, abs=1e-4)
    assert best_matches(darker, references).similarity[0] > 0.99


def test_tiles_of_one_block_are_not_compared(references: np.ndarray) -> None:
    doubled = np.concatenate([references[:6], references[:6]])
    blocks = np.tile(np.arange(6), 2)
    assert best_matches(doubled, doubled).similarity.min() > 0.99
    assert best_matches(doubled, doubled, blocks, blocks).similarity.max() < 0.8


def test_a_large_tile_is_searched_over_a_sixth_of_its_side() -> None:
    assert [margin_of(side) for side in (16, 64, 196)] == [4, 10, 32]


def test_a_threshold_of_held_out_tiles_flags_about_five_percent_of_others() -> None:
    random = np.random.default_rng(0)
    cells = np.repeat(np.arange(3), 80)
    level = np.array([0.3, 0.5, 0.7])[cells]
    held_out, again = (level + random.normal(0, 0.05, 240) for _ in range(2))
    threshold = calibrate(held_out, cells, np.arange(240) % 20, draws=200)
    assert threshold.flags(again, cells).mean() <= 0.08
    assert threshold.flags(level + 0.25, cells).mean() == 1
    assert threshold.conservative > threshold.value


def test_a_caption_without_held_out_tiles_flags_nothing() -> None:
    values = np.random.default_rng(0).normal(size=40)
    threshold = calibrate(values, np.zeros(40, dtype=np.int64), np.arange(40), draws=100)
    assert threshold.flags(np.array([99.0, 99.0]), np.array([0, 1])).tolist() == [1, 0]


def test_neighbouring_slices_as_hold_out_hide_copies_and_a_block_hold_out_shows_them() -> None:
    """Appendix of the protocol: copies with more noise than two neighbours differ by; no slice hold-out sees them."""
    random = np.random.default_rng(0)
    number = np.arange(240)
    stack = gaussian_filter(random.normal(size=(240, SIDE, SIDE)), (4, 3, 3))
    stack = (127 + 40 * stack / stack.std()).clip(0, 255).astype(np.uint8)
    other = gaussian_filter(random.normal(size=(60, SIDE, SIDE)), (4, 3, 3))
    other = (127 + 40 * other / other.std()).clip(0, 255).astype(np.uint8)
    copies = noisy(stack[2::24], 3)
    zeros = np.zeros(240, dtype=np.int64)
    flagged = {}
    for name, kept, held_out in (
        ("slices", stack[number % 2 == 0], stack[number % 2 == 1][::4]),
        ("blocks", stack[number % 2 == 0], other[::2]),
    ):
        found = best_matches(held_out, kept).similarity
        blocks = np.arange(len(found)) // 3
        threshold = calibrate(found, zeros[: len(found)], blocks, draws=100)
        flagged[name] = threshold.flags(best_matches(copies, kept).similarity, zeros[: len(copies)]).mean()
    assert flagged["slices"] < 0.2
    assert flagged["blocks"] >= 0.9


def test_the_network_finds_copies_it_was_not_shown() -> None:
    tiles = blobs(64, 0)
    net = train_copy_net(tiles, num_steps=150, shift_px=8, seed=0)
    copies = noisy(planted(tiles[:16], 8), 5)
    found = net_matches(net, copies, tiles)
    others = net_matches(net, blobs(16, 9), tiles)
    assert (found.index == np.arange(16)).mean() >= 0.8
    assert np.median(found.similarity) > np.median(others.similarity) + 0.1
