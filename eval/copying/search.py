"""Every set of tiles searched by every detector, and tiles of one caption compared with each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from eval.copying.copies import Matches, best_matches, planted
from eval.copying.copy_net import net_matches, train_copy_net
from eval.copying.encoder_matches import matcher
from eval.copying.rows import Agreement, Detector, Searched, Side
from eval.copying.tile_sets import SearchTiles
from eval.stats.arrays import Floats, Grey, Ints
from eval.tiles.config import SlicesConfig
from eval.tiles.encoders import Encoder, unit
from eval.tiles.features import Tiles
from finetune.diffusion.models import Models
from finetune.diffusion.vae import round_trip
from prompts.captions import caption
from prompts.vocabulary import Vocabulary

Finder = Callable[[Grey, Grey], Matches]

SHIFT_PX = 8
PLANTED = 32
PLANTED_NOISE = 4.0
"""Grey levels of noise put on planted copies after the VAE."""
SMALLEST_LEARNING = 48
"""Fewer training tiles than this are too few for the copy network."""
AGREEMENT_TILES = 24
"""Tiles of a caption that are compared with each other."""


@dataclass(frozen=True, kw_only=True)
class Sought:
    """Tiles that are searched for: their grey values (N, t, t), numbers of captions (N,) and of blocks (N,)."""

    pixels: Grey
    cells: Ints
    blocks: Ints

    def __len__(self) -> int:
        return len(self.cells)


def search(
    slices: SlicesConfig,
    tiles: SearchTiles,
    models: Models | None,
    vocabulary: Vocabulary,
    encoders: Sequence[Encoder],
    *,
    copy_net_steps: int,
) -> Searched:
    """Search every set with every detector.

    Args:
        slices: what is compared; its seed draws the planted copies and trains the network.
        tiles: the sets.
        models: the model behind the generated slices, whose VAE real tiles go through; None if it is unknown.
        vocabulary: the words of the captions.
        encoders: networks that search as well.
        copy_net_steps: updates of the copy network; 0 leaves it out.
    """
    labels = sorted({cut.label for cut in tiles.reference.cuts})

    def through_vae(pixels: Grey) -> Grey:
        return round_trip(models.vae, pixels) if models is not None and len(pixels) else pixels

    reference, held_out, generated = (
        _sought(part, part.pixels, labels) for part in (tiles.reference, tiles.held_out, tiles.generated)
    )
    # A generated tile has been through the VAE: held-out ones must lose the same grain before they are compared.
    held_out = Sought(pixels=through_vae(held_out.pixels), cells=held_out.cells, blocks=held_out.blocks)
    sides = {
        "generated": generated,
        "held_out": held_out,
        "planted": _plant(reference, through_vae, seed=slices.seed),
    }
    finders, cosines = _finders(slices, tiles, encoders, copy_net_steps)
    notes = [] if models else ["no VAE: real tiles and planted copies are compared as scanned"]
    if not len(held_out):
        finders = {}
        notes.append(f"leak unchecked: {slices.real} has no validation split")
        real = Sought(pixels=through_vae(reference.pixels), cells=reference.cells, blocks=reference.blocks)
    else:
        real = held_out
    return Searched(
        reference=tiles.reference,
        generated=tiles.generated,
        held_out=tiles.held_out,
        captions=tuple(caption(*label, vocabulary) for label in labels),
        detectors=tuple(_detectors(finders, sides, reference)),
        agreement=_agreement(generated, real),
        sscd_cosines=cosines,
        notes=tuple(notes),
    )


def _sought(tiles: Tiles, pixels: Grey, labels: Sequence[tuple[str, str]]) -> Sought:
    """Return tiles with the numbers of their captions and blocks."""
    return Sought(
        pixels=pixels,
        cells=np.array([labels.index(cut.label) for cut in tiles.cuts], dtype=np.int64),
        blocks=np.unique([cut.block for cut in tiles.cuts], return_inverse=True)[1].astype(np.int64),
    )


def _plant(reference: Sought, through_vae: Callable[[Grey], Grey], *, seed: int) -> Sought:
    """Return copies of training tiles as a generator would make them: moved, through the VAE, and noisy."""
    random = np.random.default_rng(seed)
    chosen = random.choice(len(reference), PLANTED, replace=len(reference) < PLANTED)
    noise = random.normal(0, PLANTED_NOISE, (PLANTED, *reference.pixels.shape[1:]))
    copies = through_vae(planted(reference.pixels[chosen], SHIFT_PX)) + noise
    return Sought(
        pixels=copies.round().clip(0, 255).astype(np.uint8),
        cells=reference.cells[chosen],
        blocks=np.arange(PLANTED, dtype=np.int64),
    )


def _finders(
    slices: SlicesConfig, tiles: SearchTiles, encoders: Sequence[Encoder], copy_net_steps: int
) -> tuple[dict[str, Finder], Floats | None]:
    """Return what searches, by name, and the cosines of generated tiles to the nearest training tile by the encoder."""
    reference = tiles.reference.pixels
    finders: dict[str, Finder] = {"ncc": best_matches}
    if copy_net_steps and len(reference) >= SMALLEST_LEARNING:
        net = train_copy_net(reference, num_steps=copy_net_steps, shift_px=SHIFT_PX, seed=slices.seed)
        finders["copy_net"] = lambda queries, references: net_matches(net, queries, references)
    cosines = None
    for encoder in encoders:
        vectors = unit(encoder.images(reference))
        finders[encoder.kind] = matcher(encoder, vectors.mean(axis=0))
        cosines = (unit(encoder.images(tiles.generated.pixels)) @ vectors.T).max(axis=1)
    return finders, cosines


def _detectors(finders: Mapping[str, Finder], sides: Mapping[str, Sought], reference: Sought) -> Iterator[Detector]:
    """Yield what each finder found in every side."""
    for name, find in finders.items():
        found = {key: _within_captions(find, side, reference, f"{name}, {key}") for key, side in sides.items()}
        yield Detector(name=name, **found)


def _within_captions(find: Finder, sought: Sought, reference: Sought, progress: str) -> Side:
    """Find the best training tile of the same caption for every tile."""
    count = len(sought)
    similarity, index, symmetry = np.zeros(count), *np.zeros((2, count), dtype=np.int64)
    offset = np.zeros((count, 2), dtype=np.int64)
    for cell in tqdm(np.unique(sought.cells), desc=progress, unit="caption", disable=None):
        mine, theirs = np.flatnonzero(sought.cells == cell), np.flatnonzero(reference.cells == cell)
        found = find(sought.pixels[mine], reference.pixels[theirs])
        similarity[mine], index[mine] = found.similarity, theirs[found.index]
        symmetry[mine], offset[mine] = found.symmetry, found.offset
    matches = Matches(similarity=similarity, index=index, symmetry=symmetry, offset=offset)
    return Side(matches=matches, cells=sought.cells, blocks=sought.blocks)


def _agreement(generated: Sought, real: Sought) -> Agreement:
    """Compare tiles of one caption with each other: other seeds, or other slabs; as many real ones as generated."""
    found: list[list[Floats]] = [[], []]
    for cell in np.unique(generated.cells):
        chosen = [np.flatnonzero(side.cells == cell) for side in (generated, real)]
        count = min(AGREEMENT_TILES, *map(len, chosen))
        for part, side, members in zip(found, (generated, real), chosen, strict=True):
            own = members[:count]
            if len(np.unique(side.blocks[own])) > 1:
                part.append(
                    best_matches(side.pixels[own], side.pixels[own], side.blocks[own], side.blocks[own]).similarity
                )
    joined = [np.concatenate(part) if part else np.zeros(0) for part in found]
    return Agreement(generated=joined[0], real=joined[1])
