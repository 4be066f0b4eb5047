"""Options as text: which there are, how a file and a command line write them, and what the words become.

Nothing here knows where a word came from beyond the place that an error names, so a preset and a command line are
checked by the same rules. The types are tyro's.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import operator
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from configs.errors import UsageError

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NULLS = ("null", "Null", "NULL", "~", "")  # in YAML, unquoted
TYPED_NULLS = ("null", "None")  # None is how the help page shows it
YAML_NUMBERS = {".inf": "inf", "-.inf": "-inf", ".nan": "nan"}  # YAML's spelling -> Python's
DEEPEST = 8  # levels of nesting in a file; a preset has 3, a vocabulary 4
LARGEST_FILE = 100_000  # bytes; `--config` on a weights file must not fill the memory


@dataclass(frozen=True)
class Option:
    """One field of a config dataclass."""

    name: str
    type: Any  # without None
    is_optional: bool
    is_required: bool
    is_positional: bool
    is_repeatable: bool
    spec: PrimitiveConstructorSpec[Any]

    @property
    def flag(self) -> str:
        """The name as typed."""
        return self.name.upper() if self.is_positional else f"--{self.name}"

    @property
    def count(self) -> int | None:
        """How many words the option takes; None is any number."""
        return self.spec.nargs if isinstance(self.spec.nargs, int) else None


@dataclass(frozen=True)
class Given:
    """An option as somebody wrote it: where, and its words (None for null)."""

    where: str
    words: list[str] | None


registry = ConstructorRegistry()


@registry.primitive_rule
def _mapping_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read ``dict[str, X]`` from ``name=value`` words; tyro's own rule wants names and values in turn."""
    if info.type_origin is not dict:
        return None
    inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(typing.get_args(info.type)[1], set()))
    assert isinstance(inner, PrimitiveConstructorSpec)

    def from_words(words: list[str]) -> dict[str, Any]:
        values = {}
        for word in words:
            name, _, text = word.partition("=")
            if not name or not text or name in values:
                raise ValueError
            values[name] = inner.instance_from_str([text])
        return values

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[NAME={inner.metavar} ...]",
        instance_from_str=from_words,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={item}" for name, item in value.items()],
    )


@registry.primitive_rule
def _path_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """Read paths; no text is no path, although Python takes it for the current folder."""
    if info.type is not Path:
        return None

    def from_words(words: list[str]) -> Path:
        if not words[0] or "\0" in words[0]:
            raise ValueError
        return Path(words[0])

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=from_words,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


@registry.primitive_rule
def _number_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[float] | None:
    """Read numbers as Python does, and YAML's spelling of the endless ones too."""
    if info.type is not float:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=lambda words: float(YAML_NUMBERS.get(words[0].lower(), words[0])),
        is_instance=lambda value: isinstance(value, float | int),
        str_from_instance=lambda value: [str(value)],
    )


def options_of(config_class: type) -> dict[str, Option]:
    """List the options of a dataclass and of the dataclasses inside it, by name."""
    found: dict[str, Option] = {}
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        annotation, *markers = (
            typing.get_args(hints[field.name])
            if typing.get_origin(hints[field.name]) is Annotated
            else (hints[field.name],)
        )
        if dataclasses.is_dataclass(annotation):
            new = options_of(typing.cast(type, annotation))
            if field.default_factory is not dataclasses.MISSING:
                new = {name: dataclasses.replace(option, is_required=False) for name, option in new.items()}
        else:
            kinds = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
            without_none: Any = functools.reduce(operator.or_, (kind for kind in kinds if kind is not types.NoneType))
            with registry:
                spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(without_none, set()))
            if not isinstance(spec, PrimitiveConstructorSpec):
                raise TypeError(f"{config_class.__name__}.{field.name}: no way to write {annotation} as an option")
            option = Option(
                name=field.name,
                type=without_none,
                is_optional=types.NoneType in kinds,
                is_required=field.default is field.default_factory is dataclasses.MISSING,
                is_positional=tyro.conf.Positional in markers,
                is_repeatable=tyro.conf.UseAppendAction in markers,
                spec=spec,
            )
            new = {field.name: option}
        if clash := sorted(set(found) & set(new)):
            raise TypeError(f"{config_class.__name__} has two fields named {', '.join(clash)}")
        found |= new
    return found


def read_words(words: Sequence[str], options: dict[str, Option]) -> dict[str, Given]:
    """Sort a command line into options; words that no flag takes go to the positional options, in order.

    Raises:
        UsageError: an unknown flag, or a word too many.
    """
    given: dict[str, Given] = {}
    loose: list[str] = []
    negations = {f"no_{name}": option for name, option in options.items() if option.type is bool}
    rest, previous = list(words), ""
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            loose.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        option = options.get(name) or negations.get(name)
        if option is None:
            raise UsageError(f"unknown option '--{name}'{_did_you_mean(name, [*options, *negations], '--')}")
        if name in negations and equals:
            raise UsageError(f"--{name} takes no value, got {text!r}")
        if equals:
            taken = [text]
        elif option.type is bool:
            taken = ["false" if name in negations else "true"]
        else:
            taken = _take(rest, option)
        before = given.get(name)
        is_null = option.is_optional and len(taken) == 1 and taken[0] in TYPED_NULLS
        if option.is_repeatable and before and before.words:
            taken = [*before.words, *taken]
        given[option.name] = Given(f"--{name}", None if is_null else taken)
        previous = word
    for option in options.values():
        if option.is_positional and loose:
            taken, loose = loose[: option.count], loose[len(loose[: option.count]) :]
            given[option.name] = Given(option.flag, taken)
    if loose:
        after = f" (after {previous}, which takes no more)" if previous else ""
        raise UsageError(f"{loose[0]!r} belongs to no option{after}; every option begins with --")
    return given


