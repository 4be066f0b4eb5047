"""What an engineer would measure in a slice: grey levels, spectrum, directions, texture, phases, lengths.

Every descriptor is computed tile by tile at native scale and compared as the distribution it is: histograms by the
Wasserstein distance in grey levels, degrees or px, curves by the area between them. Nothing is learned, and no weights
are needed. Shapes: N is the number of tiles, each of t x t px.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import fft, ndimage

from eval.stats.arrays import Floats, Grey, Mask

GREY_BINS = 64
RINGS = 32
SECTORS = 18
ANGLES = 36
GLCM_LEVELS = 32
GLCM_OFFSETS = (1, 2, 4, 8)
FAMILY_DEG = 20.0
"""Directions within this of an image axis belong to the family of yarns along it."""
TENSOR_SIGMA = 3.0
"""Px over which gradients are averaged: the coherence of white noise stays below 0.2."""
PHASE_SIGMA = 1.0
"""Px of smoothing before the threshold, so that noise does not cut yarns into specks."""
PITCH_PX = (6.0, 0.75)
"""Shortest pitch that is looked for in px, and the longest as a share of the tile."""


@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """One descriptor and how two sets of tiles are compared by it.

    Attributes:
        name: its name in the results.
        unit: the unit of the distance.
        distance: a function of the values (N, ...) and weights (N,) of one set, and the values (M, ...) and weights
            (M,) of the reference.
    """

    name: str
    unit: str
    distance: Callable[[Floats, Floats, Floats, Floats], float]


def phase_threshold(tiles: Grey) -> float:
    """Return the grey level that parts yarn from matrix in real tiles (N, t, t), by Otsu on the smoothed ones."""
    from skimage.filters import threshold_otsu

    return float(threshold_otsu(_smooth(tiles)))


def phase_mask(tiles: Grey, threshold: float) -> Mask:
    """Return where tiles (N, t, t) are yarn, the brighter phase; the same threshold serves real and generated."""
    return np.asarray(_smooth(tiles) > threshold)


def describe(tiles: Grey, threshold: float) -> dict[str, Floats]:
    """Return every descriptor of tiles (N, t, t) uint8; first axis N.

    Args:
        tiles: at native scale, all of one size of at least 16 px.
        threshold: grey level between the phases, from ``phase_threshold`` of real tiles of the same state.
    """
    masks = phase_mask(tiles, threshold)
    angles, coherence = structure(tiles)
    return {
        "histogram": histogram(tiles),
        "grey_mean": tiles.mean(axis=(1, 2))[:, None],
        "grey_spread": tiles.std(axis=(1, 2))[:, None],
        "spectrum": radial_spectrum(tiles),
        "direction": directional_spectrum(tiles),
        "pitch": axis_spectra(tiles),
        "orientation": orientation(angles, coherence),
        "coherence": coherence.mean(axis=(1, 2))[:, None],
        "waviness": waviness(angles, coherence),
        "texture": texture(tiles),
        "yarn_fraction": masks.mean(axis=(1, 2))[:, None],
        "two_point": two_point(masks),
        "chords": chord_lengths(masks),
    }


def histogram(tiles: Grey) -> Floats:
    """Return the share of pixels in ``GREY_BINS`` equal bins of [0, 256), (N, bins)."""
    binned = tiles.reshape(len(tiles), -1) // (256 // GREY_BINS)
    return np.stack([np.bincount(tile, minlength=GREY_BINS) for tile in binned]) / binned.shape[1]


def radial_spectrum(tiles: Grey) -> Floats:
    """Return the power in rings of equal width from 0 to half a cycle per px, (N, rings); at most one ring a bin."""
    power, frequency, _ = _power(tiles)
    rings = min(RINGS, tiles.shape[1] // 2)
    ring = np.minimum((frequency * 2 * rings).astype(int), rings)  # the corners beyond the last ring are left out
    flat, inside = power.reshape(len(tiles), -1), ring.ravel()
    sums = np.stack([np.bincount(inside, weights=row, minlength=rings + 1) for row in flat])
    counts = np.maximum(np.bincount(inside, minlength=rings + 1), 1)
    return np.asarray((sums / counts)[:, :rings] + 1e-12)


def directional_spectrum(tiles: Grey) -> Floats:
    """Return the share of the power per direction of its wave vector, (N, sectors) over [0, 180) degrees.

    0 is along the columns' direction (a wave from left to right), 90 down the rows. The lowest and the corner
    frequencies are left out: they have no room for a direction.
    """
    power, frequency, angle = _power(tiles)
    kept = (frequency > 2.5 / tiles.shape[1]) & (frequency <= 0.5)
    sector = np.round(angle[kept] / (180 / SECTORS)).astype(int) % SECTORS
    sums = np.stack([np.bincount(sector, weights=row, minlength=SECTORS) for row in power[:, kept]])
    return np.asarray(sums / np.maximum(sums.sum(axis=1, keepdims=True), 1e-12))


def axis_spectra(tiles: Grey, places: int = 128) -> Floats:
    """Return the power along each image axis at ``places`` periods, (N, 2, places): down the rows, along the columns.

    Periods are spaced evenly in frequency between the longest and the shortest pitch looked for. It is the mean power
    of single lines, so yarns of other heights add up instead of averaging out.
    """
    frequency = 1 / pitch_periods(tiles.shape[1], places)
    window = np.hanning(tiles.shape[1] + 2)[1:-1]
    waves = np.exp(-2j * np.pi * np.outer(np.arange(tiles.shape[1]), frequency)) * window[:, None]
    spectra = []
    for lines in (tiles.transpose(0, 2, 1), tiles):  # the last axis runs along the line
        centred = lines - (lines @ window / window.sum())[..., None]
        spectra.append((np.abs(centred @ waves) ** 2).mean(axis=1))
    return np.stack(spectra, axis=1)


def pitch_periods(tile: int, places: int = 128) -> Floats:
    """Return the periods in px that ``axis_spectra`` looks at, the longest first."""
    shortest, share = PITCH_PX
    return np.asarray(1 / np.linspace(1 / (tile * share), 1 / shortest, places))


def pitch_px(spectra: Floats, tile: int) -> Floats:
    """Return the strongest period along each image axis, in px, of the mean over tiles of ``axis_spectra``, (2,).

    A spectrum that only falls has no pitch: its peak is then the longest period looked for.
    """
    mean = spectra.mean(axis=0) if spectra.ndim == 3 else spectra
    frequency = 1 / pitch_periods(tile, mean.shape[-1])
    found = []
    for power in mean:
        peak = int(power.argmax())
        offset = 0.0
        if 0 < peak < len(power) - 1:  # the vertex of the parabola through the peak and its neighbours
            left, middle, right = power[peak - 1 : peak + 2]
            offset = 0.5 * (left - right) / (left - 2 * middle + right)
        found.append(1 / (frequency[peak] + offset * (frequency[1] - frequency[0])))
    return np.array(found)


def structure(tiles: Grey) -> tuple[Floats, Floats]:
    """Return the direction of the structure in degrees in [0, 180) and its coherence in [0, 1], (N, t, t) each.

    0 is along the columns (a horizontal yarn), 90 down the rows. Source: Jaehne, Spatio-temporal image processing,
    1993: the structure tensor's eigenvectors; coherence = (l1 - l2) / (l1 + l2).
    """
    from skimage.feature import structure_tensor

    angles, coherence = [], []
    for tile in tiles:
        rows, mixed, columns = structure_tensor(tile.astype(np.float64), sigma=TENSOR_SIGMA, mode="reflect", order="rc")
        across = np.degrees(0.5 * np.arctan2(2 * mixed, columns - rows))  # of the gradient, from the columns' axis
        angles.append((across + 90) % 180)
        coherence.append(np.hypot(columns - rows, 2 * mixed) / np.maximum(rows + columns, 1e-9))
    return np.stack(angles), np.stack(coherence)


def orientation(angles: Floats, coherence: Floats) -> Floats:
    """Return the histogram of directions weighted by coherence, (N, angles) over [0, 180) degrees, summing to 1."""
    place = np.round(angles.reshape(len(angles), -1) / (180 / ANGLES)).astype(int) % ANGLES
    weight = coherence.reshape(len(angles), -1)
    pairs = zip(place, weight, strict=True)
    sums = np.stack([np.bincount(row, weights=own, minlength=ANGLES) for row, own in pairs])
    return np.asarray(sums / np.maximum(sums.sum(axis=1, keepdims=True), 1e-12))


def waviness(angles: Floats, coherence: Floats) -> Floats:
    """Return the spread in degrees of the directions near each image axis, (N, 2): along the columns, down the rows.

    The root mean square deviation within ``FAMILY_DEG`` weighted by coherence; directions spread evenly give
    ``FAMILY_DEG / sqrt(3)``. It grows with the crimp of yarns.
    """
    found = []
    for family in (0.0, 90.0):
        away = (angles - family + 90) % 180 - 90
        weight = np.where(np.abs(away) <= FAMILY_DEG, coherence, 0.0)
        total = np.maximum(weight.sum(axis=(1, 2)), 1e-12)
        found.append(np.sqrt((weight * away**2).sum(axis=(1, 2)) / total))
    return np.stack(found, axis=1)


def texture(tiles: Grey) -> Floats:
    """Return contrast, homogeneity, energy and correlation of the grey-level co-occurrence, (N, 4 x offsets).

    32 fixed levels, offsets of 1, 2, 4 and 8 px, the mean over four directions. Source: Haralick 1973.
    """
    from skimage.feature import graycomatrix, graycoprops

    angles = np.arange(4) * np.pi / 4
    found = []
    for tile in tiles // (256 // GLCM_LEVELS):
        table = graycomatrix(tile, GLCM_OFFSETS, angles, levels=GLCM_LEVELS, symmetric=True, normed=True)
        found.append(
            [graycoprops(table, name).mean(axis=1) for name in ("contrast", "homogeneity", "energy", "correlation")]
        )
    return np.array(found).reshape(len(tiles), -1)


def two_point(masks: Mask) -> Floats:
    """Return the two-point probability S2 along each image axis, (N, 2, t // 2): down the rows, along the columns.

    S2(r) is the share of pairs of pixels r apart, both inside the tile, that both are yarn; S2(0) is the fraction.
    Source: Torquato 2002, Random heterogeneous materials, section 2.2.
    """
    tile = masks.shape[1]
    lags = np.arange(tile // 2)
    curves = []
    for axis in (1, 2):
        spectrum = fft.rfft(masks.astype(np.float64), n=2 * tile, axis=axis)
        pairs = fft.irfft(np.abs(spectrum) ** 2, axis=axis)  # zero padded: no pair reaches round the edge
        summed = pairs.sum(axis=3 - axis)[:, : tile // 2]
        curves.append(summed / ((tile - lags) * tile))
    return np.stack(curves, axis=1)


def chord_lengths(masks: Mask) -> Floats:
    """Return how many chords of each length there are, (N, 2 phases, 2 axes, t + 1): yarn, matrix; rows, columns.

    A chord is an unbroken run of one phase along a line; those that touch the edge are cut short and left out.
    Source: Torquato 2002, section 2.4.
    """
    count, tile = masks.shape[:2]
    found = np.zeros((count, 2, 2, tile + 1))
    for along, lines in enumerate((masks.transpose(0, 2, 1), masks)):  # chords run along the last axis
        change = np.diff(lines, axis=2)
        number, line, place = np.nonzero(change)
        same = (number[1:] == number[:-1]) & (line[1:] == line[:-1])  # both ends of a run lie on one line
        start = tuple(index[:-1][same] for index in (number, line, place))
        length = place[1:][same] - place[:-1][same]
        phase = np.where(lines[start[0], start[1], start[2] + 1], 0, 1)
        np.add.at(found, (start[0], phase, np.full(len(length), along), length), 1)
    return found


def mean_chords_px(chords: Floats) -> Floats:
    """Return the mean chord length in px, pooled over tiles, (2 phases, 2 axes); NaN where there is none."""
    pooled = chords.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.asarray((pooled * np.arange(pooled.shape[-1])).sum(axis=-1) / pooled.sum(axis=-1))


def histogram_distance(width: float) -> Callable[[Floats, Floats, Floats, Floats], float]:
    """Return the Wasserstein distance of pooled histograms on a line, bins ``width`` wide; a mean over inner axes."""

    def distance(a: Floats, a_weights: Floats, b: Floats, b_weights: Floats) -> float:
        gap = np.cumsum(_pooled(a, a_weights) - _pooled(b, b_weights), axis=-1)
        return float(width * np.abs(gap).sum(axis=-1).mean())

    return distance


def circular_distance(width: float) -> Callable[[Floats, Floats, Floats, Floats], float]:
    """Return the Wasserstein distance of pooled histograms on a circle.

    Source: Rabin, Delon, Gousseau 2011, Transportation distances on the circle: cumulated differences about their
    median.
    """

    def distance(a: Floats, a_weights: Floats, b: Floats, b_weights: Floats) -> float:
        gap = np.cumsum(_pooled(a, a_weights) - _pooled(b, b_weights), axis=-1)
        return float(width * np.abs(gap - np.median(gap, axis=-1, keepdims=True)).sum(axis=-1).mean())

    return distance


def values_distance(a: Floats, a_weights: Floats, b: Floats, b_weights: Floats) -> float:
    """Return the Wasserstein distance of one value a tile, (N, K); the mean over the K."""
    from scipy.stats import wasserstein_distance

    pairs = zip(a.T, b.T, strict=True)
    return float(np.mean([wasserstein_distance(own, other, a_weights, b_weights) for own, other in pairs]))


def log_spectral_distance(a: Floats, a_weights: Floats, b: Floats, b_weights: Floats) -> float:
    """Return the root mean square difference of the mean spectra in decibels, (N, K)."""
    levels = [
        10 * np.log10(np.average(values, axis=0, weights=weights))
        for values, weights in ((a, a_weights), (b, b_weights))
    ]
    return float(np.sqrt(np.mean((levels[0] - levels[1]) ** 2)))


def curve_distance(a: Floats, a_weights: Floats, b: Floats, b_weights: Floats) -> float:
    """Return the mean absolute difference of the mean curves, (N, 2, K): the area between them over their length."""
    means = [np.average(values, axis=0, weights=weights) for values, weights in ((a, a_weights), (b, b_weights))]
    return float(np.abs(means[0] - means[1]).mean())


def standardised_distance(a: Floats, a_weights: Floats, b: Floats, b_weights: Floats) -> float:
    """Return the root mean square over K of the difference of means, in standard deviations of the reference."""
    first, second = (
        np.average(values, axis=0, weights=weights) for values, weights in ((a, a_weights), (b, b_weights))
    )
    spread = np.sqrt(np.average((b - second) ** 2, axis=0, weights=b_weights))
    known = spread > 1e-9
    return float(np.sqrt(np.mean(((first - second)[known] / spread[known]) ** 2))) if known.any() else 0.0


def pitch_distance(a: Floats, a_weights: Floats, b: Floats, b_weights: Floats) -> float:
    """Return the Wasserstein distance of the spectra along the axes as distributions over frequency, in cycles a px."""
    shortest, _ = PITCH_PX
    return histogram_distance(1 / (shortest * a.shape[-1]))(a, a_weights, b, b_weights)


DESCRIPTORS: tuple[Descriptor, ...] = (
    Descriptor(name="histogram", unit="grey levels", distance=histogram_distance(256 / GREY_BINS)),
    Descriptor(name="grey_mean", unit="grey levels", distance=values_distance),
    Descriptor(name="grey_spread", unit="grey levels", distance=values_distance),
    Descriptor(name="spectrum", unit="dB", distance=log_spectral_distance),
    Descriptor(name="direction", unit="degrees", distance=circular_distance(180 / SECTORS)),
    Descriptor(name="pitch", unit="1/px", distance=pitch_distance),
    Descriptor(name="orientation", unit="degrees", distance=circular_distance(180 / ANGLES)),
    Descriptor(name="coherence", unit="share", distance=values_distance),
    Descriptor(name="waviness", unit="degrees", distance=values_distance),
    Descriptor(name="texture", unit="standard deviations", distance=standardised_distance),
    Descriptor(name="yarn_fraction", unit="share", distance=values_distance),
    Descriptor(name="two_point", unit="probability", distance=curve_distance),
    Descriptor(name="chords", unit="px", distance=histogram_distance(1.0)),
)


def as_vectors(described: dict[str, Floats], names: Sequence[str] = ()) -> Floats:
    """Return the descriptors of each tile in one row, (N, D); spectra as decibels, chords as mean lengths.

    Args:
        described: as from ``describe``.
        names: descriptors to take; all of them if empty.
    """
    parts = []
    for name in names or tuple(described):
        values = described[name]
        if name in {"spectrum", "pitch"}:
            values = 10 * np.log10(values + 1e-6)
        if name == "chords":
            lengths = np.arange(values.shape[-1])
            values = (values * lengths).sum(axis=-1) / np.maximum(values.sum(axis=-1), 1)
        parts.append(values.reshape(len(values), -1))
    return np.concatenate(parts, axis=1)


def _pooled(values: Floats, weights: Floats) -> Floats:
    """Return the weighted sum over tiles, each inner histogram scaled to 1."""
    summed = np.tensordot(weights, values, axes=1)
    return np.asarray(summed / np.maximum(summed.sum(axis=-1, keepdims=True), 1e-12))


def _smooth(tiles: Grey) -> Floats:
    """Blur each tile by ``PHASE_SIGMA`` px."""
    return np.asarray(ndimage.gaussian_filter(tiles.astype(np.float64), (0, PHASE_SIGMA, PHASE_SIGMA)))


def _power(tiles: Grey) -> tuple[Floats, Floats, Floats]:
    """Return the power spectrum of windowed tiles with the frequency in cycles per px and the direction in degrees."""
    side = tiles.shape[1]
    window = np.outer(np.hanning(side + 2)[1:-1], np.hanning(side + 2)[1:-1])
    centred = (tiles - tiles.mean(axis=(1, 2), keepdims=True)) * window
    power = np.abs(fft.fft2(centred)) ** 2 / np.square(window).sum()
    down, along = np.meshgrid(fft.fftfreq(side), fft.fftfreq(side), indexing="ij")
    return power, np.hypot(down, along), np.degrees(np.arctan2(down, along)) % 180
