"""Do generated slices look like real ones, and like the slices asked for?

    python -m eval.fidelity --real data/weave --generated out/slices --output_dir out/fidelity

Trains a small classifier on the real training slices, tests it on held-out ones, and reads the generated slices with
it: does each show the state and axis of its prompt, and how far are they from held-out slices, measured by how far
real slices are from each other? No outside weights are needed; the base model named in the records gives the VAE
round trip.

And what an engineer would measure (grey levels, spectrum, directions, texture, phases, chord lengths), each in units of
how much real slices differ among themselves.

Writes results.jsonl, overview.json, confusion.png, samples.png, samples/ (the strips of each caption), descriptors/
(the curves of each caption) and config.yaml.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.errors import InputError
from configs.load import command, save
from eval.tiles.config import SlicesConfig, check_encoders

if TYPE_CHECKING:
    from data_prep.folders.results import Result
    from eval.likeness.classifier import Reading, SliceClassifier
    from eval.likeness.descriptor_rows import Compared
    from eval.likeness.rows import Head, Naming, Seen, Sets
    from eval.likeness.tile_sets import TileSets
    from eval.stats.distances import Ints
    from eval.tiles.encoders import Encoder
    from eval.tiles.features import Grey, Tiles
    from eval.tiles.sets import Generated, RealSlices

GREY_LEVELS = 2.0  # mean distance of the channels of a picture, beyond which it is not grey
MOST_FOR_THRESHOLD = 200  # tiles of a state; their pixels are enough for a threshold


@dataclass(frozen=True, kw_only=True)
class FidelityConfig:
    """Compare generated slices with held-out real ones and with their prompts."""

    slices: SlicesConfig
    output_dir: Path
    """Folder to write."""
    train_tiles: int = 400
    """Real tiles per caption that the classifier learns from."""
    held_out_tiles: int = 80
    """Held-out real tiles per caption, at least; as many as generated ones if those are more."""
    classifier_steps: int = 600
    """Updates of the classifier."""
    classify_slices: int = 0
    """Held-out slices that the model itself reads, by its loss under each caption; 0: leave it out, 45: a minute."""
    num_timesteps: int = 8
    """Noise levels of that loss."""
    encoder: dict[str, Path] = field(default_factory=dict)
    """Local encoders that compare the tiles as well: clip=DIR, dinov2=DIR; folders with safetensors."""
    torch_fidelity: bool = False
    """Add FID, KID, precision and recall by torch-fidelity, where it is installed, on the features of --encoder."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the classifier and the VAE run. Only the CPU gives the same numbers bit by bit."""
    overwrite: bool = False
    """Replace the folder if it is there."""

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to learn from or to compare."""
        for name, least in (
            ("train_tiles", 8),
            ("held_out_tiles", 2),
            ("classifier_steps", 1),
            ("classify_slices", 0),
            ("num_timesteps", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: at least {least}")
        check_encoders(self.encoder, ("clip", "dinov2"))
        if self.torch_fidelity and not self.encoder:
            raise ValueError("--torch_fidelity: measures features of an encoder; give --encoder dinov2=DIR")


def main(config: FidelityConfig) -> None:
    """Draw tiles, train the classifier, measure, judge, and publish the folder when it is whole."""
    from data_prep.folders.publish import check_free, publish
    from data_prep.folders.results import command_line, write_results
    from eval.likeness.descriptor_rows import descriptor_rows
    from eval.likeness.rows import HEADS, Naming, fidelity_rows, why_not_believed
    from eval.likeness.swaps import swap_rows
    from eval.tiles.sets import choose_tile, hashes_of, read_both

    check_free(config.output_dir, overwrite=config.overwrite, mark="results.jsonl")
    encoders = _encoders(config)
    vocabulary, real, generated = read_both(config.slices)
    tile = choose_tile(config.slices, real, generated)
    naming = Naming(states=real.states, axes=real.axes, vocabulary=vocabulary)
    drawn = draw(config, real, generated, tile)
    for note in _notes(config, real, generated, drawn, tile):
        print(note)

    from eval.likeness.classifier import train_classifier
    from eval.likeness.pictures import save_overlays, save_pictures

    truth = _truth(drawn.learning, naming)
    model = train_classifier(
        drawn.learning.pixels,
        truth["state"],
        truth["axis"],
        num_steps=config.classifier_steps,
        seed=config.slices.seed,
        device=config.device,
    )
    round_trips, no_vae, vae_hash = _round_trips(config, generated, [drawn.held_out.pixels, drawn.aside.pixels])
    sets = _read_sets(model, drawn, naming, real, round_trips, no_vae)
    rows = fidelity_rows(sets, naming, draws=config.slices.bootstrap_draws, seed=config.slices.seed)
    accuracies = [row for row in rows if row.metric.startswith("accuracy_")]
    rows += swap_rows(sets.generated, {head: why_not_believed(head, accuracies, sets, naming) for head in HEADS})
    rows += _own_reading(config, real, generated, naming)
    rows.append(coloured_row([picture.path for picture in generated.pictures]))
    compared = _describe_sets(drawn, naming, round_trips)
    draws, grey = config.slices.bootstrap_draws, sets.leak_unchecked
    rows += descriptor_rows(compared, naming, grey, draws=draws, seed=config.slices.seed)
    rows += _encoded(config, encoders, sets, drawn, round_trips, naming)
    hashes = hashes_of(config.slices, vae_hash or generated.base_hash)
    hashes |= {f"encoder {one.kind}": one.hash for one in encoders}
    rows = [replace(row, hashes=hashes, command=command_line("eval.fidelity", config)) for row in rows]

    with publish(config.output_dir, overwrite=config.overwrite, mark="results.jsonl") as folder:
        write_results(folder / "results.jsonl", rows)
        overview = save_pictures(folder, drawn, sets, round_trips[0] if round_trips else None, naming)
        overview["overlays"] = save_overlays(folder, compared, naming, drawn.held_out.pixels.shape[1])
        (folder / "overview.json").write_text(json.dumps(overview, indent=1) + "\n", encoding="utf-8")
        save(config, folder / "config.yaml")
    for line in _summary(rows):
        print(line)
    print(f"look at {config.output_dir / 'samples.png'} and {config.output_dir / 'confusion.png'}")
    results = shlex.join([str(config.slices.generated), str(config.output_dir)])
    print(f"next: python -m eval.report --results {results} --output {config.output_dir.parent / 'report.html'}")


def _encoders(config: FidelityConfig) -> list[Encoder]:
    """Load the encoders asked for, before anything is worked on."""
    if not config.encoder:
        return []
    from eval.likeness.encoder_rows import check_torch_fidelity
    from eval.tiles.encoders import load_encoder

    if config.torch_fidelity:
        check_torch_fidelity()
    return [load_encoder(kind, folder) for kind, folder in config.encoder.items()]


def _encoded(
    config: FidelityConfig,
    encoders: Sequence[Encoder],
    sets: Sets,
    drawn: TileSets,
    round_trips: Sequence[Grey],
    naming: Naming,
) -> list[Result]:
    """Compare the same tiles in the features of each encoder."""
    if not encoders:
        return []
    from eval.likeness.encoder_rows import encoder_rows

    pixels = {
        "held_out": drawn.held_out.pixels,
        "aside": drawn.aside.pixels,
        "generated_tiles": drawn.generated.pixels,
        **({"aside_vae": round_trips[1]} if round_trips else {}),
    }
    found = []
    for encoder in encoders:
        found += encoder_rows(
            encoder,
            sets,
            pixels,
            naming,
            with_torch_fidelity=config.torch_fidelity,
            draws=config.slices.bootstrap_draws,
            seed=config.slices.seed,
        )
    return found


def draw(config: FidelityConfig, real: RealSlices, generated: Generated, tile: int) -> TileSets:
    """Draw and read the tiles of every set, by seed.

    Raises:
        InputError: a caption of the dataset has nothing to learn from.
    """
    from eval.likeness.tile_sets import TileSets
    from eval.tiles.features import draw_cuts, read_tiles
    from eval.tiles.sets import generated_cuts, real_cuts

    cuts = real_cuts(real, tile)
    made = read_tiles(generated_cuts(generated.pictures, tile), tile, keep_flat=True)
    most = max(sum(cut.label == label for cut in made.cuts) for label in {cut.label for cut in made.cuts})
    each = max(config.held_out_tiles, most)
    learning = read_tiles(draw_cuts(cuts.learning, config.train_tiles, config.slices.seed), tile)
    for kind, position, names in (("state", 0, real.states), ("axis", 1, real.axes)):
        for name in names:
            if not any(cut.label[position] == name for cut in learning.cuts):
                raise InputError(
                    f"--real {config.slices.real}: no training tile of the {kind} '{name}' shows anything but one "
                    "grey level"
                )
    numbers = {picture.path: number for number, picture in enumerate(generated.pictures)}
    return TileSets(
        learning=learning,
        aside=read_tiles(draw_cuts(cuts.aside, most, config.slices.seed), tile),
        held_out=read_tiles(draw_cuts(cuts.held_out, each, config.slices.seed), tile),
        generated=made,
        owners=[numbers[cut.path] for cut in made.cuts],
    )


def _notes(config: FidelityConfig, real: RealSlices, generated: Generated, drawn: TileSets, tile: int) -> Iterable[str]:
    """Say what was left out or cannot be trusted, before the work starts."""
    shapes = sorted({(picture.height, picture.width) for picture in generated.pictures})
    yield (
        f"{len(generated.pictures)} generated slices of {', '.join(f'{h} x {w}' for h, w in shapes)} px, "
        f"{len(drawn.held_out)} held-out real tiles, {len(drawn.learning)} to learn from; "
        f"tiles of {tile} px at native scale"
    )
    if not {(row.height, row.width) for row in real.train} & set(shapes):
        yield (
            "note: real slices have another size than generated ones; both are read pixel for pixel; that is wrong if "
            "training resized its pictures: slice with --fit tile at the training size"
        )
    if generated.num_other:
        yield f"note: {generated.num_other} pictures whose prompt is not a caption of the dataset are left out"
    flat = drawn.learning.num_flat + drawn.aside.num_flat + drawn.held_out.num_flat
    if flat:
        yield f"note: {flat} real tiles of a single grey level are left out"
    if not real.validation:
        yield f"note: {_leak_unchecked(config.slices.real)}"


def _leak_unchecked(folder: Path) -> str:
    """Say what a dataset without a held-out region means."""
    return f"leak unchecked: {folder} has no validation split, so all comparisons are with what was trained on"


def _truth(tiles: Tiles, naming: Naming) -> dict[Head, Ints]:
    """Return the class numbers of the states and of the axes."""
    import numpy as np

    return {
        "state": np.array([naming.states.index(cut.label[0]) for cut in tiles.cuts], dtype=np.int64),
        "axis": np.array([naming.axes.index(cut.label[1]) for cut in tiles.cuts], dtype=np.int64),
    }


def _round_trips(config: FidelityConfig, generated: Generated, sets: Sequence[Grey]) -> tuple[list[Grey], str, str]:
    """Return the sets after the VAE with the model's hash, or nothing and why.

    Raises:
        UsageError: the model was named on the command line and cannot be loaded.
    """
    from configs.errors import UsageError
    from eval.tiles.features import vae_round_trip
    from finetune.diffusion.hashes import model_hash
    from finetune.diffusion.models import load_models

    name = config.slices.pretrained_model_name_or_path or generated.base_model
    if not name:
        return [], "no VAE round trip: the records name no base model; pass --pretrained_model_name_or_path", ""
    try:
        vae, found = load_models(name, device=config.device).vae, model_hash(name)
    except UsageError as error:
        if config.slices.pretrained_model_name_or_path:
            raise
        return [], f"no VAE round trip: {error}", ""
    if not config.slices.pretrained_model_name_or_path and generated.base_hash not in {"", found}:
        print(f"note: {name} has changed since these slices were generated; the VAE round trip is that of the new one")
    return [vae_round_trip(vae, pixels) for pixels in sets], "", found


def _read_sets(
    model: SliceClassifier, drawn: TileSets, naming: Naming, real: RealSlices, round_trips: list[Grey], no_vae: str
) -> Sets:
    """Read every set with the classifier."""
    import numpy as np

    from eval.likeness.classifier import read_slices
    from eval.likeness.rows import Seen, Sets
    from eval.tiles.features import match_histograms_to

    learned = read_slices(model, drawn.learning.pixels).features
    mean, spread = learned.mean(axis=0), learned.std(axis=0) + 1e-6

    def seen(tiles: Tiles, pixels: Grey) -> Seen:
        reading = read_slices(model, pixels)
        return Seen(
            features=(reading.features - mean) / spread,
            truth=_truth(tiles, naming),
            seen={"state": reading.states.argmax(axis=1), "axis": reading.axes.argmax(axis=1)},
            blocks=np.unique([cut.block for cut in tiles.cuts], return_inverse=True)[1].astype(np.int64),
        )

    common = drawn.learning.pixels[:: max(1, len(drawn.learning) // 128)]
    tiles = seen(drawn.generated, drawn.generated.pixels)
    return Sets(
        held_out=seen(drawn.held_out, drawn.held_out.pixels),
        held_out_matched=seen(drawn.held_out, match_histograms_to(drawn.held_out.pixels, common)),
        held_out_vae=seen(drawn.held_out, round_trips[0]) if round_trips else None,
        aside=seen(drawn.aside, drawn.aside.pixels),
        aside_vae=seen(drawn.aside, round_trips[1]) if round_trips else None,
        generated=_by_picture(tiles, read_slices(model, drawn.generated.pixels), drawn.owners),
        generated_tiles=tiles,
        no_vae=no_vae,
        leak_unchecked="" if real.validation else _leak_unchecked(real.folder),
    )


def _describe_sets(drawn: TileSets, naming: Naming, round_trips: Sequence[Grey]) -> Compared:
    """Describe every set, state by state with the threshold between its phases from the learning tiles."""
    import numpy as np

    from eval.likeness.descriptor_rows import Compared, Described
    from eval.likeness.descriptors import describe, phase_threshold

    states = np.array([cut.label[0] for cut in drawn.learning.cuts])
    threshold = {
        state: phase_threshold(drawn.learning.pixels[states == state][:MOST_FOR_THRESHOLD]) for state in naming.states
    }

    def described(tiles: Tiles, pixels: Grey) -> Described:
        truth = _truth(tiles, naming)
        parts = [np.flatnonzero(truth["state"] == number) for number in range(len(naming.states))]
        found = [
            describe(pixels[part], threshold[state])
            for state, part in zip(naming.states, parts, strict=True)
            if len(part)
        ]
        order = np.concatenate(parts).argsort()
        return Described(
            values={name: np.concatenate([part[name] for part in found])[order] for name in found[0]},
            cells=truth["state"] * 1000 + truth["axis"],
            blocks=np.unique([cut.block for cut in tiles.cuts], return_inverse=True)[1].astype(np.int64),
        )

    return Compared(
        generated=described(drawn.generated, drawn.generated.pixels),
        held_out=described(drawn.held_out, drawn.held_out.pixels),
        aside=described(drawn.aside, drawn.aside.pixels),
        vae=described(drawn.aside, round_trips[1]) if round_trips else None,
    )


def _by_picture(tiles: Seen, reading: Reading, owners: Sequence[int]) -> Seen:
    """Return one entry a picture: the class its tiles together hold most likely, the features of the first."""
    import numpy as np

    owner = np.asarray(owners)
    first = np.unique(owner, return_index=True)[1]
    pooled = [np.zeros((len(first), part.shape[1])) for part in (reading.states, reading.axes)]
    np.add.at(pooled[0], owner, reading.states)
    np.add.at(pooled[1], owner, reading.axes)
    return replace(tiles.take(first), seen={"state": pooled[0].argmax(axis=1), "axis": pooled[1].argmax(axis=1)})


def _own_reading(config: FidelityConfig, real: RealSlices, generated: Generated, naming: Naming) -> list[Result]:
    """Let the model that made the slices read held-out ones by its own loss, or say why not.

    Raises:
        UsageError, InputError: the model or an adapter of the records cannot be loaded.
    """
    import numpy as np

    from data_prep.folders.results import Result
    from eval.likeness.own_classifier import caption_losses, own_classifier_rows
    from eval.tiles.features import cover, draw_cuts, read_grey
    from eval.tiles.sets import split_cuts
    from finetune.diffusion.tuned import load_tuned
    from prompts.captions import caption

    name = config.slices.pretrained_model_name_or_path or generated.base_model
    why = "left out; ask for it with --classify_slices 45" if not config.classify_slices else ""
    why = (
        why
        or ("" if name else "the records name no model")
        or ("" if real.validation else _leak_unchecked(real.folder))
    )
    if why:
        return [
            Result(metric=f"own_classifier_{head}", set="held_out", unit="share", reason=why)
            for head in ("state", "axis")
        ]
    paths, scales = [path for path, _ in generated.adapters], [scale for _, scale in generated.adapters]
    models = load_tuned(name, paths, scales or [1.0]).models
    labels = sorted({(row.state, row.axis) for row in real.validation})
    each = max(1, config.classify_slices // len(labels))
    cuts = {
        cut.path: cut for cut in draw_cuts(split_cuts(real, "validation", real.shortest_side), each, config.slices.seed)
    }
    pictures = np.stack([cover(read_grey(path), (models.size_px, models.size_px)) for path in cuts])

    def numbers(pairs: Iterable[tuple[str, str]]) -> dict[str, Ints]:
        listed = list(pairs)
        return {
            "state": np.array([naming.states.index(state) for state, _ in listed], dtype=np.int64),
            "axis": np.array([naming.axes.index(axis) for _, axis in listed], dtype=np.int64),
        }

    captions = [caption(*label, naming.vocabulary) for label in labels]
    losses = caption_losses(models, pictures, captions, num_timesteps=config.num_timesteps, seed=config.slices.seed)
    blocks = np.unique([cut.block for cut in cuts.values()], return_inverse=True)[1].astype(np.int64)
    truth = numbers(cut.label for cut in cuts.values())
    draws = config.slices.bootstrap_draws
    return own_classifier_rows(losses, truth, numbers(labels), blocks, draws=draws, seed=config.slices.seed)


def coloured_row(paths: Sequence[Path]) -> Result:
    """Return the share of pictures that are not grey: everything else reads the mean of their channels."""
    import numpy as np
    from PIL import Image

    from data_prep.folders.results import Result

    spreads = []
    for path in paths:
        with Image.open(path) as opened:
            picture = np.asarray(opened.convert("RGB")).astype(int)
        spreads.append(float((picture.max(axis=2) - picture.min(axis=2)).mean()))
    reason = f"channels more than {GREY_LEVELS:g} grey levels apart; {np.mean(spreads):.1f} over all; shown, not judged"
    share = float(np.mean(np.array(spreads) > GREY_LEVELS))
    return Result(metric="coloured", set="generated", value=share, n=len(paths), unit="share", reason=reason)


def _summary(rows: Sequence[Result]) -> Iterable[str]:
    """Return the numbers over all captions as lines."""
    for row in rows:
        if row.prompt or row.value is None or row.set.startswith("descriptor_"):
            continue
        interval = f" [{row.low:.3f}, {row.high:.3f}]" if row.low is not None and row.high is not None else ""
        judged = "" if row.reason.startswith("reference") else f"{row.verdict}: "
        yield f"{row.metric:<22} {row.set:<17} {row.value:7.3f}{interval}  n {row.n}  {judged}{row.reason}"


if __name__ == "__main__":
    command(FidelityConfig, main)
