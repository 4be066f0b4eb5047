"""Read settings: defaults, then a preset, then the command line, all through one typed parser.

    python -m data_prep.slice --config configs/slice.yaml --tile_size 64

A command is a frozen keyword-only dataclass and a function of it; every field is an option and a YAML key of the same
name, and fields of nested dataclasses join the same flat list. A YAML file is a set of saved command-line arguments:
its values are read as text and meet the same parser as those typed.

    --rank 8, --rank=8               one value
    --shape 359 702 970              a list; given again, the last one counts (fields marked ``Repeatable`` add up)
    --random_flip, --no_random_flip  true, false
    --snr_gamma null                 None, where the field allows it
    --volumes dry=a.tif wet=b.tif    a mapping
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import re
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from configs.errors import TisserandError, UsageError

C = TypeVar("C")
T = TypeVar("T")

Positional = Annotated[T, tyro.conf.Positional]
"""``volume: Positional[Path]`` is given without its flag (and by name in YAML)."""
Repeatable = Annotated[T, tyro.conf.UseAppendAction]
"""``adapter: Repeatable[tuple[Path, ...]]`` adds up when its flag is typed several times; YAML values are replaced."""

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NULLS = ("null", "Null", "NULL", "~", "")  # YAML 1.1, where written without quotes
LARGEST_FILE = 1_000_000  # bytes; a config is short, and --config on a weights file must not fill the memory


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every command."""

    config: Path | None = None
    """YAML file with the same names as the options; what is typed wins over it."""
    print_config: bool = False
    """Print the resulting settings as a YAML file and stop."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class _Field:
    """One option: how it is spelled, and how text becomes its value."""

    name: str
    annotation: Any  # without None and without markers
    is_optional: bool
    is_required: bool
    markers: tuple[Any, ...]
    spec: PrimitiveConstructorSpec[Any]

    @property
    def typed_as(self) -> str:
        return self.name.upper() if tyro.conf.Positional in self.markers else f"--{self.name}"


@dataclass(frozen=True)
class _Given:
    """An option as somebody wrote it, in a file or on the command line."""

    where: str
    texts: list[str] | None  # None is null


def load(config_class: type[C], arguments: Sequence[str] | None = None) -> C:
    """Build ``config_class`` from ``--config FILE`` and the command line; ``--help`` and ``--print_config`` stop here.

    Args:
        config_class: a frozen keyword-only dataclass; range checks in ``__post_init__`` raise ValueError.
        arguments: the command line without the program's name; ``sys.argv[1:]`` if None.

    Raises:
        UsageError: one line that names the option as typed, or the file, line and key.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--help" in arguments or "-h" in arguments:
        _print_help(config_class)
    fields, own = _fields_of(config_class), _fields_of(Options)
    if clash := sorted(set(fields) & set(own)):
        raise TypeError(f"{config_class.__name__} has fields that every command has: {', '.join(clash)}")
    typed = _read_command_line(arguments, fields | own)
    options = _build(Options, own, {name: typed.pop(name) for name in own if name in typed})
    saved = _read_yaml(options.config, fields) if options.config else {}
    config = _build(config_class, fields, saved | typed)
    if options.print_config:
        print(_as_yaml(config), end="")
        raise SystemExit(0)
    return config


def command(config_class: type[C], main: Callable[[C], None]) -> None:
    """Run ``main`` on the settings and leave with its exit code; a module ends in ``command(SliceConfig, main)``.

    An error is one line on stderr, from rank 0, and the code of its kind (``configs.errors``); 1 for a full disk, for
    memory and for what nobody foresaw; 130 when interrupted and 143 when terminated. ``--debug`` adds the traceback.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main(load(config_class))
    except (Exception, KeyboardInterrupt, _Terminated) as error:
        debug = "--debug" in sys.argv
        if debug:
            traceback.print_exc()
        code, message = _verdict(error)
        if debug or int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0) <= 0:
            print("error:", _one_line(message), file=sys.stderr)
        sys.exit(code)


def as_dict(config: object) -> dict[str, object]:
    """Return the settings as plain values under their flag names, inner dataclasses flattened: for YAML or JSON."""
    return {name: _plain(value) for name, value in _flat(config).items()}


def save(config: object, path: Path) -> None:
    """Write the settings to ``path``, so that ``--config path`` gives an equal config."""
    path.write_text(_as_yaml(config), encoding="utf-8")


def _as_yaml(config: object) -> str:
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True, width=sys.maxsize)


def _flat(config: Any) -> dict[str, Any]:
    """Return the values of a dataclass and of those inside it, by flag name."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat |= _flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return flat


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# ---- What there is to give ----

_registry = ConstructorRegistry()


