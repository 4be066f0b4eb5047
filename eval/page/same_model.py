"""Whether the checks on a page are of the run on it: results carry hashes of the models they were made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.folders.hashes import sha256_of
from data_prep.folders.manifest import read_records
from data_prep.folders.run_folder import EMBEDDINGS_FILE, LORA_FILE, PIPELINE_FILE
from eval.page.inputs import ReportedRun, ResultsFolder, part
from finetune.diffusion.hashes import model_hash


@dataclass(frozen=True, kw_only=True)
class ModelHashes:
    """The model behind some results; empty or None where nothing tells.

    Attributes:
        base: hash of the base model, under adapters or of a tuned pipeline.
        pipeline: hash of the tuned pipeline.
        adapters: hashes of the files of its adapters.
    """

    base: str = ""
    pipeline: str = ""
    adapters: frozenset[str] | None = None


def note_of_other_models(run: ReportedRun | None, folders: Sequence[ResultsFolder]) -> str:
    """Say which results are of another model than the run; empty if none are, or nothing tells."""
    if run is None:
        return ""
    differ = [(folder.path, why) for folder in folders if (why := _difference(run, _behind(folder, run)))]
    if not differ:
        return ""
    listed = ", ".join(f"{name} ({why})" for name, why in differ)
    return f"Results of another model than --run {run.path}: {listed}. They say nothing about this run."


def _difference(run: ReportedRun, behind: ModelHashes) -> str:
    """Say in words how a model differs from the run's, or nothing."""
    base = str(part(run.provenance, "base_model").get("hash") or "")
    if base and behind.base and behind.base != base:
        return "another base model"
    if behind.pipeline:
        known = [model_hash(str(path.parent)) for path in sorted(run.path.rglob(PIPELINE_FILE))]
        return "other weights" if known and behind.pipeline not in known else ""
    # Checkpoints and the like below the run are its own, too.
    files = [path for name in (LORA_FILE, EMBEDDINGS_FILE) for path in sorted(run.path.rglob(name))]
    if not files or behind.adapters is None or behind.adapters & {sha256_of(path) for path in files}:
        return ""
    return "other weights" if behind.adapters else "without its adapter"


def _behind(folder: ResultsFolder, run: ReportedRun) -> ModelHashes:
    """Return what rows and records say of the model behind them."""
    hashes = folder.rows[0].hashes if folder.rows else {}
    if folder.module == "eval.drift":
        found = frozenset(value for name, value in hashes.items() if name.startswith("adapter "))
        if "tuned" not in hashes and not found:
            return ModelHashes()
        return ModelHashes(base=hashes.get("base", ""), pipeline=hashes.get("tuned", ""), adapters=found or None)
    record = _first_record(folder)
    listed = record.get("adapters")
    adapters = None
    if isinstance(listed, list):
        adapters = frozenset(str(one.get("hash")) for one in listed if isinstance(one, dict))
    drawn = str(part(record, "base_model").get("hash") or hashes.get("base_model", ""))
    # Of pictures that a tuned pipeline made, the model they name is the pipeline.
    is_pipeline = not adapters and (run.path / PIPELINE_FILE).is_file()
    return ModelHashes(pipeline=drawn, adapters=adapters) if is_pipeline else ModelHashes(base=drawn, adapters=adapters)


def _first_record(folder: ResultsFolder) -> Mapping[str, object]:
    """Return the record of a picture that was generated for a check, if the folder is still there."""
    if folder.module == "eval.generate":
        return folder.records[0] if folder.records else {}
    generated = folder.settings.get("generated")
    path = Path(str(generated)) / "records.jsonl"
    return next((record for _, record in read_records(path)), {}) if generated and path.is_file() else {}
