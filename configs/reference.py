"""Write docs/reference.md: every command with its options, their defaults and what they mean, read from the code.

    python -m configs.reference

Settings that several commands share, such as the model to start from, stand once at the end; a command links to them
and lists only those of its defaults that differ.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import re
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.load import Common, command
from configs.options import Option, describe, options_of

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_prep", "prompts", "eval", "finetune")
HEAD = """# Reference

Every command and every option. This page is written by `python -m configs.reference` from the code, and a test keeps
the two equal.

How options are typed:

| typed | what it means |
|---|---|
| `--rank 8` or `--rank=8` | one value |
| `--shape 359 702 970` | several values; where an option is given twice, the last one counts |
| `--random_flip`, `--no_random_flip` | a switch: on, off |
| `--snr_gamma null` | no value, where the default is *none* |
| `--volumes dry=a.tif wet=b.tif` | names with values |
| `--config FILE.yaml` | a file with the same names; what is typed wins over it |

*Ours* marks a training option that diffusers' example scripts do not have. The others are spelled as there
([coming from diffusers](from_diffusers.md)).
"""


@dataclass(frozen=True)
class Row:
    """One option of a table: as typed, what it takes, its default, its meaning."""

    flag: str
    takes: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Group:
    """Options that stand together: those of one dataclass, without the dataclasses inside it."""

    kind: type
    rows: tuple[Row, ...]

    @property
    def about(self) -> str:
        """What the options are about: the first line of the docstring."""
        return inspect.cleandoc(self.kind.__doc__ or self.kind.__name__).splitlines()[0]

    @property
    def title(self) -> str:
        """The same, short: up to the first stop."""
        return re.split(r"[:;,.](?:\s|$)(?![^(]*\))", self.about)[0]


@functools.cache
def commands() -> dict[str, type]:
    """Return every command, a module that ends in ``command(SomeConfig, main)``, with the class of its settings."""
    found = {}
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    for path in paths:
        last = re.search(r"^    command\((\w+), main\)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        if last:
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name] = getattr(importlib.import_module(name), last[1])
    return found


def page() -> str:
    """Return the text of docs/reference.md."""
    groups = {name: list(groups_of(kind)) for name, kind in commands().items()}
    shared = _shared(groups)
    parts = [HEAD, "## Options of every command\n", _table(next(groups_of(Common)).rows)]
    for name, own in groups.items():
        parts += [f"## {name}\n", _about(inspect.getdoc(sys.modules[name]) or "")]
        parts += [text for group in own if (text := _of_command(group, shared))]
        if linked := [shared[_root(group.kind)] for group in own if _root(group.kind) in shared]:
            parts += ["Also takes the options of these groups:\n", *(f"- {_link(group)}" for group in linked), ""]
    parts.append("## Options that several commands share\n")
    for group in shared.values():
        parts += [f"### {_text(group.title)}\n", _text(group.about) + "\n", _table(group.rows)]
    return "\n".join(parts)


def groups_of(config_class: type, defaults: object = None) -> Iterator[Group]:
    """Yield the options of a dataclass, then those of the dataclasses inside it.

    Args:
        config_class: a config dataclass.
        defaults: an instance that holds its defaults; what has no default is required if None.
    """
    options, hints = options_of(config_class), typing.get_type_hints(config_class)
    inner, rows = [], []
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[field.name]):
            inner.append((typing.cast(type, hints[field.name]), _default(field, defaults)))
        else:
            rows.append(_row(options[field.name], _default(field, defaults), meanings(config_class)[field.name]))
    if rows:
        yield Group(config_class, tuple(rows))
    for kind, value in inner:
        yield from groups_of(kind, None if value is dataclasses.MISSING else value)


def meanings(config_class: type) -> dict[str, str]:
    """Return the string under each field of a dataclass, and of those it comes from, on one line."""
    found: dict[str, str] = {}
    for kind in reversed(config_class.__mro__[:-1]):
        tree = ast.parse(Path(inspect.getfile(kind)).read_text(encoding="utf-8"))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__)
        for field, below in itertools.pairwise(body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def _default(field: dataclasses.Field[Any], defaults: object) -> Any:
    if defaults is not None:
        return getattr(defaults, field.name)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _row(option: Option, default: object, meaning: str) -> Row:
    takes = "switch" if option.type is bool else re.sub(r"\bone of (\w+)$", r"\1", describe(option.type))
    return Row(option.flag, takes, _typed(default), meaning)


def _typed(value: object) -> str:
    """Return a default as somebody would type it."""
    if value is dataclasses.MISSING:
        return "required"
    if value is None or value in ((), "") or value == {}:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return f"`{' '.join(f'{name}={item}' for name, item in value.items())}`"
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def _root(kind: type) -> type:
    """Return the dataclass that a class of settings only gives other defaults."""
    return next(base for base in reversed(kind.__mro__[:-1]) if dataclasses.is_dataclass(base))


def _shared(groups: Mapping[str, list[Group]]) -> dict[type, Group]:
    """Return the groups that stand in more than one command, with their own defaults, by class."""
    users: dict[type, set[str]] = {}
    for name, own in groups.items():
        for group in own:
            users.setdefault(_root(group.kind), set()).add(name)
    return {kind: next(groups_of(kind)) for kind, names in users.items() if len(names) > 1}


def _link(group: Group) -> str:
    address = re.sub(r"[^\w\- ]", "", group.title.lower()).replace(" ", "-")  # as forges and the site make it
    return f"[{_text(group.title)}](#{address})"


def _of_command(group: Group, shared: Mapping[type, Group]) -> str:
    """Return what a command's own part says of a group: all of it, or what differs from the shared one."""
    if _root(group.kind) not in shared:
        return _table(group.rows)
    usual = shared[_root(group.kind)]
    rows = tuple(row for row in group.rows if row not in usual.rows)
    return f"Other defaults here for {_link(usual)}:\n\n{_table(rows)}" if rows else ""


