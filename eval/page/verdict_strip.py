"""The boxes at the top of the page: four questions, each with its verdict, or the command that would answer it."""

from __future__ import annotations

import importlib.util
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.folders.provenance import training_folders
from data_prep.folders.results import VERDICTS, Result, Verdict
from eval.forgetting.verdicts import worst
from eval.page.inputs import ReportedRun, ResultsFolder, shown_name
from eval.page.words import WORDS, number_of, sentence


@dataclass(frozen=True, kw_only=True)
class Question:
    """One box of the verdict strip.

    Attributes:
        title: what it is called.
        text: the question in words.
        module: the command that answers it.
    """

    title: str
    text: str
    module: str


QUESTIONS = (
    Question(title="Fidelity", text="Do generated slices look like real ones?", module="eval.fidelity"),
    Question(title="Prompt", text="Do they show what was asked for?", module="eval.fidelity"),
    Question(title="Drift", text="Did the model forget what it knew?", module="eval.drift"),
    Question(title="Memorisation", text="Are they copies of training slices?", module="eval.memorization"),
)
"""What decides each is declared with the numbers (``answers``)."""


def verdict_boxes(folders: Sequence[ResultsFolder], run: ReportedRun | None) -> list[dict[str, str]]:
    """Return the four boxes of the strip."""
    return [_box(question, folders, run) for question in QUESTIONS]


def _box(question: Question, folders: Sequence[ResultsFolder], run: ReportedRun | None) -> dict[str, str]:
    """Judge one question by the worst row that was judged."""
    checks = [
        (shown_name(folder), [row for row in folder.rows if number_of(row.metric).answers == question.title])
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


def _seen_while_it_learned(run: ReportedRun | None) -> dict[str, str]:
    """Return verdict and reason of the run's own check of the weights that it kept, else its last one; or nothing."""
    checks = [record for record in (run.drift if run else ()) if record.get("kind") == "check"]
    kept = [check for check in checks if run and check.get("step") == run.selection.get("selected_step")]
    check = (kept or checks or [{}])[-1]
    verdict = next((known for known in VERDICTS if known == check.get("verdict")), None)
    if verdict is None:
        return {}
    value = check.get("value")
    shown = f", {str(check.get('unit')).replace('_', ' ')} {value:.2f}" if isinstance(value, int | float) else ""
    why = f" {sentence(str(check['reason']).replace('_', ' '))}." if check.get("reason") else ""
    reason = f"By the run's own check at step {check.get('step')}. Worst prompt: {check.get('prompt')}{shown}.{why}"
    return {"verdict": verdict, "word": WORDS[verdict], "reason": reason}


def _why(rows: Sequence[Result], verdict: Verdict) -> str:
    """Say in words what was found, over everything before single prompts, and why it is not in order."""
    deciding = [row for row in rows if row.verdict == verdict and not row.reason.startswith(("reference", "A/A"))]
    whole = [row for row in deciding if not row.prompt or row.metric == "worst_prompt"] or deciding
    if verdict == "grey":
        return f"{sentence(next((row.reason for row in whole if row.reason), 'nothing could be judged'))}."
    found = [_finding(row) for row in whole]
    return " ".join(found[:3]) + (f" And {len(found) - 3} more." if len(found) > 3 else "")


def _finding(row: Result) -> str:
    """Write one deciding number as a sentence, with its reason unless it is in order."""
    number = number_of(row.metric)
    if number.finding == "{reason}" or (row.metric == "kid_floor_ratio" and row.verdict == "ok"):
        return f"{sentence(row.reason)}."
    text = (number.finding or sentence(number.words) + " {value:.2f}").format(
        value=row.value if row.value is not None else math.nan, prompt=row.prompt, unit=row.unit.replace("_", " ")
    )
    why = f": {row.reason.replace('_', ' ')}" if row.reason and row.verdict != "ok" else ""
    return f"{text}{why}."


def suggestion(module: str, folders: Sequence[ResultsFolder], run: ReportedRun | None) -> str:
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
