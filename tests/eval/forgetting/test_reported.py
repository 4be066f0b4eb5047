"""A number is declared once: rows, verdicts, the table of the command and the page read the same declaration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_drift import evidence_of, pictures_of

from data_prep.folders.results import write_results
from eval.forgetting.picture_scores import Measured, Score, per_picture
from eval.forgetting.reported import NUMBERS, SCORES, DriftScore
from eval.forgetting.scores import score_drift
from eval.forgetting.table import drift_table
from eval.page.drift import drift_sections
from eval.page.inputs import Pictures, read_folder
from eval.stats.intervals import hierarchical, noise_band, ratio_of_means
from eval.stats.number import Number, by_name
from prompts.probe_lists import Probe

CONTRAST = Number(
    name="contrast_ratio", unit="ratio", bad="low", limits="colour", column="contrast", card="contrast left"
)


def contrast(measured: Measured) -> Score:
    """Return how much of the spread of grey levels is left: the maths of a score that we do not have."""

    def spread(pictures: np.ndarray) -> np.ndarray:
        return np.asarray(pictures.astype(float).std(axis=(1, 2, 3)))

    made = measured.evidence
    tuned, base, again = (per_picture(spread, one) for one in (made.tuned, made.base, made.base_again))
    return Score(
        of=lambda rows: hierarchical(ratio_of_means, tuned[rows], base[rows]),
        floor=ratio_of_means(again, base),
        band=lambda rows: noise_band(again, base, rows),
        counts=np.ones(len(base), dtype=np.bool_),
        why_not="",
        per_picture={"contrast": tuned},
    )


def test_a_declared_score_has_rows_verdicts_a_column_and_a_place_on_the_page(tmp_path: Path) -> None:
    base = pictures_of(500)
    flat = (128 + 0.2 * (base.astype(float) - 128)).round().astype(np.uint8)
    probes = [Probe(id=str(index), prompt=f"probe {index}", set="G3") for index in range(4)]
    scores = (*SCORES, DriftScore(number=CONTRAST, of=contrast))
    rows, pictures = score_drift(probes, evidence_of(flat, base, base), None, "no slices", scores=scores)
    whole = next(row for row in rows if row.metric == "contrast_ratio" and not row.prompt)
    assert whole.value == pytest.approx(0.2, abs=0.02)
    assert (whole.unit, whole.verdict) == ("ratio", "stop")
    assert len([row for row in rows if row.metric == "contrast_ratio" and row.verdict == "stop"]) == 5
    assert all("contrast" in numbers for numbers in pictures)

    numbers = (*NUMBERS, CONTRAST)
    head, first, *_ = drift_table(rows, numbers).splitlines()
    assert head.split() == ["set", "moved", "leak", "colour", "light", "kept", "contrast", "verdict"]
    assert f"{whole.value:.2f} [" in first[head.index("contrast") :]

    write_results(tmp_path / "results.jsonl", [replace(row, command="python -m eval.drift") for row in rows])
    (section,) = drift_sections([read_folder(tmp_path)], Pictures(), numbers)
    assert section["names"]["contrast_ratio"] == "contrast left"
    (score,) = (one for one in section["sets"][0]["scores"] if one["name"] == "contrast left")
    assert (score["value"], score["verdict"]) == (f"{whole.value:.2f}", "stop")


def test_two_numbers_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="contrast_ratio: declared twice"):
        by_name((CONTRAST, replace(CONTRAST, unit="share")))
