"""The end of a report: the commands that give the run and the checks again, and their settings."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.recipes import RECIPES
from eval.page.inputs import ReportedRun, ResultsFolder


def appendix(run: ReportedRun | None, folders: Sequence[ResultsFolder]) -> list[dict[str, Any]]:
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


def _trained_by(run: ReportedRun) -> str:
    """Return the command that trains a run again beside itself; empty if nothing says which recipe it was."""
    typed = run.environment.get("command")
    script = Path(str(typed[0])).name if isinstance(typed, list) and typed else f"{run.provenance.get('method')}.py"
    if script.removesuffix(".py") not in (*RECIPES, "pretrain"):
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
