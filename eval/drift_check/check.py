"""A drift check from the models to its folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import GateError
from data_prep.folders.results import Result, write_results
from eval.drift_check.controls import recognise_slices
from eval.drift_check.gather import DriftRequest, at_strength, gather
from eval.drift_check.models import BaseAndTuned
from eval.drift_check.side_by_side import save_pictures
from eval.forgetting.evidence import Evidence, Views
from eval.forgetting.policy import Policy
from eval.forgetting.reported import WORST_PROMPT
from eval.forgetting.scores import score_drift, sweep_rows
from eval.forgetting.table import drift_table, sweep_lines
from eval.tiles.encoders import Encoder, unit


@dataclass(frozen=True, kw_only=True)
class DriftCheck:
    """What a check found.

    Attributes:
        rows: of ``results.jsonl``.
        swept: of ``sweep.jsonl``; none without weaker strengths.
        evidence: what both models made.
        weaker: strength -> what the tuned model made at it.
        per_picture: the numbers of each tuned picture.
    """

    rows: Sequence[Result]
    swept: Sequence[Result]
    evidence: Evidence
    weaker: Mapping[float, Evidence]
    per_picture: Sequence[dict[str, float]]

    @property
    def overall(self) -> Result:
        """The row of the whole check."""
        return next(row for row in self.rows if row.metric == WORST_PROMPT.name)


def check_drift(
    request: DriftRequest,
    models: BaseAndTuned,
    policy: Policy,
    encoders: Sequence[Encoder] = (),
    strengths: Sequence[float] = (),
) -> DriftCheck:
    """Make the pictures and predictions of both models, and judge them.

    Args:
        request: what the models are asked.
        models: base and tuned.
        policy: what counts as drift.
        encoders: that also look at the pictures.
        strengths: weaker adapters to try as well, as shares of the strength asked for.
    """
    evidence, latents = gather(request, models)
    detector, why_blind, controls = recognise_slices(request, models.base, evidence)

    def judged(found: Evidence) -> tuple[list[Result], list[dict[str, float]]]:
        views = [_view(encoder, [probe.prompt for probe in request.probes], found) for encoder in encoders]
        return score_drift(request.probes, found, detector, why_blind, policy, views)

    rows, per_picture = judged(evidence)
    rows = [*rows, *controls]
    weaker = {strength: at_strength(request, models, evidence, latents, strength) for strength in sorted(strengths)}
    swept = [row for share, found in weaker.items() for row in sweep_rows(judged(found)[0], found, evidence, share)]
    if swept:
        swept += sweep_rows(rows, evidence, evidence, 1.0)
    return DriftCheck(rows=rows, swept=swept, evidence=evidence, weaker=weaker, per_picture=per_picture)


def save_check(folder: Path, request: DriftRequest, found: DriftCheck, hashes: Mapping[str, str], command: str) -> None:
    """Write rows and pictures of a check, each row with the hashes it depends on and the command that repeats it."""
    written = {"results.jsonl": found.rows} | ({"sweep.jsonl": found.swept} if found.swept else {})
    for name, rows in written.items():
        write_results(folder / name, [replace(row, hashes=dict(hashes), command=command) for row in rows])
    if request.has_pictures:
        save_pictures(folder, request, found.evidence, found.per_picture, found.weaker)


def summary(found: DriftCheck) -> Iterable[str]:
    """Say in lines what was found."""
    yield drift_table(found.rows)
    yield from sweep_lines(found.swept)


def pass_gate(found: DriftCheck, policy: Policy, name: str) -> None:
    """Raise if the policy is a gate and the verdict a stop.

    Raises:
        GateError: naming the policy, the worst prompt and what stopped it.
    """
    row = found.overall
    if policy.is_gate and row.verdict == "stop":
        raise GateError(
            f"--policy {name}: drift ({row.reason}); worst prompt '{row.prompt}', {row.unit} {row.value:.2f}; an "
            "earlier checkpoint or a weaker adapter (--sweep) may pass"
        )


def _view(encoder: Encoder, prompts: Sequence[str], evidence: Evidence) -> Views:
    """Look at the pictures, and read the prompts, with an encoder."""

    def seen(pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
        flat = unit(encoder.images(pictures.reshape(-1, *pictures.shape[2:])))
        return flat.reshape(*pictures.shape[:2], -1)

    return Views(
        kind=encoder.kind,
        texts=None if encoder.texts is None else unit(encoder.texts(prompts)),
        tuned=seen(evidence.tuned),
        base=seen(evidence.base),
        base_again=seen(evidence.base_again),
    )
