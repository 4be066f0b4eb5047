"""From results to what the page shows: verdicts, dataset, samples, curve, tables; plain values for the template."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.folders.provenance import training_folders
from data_prep.folders.results import VERDICTS, Result, Verdict
from eval.copying.rows import DETECTORS
from eval.forgetting.verdicts import worst
from eval.page.inputs import Folder, Pictures, Run, part, read_json, shown_name

WORDS: dict[Verdict, str] = {"ok": "in order", "warn": "look closer", "stop": "stop", "grey": "not measured"}
AXES = ("z", "y", "x")
RECIPES = ("full", "lora", "textual_inversion", "dreambooth", "lora_dreambooth", "pivotal_tuning", "pretrain")
KINDS = {"real": "real, held out", "vae": "through the VAE", "generated": "generated"}
LABELS = {
    "accuracy_state": "state read correctly",
    "accuracy_axis": "axis read correctly",
    "agreement_state": "state as asked for",
    "agreement_axis": "axis as asked for",
    "coloured": "slices that are not grey",
    "kid": "distance (KID)",
    "kid_floor_ratio": "distance / real to real",
    "held_out": "held-out real",
    "held_out_matched": "held-out real, one histogram",
    "held_out_vae": "held-out real, through the VAE",
    "real": "real to real",
    "vae": "real through the VAE, to real",
    "nearest_states": "nearest two states",
    "descriptor_floor_ratio": "all descriptors / real to real",
    "two_sample_auc": "told apart by a classifier (AUC)",
    "mmd": "distance of descriptors (MMD)",
    **{
        f"{name}_{kind}": f"{text}, {words}"
        for name, words in DETECTORS.items()
        for kind, text in (
            ("recall", "planted copies found"),
            ("false_alarm", "held-out tiles flagged"),
            ("copies", "flagged as copies"),
            ("closer", "closer to training than held-out"),
        )
    },
    "swap_state": "state follows its word",
    "swap_state_alone": "axis stays when the state is swapped",
    "swap_axis": "axis follows its word",
    "swap_axis_alone": "state stays when the axis is swapped",
    "own_classifier_state": "state by the model's own loss",
    "own_classifier_axis": "axis by the model's own loss",
    "seed_agreement": "likeness of different seeds",
    "loss_gap_auc": "loss tells trained from held-out (AUC)",
    "split_audit": "problems of the split",
    "chords": "chord length",
    "sweep_worst_prompt": "worst prompt",
    "sweep_captions_moved": "change for the captions kept",
    "two_point": "two-point probability",
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """One box of the verdict strip.

    Attributes:
        title: what it is called.
        text: the question in words.
        module: the command that answers it.
        metrics: those that decide; empty for all.
    """

    title: str
    text: str
    module: str
    metrics: tuple[str, ...] = ()


QUESTIONS = (
    Question(
        title="Fidelity",
        text="Do generated slices look like real ones?",
        module="eval.fidelity",
        metrics=("kid_floor_ratio", "descriptor_floor_ratio", "two_sample_auc"),
    ),
    Question(
        title="Prompt",
        text="Do they show what was asked for?",
        module="eval.fidelity",
        metrics=("agreement_state", "agreement_axis", "swap_state", "swap_axis"),
    ),
    Question(title="Drift", text="Did the model forget what it knew?", module="eval.drift", metrics=("worst_prompt",)),
    Question(
        title="Memorisation",
        text="Are they copies of training slices?",
        module="eval.memorization",
        metrics=("memorisation",),
    ),
)


def verdict_boxes(folders: Sequence[Folder], run: Run | None) -> list[dict[str, str]]:
    """Return the four boxes of the strip."""
    return [_box(question, folders, run) for question in QUESTIONS]


def _box(question: Question, folders: Sequence[Folder], run: Run | None) -> dict[str, str]:
    """Judge one question by the worst row that was judged."""
    checks = [
        (shown_name(folder), [row for row in folder.rows if not question.metrics or row.metric in question.metrics])
        for folder in folders
        if folder.module == question.module
    ]
    rows = [row for _, found in checks for row in found]
    box = {"title": question.title, "text": question.text, "command": ""}
    if not rows and question.module == "eval.drift" and (seen := _seen_while_it_learned(run)):
        return {**box, **seen}
    if not rows:
        verdict: Verdict = "grey"
        reason = f"No results of {question.module} were given. The command:"
        if importlib.util.find_spec(question.module) is None:
            reason = "This version has no command for it yet."
        else:
            box["command"] = suggestion(question.module, folders, run)
    else:
        verdict = worst([row.verdict for row in rows])
        judged = [worst([row.verdict for row in found]) for _, found in checks]
        name, deciding = checks[judged.index(verdict)]
        reason = _why(deciding, verdict)
        if len(checks) > 1:
            all_of_them = ", ".join(f"{name} {WORDS[one]}" for (name, _), one in zip(checks, judged, strict=True))
            reason = f"{all_of_them}. {name}: {reason}"
    return {**box, "verdict": verdict, "word": WORDS[verdict], "reason": reason}


def _seen_while_it_learned(run: Run | None) -> dict[str, str]:
    """Return verdict and reason of the run's own check of the weights that it kept, else its last one; or nothing."""
    checks = [record for record in (run.drift if run else ()) if record.get("kind") == "check"]
    kept = [check for check in checks if run and check.get("step") == run.selection.get("selected_step")]
    check = (kept or checks or [{}])[-1]
    verdict = next((known for known in VERDICTS if known == check.get("verdict")), None)
    if verdict is None:
        return {}
    value = check.get("value")
    shown = f", {str(check.get('unit')).replace('_', ' ')} {value:.2f}" if isinstance(value, int | float) else ""
    why = f" {_sentence(str(check['reason']).replace('_', ' '))}." if check.get("reason") else ""
    reason = f"By the run's own check at step {check.get('step')}. Worst prompt: {check.get('prompt')}{shown}.{why}"
    return {"verdict": verdict, "word": WORDS[verdict], "reason": reason}


