"""The allowed words: states, axes and the prefix, and what each of them means.

A vocabulary is data: another campaign writes its own words in a YAML file and passes it with ``--vocabulary``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from configs.errors import UsageError


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
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"--vocabulary {path}: there is no such file") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--vocabulary {path}: not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or not set(content) <= {"prefix", "states", "axes"}:
        raise UsageError(f"--vocabulary {path}: expected the keys prefix, states and axes, nothing else")
    try:
        vocabulary = Vocabulary(
            prefix=str(content.get("prefix", DEFAULT.prefix)),
            states={str(name): tuple(map(str, words)) for name, words in content.get("states", DEFAULT.states).items()},
            axes={str(name): str(word) for name, word in content.get("axes", DEFAULT.axes).items()},
        )
    except (AttributeError, TypeError):
        raise UsageError(
            f"--vocabulary {path}: states must map a name to a list of words, axes a name to a word"
        ) from None
    for kind, words in (("states", list(vocabulary.states.values())), ("axes", list(vocabulary.axes.values()))):
        if len(set(words)) != len(words) or any(not word for word in words):
            raise UsageError(f"--vocabulary {path}: two {kind} are written with the same words, or one has none")
    return vocabulary
