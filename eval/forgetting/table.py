"""What ``eval.drift`` prints: a line per probe set, the worst prompt, and what weaker adapters kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from data_prep.folders.results import Result
from eval.forgetting.reported import LEAK, NUMBERS, SWEEP_CAPTIONS_MOVED, SWEEP_WORST_PROMPT, WORST_PROMPT
from eval.forgetting.verdicts import worst
from eval.stats.number import Number


def drift_table(rows: Sequence[Result], numbers: Sequence[Number] = NUMBERS) -> str:
    """Write one line per set with its scores and A/A bands, and one for the worst prompt.

    Args:
        rows: of a check.
        numbers: that it may hold; those with a ``column`` are written.
    """
    columns = sorted((number for number in numbers if number.column), key=lambda one: one.place)
    by_key = {(row.metric, row.set): row for row in rows if not row.prompt}
    lines = [["set", *(number.column for number in columns), "verdict"]]
    for name in dict.fromkeys(row.set for row in rows if row.set not in {"", "control", "captions"}):
        cells = [_cell(by_key.get((one.name, name)), by_key.get((f"{one.name}_aa", name))) for one in columns]
        judged = [row.verdict for row in rows if row.set == name and not row.prompt]
        lines.append([name, *cells, worst(judged)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    overall = next(row for row in rows if row.metric == WORST_PROMPT.name)
    text.append(f"worst prompt: '{overall.prompt}' ({overall.set}), {overall.unit} {overall.value:.2f}")
    text.append(f"verdict: {overall.verdict}" + (f" ({overall.reason})" if overall.reason else ""))
    text += [f"leak not measured: {row.reason}" for row in unmeasured(rows)]
    return "\n".join(text)


def sweep_lines(rows: Sequence[Result]) -> Iterable[str]:
    """Write a line per strength tried, weakest first, and which is the strongest that does not stop."""
    worst_prompts = {row.set: row for row in rows if row.metric == SWEEP_WORST_PROMPT.name}
    moved = {row.set: row for row in rows if row.metric == SWEEP_CAPTIONS_MOVED.name}
    for name, row in worst_prompts.items():
        learned = moved[name].value if name in moved else None
        kept = "" if learned is None else f", {learned:.0%} of the change for the captions"
        yield f"{name}: worst prompt '{row.prompt}', {row.unit} {row.value:.2f}, {row.verdict}{kept}"
    passed = [name for name, row in worst_prompts.items() if row.verdict in {"ok", "warn"}]
    if worst_prompts:
        yield f"strongest without a stop: {passed[-1]}" if passed else "every strength tried stops"


def unmeasured(rows: Iterable[Result]) -> list[Result]:
    """Return the row that says why no leak was measured, if none was."""
    return [row for row in rows if row.metric == LEAK.name and row.value is None and not row.set]


def _cell(row: Result | None, band: Result | None) -> str:
    """Write a value, with its A/A band where it has one."""
    if row is None or row.value is None:
        return "-"
    return f"{row.value:.2f}" + (f" [{band.low:.2f}, {band.high:.2f}]" if band is not None else "")
