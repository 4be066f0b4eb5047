"""The pictures of a memorisation check: the closest pairs, and how close every set is to the training slices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from eval.copying.copies import Threshold, aligned
from eval.copying.reported import DETECTORS
from eval.copying.rows import Detector, Searched, threshold_of


def save_gallery(
    folder: Path, searched: Searched, boxes: Mapping[str, tuple[int, ...]], count: int
) -> list[dict[str, object]]:
    """Write the closest pairs to gallery/, a strip each, and return what they show.

    A strip holds the generated tile, its nearest training tile, their difference once aligned, and the held-out tile of
    the same caption that is nearest to any training tile: what resemblance without copying looks like.
    """
    (folder / "gallery").mkdir()
    detector = next((item for item in searched.detectors if item.name == "ncc"), None)
    if detector is None:
        return []
    threshold = threshold_of(detector)
    found, cells = detector.generated.matches, detector.generated.cells
    scores = threshold.scores(found.similarity, cells)
    shown: list[dict[str, object]] = []
    for rank, number in enumerate(np.argsort(-scores)[:count]):
        made = searched.generated.pixels[number]
        match = int(found.index[number])
        trained = searched.reference.pixels[match]
        moved = aligned(made, int(found.symmetry[number]), found.offset[number])
        difference = np.abs(_levelled(moved, trained) - trained.astype(np.float64)).clip(0, 255).astype(np.uint8)
        strip = [made, trained, difference]
        members = np.flatnonzero(detector.held_out.cells == cells[number])
        if len(members):
            nearest = members[detector.held_out.matches.similarity[members].argmax()]
            strip.append(searched.held_out.pixels[nearest])
        name = f"gallery/{rank:02d}.png"
        Image.fromarray(np.concatenate(strip, axis=1)).save(folder / name)
        cut, source = searched.generated.cuts[number], searched.reference.cuts[match]
        shown.append(
            {
                "file": name,
                "caption": searched.captions[cells[number]],
                "generated": cut.path.name,
                "trained": source.path.name,
                "corner": [source.row, source.column],
                "box": list(boxes.get(source.path.name, ())),
                "similarity": round(float(found.similarity[number]), 4),
                "score": round(float(scores[number]), 3),
                "is_flagged": bool(scores[number] > threshold.conservative),
            }
        )
    return shown


def save_distances(path: Path, searched: Searched) -> None:
    """Draw, for each detector, the share of tiles up to a similarity: held-out, generated and planted ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * max(1, len(searched.detectors)), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, detector in zip(
        figure.subplots(1, max(1, len(searched.detectors)), squeeze=False)[0], searched.detectors, strict=False
    ):
        _draw_shares(axes, detector, threshold_of(detector))
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_shares(axes: object, detector: Detector, threshold: Threshold) -> None:
    """Draw one detector."""
    sides = (
        ("held-out real", detector.held_out, "#1d2025"),
        ("generated", detector.generated, "#b3541e"),
        ("planted copies", detector.planted, "#1f4e79"),
    )
    for label, side, colour in sides:
        scores = np.sort(threshold.scores(side.matches.similarity, side.cells))
        share = np.arange(1, len(scores) + 1) / max(1, len(scores))
        axes.step(scores, share, where="post", color=colour, label=label)  # type: ignore[attr-defined]
    line = threshold.conservative
    axes.axvline(line, color="#982b25", linestyle=":", label="counts as a copy beyond")  # type: ignore[attr-defined]
    axes.set_title(DETECTORS[detector.name], loc="left", fontsize=10)  # type: ignore[attr-defined]
    axes.set_xlabel("similarity to the nearest training tile\nin spreads of held-out tiles of the caption", fontsize=9)  # type: ignore[attr-defined]
    axes.set_ylabel("share of tiles up to there", fontsize=9)  # type: ignore[attr-defined]
    axes.legend(frameon=False, fontsize=8)  # type: ignore[attr-defined]
    axes.spines[["top", "right"]].set_visible(False)  # type: ignore[attr-defined]


def _levelled(tile: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Give a tile the mean and spread of another, since a copy may be darker or flatter."""
    centred = (tile - tile.mean()) / max(float(tile.std()), 1.0)
    return np.asarray(centred * other.std() + other.mean())