@_registry.primitive_rule
def _mapping_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read ``dict[str, X]`` from ``name=value`` words; tyro's own rule wants names and values in turn."""
    if info.type_origin is not dict:
        return None
    value_type = typing.get_args(info.type)[1]
    inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(value_type, set()))
    assert isinstance(inner, PrimitiveConstructorSpec)

    def from_words(words: list[str]) -> dict[str, Any]:
        pairs = [word.partition("=") for word in words]
        names = [name for name, _, _ in pairs]
        if not all(name and equals and text for name, equals, text in pairs) or len(set(names)) < len(names):
            raise ValueError
        return {name: inner.instance_from_str([text]) for name, _, text in pairs}

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[NAME={inner.metavar} ...]",
        instance_from_str=from_words,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={item}" for name, item in value.items()],
    )


def _fields_of(config_class: type) -> dict[str, _Field]:
    """List every option of a dataclass and of those inside it, by name."""
    found: dict[str, _Field] = {}
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        annotation, markers = hints[field.name], ()
        if typing.get_origin(annotation) is Annotated:
            annotation, *markers = typing.get_args(annotation)
        if dataclasses.is_dataclass(annotation):
            new = _fields_of(annotation)  # type: ignore[arg-type]  # a class, not an instance
        else:
            choices = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
            core = Union[tuple(choice for choice in choices if choice is not types.NoneType)]  # noqa: UP007  # of a tuple
            with _registry:
                spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(core, set()))
            if not isinstance(spec, PrimitiveConstructorSpec):
                raise TypeError(f"{config_class.__name__}.{field.name}: no way to write {annotation} on a command line")
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            is_optional = types.NoneType in choices
            new = {field.name: _Field(field.name, core, is_optional, required, tuple(markers), spec)}
        if clash := sorted(set(found) & set(new)):
            raise TypeError(f"{config_class.__name__} has two fields of the same name: {', '.join(clash)}")
        found |= new
    return found


# ---- What was given ----


def _read_command_line(arguments: Sequence[str], fields: dict[str, _Field]) -> dict[str, _Given]:
    """Sort the words into options; words that no option takes go to the positional ones, in order."""
    given: dict[str, _Given] = {}
    loose: list[str] = []
    words = list(arguments)
    while words:
        flag = words.pop(0)
        if not flag.startswith("--"):
            loose.append(flag)
            continue
        name, equals, text = flag[2:].partition("=")
        field = fields.get(name) or fields.get(name.removeprefix("no_"))
        if field is None or (field.name != name and field.annotation is not bool):
            hint = _did_you_mean(name, [*fields, *(f"no_{n}" for n, f in fields.items() if f.annotation is bool)], "--")
            if name == "config_file":
                hint = "; it belongs to accelerate launch, before the script; a preset of ours is given with --config"
            raise UsageError(f"unknown option '--{name}'{hint}")
        taken = _words_taken(words, field) if not equals else [text]
        if field.annotation is bool and not equals:
            taken = ["true" if field.name == name else "false"]
        elif field.name != name:
            raise UsageError(f"--{name} takes no value; write --{field.name} or --{name}")
        is_null = field.is_optional and taken in (["null"], ["None"])
        if tyro.conf.UseAppendAction in field.markers and name in given:
            taken = [*(given[name].texts or []), *taken]
        given[field.name] = _Given(f"--{name}", None if is_null else taken)
    for field in fields.values():
        if tyro.conf.Positional in field.markers and loose:
            count = field.spec.nargs if isinstance(field.spec.nargs, int) else len(loose)
            given[field.name] = _Given(field.typed_as, loose[:count])
            del loose[:count]
    if loose:
        raise UsageError(f"{loose[0]!r} belongs to no option (options begin with --)")
    return given


def _words_taken(words: list[str], field: _Field) -> list[str]:
    """Take the words after a flag off the list: as many as its type holds, up to the next flag."""
    flags = (i for i, word in enumerate(words) if word.startswith("--"))
    end = next(flags, len(words))
    if field.annotation is bool:
        end = 0
    elif isinstance(field.spec.nargs, int):
        end = min(end, 1 if words[:1] in (["null"], ["None"]) and field.is_optional else field.spec.nargs)
    taken = words[:end]
    del words[:end]
    return taken


