from __future__ import annotations

import numpy as np
import pytest
import torch

from eval.likeness.classifier import SliceClassifier, augment, give_histogram, read_slices, train_classifier


def stripes(count: int, seed: int, side: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiles whose state is the pitch of their stripes and whose axis is the direction, with any grey level."""
    random = np.random.default_rng(seed)
    states, axes = random.integers(0, 2, count), random.integers(0, 2, count)
    steps = np.arange(side)
    tiles = []
    for state, axis in zip(states, axes, strict=True):
        wave = np.sin(2 * np.pi * steps / (4, 9)[state] + random.uniform(0, 6))
        plane = np.broadcast_to(wave, (side, side)) if axis else np.broadcast_to(wave[:, None], (side, side))
        tiles.append(random.uniform(60, 190) + random.uniform(15, 50) * plane + random.normal(0, 5, (side, side)))
    return np.stack(tiles).clip(0, 255).astype(np.uint8), states, axes


def test_separable_textures_are_learned_whatever_their_grey_level() -> None:
    model = train_classifier(*stripes(256, 0), num_steps=60, batch_size=32)
    tiles, states, axes = stripes(100, 1)
    reading = read_slices(model, tiles)
    assert (reading.states.argmax(1) == states).mean() > 0.95
    assert (reading.axes.argmax(1) == axes).mean() > 0.95


def test_shuffled_labels_stay_at_chance_on_tiles_not_learned_from() -> None:
    tiles, states, axes = stripes(256, 0)
    random = np.random.default_rng(2)
    model = train_classifier(tiles, random.permutation(states), random.permutation(axes), num_steps=40, batch_size=32)
    held_out, states, axes = stripes(300, 1)
    reading = read_slices(model, held_out)
    assert abs((reading.states.argmax(1) == states).mean() - 0.5) < 0.15
    assert abs((reading.axes.argmax(1) == axes).mean() - 0.5) < 0.15


def test_a_state_that_differs_in_grey_level_alone_is_not_learned() -> None:
    """The shortcut that must not work: dark and bright noise. Unchanged tiles are a fifth of what is learned from."""
    random = np.random.default_rng(0)
    states = np.tile([0, 1], 128)
    noise = random.normal(0, 20, (256, 24, 24)) + np.where(states, 170, 90)[:, None, None]
    model = train_classifier(noise.clip(0, 255).astype(np.uint8), states, 0 * states, num_steps=40, batch_size=32)
    same_grey = (random.normal(0, 20, (256, 24, 24)) + 130).clip(0, 255).astype(np.uint8)
    assert abs((read_slices(model, same_grey).states.argmax(1) == states).mean() - 0.5) < 0.15


def test_the_same_seed_gives_the_same_weights() -> None:
    tiles, states, axes = stripes(64, 0)
    one, two = (train_classifier(tiles, states, axes, num_steps=3, batch_size=16, seed=5) for _ in range(2))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_training_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    train_classifier(*stripes(32, 0), num_steps=2, batch_size=16)
    assert torch.equal(torch.get_rng_state(), before)


def test_reading_does_not_depend_on_the_batch_size() -> None:
    tiles, states, axes = stripes(40, 0)
    model = train_classifier(tiles, states, axes, num_steps=3, batch_size=16)
    whole, single = read_slices(model, tiles), read_slices(model, tiles, batch_size=7)
    np.testing.assert_allclose(whole.features, single.features, rtol=1e-4, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (70, 33)])
def test_any_tile_size_is_read(shape: tuple[int, int]) -> None:
    model = SliceClassifier(3, 2).eval()
    states, axes = model(torch.rand(2, 1, *shape))
    assert (tuple(states.shape), tuple(axes.shape)) == ((2, 3), (2, 2))


def test_a_borrowed_histogram_is_the_donors_and_the_order_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    tiles, donors = torch.rand(3, 8, 8, generator=generator), torch.rand(3, 8, 8, generator=generator)
    given = give_histogram(tiles, donors, generator)
    assert torch.equal(given.flatten(1).sort(dim=1).values, donors.flatten(1).sort(dim=1).values)
    far = tiles[:, 0, 0] - tiles[:, 4, 4]
    assert torch.equal(far.sign(), (given[:, 0, 0] - given[:, 4, 4]).sign())


def test_augmented_tiles_stay_in_range_and_are_not_turned() -> None:
    generator = torch.Generator().manual_seed(0)
    wave = torch.linspace(0, 12, 32).sin().mul(0.4).add(0.5)
    tiles = wave[None, :, None].expand(40, 32, 32)
    changed = augment(tiles, generator)
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert (changed.mean(dim=2).std(dim=1) > changed.mean(dim=1).std(dim=1)).all()