def _why(rows: Sequence[Result], verdict: Verdict) -> str:
    """Say in words what was found, over everything before single prompts, and why it is not in order."""
    deciding = [row for row in rows if row.verdict == verdict and not row.reason.startswith(("reference", "A/A"))]
    whole = [row for row in deciding if not row.prompt or row.metric == "worst_prompt"] or deciding
    if verdict == "grey":
        return f"{_sentence(next((row.reason for row in whole if row.reason), 'nothing could be judged'))}."
    found = [_finding(row) for row in whole]
    return " ".join(found[:3]) + (f" And {len(found) - 3} more." if len(found) > 3 else "")


def _finding(row: Result) -> str:
    """Write one deciding number as a sentence, with its reason unless it is in order."""
    if row.metric == "kid_floor_ratio" and row.verdict == "ok":
        return f"{_sentence(row.reason)}."
    value = row.value if row.value is not None else math.nan
    text = {
        "agreement_state": f"{value:.0%} show the state asked for",
        "agreement_axis": f"{value:.0%} show the axis asked for",
        "kid_floor_ratio": f"{value:.1f} times the distance between real slices",
        "descriptor_floor_ratio": f"Descriptors are {value:.1f} times as far from real slices as real ones are",
        "two_sample_auc": f"A classifier tells {value:.0%} of pairs apart",
        "memorisation": f"{_sentence(row.reason)}",
        "worst_prompt": f"Worst prompt: {row.prompt}, {row.unit.replace('_', ' ')} {value:.2f}",
    }.get(row.metric, f"{_sentence(LABELS.get(row.metric, row.metric.replace('_', ' ')))} {value:.2f}")
    if row.metric == "memorisation":
        return f"{text}."
    why = f": {row.reason.replace('_', ' ')}" if row.reason and row.verdict != "ok" else ""
    return f"{text}{why}."


