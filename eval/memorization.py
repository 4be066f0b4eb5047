"""Are generated slices copies of training slices?

    python -m eval.memorization --real data/weave --generated out/slices --output_dir out/memorization

A copy is a tile that is closer to the training slices than held-out real tiles are, beyond the quantile they set; with
a periodic weave resemblance alone proves nothing. Two detectors look for shifted, flipped and turned copies: one by
correlation, one by a small network trained on the training slices. Each is shown 32 planted copies and the held-out
tiles it was not calibrated on; a detector that misses the planted ones is called blind. Two more signs need no search:
seeds that agree with each other more than real tiles do, and a loss that is lower on what was trained on.

Writes results.jsonl, gallery.json, gallery/ (the closest pairs), distances.png and config.yaml.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import InputError
from configs.load import Repeatable, command, save
from eval.tiles.config import SMALLEST_TILE, SlicesConfig, check_encoders

if TYPE_CHECKING:
    from collections.abc import Callable

    from data_prep.folders.results import Result
    from eval.copying.copies import Matches
    from eval.copying.rows import Agreement, LossGap, Searched, Side
    from eval.stats.distances import Floats, Ints
    from eval.tiles.encoders import Encoder
    from eval.tiles.features import Cut, Grey, Tiles
    from eval.tiles.sets import Generated, RealSlices
    from finetune.diffusion.models import Models
    from prompts.vocabulary import Vocabulary

    Finder = Callable[[Grey, Grey], Matches]
    TileSet = tuple[Grey, Ints, Ints]

SHIFT_PX = 8
PLANTED = 32
PLANTED_NOISE = 4.0
"""Grey levels of noise put on planted copies after the VAE."""
SMALLEST_LEARNING = 48
"""Fewer training tiles than this are too few for the copy network."""
AGREEMENT_TILES = 24
"""Tiles of a caption that are compared with each other."""


@dataclass(frozen=True, kw_only=True)
class MemorizationConfig:
    """Look for copies of training slices among generated ones."""

    slices: SlicesConfig
    output_dir: Path
    """Folder to write."""
    train_data_dir: Path | None = None
    """What the model was trained on, if that is not all of train/: a folder of few slices, with its metadata.jsonl."""
    adapter: Repeatable[tuple[Path, ...]] = ()
    """Adapters behind the slices. Default: those named in the records."""
    base: str | None = None
    """What a tuned pipeline folder came from, for its loss to be compared with."""
    reference_tiles: int = 400
    """Training tiles per caption that are searched."""
    held_out_tiles: int = 80
    """Held-out real tiles per caption."""
    generated_tiles: int = 80
    """Generated tiles per caption, at most."""
    copy_net_steps: int = 300
    """Updates of the copy network; 0 leaves it out."""
    encoder: dict[str, Path] = field(default_factory=dict)
    """Local network that looks for copies as well: sscd=DIR, a folder with safetensors."""
    loss_slices: int = 48
    """Training and held-out slices each whose loss is compared; 0 leaves it out."""
    num_timesteps: int = 8
    """Noise levels of that loss."""
    gallery: int = 20
    """Closest pairs to show."""
    overwrite: bool = False
    """Replace the folder if it is there."""

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to compare."""
        for name, least in (
            ("reference_tiles", 1),
            ("held_out_tiles", 4),
            ("generated_tiles", 1),
            ("copy_net_steps", 0),
            ("loss_slices", 0),
            ("num_timesteps", 1),
            ("gallery", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: at least {least}")
        check_encoders(self.encoder, ("sscd",))


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The tiles of one check; ``reference`` are those searched, of what the model was trained on."""

    reference: Tiles
    held_out: Tiles
    generated: Tiles


def main(config: MemorizationConfig) -> None:
    """Draw tiles, search them, test the detectors, and publish the folder when it is whole."""
    from data_prep.folders.publish import check_free, publish
    from data_prep.folders.results import command_line, write_results
    from eval.copying.rows import memorization_rows, split_audit
    from eval.tiles.sets import hashes_of, read_both

    check_free(config.output_dir, overwrite=config.overwrite, mark="results.jsonl")
    vocabulary, real, generated = read_both(config.slices)
    encoders = _encoders(config)
    drawn = draw(config, real, generated, vocabulary)
    print(
        f"{len(drawn.generated)} generated tiles, {len(drawn.reference)} training tiles to search, "
        f"{len(drawn.held_out)} held-out ones, of {drawn.reference.pixels.shape[1]} px"
    )

    from eval.copying.pictures import save_distances, save_gallery

    model, no_model = _load(config, generated)
    searched = _search(config, drawn, model.tuned if model else None, vocabulary, encoders)
    gap, why_not = (None, no_model) if model is None else _loss_gap(config, real, model, vocabulary)
    rows = memorization_rows(
        searched,
        audit=split_audit(config.slices.real),
        loss_gap=gap,
        no_model=why_not,
        num_trained=_num_trained(config, real),
        draws=config.slices.bootstrap_draws,
        seed=config.slices.seed,
    )
    hashes = hashes_of(config.slices, generated.base_hash, config.train_data_dir)
    hashes |= {f"encoder {one.kind}": one.hash for one in encoders}
    rows = [replace(row, hashes=hashes, command=command_line("eval.memorization", config)) for row in rows]
    with publish(config.output_dir, overwrite=config.overwrite, mark="results.jsonl") as folder:
        write_results(folder / "results.jsonl", rows)
        shown = save_gallery(folder, searched, _boxes(real), config.gallery)
        (folder / "gallery.json").write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
        save_distances(folder / "distances.png", searched)
        save(config, folder / "config.yaml")
    for line in _summary(rows):
        print(line)
    print(f"look at {config.output_dir / 'gallery'} and {config.output_dir / 'distances.png'}")
    results = shlex.join([str(config.slices.generated), str(config.output_dir)])
    print(f"next: python -m eval.report --results {results} --output {config.output_dir.parent / 'report.html'}")


def draw(config: MemorizationConfig, real: RealSlices, generated: Generated, vocabulary: Vocabulary) -> Drawn:
    """Draw and read the tiles of every set, by seed; captions without training tiles are left out.

    Raises:
        InputError: the tile does not fit, or nothing is left of the training slices.
    """
    from eval.tiles.features import draw_cuts, read_tiles
    from eval.tiles.sets import choose_tile, generated_cuts, split_cuts

    tile = choose_tile(config.slices, real, generated)
    learned = split_cuts(real, "train", tile)
    if config.train_data_dir is not None:
        learned = few_cuts(config.train_data_dir, vocabulary, tile)
    reference = read_tiles(draw_cuts(learned, config.reference_tiles, config.slices.seed), tile)
    labels = {cut.label for cut in reference.cuts}

    def drawn(cuts: Sequence[Cut], count: int, *, keep_flat: bool) -> Tiles:
        kept = [cut for cut in cuts if cut.label in labels]
        return read_tiles(draw_cuts(kept, count, config.slices.seed), tile, keep_flat=keep_flat)

    made = drawn(generated_cuts(generated.pictures, tile), config.generated_tiles, keep_flat=True)
    if not len(reference) or not len(made):
        raise InputError(f"--generated {config.slices.generated}: no picture has a caption of the training slices")
    held_out = drawn(split_cuts(real, "validation", tile), config.held_out_tiles, keep_flat=False)
    return Drawn(reference=reference, held_out=held_out, generated=made)


def few_cuts(folder: Path, vocabulary: Vocabulary, tile: int) -> list[Cut]:
    """Return the tiles of a folder of few training slices, whose captions are those of the dataset.

    Raises:
        InputError: no readable rows, a picture outside the folder, or no caption of the dataset.
    """
    from PIL import Image

    from data_prep.folders.manifest import METADATA_NAME, is_inside, read_records
    from eval.tiles.features import Cut, tile_corners
    from prompts.captions import parse_caption

    cuts = []
    for number, record in read_records(folder / METADATA_NAME):
        name = str(record.get("file_name"))
        if not is_inside(name) or not (folder / name).is_file():
            raise InputError(f"{folder / METADATA_NAME}:{number}: no file_name inside this folder")
        label = parse_caption(str(record.get("text")), vocabulary)
        if label is None and isinstance(record.get("state"), str) and isinstance(record.get("axis"), str):
            label = str(record["state"]), str(record["axis"])
        if label is None:
            continue
        with Image.open(folder / name) as picture:
            width, height = picture.size
        if min(width, height) >= tile:
            cuts += [
                Cut(path=folder / name, row=row, column=column, label=label, block=f"{name} {row} {column}")
                for row, column in tile_corners(height, width, tile)
            ]
    if not cuts:
        raise InputError(f"--train_data_dir {folder}: no slice of at least {tile} px whose caption the dataset has")
    return cuts


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model behind the slices; ``base`` is the same object where adapters can be switched off, None if unknown."""

    tuned: Models
    base: Models | None


def _load(config: MemorizationConfig, generated: Generated) -> tuple[Model | None, str]:
    """Load the model that made the slices, or say why not.

    Raises:
        UsageError, InputError: a model or adapter was named on the command line and cannot be loaded.
    """
    from configs.errors import TisserandError
    from finetune.diffusion.hashes import model_hash
    from finetune.diffusion.tuned import load_tuned

    name = config.slices.pretrained_model_name_or_path or generated.base_model
    if not name:
        return None, "the records name no model; pass --pretrained_model_name_or_path"
    typed = bool(config.slices.pretrained_model_name_or_path or config.adapter or config.base)
    adapters = [(path, 1.0) for path in config.adapter] or list(generated.adapters)
    paths, scales = [path for path, _ in adapters], [scale for _, scale in adapters]
    try:
        loaded = load_tuned(name, paths, scales or [1.0])
        base = load_tuned(config.base).models if config.base else loaded.models if adapters else None
    except TisserandError as error:
        if typed:
            raise
        return None, f"the model of the records cannot be loaded ({error})"
    known = [str(adapter["hash"]) for adapter in loaded.adapters]
    if not typed and (known != list(generated.adapter_hashes) or model_hash(name) != generated.base_hash):
        return None, "the model of the records has changed since they were made; name the right one with --adapter"
    return Model(tuned=loaded.models, base=base), ""


def _encoders(config: MemorizationConfig) -> list[Encoder]:
    """Load the encoders asked for, before anything is worked on."""
    if not config.encoder:
        return []
    from eval.tiles.encoders import load_encoder

    return [load_encoder(kind, folder) for kind, folder in config.encoder.items()]


def _search(
    config: MemorizationConfig,
    drawn: Drawn,
    models: Models | None,
    vocabulary: Vocabulary,
    encoders: Sequence[Encoder],
) -> Searched:
    """Search every set with every detector."""
    import numpy as np

    from eval.copying.copies import best_matches, planted
    from eval.copying.copy_net import net_matches, train_copy_net
    from eval.copying.encoder_matches import matcher
    from eval.copying.rows import Detector, Searched
    from eval.tiles.encoders import unit
    from eval.tiles.features import vae_round_trip
    from prompts.captions import caption

    reference = drawn.reference
    labels = sorted({cut.label for cut in reference.cuts})
    notes = [] if models else ["no VAE: real tiles and planted copies are compared as scanned"]

    def through(pixels: Grey) -> Grey:
        return vae_round_trip(models.vae, pixels) if models is not None else pixels

    cells: dict[str, Ints] = {}
    blocks: dict[str, Ints] = {}
    for name, tiles in (("reference", reference), ("held_out", drawn.held_out), ("generated", drawn.generated)):
        cells[name] = np.array([labels.index(cut.label) for cut in tiles.cuts], dtype=np.int64)
        blocks[name] = np.unique([cut.block for cut in tiles.cuts], return_inverse=True)[1].astype(np.int64)
    # A generated tile has been through the VAE: held-out ones must lose the same grain before they are compared.
    real = through(drawn.held_out.pixels) if len(drawn.held_out) else drawn.held_out.pixels
    random = np.random.default_rng(config.slices.seed)
    chosen = random.choice(len(reference), PLANTED, replace=len(reference) < PLANTED)
    copies = through(planted(reference.pixels[chosen], SHIFT_PX)) + random.normal(
        0, PLANTED_NOISE, (PLANTED, *reference.pixels.shape[1:])
    )
    planted_tiles = copies.round().clip(0, 255).astype(np.uint8)

    finders: dict[str, Finder] = {"ncc": best_matches}
    if config.copy_net_steps and len(reference) >= SMALLEST_LEARNING:
        net = train_copy_net(
            reference.pixels, num_steps=config.copy_net_steps, shift_px=SHIFT_PX, seed=config.slices.seed
        )
        finders["copy_net"] = lambda queries, references: net_matches(net, queries, references)
    raw = None
    for encoder in encoders:
        vectors = unit(encoder.images(reference.pixels))
        finders[encoder.kind] = matcher(encoder, vectors.mean(axis=0))
        raw = (unit(encoder.images(drawn.generated.pixels)) @ vectors.T).max(axis=1)
    detectors = []
    for name, find in finders.items():
        if not len(real):
            break
        sides: dict[str, TileSet] = {
            "generated": (drawn.generated.pixels, cells["generated"], blocks["generated"]),
            "held_out": (real, cells["held_out"], blocks["held_out"]),
            "planted": (planted_tiles, cells["reference"][chosen], np.arange(PLANTED, dtype=np.int64)),
        }
        found = {
            key: _within_captions(find, *side, reference.pixels, cells["reference"], f"{name}, {key}")
            for key, side in sides.items()
        }
        detectors.append(Detector(name=name, **found))
    return Searched(
        reference=reference,
        generated=drawn.generated,
        held_out=drawn.held_out,
        captions=tuple(caption(*label, vocabulary) for label in labels),
        detectors=tuple(detectors),
        agreement=_agreement(
            (drawn.generated.pixels, cells["generated"], blocks["generated"]),
            (real, cells["held_out"], blocks["held_out"])
            if len(real)
            else (through(reference.pixels), cells["reference"], blocks["reference"]),
        ),
        sscd_cosines=raw,
        notes=(*notes, *(() if len(real) else (f"leak unchecked: {config.slices.real} has no validation split",))),
    )


def _within_captions(
    find: Finder, queries: Grey, cells: Ints, blocks: Ints, references: Grey, reference_cells: Ints, progress: str
) -> Side:
    """Find the best training tile of the same caption for every tile."""
    import numpy as np
    from tqdm import tqdm

    from eval.copying.copies import Matches
    from eval.copying.rows import Side

    similarity, index, symmetry = np.zeros(len(cells)), *np.zeros((2, len(cells)), dtype=np.int64)
    offset = np.zeros((len(cells), 2), dtype=np.int64)
    for cell in tqdm(np.unique(cells), desc=progress, unit="caption", disable=None):
        mine, theirs = np.flatnonzero(cells == cell), np.flatnonzero(reference_cells == cell)
        found = find(queries[mine], references[theirs])
        similarity[mine], index[mine] = found.similarity, theirs[found.index]
        symmetry[mine], offset[mine] = found.symmetry, found.offset
    matches = Matches(similarity=similarity, index=index, symmetry=symmetry, offset=offset)
    return Side(matches=matches, cells=cells, blocks=blocks)


def _agreement(generated: TileSet, real: TileSet) -> Agreement:
    """Compare tiles of one caption with each other: other seeds, or other slabs; as many real ones as generated."""
    import numpy as np

    from eval.copying.copies import best_matches
    from eval.copying.rows import Agreement

    found: list[list[Floats]] = [[], []]
    for cell in np.unique(generated[1]):
        chosen = [np.flatnonzero(cells == cell) for _, cells, _ in (generated, real)]
        count = min(AGREEMENT_TILES, *map(len, chosen))
        for part, (pixels, _, blocks), members in zip(found, (generated, real), chosen, strict=True):
            own = members[:count]
            if len(np.unique(blocks[own])) > 1:
                part.append(best_matches(pixels[own], pixels[own], blocks[own], blocks[own]).similarity)
    joined = [np.concatenate(part) if part else np.zeros(0) for part in found]
    return Agreement(generated=joined[0], real=joined[1])


def _loss_gap(
    config: MemorizationConfig, real: RealSlices, model: Model, vocabulary: Vocabulary
) -> tuple[LossGap | None, str]:
    """Compare how much tuning lowered the loss of trained and of held-out slices, or say why not."""
    import numpy as np

    from eval.copying.rows import LossGap
    from eval.tiles.features import cover, draw_cuts, read_grey
    from eval.tiles.sets import split_cuts
    from finetune.diffusion.adapters import set_adapter_scale
    from finetune.diffusion.fixed_noise import denoising_losses
    from finetune.diffusion.vae import slice_latents
    from prompts.captions import caption

    if not config.loss_slices or not real.validation:
        return None, "left out with --loss_slices 0" if not config.loss_slices else "there are no held-out slices"
    if model.base is None:
        return None, "no base model to compare the loss with; pass --base"
    side = model.tuned.size_px
    smallest = real.shortest_side
    learned = (
        split_cuts(real, "train", smallest)
        if config.train_data_dir is None
        else few_cuts(config.train_data_dir, vocabulary, SMALLEST_TILE)
    )
    pictures: list[Grey] = []
    captions, blocks, counts = list[str](), list[str](), list[int]()
    for cuts in (learned, split_cuts(real, "validation", smallest)):
        labels = {cut.label for cut in learned}
        each = max(1, config.loss_slices // len(labels))
        # A picture counts once, however many tiles it has.
        whole = list({cut.path: cut for cut in cuts if cut.label in labels}.values())
        unique = {cut.path: cut for cut in draw_cuts(whole, each, config.slices.seed)}
        counts.append(len(unique))
        for path, cut in unique.items():
            pictures.append(cover(read_grey(path), (side, side)))
            captions.append(caption(*cut.label, vocabulary))
            blocks.append(cut.block)
    latents = slice_latents(model.tuned, np.stack(pictures))

    def losses(models: Models) -> Floats:
        found = denoising_losses(models, latents, captions, num_timesteps=config.num_timesteps, seed=config.slices.seed)
        return np.asarray(found.mean(axis=1))

    tuned = losses(model.tuned)
    if model.base is model.tuned:
        set_adapter_scale(model.tuned, 0.0)
    fall = losses(model.base) - tuned
    if model.base is model.tuned:
        set_adapter_scale(model.tuned, 1.0)
    numbers = np.unique(blocks, return_inverse=True)[1].astype(np.int64)
    first = counts[0]
    return LossGap(
        trained=fall[:first],
        held_out=fall[first:],
        trained_blocks=numbers[:first],
        held_out_blocks=numbers[first:],
    ), ""


def _num_trained(config: MemorizationConfig, real: RealSlices) -> int:
    """Return how many slices the model was trained on."""
    from data_prep.folders.manifest import METADATA_NAME, read_records

    return len(read_records(config.train_data_dir / METADATA_NAME)) if config.train_data_dir else len(real.train)


def _boxes(real: RealSlices) -> dict[str, tuple[int, ...]]:
    """Return the box of voxels of every slice, by file name."""
    return {row.file_name: row.box for row in (*real.train, *real.validation)}


def _summary(rows: Sequence[Result]) -> Iterable[str]:
    """Return the numbers over all captions as lines, the verdict last."""
    for row in (*rows[1:], rows[0]):
        if row.prompt:
            continue
        value = "      -" if row.value is None else f"{row.value:7.3f}"
        interval = f" [{row.low:.3f}, {row.high:.3f}]" if row.low is not None and row.high is not None else ""
        yield f"{row.metric:<22} {row.set:<10} {value}{interval}  n {row.n}  {row.verdict}: {row.reason}"


if __name__ == "__main__":
    command(MemorizationConfig, main)
