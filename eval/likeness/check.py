"""The steps of a likeness check, in the order that ``python -m eval.fidelity`` takes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.folders.results import Result, write_results
from eval.likeness.classified import classify_sets, learn_classes
from eval.likeness.described import DescribedSets, describe_sets
from eval.likeness.descriptor_rows import coloured_row, descriptor_rows
from eval.likeness.encoder_rows import check_torch_fidelity, encoder_rows
from eval.likeness.own_classifier import rows_by_own_loss
from eval.likeness.pictures import save_overlays, save_pictures
from eval.likeness.round_trips import RoundTrips, round_trips
from eval.likeness.rows import HEADS, ClassifiedSets, Naming, fidelity_rows, why_not_believed
from eval.likeness.swaps import swap_rows
from eval.likeness.tile_sets import TileSets, draw_tile_sets, leak_unchecked, remarks
from eval.tiles.config import SlicesConfig
from eval.tiles.encoders import Encoder, load_encoders
from eval.tiles.sets import Generated, RealSlices, hashes_of, read_both


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared: the settings, both folders of slices, the names of the classes, the tiles, the encoders."""

    slices: SlicesConfig
    real: RealSlices
    generated: Generated
    naming: Naming
    tiles: TileSets
    encoders: Sequence[Encoder]

    @property
    def remarks(self) -> Iterable[str]:
        """How much is compared, what was left out, and what cannot be trusted, a line each."""
        return remarks(self.real, self.generated, self.tiles)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The tiles after the VAE, as the classifier reads them, and as descriptors."""

    through_vae: RoundTrips
    classified: ClassifiedSets
    described: DescribedSets


def compare(
    slices: SlicesConfig,
    encoders: Mapping[str, Path],
    *,
    with_torch_fidelity: bool,
    train_tiles: int,
    held_out_tiles: int,
) -> Comparison:
    """Load the encoders, read both folders and draw the tiles.

    Args:
        slices: both folders as they were named, and how tiles are drawn.
        encoders: folders of local networks by kind.
        with_torch_fidelity: whether torch-fidelity will be asked, and must be there.
        train_tiles: real tiles of a caption that the classifier learns from, at most.
        held_out_tiles: held-out tiles of a caption, at least.

    Raises:
        InputError, NothingLeftError: a folder cannot be read, or leaves nothing to compare.
        UsageError: a folder is not readable as its encoder, or torch-fidelity cannot run.
    """
    if with_torch_fidelity:
        check_torch_fidelity()
    loaded = load_encoders(encoders)
    vocabulary, real, generated = read_both(slices)
    return Comparison(
        slices=slices,
        real=real,
        generated=generated,
        naming=Naming(states=real.states, axes=real.axes, vocabulary=vocabulary),
        tiles=draw_tile_sets(slices, real, generated, train_tiles=train_tiles, held_out_tiles=held_out_tiles),
        encoders=loaded,
    )


def measure(this: Comparison, *, classifier_steps: int, device: str) -> Measured:
    """Train the classifier, send real tiles through the VAE, and read and describe every set.

    Raises:
        UsageError: the model was named on the command line and cannot be loaded.
    """
    model = learn_classes(this.tiles, this.naming, num_steps=classifier_steps, seed=this.slices.seed, device=device)
    through = round_trips(this.slices, this.generated, this.tiles, device=device)
    classified = classify_sets(model, this.tiles, this.naming, through, leak_unchecked(this.real))
    return Measured(
        through_vae=through,
        classified=classified,
        described=describe_sets(this.tiles, this.naming, through),
    )


def rows_by_tiles(this: Comparison, measured: Measured) -> list[Result]:
    """Return what the classifier reads, as judged numbers, and what one word of a prompt changes."""
    sets, draws, seed = measured.classified, this.slices.bootstrap_draws, this.slices.seed
    rows = fidelity_rows(sets, this.naming, draws=draws, seed=seed)
    accuracies = [row for row in rows if row.metric.startswith("accuracy_")]
    believed = {head: why_not_believed(head, accuracies, sets, this.naming) for head in HEADS}
    return rows + swap_rows(sets.generated, believed)


def rows_by_model(this: Comparison, *, num_slices: int, num_timesteps: int) -> list[Result]:
    """Return how well the model itself reads held-out slices, by its own loss."""
    return rows_by_own_loss(
        this.slices, this.real, this.generated, this.naming, num_slices=num_slices, num_timesteps=num_timesteps
    )


def rows_by_descriptors(this: Comparison, measured: Measured) -> list[Result]:
    """Return the share of coloured pictures, and the distances of the descriptors."""
    draws, seed = this.slices.bootstrap_draws, this.slices.seed
    grey = measured.classified.leak_unchecked
    return [
        coloured_row([picture.path for picture in this.generated.pictures]),
        *descriptor_rows(measured.described, this.naming, grey, draws=draws, seed=seed),
    ]


def rows_by_encoders(this: Comparison, measured: Measured, *, with_torch_fidelity: bool) -> list[Result]:
    """Compare the same tiles in the features of each encoder."""
    through = {} if measured.through_vae.aside is None else {"aside_vae": measured.through_vae.aside}
    tiles = this.tiles
    pixels = {
        "held_out": tiles.held_out.pixels,
        "aside": tiles.aside.pixels,
        "generated_tiles": tiles.generated.pixels,
        **through,
    }
    rows = []
    for encoder in this.encoders:
        rows += encoder_rows(
            encoder,
            measured.classified,
            pixels,
            this.naming,
            with_torch_fidelity=with_torch_fidelity,
            draws=this.slices.bootstrap_draws,
            seed=this.slices.seed,
        )
    return rows


def hashes(this: Comparison, measured: Measured) -> dict[str, str]:
    """Return the hashes of everything that the rows depend on."""
    found = hashes_of(this.slices, measured.through_vae.model_hash or this.generated.base_hash)
    return found | {f"encoder {one.kind}": one.hash for one in this.encoders}


def save_check(folder: Path, rows: Sequence[Result], this: Comparison, measured: Measured) -> None:
    """Write the rows, the pictures, and what the pictures show."""
    write_results(folder / "results.jsonl", rows)
    overview = save_pictures(folder, this.tiles, measured.classified, measured.through_vae.held_out, this.naming)
    tile = this.tiles.held_out.pixels.shape[1]
    overview["overlays"] = save_overlays(folder, measured.described, this.naming, tile)
    (folder / "overview.json").write_text(json.dumps(overview, indent=1) + "\n", encoding="utf-8")


def summary(rows: Sequence[Result]) -> Iterable[str]:
    """Return the numbers over all captions as lines."""
    for row in rows:
        if row.prompt or row.value is None or row.set.startswith("descriptor_"):
            continue
        interval = f" [{row.low:.3f}, {row.high:.3f}]" if row.low is not None and row.high is not None else ""
        judged = "" if row.reason.startswith("reference") else f"{row.verdict}: "
        yield f"{row.metric:<22} {row.set:<17} {row.value:7.3f}{interval}  n {row.n}  {judged}{row.reason}"
