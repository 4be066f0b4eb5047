"""Words of the page: verdicts, what numbers and sets are called, and a row of results as text."""

from __future__ import annotations

from data_prep.folders.results import Result, Verdict
from eval.copying.reported import NUMBERS as OF_COPYING
from eval.forgetting.reported import NUMBERS as OF_FORGETTING
from eval.likeness.reported import NUMBERS as OF_LIKENESS
from eval.stats.number import Number, by_name

MEASURED_BY = {"eval.fidelity": OF_LIKENESS, "eval.drift": OF_FORGETTING, "eval.memorization": OF_COPYING}
"""Command -> the numbers it declares."""
NUMBERS = by_name(number for numbers in MEASURED_BY.values() for number in numbers)
WORDS: dict[Verdict, str] = {"ok": "in order", "warn": "look closer", "stop": "stop", "grey": "not measured"}
SET_LABELS = {
    "held_out": "held-out real",
    "held_out_matched": "held-out real, one histogram",
    "held_out_vae": "held-out real, through the VAE",
    "real": "real to real",
    "vae": "real through the VAE, to real",
    "nearest_states": "nearest two states",
}


def number_of(metric: str) -> Number:
    """Return the declaration of a metric; a bare one with its name if nothing declares it."""
    return NUMBERS.get(metric) or Number(name=metric)


def words_of(metric: str) -> str:
    """Return what the page calls a metric."""
    return number_of(metric).words


def sentence(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[:1].upper() + text[1:]


def word_of(row: Result) -> str:
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
        "metric": words_of(row.metric),
        "set": SET_LABELS.get(row.set, words_of(row.set)),
        "prompt": row.prompt,
        "value": f"{row.value:.{digits}f}" if row.value is not None else "-",
        "interval": interval,
        "floor": f"{row.floor:.{digits}f}" if row.floor is not None else "",
        "n": f"{row.n}{effective}" if row.n else "",
        "unit": row.unit,
        "verdict": row.verdict,
        "word": word_of(row),
        "reason": row.reason.removeprefix("reference: "),
    }
