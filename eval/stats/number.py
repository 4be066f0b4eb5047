"""What a number of a report is: its name, words, unit and which way is bad, declared once and read by every table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Number:
    """One number that a check measures.

    The rows of ``results.jsonl`` carry its name and unit; verdicts, console tables, ``eval.compare`` and the page read
    the rest here.

    Attributes:
        name: the ``metric`` of its rows, such as ``leak``.
        label: what the page calls it; the name without underscores if empty.
        unit: ``share``, ``ratio``, ``px``, ...
        bad: which values are worse: ``high``, ``low``, ``both`` (a ratio away from 1), or empty if it only tells how
            far apart two things are.
        tier: ``A`` needs no outside weights, ``B`` local weights, ``C`` further packages.
        limits: the limits of a policy that judge it (``leak`` for ``leak_warn`` and ``leak_stop``); none if empty.
        column: its heading in the table that its command prints; not in that table if empty.
        place: where that column stands, from the left.
        card: what the page's cards of single prompts call it; not on them if empty.
        card_place: where it stands among the columns of the page's table of those cards, from the left.
        compared: its heading in the table of ``eval.compare``; not in that table if empty.
        answers: title of the box of the page's verdict strip that it decides; none if empty.
        finding: the sentence of that box, a format of ``value``, ``prompt``, ``unit`` and ``reason``.
    """

    name: str
    label: str = ""
    unit: str = ""
    bad: Literal["", "high", "low", "both"] = ""
    tier: Literal["A", "B", "C"] = "A"
    limits: str = ""
    column: str = ""
    place: int = 100
    card: str = ""
    card_place: int = 100
    compared: str = ""
    answers: str = ""
    finding: str = ""

    @property
    def words(self) -> str:
        """What the page calls it."""
        return self.label or self.name.replace("_", " ")


def by_name(numbers: Iterable[Number]) -> Mapping[str, Number]:
    """Return declared numbers under their names.

    Raises:
        ValueError: two of them have the same name.
    """
    found: dict[str, Number] = {}
    for number in numbers:
        if found.setdefault(number.name, number) is not number:
            raise ValueError(f"{number.name}: declared twice")
    return found
