"""docs/reference.md is what the code says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from configs.load import load
from configs.options import options_of
from configs.reference import ROOT, ReferenceConfig, commands, groups_of, main, page


def test_page_equals_the_code() -> None:
    written = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert written == page(), "docs/reference.md is not what the code says; renew it: python -m configs.reference"


def test_page_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    main(load(ReferenceConfig, ["--output", str(tmp_path / "reference.md")]))
    assert (tmp_path / "reference.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("name", commands())
def test_every_option_of_a_command_has_a_row_that_says_something(name: str) -> None:
    kind = commands()[name]
    rows = [row for group in groups_of(kind) for row in group.rows]
    assert [row.flag for row in rows if not row.meaning or not row.takes] == []
    assert {row.flag for row in rows} == {option.flag for option in options_of(kind).values()}
    required = {option.flag for option in options_of(kind).values() if option.is_required}
    assert {row.flag for row in rows if row.default == "required"} == required


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Inner settings: of nothing."""

    depth: int = 1
    """How deep | or `a | b`."""


@dataclass(frozen=True, kw_only=True)
class Deeper(Inner):
    """The same, deeper."""

    depth: int = 2


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Outer settings."""

    name: str
    """A name."""
    inner: Inner = field(default_factory=lambda: Inner(depth=3))
    deeper: bool = False
    """Whether deeper."""


def test_defaults_are_those_of_the_command_and_not_of_the_group_alone() -> None:
    outer, inner = groups_of(Outer)
    assert [(row.flag, row.takes, row.default) for row in outer.rows] == [
        ("--name", "text", "required"),
        ("--deeper", "switch", "off"),
    ]
    assert [(row.flag, row.default) for row in inner.rows] == [("--depth", "`3`")]
    assert inner.title == "Inner settings"


def test_meaning_is_inherited_with_the_field() -> None:
    (group,) = groups_of(Deeper)
    assert [(row.default, row.meaning) for row in group.rows] == [("`2`", "How deep | or `a | b`.")]
