from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from configs.errors import UsageError
from data_prep.slicing.split import Region, correlation_length, cut_region


def cut(length: int, *, tile: int = 0, correlation: int = 1, guard: int | None = None) -> Region:
    return cut_region(
        2,
        length,
        tile=tile,
        fraction=0.15,
        correlation=correlation,
        guard_voxels=guard,
        who="--split region: volume 'dry'",
    )


def smooth(sigma: float, *, white: float = 0.0) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    planes = gaussian_filter1d(rng.normal(size=(8, 60, 600)), sigma, axis=2) if sigma else rng.normal(size=(8, 60, 600))
    return list(planes / planes.std() + rng.normal(0, white, planes.shape))


@pytest.mark.parametrize("sigma", [3, 6, 12])
def test_the_correlation_length_of_smoothed_noise_is_that_of_its_kernel(sigma: int) -> None:
    # White noise smoothed by a Gaussian has the correlation exp(-lag^2 / (4 sigma^2)): 1/e at lag 2 sigma.
    assert correlation_length(smooth(sigma)) == pytest.approx(2 * sigma, abs=1.5)


def test_white_noise_on_top_does_not_shorten_it() -> None:
    assert correlation_length(smooth(6, white=1.5)) == pytest.approx(12, abs=2)


def test_pure_white_noise_has_the_shortest() -> None:
    assert correlation_length(smooth(0)) == 1


def test_layers_and_shading_do_not_lengthen_it() -> None:
    planes = [plane + 20 * np.arange(60)[:, None] + np.linspace(-30, 30, 600) ** 2 for plane in smooth(6)]
    assert correlation_length(planes) == pytest.approx(12, abs=2)


def test_a_constant_plane_has_the_shortest() -> None:
    assert correlation_length([np.ones((5, 40))]) == 1


@pytest.mark.parametrize(
    ("length", "tile", "correlation", "guard", "held_out"),
    [
        (1000, 0, 1, 20, 150),  # 2 % and 15 %
        (1000, 0, 30, 90, 150),  # 3 correlation lengths
        (1000, 256, 1, 20, 320),  # a tile and a quarter of it
        (1000, 64, 1, 20, 150),
    ],
)
def test_guard_and_held_out_part_follow_the_rule(
    length: int, tile: int, correlation: int, guard: int, held_out: int
) -> None:
    region = cut(length, tile=tile, correlation=correlation)
    assert region.validation == (length - held_out, length)
    assert region.guard == (length - held_out - guard, length - held_out)
    assert region.train == (0, length - held_out - guard)


def test_a_guard_by_hand_replaces_the_measured_one() -> None:
    assert cut(1000, correlation=200, guard=7).guard == (843, 850)


@pytest.mark.parametrize(
    ("length", "tile", "correlation", "numbers"),
    [
        (100, 64, 1, ["100 voxels", "80 held out", "guard of 3", "leave 17"]),
        (1000, 0, 300, ["150 held out", "guard of 900", "300", "leave 0"]),
        (500, 200, 1, ["250 held out", "leave 240"]),
    ],
)
def test_a_volume_too_small_for_the_split_is_refused_with_the_numbers(
    length: int, tile: int, correlation: int, numbers: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        cut(length, tile=tile, correlation=correlation)
    assert all(number in str(caught.value) for number in ["--split region", "'dry'", *numbers])
