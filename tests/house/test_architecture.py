"""The plan on the pages is the one that the layout is held to."""

from __future__ import annotations

import re

from test_layout import BORDERS, MODULES, ROOT, tracked_files


def test_front_page_lists_the_folders_of_code() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- rooms -->")[1].split("<!-- /rooms -->")[0]
    rooms: dict[str, str] = {}
    above: list[str] = []
    for indent, name, purpose in re.findall(r"^( *)(\S+)/ +(\S.*)$", text, re.MULTILINE):
        above = [*above[: len(indent) // 2], name]
        rooms["/".join(above)] = purpose
    code = {path.parent.relative_to(ROOT).as_posix() for path in MODULES.values()}
    tracked = {path.relative_to(ROOT).as_posix() for path in tracked_files()}
    assert sorted(code - set(rooms)) == []
    assert [room for room in rooms if not any(name.startswith(f"{room}/") for name in tracked)] == []


def test_plan_has_a_line_for_every_folder_of_code() -> None:
    plan = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## The plan")[1].split("\n## ")[0]
    rooms = re.findall(r"^\| `([\w/]+)` \| \w", plan.split("<!-- borders -->")[0], re.MULTILINE)
    assert sorted(rooms) == sorted({path.parent.relative_to(ROOT).as_posix() for path in MODULES.values()})


def test_page_shows_the_borders_that_the_layout_keeps() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- borders -->\n(.*?)<!-- /borders -->", text, re.DOTALL)
    assert table is not None
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \|$", table[1], re.MULTILINE)
    assert {room: tuple(re.findall(r"`([\w.]+)`", cell)) for room, cell in rows} == BORDERS
    assert [room for room, _ in rows] == list(BORDERS)


def test_files_that_the_page_sends_to_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:configs|data_prep|eval|finetune|prompts|tests|docs|benchmarks)/[\w/.]+\.\w+)`", text)
    assert len(named) >= 20
    assert sorted({name for name in named if not (ROOT / name).is_file() and not is_new(name, text)}) == []


def is_new(name: str, text: str) -> bool:
    """Tell whether the page marks a file as one to write: `finetune/lokr.py` (new)."""
    return f"`{name}` (new)" in text