def _table(rows: tuple[Row, ...]) -> str:
    lines = ["| option | takes | default | what it means |", "|---|---|---|---|"]
    for row in rows:
        meaning, takes = _text(row.meaning), _text(row.takes)
        lines.append(f"| `{row.flag}` | {takes} | {row.default} | {meaning} |".replace("\n", " "))
    return "\n".join(lines) + "\n"


def _about(docstring: str) -> str:
    """Return a module's docstring as Markdown: paragraphs, and what is indented or in columns as it stands."""
    parts = []
    for paragraph in docstring.strip().split("\n\n"):
        if paragraph.startswith("    ") or re.match(r"\w+  +\S", paragraph):
            lines = re.sub(r" \s{7,}(?=--)", " \\\\\n    ", textwrap.dedent(paragraph))
            is_command = re.match("python |accelerate ", lines)
            parts.append(f"```{'' if is_command else 'text'}\n{lines}\n```\n")
        else:
            parts.append(textwrap.fill(_text(" ".join(paragraph.split())), 120, break_on_hyphens=False) + "\n")
    return "\n".join(parts)


def _text(text: str) -> str:
    """Return text as Markdown; what stands between backquotes stays as it is but for the bars of a table."""
    pieces = re.split(r"(`+[^`]+`+)", text.replace("|", "\\|"))
    plain = [re.sub(r"([*\[\]])", r"\\\1", piece).replace("<", "&lt;") for piece in pieces[::2]]
    code = [f"`{piece.strip('`')}`" for piece in pieces[1::2]]
    return "".join(part for pair in zip(plain, [*code, ""], strict=True) for part in pair)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Settings of ``configs.reference``."""

    output: Path = ROOT / "docs" / "reference.md"
    """File to write."""


def main(config: ReferenceConfig) -> None:
    """Write the page."""
    config.output.write_text(page(), encoding="utf-8")
    print(f"{config.output}: {len(commands())} commands")


if __name__ == "__main__":
    command(ReferenceConfig, main)
