"""The allowed words: states, axes, prefix and identifier, and the sentence they stand in.

A vocabulary is data: another campaign writes its own words in a YAML file and passes it with ``--vocabulary``.
"""

from __future__ import annotations

import difflib
import string
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from yaml.constructor import BaseConstructor

from configs.errors import UsageError
from configs.options import compose

# What a caption can say: the words of this file, and the place of one slice.
WORDS = ("identifier", "state", "axis")
PLACE = ("position", "index", "volume", "um_per_px")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """States and axes with the words they are written with in captions.

    Attributes:
        prefix: put before every word (``sf_``), so that trained words do not collide with everyday ones.
        states: name of a state -> its words, in caption order (``dry_compacted`` -> ``("dry", "compacted")``).
        axes: name of an axis -> its word. A slice is named by the direction it is perpendicular to.
        identifier: a rare word that stands for the material, without prefix; none if empty.
        template: the caption, one line of free text with the fields ``{identifier}``, ``{state}``, ``{axis}``, and,
            for captions that tell the place of a slice, ``{position}`` (percent of the way along its axis),
            ``{index}``, ``{volume}`` and ``{um_per_px}``.
    """

    prefix: str = "sf_"
    states: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "dry": ("dry",),
            "dry_compacted": ("dry", "compacted"),
            "injected": ("injected",),
        }
    )
    axes: dict[str, str] = field(
        default_factory=lambda: {"thickness": "thickness", "warp": "warp", "weft": "weft"},
    )
    identifier: str = ""
    template: str = "{identifier} {state} {axis}"

    def __post_init__(self) -> None:
        """Refuse a template or an identifier that no caption can be made of."""
        if problem := template_problem(self.template):
            raise ValueError(f"template {self.template!r}: {problem}")
        if set(self.identifier) & set("{}\n\r"):
            raise ValueError(f"identifier {self.identifier!r}: must be plain words on one line")

    @property
    def has_place(self) -> bool:
        """Whether captions tell the place of a slice, so that each slice has its own."""
        return bool(set(fields_of(self.template)) & set(PLACE))


def fields_of(template: str) -> list[str]:
    """Return the fields of a template, in order.

    Raises:
        ValueError: a brace is left open.
    """
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def template_problem(template: str) -> str:
    """Say what is wrong with a template; empty if it can be used."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        return f"{error}; write a brace as {{{{ or }}}}"
    if len(template.splitlines()) != 1:
        return "must be one line of text"
    for _, name, spec, conversion in parts:
        if name is not None and name not in (*WORDS, *PLACE):
            near = difflib.get_close_matches(name, (*WORDS, *PLACE), n=1)
            hint = f"; did you mean {{{near[0]}}}?" if near else ""
            return f"unknown field {{{name}}}; allowed: {', '.join((*WORDS, *PLACE))}{hint}"
        if spec or conversion:
            return f"{{{name}}} takes no format"
    return ""


DEFAULT = Vocabulary()
OF_A_DATASET = "vocabulary.yaml"
"""File of a dataset folder with the words of its captions, if they are not the built-in ones."""


def words_of(dataset: Path) -> Vocabulary:
    """Return the words of a dataset folder that ``data_prep.slice`` wrote; the built-in ones if it names none."""
    path = dataset / OF_A_DATASET
    return read_vocabulary(path) if path.is_file() else DEFAULT


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a vocabulary from YAML; what the file does not give stays as built in.

    Its keys are ``prefix``, ``states`` (name: [words]), ``axes`` (name: word), ``identifier`` and ``template``.

    Raises:
        UsageError: the file is missing, is not such a mapping, or two states share the same words.
    """
    root = compose(path, "--vocabulary")
    try:
        content = BaseConstructor().construct_document(root) if root else None
    except yaml.YAMLError as error:
        raise UsageError(f"--vocabulary {path}: not readable as YAML ({' '.join(str(error).split())})") from None
    try:
        return vocabulary_of(content)
    except ValueError as error:
        raise UsageError(f"--vocabulary {path}: {error}") from None


def vocabulary_of(content: object) -> Vocabulary:
    """Make a vocabulary of plain values, as they stand in a file; what they do not give stays as built in.

    Raises:
        ValueError: they are not a mapping of the keys of ``read_vocabulary``, or two states share the same words.
    """
    if not isinstance(content, dict) or not set(content) <= {"prefix", "states", "axes", "identifier", "template"}:
        raise ValueError("expected the keys prefix, states, axes, identifier and template, nothing else")
    states, axes = content.get("states", DEFAULT.states), content.get("axes", DEFAULT.axes)
    prefix = content.get("prefix", DEFAULT.prefix)
    identifier, template = content.get("identifier", DEFAULT.identifier), content.get("template", DEFAULT.template)
    lists = list(states.values()) if isinstance(states, dict) else [None]
    words = [word for some in lists for word in (some if isinstance(some, list | tuple) else [None])]
    words += [prefix, identifier, template, *(axes.values() if isinstance(axes, dict) else [None])]
    if not all(isinstance(word, str) for word in words):
        raise ValueError(
            "prefix, identifier and template must be text, states map a name to a list of words, axes a name to a word"
        )
    vocabulary = Vocabulary(
        prefix=prefix,
        states={name: tuple(some) for name, some in states.items()},
        axes=dict(axes),
        identifier=identifier,
        template=template,
    )
    for kind, written in (("states", list(vocabulary.states.values())), ("axes", list(vocabulary.axes.values()))):
        if len(set(written)) != len(written) or not all(written):
            raise ValueError(f"two {kind} are written with the same words, or one has none")
    return vocabulary
