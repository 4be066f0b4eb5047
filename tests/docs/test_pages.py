"""The pages hold together: links lead somewhere, every page is reached, the site is built without a warning."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import JOBS, LINKING, ROOT, anchors_of, links_of


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for line, path, anchor in links_of(page):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(f"{name_of(page)}:{line}: {path}#{anchor}")
    assert broken == []


def test_every_page_is_linked_from_the_front_page_and_stands_in_the_menu() -> None:
    linked = {(ROOT / path).resolve() for _, path, _ in links_of(ROOT / "README.md")}
    menu = re.findall(r"^ +- (?:[^:\n]+: )?(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert [page.name for page in JOBS if page.resolve() not in linked and page.name != "index.md"] == []
    assert sorted(menu) == [page.name for page in JOBS]


def test_front_page_fits_on_a_few_screens() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {page: page.read_text(encoding="utf-8") for page in sorted((tmp_path / "site").rglob("*.html"))}
    assert {page.stem for page in JOBS} <= {page.stem for page in pages}
    loaded = r"<(?:script|img|iframe)[^>]+src=\"(?:https?:)?//|<link[^>]+href=\"(?:https?:)?//"
    assert [page.name for page, text in pages.items() if re.search(loaded, text)] == []
