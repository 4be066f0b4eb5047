"""The pages of the project as data: commands, options, links and headings, each with its line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *JOBS]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
COMMAND_FENCES = ("", "sh", "bash")
"""What stands behind the three backquotes of a block of commands; what is printed or written is `text`, `yaml`, ..."""
STARTS = ("python ", "accelerate launch ", "torchrun ", "make ")
"""How code within a sentence begins if it is a command."""
OPERATORS = {"&&", "||", ";", "|", "(", ")", "&"}


@dataclass(frozen=True)
class Command:
    """One command of a page, as words; of a line of several, each is one.

    It is whole if somebody could copy it: not within a sentence, where it may only be named, and without `...`.
    """

    page: Path
    line: int
    words: tuple[str, ...]
    is_whole: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {shlex.join(self.words)}"


def commands_of(page: Path) -> Iterator[Command]:
    """Yield the commands of a page: the lines of its blocks, and code in its sentences that begins like one."""
    prose = []
    for number, line, fence in _lines(page):
        if fence is None:
            prose.append((number, line))
        elif fence in COMMAND_FENCES:
            yield from _split(page, number, line, in_block=True)
    text = "\n".join(line for _, line in prose)
    for code in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        if re.sub(r"^([A-Z_]+=\S+\s+)+", "", code[1]).startswith(STARTS):
            number = prose[text[: code.start()].count("\n")][0]
            yield from _split(page, number, " ".join(code[1].split()), in_block=False)
    for number, line in prose:
        if line.startswith("    ") and line.strip().startswith(STARTS):
            yield from _split(page, number, line.strip(), in_block=True)


def flags_of(page: Path) -> Iterator[tuple[int, str]]:
    """Yield every option that a sentence or a table of a page names as code, with its line."""
    for number, line, fence in _lines(page):
        if fence is None:
            for code in re.findall(r"`([^`]+)`", line):
                yield from ((number, flag) for flag in re.findall(r"(?<![\w-])--(\w[\w-]*)", code))


def links_of(page: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line, path and anchor of every link and picture of a page that leads to a file."""
    for number, line, fence in _lines(page):
        if fence is None:
            for path, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", re.sub(r"`[^`]*`", "", line)):
                if "://" not in path:
                    yield number, path, anchor


def anchors_of(page: Path) -> set[str]:
    """Return the addresses of the headings of a page, as forges make them."""
    headings = [line.lstrip("#").strip() for _, line, fence in _lines(page) if fence is None and line.startswith("#")]
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def _lines(page: Path) -> Iterator[tuple[int, str, str | None]]:
    """Yield number, line and the kind of the block it stands in, None outside blocks; a trailing backslash joins."""
    fence: str | None = None
    begun, joined = 0, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
        elif fence is not None and line.endswith("\\"):
            begun, joined = begun or number, joined + line[:-1]
        else:
            yield begun or number, joined + line, fence
            begun, joined = 0, ""


def _split(page: Path, number: int, line: str, *, in_block: bool) -> Iterator[Command]:
    """Split a line as a shell does, into simple commands without redirections and assignments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in OPERATORS:
            words.append(word)
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield Command(page, number, tuple(words), in_block and "..." not in words)
        words = []
