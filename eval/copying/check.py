"""The steps of a search for copies, in the order that ``python -m eval.memorization`` takes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.folders.results import Result, write_results
from eval.copying.loss_gap import loss_gap
from eval.copying.models import TunedAndBase, load_tuned_and_base
from eval.copying.pictures import save_distances, save_gallery
from eval.copying.rows import Searched, memorization_rows, split_audit
from eval.copying.search import search
from eval.copying.tile_sets import MostTiles, SearchTiles, draw_search_tiles, num_trained
from eval.tiles.config import SlicesConfig
from eval.tiles.encoders import Encoder, load_encoders
from eval.tiles.sets import Generated, RealSlices, hashes_of, read_both
from prompts.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared: the settings, both folders of slices, what was trained on, and the tiles.

    Attributes:
        slices: both folders as they were named, and how tiles are drawn.
        real: the slices of the dataset.
        generated: the generated slices.
        vocabulary: the words of the captions.
        train_data_dir: folder that the model was trained on, if that is not all of the training split.
        tiles: the tiles of every set.
        encoders: local networks that search as well.
    """

    slices: SlicesConfig
    real: RealSlices
    generated: Generated
    vocabulary: Vocabulary
    train_data_dir: Path | None
    tiles: SearchTiles
    encoders: Sequence[Encoder]


def compare(
    slices: SlicesConfig,
    train_data_dir: Path | None,
    encoders: Mapping[str, Path],
    *,
    reference_tiles: int,
    held_out_tiles: int,
    generated_tiles: int,
) -> Comparison:
    """Read both folders, load the encoders and draw the tiles.

    Args:
        slices: both folders as they were named, and how tiles are drawn.
        train_data_dir: folder that the model was trained on, if that is not all of the training split.
        encoders: folders of local networks by kind.
        reference_tiles: training tiles of a caption that are searched, at most.
        held_out_tiles: held-out tiles of a caption, at most.
        generated_tiles: generated tiles of a caption, at most.

    Raises:
        InputError, NothingLeftError: a folder cannot be read, or leaves nothing to compare.
        UsageError: a folder is not readable as its encoder.
    """
    vocabulary, real, generated = read_both(slices)
    loaded = load_encoders(encoders)
    most = MostTiles(reference=reference_tiles, held_out=held_out_tiles, generated=generated_tiles)
    return Comparison(
        slices=slices,
        real=real,
        generated=generated,
        vocabulary=vocabulary,
        train_data_dir=train_data_dir,
        tiles=draw_search_tiles(slices, real, generated, vocabulary, train_data_dir, most),
        encoders=loaded,
    )


def load_behind(this: Comparison, adapters: Sequence[Path], base: str | None) -> tuple[TunedAndBase | None, str]:
    """Load the model that made the slices, or say why not.

    Raises:
        UsageError, InputError: a model or adapter was named on the command line and cannot be loaded.
    """
    return load_tuned_and_base(this.slices, this.generated, adapters, base)


def seek(this: Comparison, model: TunedAndBase | None, *, copy_net_steps: int) -> Searched:
    """Search every set with every detector."""
    tuned = model.tuned if model else None
    return search(this.slices, this.tiles, tuned, this.vocabulary, this.encoders, copy_net_steps=copy_net_steps)


def judge(
    this: Comparison,
    searched: Searched,
    model: TunedAndBase | None,
    no_model: str,
    *,
    loss_slices: int,
    num_timesteps: int,
) -> list[Result]:
    """Return every number of the check, the verdict first.

    Args:
        this: what is compared.
        searched: what the detectors found.
        model: the model behind the slices, for its loss.
        no_model: why there is none.
        loss_slices: slices of either split whose loss is compared; 0 leaves it out.
        num_timesteps: noise levels of that loss.
    """
    gap, why_not = None, no_model
    if model is not None:
        gap, why_not = loss_gap(
            this.slices,
            this.real,
            model,
            this.vocabulary,
            this.train_data_dir,
            num_slices=loss_slices,
            num_timesteps=num_timesteps,
        )
    return memorization_rows(
        searched,
        audit=split_audit(this.slices.real),
        loss_gap=gap,
        no_model=why_not,
        num_trained=num_trained(this.real, this.train_data_dir),
        draws=this.slices.bootstrap_draws,
        seed=this.slices.seed,
    )


def hashes(this: Comparison) -> dict[str, str]:
    """Return the hashes of everything that the rows depend on."""
    found = hashes_of(this.slices, this.generated.base_hash, this.train_data_dir)
    return found | {f"encoder {one.kind}": one.hash for one in this.encoders}


def save_check(folder: Path, rows: Sequence[Result], this: Comparison, searched: Searched, gallery: int) -> None:
    """Write the rows, the closest pairs with what they show, and the distances."""
    boxes = {row.file_name: row.box for row in (*this.real.train, *this.real.validation)}
    write_results(folder / "results.jsonl", rows)
    shown = save_gallery(folder, searched, boxes, gallery)
    (folder / "gallery.json").write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    save_distances(folder / "distances.png", searched)


def summary(rows: Sequence[Result]) -> Iterable[str]:
    """Return the numbers over all captions as lines, the verdict last."""
    for row in (*rows[1:], rows[0]):
        if row.prompt:
            continue
        value = "      -" if row.value is None else f"{row.value:7.3f}"
        interval = f" [{row.low:.3f}, {row.high:.3f}]" if row.low is not None and row.high is not None else ""
        yield f"{row.metric:<22} {row.set:<10} {value}{interval}  n {row.n}  {row.verdict}: {row.reason}"