def _sentence(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[:1].upper() + text[1:]


def suggestion(module: str, folders: Sequence[Folder], run: Run | None) -> str:
    """Return the command that would fill a grey box, with the paths that are known."""
    generated = next((str(folder.path) for folder in folders if folder.module == "eval.generate"), "out/slices")
    run_path = str(run.path) if run else "runs/lora"
    settings = run.settings if run else {}
    train = Path(*training_folders(settings)[:1] or ["data/weave/train"])
    real = str(train.parent if train.name == "train" else train)
    model = str(settings.get("pretrained_model_name_or_path", "assets/tiny-sd"))
    is_whole = (Path(run_path) / "model_index.json").is_file()
    compared = (run_path, "--base", model) if is_whole else (model, "--adapter", run_path)
    words = {
        "eval.fidelity": ["--real", real, "--generated", generated, "--output_dir", "out/fidelity"],
        "eval.drift": ["--pretrained_model_name_or_path", *compared, "--output_dir", "out/drift"],
        "eval.memorization": ["--real", real, "--generated", generated, "--output_dir", "out/memorization"],
    }[module]
    return f"python -m {module} {shlex.join(words)}"


def dataset_box(found: tuple[Path, Mapping[str, Any]] | None) -> dict[str, Any] | None:
    """Return the volumes, counts, windows and split of a dataset."""
    if found is None:
        return None
    folder, manifest = found
    counts = part(manifest, "counts")
    volumes = [_volume(volume) for volume in manifest.get("volumes") or () if isinstance(volume, dict)]
    totals = {name: sum(n for n in split.values() if isinstance(n, int)) for name, split in counts.items()}
    states = [volume["state"] for volume in volumes]
    notes = []
    if volumes and len(set(states)) == len(states):
        notes.append(
            "One volume per state: state, specimen and scan cannot be told apart, and nothing here says how the model "
            "does on another part."
        )
    if not totals.get("validation"):
        notes.append("No held-out region: leaks between training and checking are not excluded.")
    cells = sorted({cell for split in counts.values() if isinstance(split, dict) for cell in split})
    table = [(cell, *(part(counts, name).get(cell, 0) for name in totals)) for cell in cells]
    options = part(manifest, "options")
    cut = {name: options.get(name) for name in ("fit", "tile_size", "stride") if options.get(name) is not None}
    return {
        "folder": str(folder),
        "volumes": volumes,
        "splits": list(totals),
        "totals": totals,
        "counts": table,
        "notes": notes,
        "cut": ", ".join(f"{name} {value}" for name, value in cut.items()),
    }


def _volume(volume: Mapping[str, Any]) -> dict[str, Any]:
    """Write one volume's entry of the manifest in words."""
    window, split = part(volume, "window"), part(volume, "split")
    voxel = volume.get("voxel_um")
    low, high = window.get("low"), window.get("high")
    regions = [f"{name} {_span(split[name])}" for name in ("train", "guard", "validation") if _span(split.get(name))]
    return {
        "name": str(volume.get("name", "")),
        "state": str(volume.get("state", "")),
        "shape": " x ".join(map(str, volume.get("shape") or ())),
        "dtype": str(volume.get("dtype", "")),
        "voxel": " x ".join(f"{size:g}" for size in voxel) + " um" if voxel and _numbers(voxel) else "unknown",
        "window": f"{low:g} to {high:g}" if _numbers([low, high]) else "none",
        "split": f"along {split.get('axis')}: {', '.join(regions)}" if regions else "none",
        "map": _split_map(volume, split),
        "length": f"{split['correlation_length']} voxels" if "correlation_length" in split else "unknown",
        "independent": _independent(part(volume, "audit")),
        "sha256": str(volume.get("sha256", ""))[:12],
    }


def _independent(audit: Mapping[str, Any]) -> str:
    """Write how many slices of each direction are independent of their neighbours."""
    found = {axis: part(audit, axis) for axis in audit}
    return ", ".join(
        f"{axis} {one['effective_number']:.0f} of {one['num_slices']}"
        for axis, one in found.items()
        if _numbers([one.get("effective_number"), one.get("num_slices")])
    )


def _split_map(volume: Mapping[str, Any], split: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a volume along the direction it was split in, in order, each with its share in percent."""
    shape = volume.get("shape") or []
    if not _numbers(shape) or str(split.get("axis")) not in AXES or len(shape) != len(AXES):
        return []
    length = shape[AXES.index(str(split["axis"]))]
    spans = sorted((split[name], name) for name in ("train", "guard", "validation") if _span(split.get(name)))
    found, end = [], 0
    for (start, stop), name in spans:
        if not end <= start <= stop <= length:
            return []
        found += [{"name": "unused", "share": 100 * (start - end) / length}] if start > end else []
        found.append({"name": name, "share": 100 * (stop - start) / length})
        end = stop
    return found


def _span(value: object) -> str:
    """Write a half-open range."""
    return f"{value[0]}-{value[1]}" if _numbers(value) and isinstance(value, list) and len(value) == 2 else ""


def _numbers(value: object) -> bool:
    """Return whether this is a list of numbers."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, int | float) for item in value)


def fidelity_checks(folders: Sequence[Folder], pictures: Pictures) -> list[dict[str, Any]]:
    """Return the tables of each fidelity check; ``name`` is empty where there is one only."""
    checks = [folder for folder in folders if folder.module == "eval.fidelity"]
    return [
        {
            "name": shown_name(folder) if len(checks) > 1 else "",
            "table": fidelity_table(folder),
            "confusion": confusion_tables(folder),
            "descriptors": descriptor_table(folder, pictures),
        }
        for folder in checks
    ]


def sample_cards(folders: Sequence[Folder], pictures: Pictures) -> list[dict[str, Any]]:
    """Return, for each check that has them, the strips of each caption: real, through the VAE, generated."""
    found = []
    for folder in folders:
        overview = read_json(folder.path / "overview.json")
        if not isinstance(overview.get("captions"), list):
            continue
        cards = []
        for entry in overview["captions"]:
            files = part(entry, "files") if isinstance(entry, dict) else {}
            strips = [
                {"kind": words, "uri": pictures.embed(folder.path, str(files[kind])) if kind in files else ""}
                for kind, words in KINDS.items()
            ]
            cards.append({"caption": str(entry.get("caption", "")), "strips": strips})
        found.append({"name": shown_name(folder), "cards": cards, "tile_px": overview.get("tile_px")})
    return found


def contact_sheet(folders: Sequence[Folder], pictures: Pictures) -> str:
    """Return the sheet of the generated folder, for a report without a fidelity check."""
    for folder in folders:
        if folder.module == "eval.generate":
            return pictures.embed(folder.path, "contact_sheet.png")
    return ""


def confusion_tables(folder: Folder) -> list[dict[str, Any]]:
    """Return the tables of both heads, held-out real and generated, as rows of cells with count and share."""
    tables = []
    confusion = part(read_json(folder.path / "overview.json"), "confusion")
    for head, content in confusion.items():
        names = [str(name) for name in content.get("names", ())]
        for key, title in (("held_out", "held-out real"), ("generated", "generated")):
            counts = np.asarray(content.get(key, []), dtype=float)
            if counts.shape != (len(names), len(names)):
                continue
            shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            rows = [
                {
                    "name": name.replace("_", " "),
                    "cells": [
                        {"count": int(count), "share": round(float(share), 3), "on": i == j}
                        for j, (count, share) in enumerate(zip(counts[i], shares[i], strict=True))
                    ],
                }
                for i, name in enumerate(names)
            ]
            columns = [name.replace("_", " ") for name in names]
            asked = "is" if key == "held_out" else "asked for"
            tables.append({"title": f"{head}, {title}", "names": columns, "rows": rows, "asked": asked})
    return tables


def fidelity_table(folder: Folder) -> dict[str, Any]:
    """Return the numbers over all captions, and a row per caption with a column per measure."""
    rows = [row for row in folder.rows if not row.set.startswith("descriptor")]
    single = [row for row in rows if row.prompt]
    by_key = {(row.prompt, row.metric): line(row) for row in single}
    metrics = list(dict.fromkeys(row.metric for row in single))
    return {
        "whole": [line(row) for row in rows if not row.prompt],
        "columns": [LABELS.get(metric, metric.replace("_", " ")) for metric in metrics],
        "captions": [
            (prompt, [by_key.get((prompt, metric)) for metric in metrics])
            for prompt in dict.fromkeys(row.prompt for row in single)
        ],
        "reasons": list(dict.fromkeys(_sentence(row.reason) for row in single if row.reason and row.verdict != "ok")),
    }


def descriptor_table(folder: Folder, pictures: Pictures) -> dict[str, Any]:
    """Return the floor ratio of each descriptor with its reference lines and captions, and the curves of each caption.

    Ratios are shaded on a logarithmic scale: 1 is white, 10 and more the darkest.
    """
    found: dict[str, Any] = {"captions": [], "rows": [], "overlays": []}
    rows = [row for row in folder.rows if row.set.startswith("descriptor")]
    single = {(row.metric, row.prompt): row for row in rows if row.prompt}
    lines = {(row.metric, row.set): row for row in rows if not row.prompt}
    found["captions"] = list(dict.fromkeys(row.prompt for row in rows if row.prompt))
    for metric in dict.fromkeys(row.metric for row in rows):
        own, vae, state = (
            lines.get((metric, name)) for name in ("descriptor", "descriptor_vae", "descriptor_nearest_states")
        )
        if own is None:
            continue
        found["rows"].append(
            {
                **line(own),
                "vae": f"{vae.value:.1f}" if vae and vae.value is not None else "-",
                "state": f"{state.value:.1f}" if state and state.value is not None else "-",
                "cells": [_ratio_cell(single.get((metric, prompt))) for prompt in found["captions"]],
            }
        )
    for entry in read_json(folder.path / "overview.json").get("overlays") or ():
        if isinstance(entry, dict) and (uri := pictures.embed(folder.path, str(entry.get("file")))):
            found["overlays"].append({"caption": str(entry.get("caption", "")), "uri": uri})
    return found


def _ratio_cell(row: Result | None) -> dict[str, Any]:
    """Return a ratio as text with how dark its cell is, in [0, 1]."""
    if row is None or row.value is None:
        return {"value": "-", "share": 0.0}
    return {"value": f"{row.value:.1f}", "share": round(min(1.0, max(0.0, math.log10(max(row.value, 1e-6)))), 2)}


def memorization_sections(folders: Sequence[Folder], pictures: Pictures) -> list[dict[str, Any]]:
    """Return verdict, controls and findings, curves and closest pairs of each memorisation check."""
    found = []
    for folder in folders:
        if folder.module != "eval.memorization":
            continue
        whole = [row for row in folder.rows if not row.prompt]
        overall = next((row for row in whole if row.metric == "memorisation"), None)
        found.append(
            {
                "name": shown_name(folder),
                "overall": line(overall) if overall else None,
                "rows": [line(row) for row in whole if row.metric != "memorisation"],
                "curves": pictures.embed(folder.path, "distances.png"),
                "pairs": _pairs(folder, pictures),
            }
        )
    return found


def _pairs(folder: Folder, pictures: Pictures) -> list[dict[str, Any]]:
    """Return the closest pairs of a gallery, each with its strip."""
    path = folder.path / "gallery.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except ValueError:
        content = []
    pairs = []
    for entry in content if isinstance(content, list) else ():
        if isinstance(entry, dict) and (uri := pictures.embed(folder.path, str(entry.get("file")))):
            box = entry.get("box")
            place = f"voxels {', '.join(map(str, box or ()))}" if _numbers(box) else "place unknown"
            texts = {name: str(entry.get(name, "")) for name in ("caption", "generated", "trained", "score")}
            pairs.append({**texts, "place": place, "uri": uri, "is_flagged": entry.get("is_flagged") is True})
    return pairs


def compare_table(folders: Sequence[Folder], pictures: Pictures) -> dict[str, Any] | None:
    """Return the table and the plot of a comparison of runs."""
    for folder in folders:
        if folder.module != "eval.compare":
            continue
        table = read_json(folder.path / "table.json")
        lines = []
        for entry in table.get("lines") or ():
            cells = [_compared(cell) for cell in entry.get("cells") or ()]
            lines.append({"name": str(entry.get("name", "")), "is_best": entry.get("is_best") is True, "cells": cells})
        columns = [str(column.get("name", "")) for column in table.get("columns") or ()]
        best = next((row.reason for row in folder.rows if row.metric == "pareto_best"), "")
        return {"columns": columns, "lines": lines, "best": best, "plot": pictures.embed(folder.path, "pareto.png")}
    return None


def _compared(cell: object) -> dict[str, str]:
    """Write one cell of a comparison."""
    if not isinstance(cell, dict) or not isinstance(cell.get("value"), int | float):
        return {"value": "-", "interval": "", "verdict": "grey", "note": ""}
    low, high = cell.get("low"), cell.get("high")
    interval = f"{low:.2f} to {high:.2f}" if isinstance(low, int | float) and isinstance(high, int | float) else ""
    verdict = str(cell.get("verdict"))
    return {
        "value": f"{cell['value']:.2f}",
        "interval": interval,
        "verdict": verdict if verdict in WORDS else "grey",
        "note": str(cell.get("note", "")),
    }


def _word(row: Result) -> str:
    """Return the verdict of a row in words; what was measured and not judged is not called unmeasured."""
    if row.reason.startswith(("reference", "A/A")):
        return "reference"
    return "not judged" if row.verdict == "grey" and row.value is not None else WORDS[row.verdict]


def line(row: Result) -> dict[str, str]:
    """Write a row for a table."""
    digits = 3 if row.unit != "ratio" else 2
    interval = f"{row.low:.{digits}f} to {row.high:.{digits}f}" if row.low is not None and row.high is not None else ""
    effective = f" / {row.n_eff:g}" if row.n_eff is not None else ""
    return {
        "metric": LABELS.get(row.metric, row.metric.replace("_", " ")),
        "set": LABELS.get(row.set, row.set.replace("_", " ")),
        "prompt": row.prompt,
        "value": f"{row.value:.{digits}f}" if row.value is not None else "-",
        "interval": interval,
        "floor": f"{row.floor:.{digits}f}" if row.floor is not None else "",
        "n": f"{row.n}{effective}" if row.n else "",
        "unit": row.unit,
        "verdict": row.verdict,
        "word": _word(row),
        "reason": row.reason.removeprefix("reference: "),
    }


def appendix(run: Run | None, folders: Sequence[Folder]) -> list[dict[str, Any]]:
    """Return, for the run and each folder, the command that gives it again and its settings."""
    entries = []
    if run:
        entries.append(
            {"title": f"Training run {run.path}", "command": _trained_by(run), "settings": _flat(run.settings)}
        )
        if run.environment:
            entries.append({"title": "Environment of the run", "command": "", "settings": _flat(run.environment)})
    for folder in folders:
        command = folder.rows[0].command if folder.rows else ""
        if not command and folder.module:
            command = f"python -m {folder.module} --config {shlex.quote(str(folder.path / 'config.yaml'))} --overwrite"
        hashes = folder.rows[0].hashes if folder.rows else {}
        settings = _flat(folder.settings) + [(f"hash of {name}", value) for name, value in hashes.items()]
        entries.append(
            {"title": f"{folder.module or 'results'} in {folder.path}", "command": command, "settings": settings}
        )
    return entries


def _trained_by(run: Run) -> str:
    """Return the command that trains a run again beside itself; empty if nothing says which recipe it was."""
    typed = run.environment.get("command")
    script = Path(str(typed[0])).name if isinstance(typed, list) and typed else f"{run.provenance.get('method')}.py"
    if script.removesuffix(".py") not in RECIPES:
        return ""
    processes = run.environment.get("processes")
    several = isinstance(processes, int) and processes > 1
    words = ["torchrun", "--nproc_per_node", str(processes)] if several else ["accelerate", "launch"]
    words += [f"finetune/{script}", "--config", str(run.path / "config.yaml"), "--output_dir", f"{run.path}-again"]
    return shlex.join(words)


def _flat(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return settings as pairs of text, inner mappings with dotted names."""
    pairs: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            pairs += [(f"{name}.{inner}", text) for inner, text in _flat(value)]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            pairs.append((str(name), text if len(text) <= 2000 else text[:2000] + " ..."))
    return pairs