def _take(rest: list[str], option: Option) -> list[str]:
    """Take the words of a flag off the list: as many as its type holds, up to the next flag."""
    end = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    if option.is_optional and rest[:1] and rest[0] in TYPED_NULLS:
        end = 1
    elif option.count is not None:
        end = min(end, option.count)
    taken = rest[:end]
    del rest[:end]
    return taken


class _Loader(yaml.BaseLoader):
    """Composes short flat files of text; deep nesting, which costs minutes, and a key given twice are errors."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth == DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.get_mark())
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                raise UsageError(f"{self.name}:{line}: {name!r} is given twice (first on line {lines[name]})")
            lines[name] = line
        return node


def compose(path: Path, flag: str) -> yaml.Node | None:
    """Read a YAML file that somebody wrote for ``flag`` as nodes whose scalars are text; None if it is empty.

    Raises:
        UsageError: it cannot be read, is too large or nested too deeply, is not YAML, or a key is given twice.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise UsageError(f"{flag} {path}: larger than {LARGEST_FILE} bytes; expected a short YAML file")
        loader = _Loader(content.decode())
        loader.name = str(path)
        return loader.get_single_node()
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UsageError(f"{place}: not readable as YAML: {getattr(error, 'problem', None) or error}") from None


def read_yaml(path: Path, options: dict[str, Option]) -> dict[str, Given]:
    """Read a preset as words, each key with its line.

    Raises:
        UsageError: not a file of ``key: value`` lines, an unknown key, or a key given twice.
    """
    root = compose(path, "--config")
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}:{root.start_mark.line + 1}: expected lines of 'key: value'")
    given: dict[str, Given] = {}
    for key, node in root.value:
        line, name = key.start_mark.line + 1, key.value
        if not isinstance(key, yaml.ScalarNode) or name not in options:
            raise UsageError(f"{path}:{line}: unknown key {str(name)!r}{_did_you_mean(str(name), list(options))}")
        where = f"{path}:{line}: {name}"
        given[name] = Given(where, _words_of(node, where))
    return given


def _words_of(node: yaml.Node, where: str) -> list[str] | None:
    """Turn a YAML value into the words somebody would have typed for it."""
    match node:
        case yaml.ScalarNode(style=None, value=text) if text in NULLS:
            return None
        case yaml.ScalarNode():
            return [str(node.value)]
        case yaml.SequenceNode(value=items) if all(isinstance(item, yaml.ScalarNode) for item in items):
            return [str(item.value) for item in items]
        case yaml.MappingNode(value=pairs) if all(isinstance(part, yaml.ScalarNode) for pair in pairs for part in pair):
            return [f"{name.value}={value.value}" for name, value in pairs]
    raise UsageError(f"{where}: expected a value, a list or a mapping of values; nothing nested deeper")


def convert(option: Option, given: Given) -> Any:
    """Turn the words of an option into its value.

    Raises:
        UsageError: they are not of its type; the message says what was expected, and where they stand.
    """
    words = given.words
    if words is None and option.is_optional:
        return None
    try:
        if words is None or option.count not in (None, len(words)):
            raise ValueError
        return BOOLEANS[words[0].lower()] if option.type is bool else option.spec.instance_from_str(words)
    except (ValueError, KeyError):
        expected = describe(option.type) + " or null" * option.is_optional
        got = "null" if words is None else repr(" ".join(words))[:80] if words else "nothing"
        raise UsageError(f"{given.where}: expected {expected}, got {got}") from None


def describe(kind: Any) -> str:
    """Say in words what a type allows."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    inner, origin = typing.get_args(kind), typing.get_origin(kind)
    if _is_union(kind):
        return " or ".join(map(describe, inner))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is dict:
        return "name=value, each name once"
    if origin is tuple:
        return f"{'a list' if Ellipsis in inner else f'{len(inner)} values'}, each {describe(inner[0])}"
    return names.get(kind, str(kind))


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def _did_you_mean(name: str, known: list[str], dashes: str = "") -> str:
    if name == "config_file":
        return "; it belongs to accelerate launch, before the script; a preset for the script is --config FILE"
    spelled = name.lstrip("-").replace("-", "_")
    near = [other for other in known if spelled and other.startswith(spelled)]
    near = near or difflib.get_close_matches(spelled, known, n=1)
    return f"; did you mean '{dashes}{near[0]}'?" if near else ""
