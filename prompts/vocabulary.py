"""The allowed words: states, axes and the prefix, and what each of them means.

A vocabulary is data: another campaign writes its own words in a YAML file and passes it with ``--vocabulary``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml
from yaml.constructor import BaseConstructor

from configs.errors import UsageError
from configs.options import compose


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """States and axes with the words they are written with in captions.

    Attributes:
        prefix: put before every word (``sf_``), so that trained words do not collide with everyday ones.
        states: name of a state -> its words, in caption order (``dry_compacted`` -> ``("dry", "compacted")``).
        axes: name of an axis -> its word. A slice is named by the direction it is perpendicular to.
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


DEFAULT = Vocabulary()


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a vocabulary from YAML with the keys ``prefix``, ``states`` (name: [words]) and ``axes`` (name: word).

    Raises:
        UsageError: the file is missing, is not such a mapping, or two states share the same words.
    """
    root = compose(path, "--vocabulary")
    try:
        content = BaseConstructor().construct_document(root) if root else None
    except yaml.YAMLError as error:
        raise UsageError(f"--vocabulary {path}: not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or not set(content) <= {"prefix", "states", "axes"}:
        raise UsageError(f"--vocabulary {path}: expected the keys prefix, states and axes, nothing else")
    states, axes = content.get("states", DEFAULT.states), content.get("axes", DEFAULT.axes)
    prefix = content.get("prefix", DEFAULT.prefix)
    lists = list(states.values()) if isinstance(states, dict) else [None]
    words = [word for some in lists for word in (some if isinstance(some, list | tuple) else [None])]
    words += [prefix, *(axes.values() if isinstance(axes, dict) else [None])]
    if not all(isinstance(word, str) for word in words):
        raise UsageError(
            f"--vocabulary {path}: prefix must be text, states map a name to a list of words, axes a name to a word"
        )
    vocabulary = Vocabulary(prefix=prefix, states={name: tuple(some) for name, some in states.items()}, axes=dict(axes))
    for kind, written in (("states", list(vocabulary.states.values())), ("axes", list(vocabulary.axes.values()))):
        if len(set(written)) != len(written) or not all(written):
            raise UsageError(f"--vocabulary {path}: two {kind} are written with the same words, or one has none")
    return vocabulary
