"""Every set of tiles as the slice classifier reads it, with what was true of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from eval.likeness.classifier import Reading, SliceClassifier, read_slices, train_classifier
from eval.likeness.round_trips import RoundTrips
from eval.likeness.rows import Classified, ClassifiedSets, Naming
from eval.likeness.tile_sets import TileSets, block_numbers, class_numbers
from eval.stats.arrays import Grey
from eval.tiles.features import Tiles, match_histograms_to

TILES_OF_ONE_HISTOGRAM = 128
"""Learning tiles whose grey levels together are the one histogram of the control."""


def learn_classes(tiles: TileSets, naming: Naming, *, num_steps: int, seed: int, device: str) -> SliceClassifier:
    """Train the classifier on the learning tiles."""
    truth = class_numbers((cut.label for cut in tiles.learning.cuts), naming)
    return train_classifier(
        tiles.learning.pixels, truth["state"], truth["axis"], num_steps=num_steps, seed=seed, device=device
    )


def classify_sets(
    model: SliceClassifier, tiles: TileSets, naming: Naming, through: RoundTrips, leak_unchecked: str
) -> ClassifiedSets:
    """Read every set with the classifier.

    Args:
        model: the trained classifier.
        tiles: the sets.
        naming: names of the classes, in the order of the classifier's heads.
        through: real tiles after the VAE round trip.
        leak_unchecked: why nothing may be judged; empty if it may.
    """
    learned = read_slices(model, tiles.learning.pixels).features
    mean, spread = learned.mean(axis=0), learned.std(axis=0) + 1e-6

    def classified(part: Tiles, pixels: Grey) -> Classified:
        reading = read_slices(model, pixels)
        return Classified(
            features=(reading.features - mean) / spread,
            truth=class_numbers((cut.label for cut in part.cuts), naming),
            predicted={"state": reading.states.argmax(axis=1), "axis": reading.axes.argmax(axis=1)},
            blocks=block_numbers(cut.block for cut in part.cuts),
        )

    common = tiles.learning.pixels[:: max(1, len(tiles.learning) // TILES_OF_ONE_HISTOGRAM)]
    generated = classified(tiles.generated, tiles.generated.pixels)
    return ClassifiedSets(
        held_out=classified(tiles.held_out, tiles.held_out.pixels),
        held_out_matched=classified(tiles.held_out, match_histograms_to(tiles.held_out.pixels, common)),
        held_out_vae=None if through.held_out is None else classified(tiles.held_out, through.held_out),
        aside=classified(tiles.aside, tiles.aside.pixels),
        aside_vae=None if through.aside is None else classified(tiles.aside, through.aside),
        generated=_by_picture(generated, read_slices(model, tiles.generated.pixels), tiles.owners),
        generated_tiles=generated,
        no_vae=through.why_missing,
        leak_unchecked=leak_unchecked,
    )


def _by_picture(tiles: Classified, reading: Reading, owners: Sequence[int]) -> Classified:
    """Return one entry a picture: the class its tiles together hold most likely, the features of the first."""
    owner = np.asarray(owners)
    first = np.unique(owner, return_index=True)[1]
    pooled = [np.zeros((len(first), part.shape[1])) for part in (reading.states, reading.axes)]
    np.add.at(pooled[0], owner, reading.states)
    np.add.at(pooled[1], owner, reading.axes)
    return replace(tiles.take(first), predicted={"state": pooled[0].argmax(axis=1), "axis": pooled[1].argmax(axis=1)})
