"""The numbers of ``eval.memorization``: are pictures copies of training slices, and would copies be found?"""

from __future__ import annotations

from eval.stats.number import Number

DETECTORS = {"ncc": "correlation", "copy_net": "copy network", "sscd": "SSCD"}
"""What looks for copies, in words."""


def _of_detector(name: str, words: str) -> tuple[Number, ...]:
    """Return what each detector measures: two controls on known tiles, then the generated ones."""
    return (
        Number(name=f"{name}_recall", label=f"planted copies found, {words}", unit="share", bad="low"),
        Number(name=f"{name}_false_alarm", label=f"held-out tiles flagged, {words}", unit="share", bad="high"),
        Number(name=f"{name}_copies", label=f"flagged as copies, {words}", unit="share", bad="high"),
        Number(name=f"{name}_closer", label=f"closer to training than held-out, {words}", unit="z", bad="high"),
    )


NUMBERS = (
    Number(
        name="memorisation",
        unit="signs",
        bad="high",
        compared="signs of copies",
        answers="Memorisation",
        finding="{reason}",
    ),
    *(number for name, words in DETECTORS.items() for number in _of_detector(name, words)),
    Number(name="split_audit", label="problems of the split", unit="problems", bad="high"),
    Number(name="seed_agreement", label="likeness of different seeds", unit="similarity"),
    Number(name="loss_gap_auc", label="loss tells trained from held-out (AUC)", unit="share", bad="high"),
)