def _read_yaml(path: Path, fields: dict[str, _Field]) -> dict[str, _Given]:
    """Read a preset as text, with the line of each key."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise UsageError(f"--config {path}: larger than {LARGEST_FILE} bytes; expected a short YAML file")
        root = yaml.compose(content.decode(), Loader=yaml.BaseLoader)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise UsageError(f"{line}: not readable as YAML ({getattr(error, 'problem', None) or error})") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}:1: expected lines of 'key: value'")
    given: dict[str, _Given] = {}
    first_line: dict[str, int] = {}
    for key, node in root.value:
        name, line = key.value, key.start_mark.line + 1
        if name not in fields:
            raise UsageError(f"{path}:{line}: unknown key {name!r}{_did_you_mean(str(name), list(fields))}")
        if name in given:
            raise UsageError(f"{path}:{line}: {name!r} is given twice (first on line {first_line[name]})")
        first_line[name] = line
        given[name] = _Given(f"{path}:{line}: {name}", _texts(node, f"{path}:{line}: {name}"))
    return given


def _texts(node: yaml.Node, where: str) -> list[str] | None:
    """Turn a YAML value into the words somebody would have typed for it."""
    if isinstance(node, yaml.ScalarNode):
        if node.style is None and node.value in NULLS:
            return None
        return [_scalar(node)]
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [_scalar(item) for item in node.value]
    if isinstance(node, yaml.MappingNode) and all(
        isinstance(part, yaml.ScalarNode) for pair in node.value for part in pair
    ):
        return [f"{_scalar(key)}={_scalar(value)}" for key, value in node.value]
    raise UsageError(f"{where}: expected a value, a list of values or a mapping of values, nothing nested")


def _scalar(node: yaml.ScalarNode) -> str:
    special = {".inf": "inf", "-.inf": "-inf", ".nan": "nan"}  # YAML's spelling -> Python's
    return str(special.get(node.value.lower(), node.value) if node.style is None else node.value)


# ---- From text to values ----


def _build(config_class: type[C], fields: dict[str, _Field], given: dict[str, _Given]) -> C:
    """Convert what was given and construct the dataclasses, the inner ones first."""
    missing = [field.typed_as for name, field in fields.items() if field.is_required and name not in given]
    values = {name: _value(fields[name], item) for name, item in given.items()}
    if missing:
        raise UsageError(f"missing {', '.join(missing)}; give it on the command line or in a --config file")
    try:
        return _construct(config_class, values)
    except ValueError as error:
        # A range check names the flag; where a file holds the value, say which line of it.
        named = re.search(r"--(\w+)", str(error))
        where = given[named[1]].where if named and named[1] in given else "--"
        raise UsageError(str(error) if where.startswith("--") else f"{where}: {error}") from error


def _construct(config_class: type[C], values: dict[str, Any]) -> C:
    hints = typing.get_type_hints(config_class)
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]  # always a dataclass here
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            chosen[field.name] = _construct(typing.cast(type, inner), _defaults(field) | values)
        elif field.name in values:
            chosen[field.name] = values[field.name]
    return config_class(**chosen)


def _defaults(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """Return what an inner dataclass holds unless told otherwise, under the flat names."""
    default = field.default_factory() if callable(field.default_factory) else field.default
    return {} if default is dataclasses.MISSING else _flat(default)


def _value(field: _Field, given: _Given) -> Any:
    """Convert the words of one option, or say what was expected of them."""
    if given.texts is None and field.is_optional:
        return None
    words = given.texts if given.texts is not None else ["null"]
    try:
        if given.texts is None or (isinstance(field.spec.nargs, int) and len(words) != field.spec.nargs):
            raise ValueError
        return BOOLEANS[words[0].lower()] if field.annotation is bool else field.spec.instance_from_str(words)
    except (ValueError, KeyError):
        expected = _expected(field.annotation) + " or null" * field.is_optional
        got = repr(" ".join(words))[:80] if words else "nothing"
        raise UsageError(f"{given.where}: expected {expected}, got {got}") from None


def _expected(annotation: Any) -> str:
    """Say in words what a type allows."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    arguments, origin = typing.get_args(annotation), typing.get_origin(annotation)
    if annotation in names:
        return names[annotation]
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is dict:
        return "different names, each with a value (name=value)"
    if origin is tuple and Ellipsis in arguments:
        return f"a list, each {_expected(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} values, {_expected(arguments[0])} each"
    return " or ".join(map(_expected, arguments)) if _is_union(annotation) else str(annotation)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def _did_you_mean(name: str, known: list[str], dashes: str = "") -> str:
    spelled = name.replace("-", "_").lstrip("_")
    near = [n for n in known if spelled and n.startswith(spelled)] or difflib.get_close_matches(spelled, known, n=1)
    return f"; did you mean '{dashes}{near[0]}'?" if near else ""


def _print_help(config_class: type) -> NoReturn:
    """Print what tyro makes of the dataclasses and the strings under their fields, and leave with 0."""
    page = dataclasses.make_dataclass("Page", [("settings", config_class), ("options", Options)], kw_only=True)
    main = sys.modules["__main__"]
    program = f"python -m {main.__spec__.name}" if main.__spec__ else sys.argv[0]
    about = inspect.getdoc(sys.modules[config_class.__module__]) or ""
    settings = (tyro.conf.OmitArgPrefixes,)
    tyro.cli(
        page,
        prog=program,
        description=about,
        args=["--help"],
        use_underscores=True,
        config=settings,
        registry=_registry,
    )
    raise SystemExit(0)


# ---- How a run ends ----


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that half-written output is cleared away on the way out."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def _verdict(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the message of what ended the run."""
    match error:
        case TisserandError():
            return error.exit_code, str(error)
        case KeyboardInterrupt():
            return 130, "interrupted"
        case _Terminated():
            return 143, "terminated"
        case MemoryError():
            return 1, f"out of memory {error}".strip()
        case OSError():
            return 1, ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    return 1, f"{type(error).__name__}: {error} (unexpected; run again with --debug for the traceback)"


def _one_line(message: str) -> str:
    """Keep a message to one line and its control characters, which may come from a file, visible."""
    line = " ".join(message.splitlines())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
