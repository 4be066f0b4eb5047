"""What MkDocs does with links that leave ``docs/``: the file comes into the site, under ``repository/``.

The pages are read on a forge, too, where ``../benchmarks/README.md`` is a link like any other. A Markdown file becomes
a page, with its own links treated alike; any other file is copied. A link to nothing is left as it is, and ``--strict``
refuses it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def on_files(files: Any, *, config: Any) -> Any:
    """Add the files outside ``docs/`` that are linked from the pages, and from those in turn."""
    ahead = [file.src_uri for file in files.documentation_pages()]
    while ahead:
        source = _in_repository(ahead.pop())
        for path in _outside(source.read_text(encoding="utf-8"), source):
            uri = _in_site(path)
            if files.get_file_from_path(uri) is None:
                new = File.generated(config, uri, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV)
                files.append(new)
                ahead += [uri] * (path.suffix == ".md")
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Point the links of a page at where those files are in the site."""
    source, folder = _in_repository(page.file.src_uri), Path(page.file.src_uri).parent

    def moved(link: re.Match[str]) -> str:
        path = _target(source, link[2])
        return link[1] + os.path.relpath(_in_site(path), folder) + link[3] if path.is_file() else link[0]

    return LINK.sub(moved, markdown)


def _in_repository(uri: str) -> Path:
    """Return the file that a path of the site was made from."""
    return ROOT / (uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}")


def _in_site(path: Path) -> str:
    """Return where a file of the repository is in the site."""
    name = path.relative_to(ROOT).as_posix()
    return name.removeprefix("docs/") if name.startswith("docs/") else f"repository/{name}"


def _target(source: Path, link: str) -> Path:
    return Path(os.path.normpath(source.parent / link))


def _outside(markdown: str, source: Path) -> Iterator[Path]:
    for _, link, _ in LINK.findall(markdown):
        path = _target(source, link)
        if path.is_file() and path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "docs"):
            yield path
