"""The network that recognises training slices, trained for a check and tested before it is believed."""

from __future__ import annotations

from pathlib import Path

from data_prep.folders.hashes import sha256_of
from data_prep.folders.manifest import METADATA_NAME
from data_prep.folders.results import Result
from eval.drift_check.gather import DriftRequest
from eval.forgetting.evidence import Evidence
from eval.forgetting.leak import MAX_FALSE_ALARM, MIN_RECALL, LeakNet, Learned, learn_slices, read_slices, round_trip
from eval.forgetting.reported import LEAK_FALSE_ALARM, LEAK_RECALL
from finetune.diffusion.models import Models


def train_folder(real: Path) -> Path:
    """Return the folder of training slices of a dataset, or the folder itself if it has no parts."""
    return real / "train" if (real / "train").is_dir() else real


def slices_hash(real: Path | None) -> dict[str, str]:
    """Return the hash of the list of training slices, under its name; nothing without such a list."""
    if real is None or not (metadata := train_folder(real) / METADATA_NAME).is_file():
        return {}
    return {"train": sha256_of(metadata)}


def recognise_slices(
    request: DriftRequest, base: Models, evidence: Evidence
) -> tuple[LeakNet | None, str, list[Result]]:
    """Train the network that recognises training slices, and check it on slices and pictures it has not seen.

    Args:
        request: what was asked of the models.
        base: whose VAE the slices go through.
        evidence: with the base's pictures.

    Returns:
        The network, or None and the reason; and the rows of its two controls.
    """
    if not request.has_pictures:
        return None, "a pulse makes no pictures", []
    if request.real is None:
        return None, "no training slices to compare with; give --real DATASET", []
    size = (request.sampling.height or base.size_px, request.sampling.width or base.size_px)
    train, validation = train_folder(request.real), request.real / "validation"
    slices = read_slices(train, size, limit=request.num_slices, seed=request.seed)
    if (validation / METADATA_NAME).is_file():
        kept = read_slices(validation, size, limit=max(16, request.num_slices // 3), seed=request.seed)
    else:
        slices, kept = slices[::2], slices[1::2]
    if len(kept) < 2:
        return None, f"{train} holds {len(slices)} slices; too few to learn from", []
    negatives = [*evidence.base_again.reshape(-1, *evidence.base_again.shape[2:]), *evidence.base_more]
    kept = round_trip(base, kept)
    learned = learn_slices(
        [*slices, *round_trip(base, slices)],
        negatives,
        held_out=kept,
        base=evidence.base.reshape(-1, *evidence.base.shape[2:]),
        seed=request.seed,
    )
    controls = _controls(learned)
    failed = [f"{row.metric} {row.value:.2f}, {row.reason}" for row in controls if row.verdict != "ok"]
    return (None if failed else learned.net), "; ".join(failed), controls


def _controls(learned: Learned) -> list[Result]:
    """Return the rows of both tests."""
    is_found, is_quiet = learned.recall >= MIN_RECALL, learned.false_alarm <= MAX_FALSE_ALARM
    tests = (
        (LEAK_RECALL, learned.found, is_found, f"at least {MIN_RECALL} of held-out slices must be found"),
        (LEAK_FALSE_ALARM, learned.alarms, is_quiet, f"at most {MAX_FALSE_ALARM} of base pictures"),
    )
    return [
        Result(
            metric=number.name,
            set="control",
            value=float(hits.mean()),
            n=len(hits),
            unit=number.unit,
            verdict="ok" if passed else "warn",
            reason="" if passed else f"detector blind: {rule}",
        )
        for number, hits, passed, rule in tests
    ]
