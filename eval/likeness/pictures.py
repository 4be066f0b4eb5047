"""The pictures of a fidelity check: confusion tables, and real, round-tripped and generated slices side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from eval.likeness.described import Described, DescribedSets
from eval.likeness.descriptors import ANGLES, GREY_BINS
from eval.likeness.rows import HEADS, Classified, ClassifiedSets, Head, Naming, table_of
from eval.likeness.tile_sets import TileSets
from eval.stats.arrays import Floats, Grey
from eval.tiles.contact_sheet import contact_sheet
from eval.tiles.features import Tiles
from prompts.captions import caption

SAMPLES_PER_CAPTION = 4
KINDS = ("real", "vae", "generated")


def save_pictures(
    folder: Path, drawn: TileSets, sets: ClassifiedSets, round_trip: Grey | None, naming: Naming
) -> dict[str, object]:
    """Write confusion.png, samples.png and the strips in samples/; return what they show, for overview.json."""
    confusion: dict[str, dict[str, object]] = {}
    for head in HEADS:
        confusion[head] = {"names": list(naming.of(head))}
        for name, classified in (("held_out", sets.held_out), ("generated", sets.generated)):
            confusion[head][name] = table_of(classified, head, naming).astype(int).tolist()
    _save_confusion(folder / "confusion.png", sets, naming)
    captions = _save_samples(folder, drawn, round_trip, naming)
    return {"tile_px": drawn.held_out.pixels.shape[1], "captions": captions, "confusion": confusion}


def sample_name(state: str, axis: str, kind: str) -> str:
    """Return the file name of a strip of samples."""
    return f"{state.replace('_', '-')}_{axis}_{kind}.png"


def save_overlays(folder: Path, sets: DescribedSets, naming: Naming, tile: int) -> list[dict[str, str]]:
    """Draw the curves of each caption into descriptors/; return caption and file of each.

    Real held-out slices in black with the band of single blocks of real slices, the VAE round trip dotted, generated
    ones in colour.
    """
    (folder / "descriptors").mkdir()
    found = []
    for cell in np.unique(sets.generated.cells):
        name = f"descriptors/{sample_name(naming.states[cell // 1000], naming.axes[cell % 1000], 'curves')}"
        _draw_overlay(folder / name, sets, int(cell), tile)
        found.append({"caption": naming.caption(int(cell)), "file": name})
    return found


def _draw_overlay(path: Path, sets: DescribedSets, cell: int, tile: int) -> None:
    """Draw four descriptors of one caption beside each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    rings = sets.held_out.values["spectrum"].shape[1]
    places = {
        "histogram": (np.arange(256 // GREY_BINS // 2, 256, 256 // GREY_BINS), "grey level"),
        "spectrum": ((np.arange(rings) + 0.5) / (2 * rings), "cycles per px"),
        "orientation": (np.arange(ANGLES) * 180 / ANGLES, "direction, degrees"),
        "two_point": (np.arange(tile // 2), "distance, px"),
    }
    real = Described.joined(sets.held_out, sets.aside)
    members = np.flatnonzero(real.cells == cell)
    for axes, (name, (x, label)) in zip(figure.subplots(1, 4), places.items(), strict=True):
        curves = _curves(real.values[name][members])
        blocks = [curves[real.blocks[members] == block].mean(axis=0) for block in np.unique(real.blocks[members])]
        if blocks:
            axes.fill_between(x, np.min(blocks, axis=0), np.max(blocks, axis=0), color="#d8d7d1", label="real blocks")
        lines = (("real", sets.held_out, "#1d2025", "-"), ("VAE", sets.vae, "#8a8d92", ":"))
        for kind, side, colour, style in (*lines, ("generated", sets.generated, "#b3541e", "-")):
            own = np.zeros(0) if side is None else np.flatnonzero(side.cells == cell)
            if side is not None and len(own):
                axes.plot(
                    x, _curves(side.values[name][own]).mean(axis=0), style, color=colour, linewidth=1.4, label=kind
                )
        if name == "spectrum":
            axes.set_yscale("log")
        axes.set_title(name.replace("_", " "), fontsize=9, loc="left")
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def _curves(values: Floats) -> Floats:
    """Return one curve a tile, (N, K); those of the two image axes are averaged."""
    return np.asarray(values if values.ndim == 2 else values.mean(axis=1))


def _save_confusion(path: Path, sets: ClassifiedSets, naming: Naming) -> None:
    """Draw the tables of both heads, held-out real slices above generated ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2)
    titles = {"state": "State", "axis": "Axis"}
    for row, (name, classified) in enumerate((("held-out real", sets.held_out), ("generated", sets.generated))):
        for column, head in enumerate(HEADS):
            _draw_table(grid[row, column], classified, head, naming)
            grid[row, column].set_title(f"{titles[head]}, {name}", fontsize=11, loc="left")
            asked = "is" if row == 0 else "asked for"
            grid[row, column].set_ylabel(asked)
            grid[row, column].set_xlabel("read by the classifier")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _draw_table(axes: object, classified: Classified, head: Head, naming: Naming) -> None:
    """Draw one table as shares of its rows, with the counts written in."""
    table = table_of(classified, head, naming)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    names = [name.replace("_", "\n") for name in naming.of(head)]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15)  # type: ignore[attr-defined]
    axes.set_xticks(range(len(names)), names, fontsize=9)  # type: ignore[attr-defined]
    axes.set_yticks(range(len(names)), names, fontsize=9)  # type: ignore[attr-defined]
    for (row, column), count in np.ndenumerate(table):
        colour = "white" if shares[row, column] > 0.6 else "black"
        axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=colour)  # type: ignore[attr-defined]


def _save_samples(folder: Path, drawn: TileSets, round_trip: Grey | None, naming: Naming) -> list[dict[str, object]]:
    """Write a strip per caption and kind, and all of them as one sheet; return caption and files of each."""
    (folder / "samples").mkdir()
    tile = drawn.held_out.pixels.shape[1]
    sources: dict[str, tuple[Tiles, Grey] | None] = {
        "real": (drawn.held_out, drawn.held_out.pixels),
        "vae": None if round_trip is None else (drawn.held_out, round_trip),
        "generated": (drawn.generated, drawn.generated.pixels),
    }
    cells, captions = [], list[dict[str, object]]()
    for state in naming.states:
        for axis in naming.axes:
            strips, files = [], {}
            for kind in KINDS:
                chosen = _first_tiles(sources[kind], (state, axis))
                if len(chosen):
                    strip = np.concatenate(list(chosen), axis=1)
                    files[kind] = f"samples/{sample_name(state, axis, kind)}"
                    Image.fromarray(strip).save(folder / files[kind])
                strips.append(_filled(chosen, tile))
            cells += strips
            captions.append({"caption": caption(state, axis, naming.vocabulary), "files": files})
    headers = ["real, held out", "the same through the VAE", "generated"]
    labels = [str(entry["caption"]) for entry in captions]
    contact_sheet(cells, len(labels), len(KINDS), labels, headers).save(folder / "samples.png")
    return captions


def _first_tiles(source: tuple[Tiles, Grey] | None, label: tuple[str, str]) -> Grey:
    """Return the first tiles of a caption, at most the number shown, (N, h, w)."""
    if source is None:
        return np.zeros((0, 0, 0), dtype=np.uint8)
    tiles, pixels = source
    return pixels[[number for number, cut in enumerate(tiles.cuts) if cut.label == label][:SAMPLES_PER_CAPTION]]


def _filled(tiles: Grey, side: int) -> Grey:
    """Return the tiles side by side on white, always as wide as all of them."""
    strip = np.full((side, side * SAMPLES_PER_CAPTION), 255, dtype=np.uint8)
    for number, tile in enumerate(tiles):
        strip[:, number * side : (number + 1) * side] = tile
    return strip
