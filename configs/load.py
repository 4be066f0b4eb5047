"""Read settings: defaults, then a preset, then the command line, all through one typed parser.

    python -m data_prep.slice --config configs/slice.yaml --tile_size 64

A command is a frozen keyword-only dataclass and a function of it. Every field is an option and a YAML key of the same
name; fields of the dataclasses inside it join the same flat list. A YAML file is a set of saved command-line arguments.

    --rank 8, --rank=8               one value
    --shape 359 702 970              a list; given again, the last one counts (``Repeatable`` ones add up)
    --random_flip, --no_random_flip  true, false
    --snr_gamma null                 None, where the field allows it
    --volumes dry=a.tif wet=b.tif    a mapping
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro
import yaml

from configs.errors import TisserandError, UsageError
from configs.last_word import repeat_below_launcher, tell_launcher
from configs.options import Given, Option, convert, options_of, read_words, read_yaml, registry

C = TypeVar("C")
T = TypeVar("T")

Positional = Annotated[T, tyro.conf.Positional]
"""``dataset: Positional[Path]`` is given without its flag (and by name in YAML)."""
Repeatable = Annotated[T, tyro.conf.UseAppendAction]
"""``adapter: Repeatable[tuple[Path, ...]]`` adds up when typed several times; what YAML gave is replaced."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every command."""

    config: Path | None = None
    """YAML file with the same names as the options; what is typed wins over it."""
    print_config: bool = False
    """Print the resulting settings as a YAML file and stop."""
    debug: bool = False
    """Show the traceback of an error."""


def load(config_class: type[C], arguments: Sequence[str] | None = None) -> C:
    """Build ``config_class`` from ``--config FILE`` and the command line; ``--help`` and ``--print_config`` stop here.

    Args:
        config_class: a frozen keyword-only dataclass; its ``__post_init__`` raises ValueError naming the flag.
        arguments: the command line without the program's name; ``sys.argv[1:]`` if None.

    Raises:
        UsageError: one line that names the option as typed, or the file, line and key.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if "--help" in words or "-h" in words:
        _print_help(config_class)
    options, common_options = options_of(config_class), options_of(Common)
    if clash := sorted(set(options) & set(common_options)):
        raise TypeError(f"{config_class.__name__} has fields that every command has: {', '.join(clash)}")
    typed = read_words(words, common_options | options)
    common = _build(Common, common_options, {name: typed.pop(name) for name in common_options if name in typed})
    saved = read_yaml(common.config, options) if common.config else {}
    config = _build(config_class, options, saved | typed)
    if common.print_config:
        print(_as_yaml(config), end="")
        raise SystemExit(0)
    return config


def command(config_class: type[C], main: Callable[[C], None]) -> None:
    """Run ``main`` on the settings and leave with its exit code; a module ends in ``command(SliceConfig, main)``.

    An error is one line on stderr, from rank 0, and the code of its kind (``configs.errors``); 1 for a full disk, for
    memory and for what nobody foresaw; 130 when interrupted and 143 when terminated. ``--debug`` adds the traceback.
    Under a launcher, which adds a traceback of its own, the line is written once more below that.
    """
    signal.signal(signal.SIGTERM, _terminate)
    # Before anything imports them: they give notices about packages that nobody asked for.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        main(load(config_class))
    except (Exception, KeyboardInterrupt, Terminated) as error:
        code, message = _verdict(error)
        if "--debug" in sys.argv:
            traceback.print_exc()
        line = f"error: {one_line(message)}"
        is_failure = isinstance(error, Exception)  # not an end that somebody asked for
        if is_failure:
            tell_launcher(line)
        if int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0) <= 0:
            print(line, file=sys.stderr, flush=True)
            if is_failure:
                repeat_below_launcher(line)
        sys.exit(code)


def as_dict(config: object) -> dict[str, object]:
    """Return the settings as plain values under their flag names, inner dataclasses flattened: for YAML or JSON."""
    return {name: _plain(value) for name, value in _flat(config).items()}


def save(config: object, path: Path) -> None:
    """Write the settings to ``path``, so that ``--config path`` gives an equal config."""
    path.write_text(_as_yaml(config), encoding="utf-8")


def _as_yaml(config: object) -> str:
    return yaml.dump(as_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize)


class _Dumper(yaml.SafeDumper):
    """PyYAML writes some line breaks raw and reads them back as spaces; between double quotes it escapes them."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


def _flat(config: Any) -> dict[str, Any]:
    """Return the values of a dataclass and of those inside it, by flag name."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat |= _flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return flat


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _build(config_class: type[C], options: dict[str, Option], given: dict[str, Given]) -> C:
    """Convert what was given and construct the dataclasses."""
    values = {name: convert(options[name], item) for name, item in given.items()}
    if missing := [option.flag for name, option in options.items() if option.is_required and name not in given]:
        raise UsageError(f"missing {', '.join(missing)}; give it on the command line or in a --config file")
    try:
        return _construct(config_class, values)
    except ValueError as error:
        # A range check names the flag; where a file holds the value, say which line of it.
        named = re.search(r"--(\w+)", str(error))
        where = given[named[1]].where if named and named[1] in given else "--"
        raise UsageError(f"{error}" if where.startswith("--") else f"{where}: {error}") from error


def _construct(config_class: type[C], values: dict[str, Any]) -> C:
    hints = typing.get_type_hints(config_class)
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]  # always a dataclass
        if dataclasses.is_dataclass(hints[field.name]):
            chosen[field.name] = _construct(hints[field.name], _inner_defaults(field) | values)
        elif field.name in values:
            chosen[field.name] = values[field.name]
    return config_class(**chosen)


def _inner_defaults(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """Return what an inner dataclass holds unless told otherwise."""
    if field.default_factory is not dataclasses.MISSING:
        return _flat(field.default_factory())
    return {} if field.default is dataclasses.MISSING else _flat(field.default)


def _print_help(config_class: type) -> NoReturn:
    """Print the module's docstring, and what tyro makes of the fields and the strings under them; leave with 0."""
    page = dataclasses.make_dataclass("Page", [("settings", config_class), ("common", Common)], kw_only=True)
    main = sys.modules["__main__"]
    print(inspect.getdoc(sys.modules[config_class.__module__]), end="\n\n")  # tyro would join its lines
    tyro.cli(
        page,
        prog=f"python -m {main.__spec__.name}" if main.__spec__ else sys.argv[0],
        description="",
        args=["--help"],
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
        registry=registry,
    )
    raise SystemExit(0)


class Terminated(BaseException):
    """SIGTERM as an exception, so that half-written output is cleared away on the way out."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def _verdict(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the message of what ended a run."""
    match error:
        case TisserandError():
            return error.exit_code, str(error)
        case KeyboardInterrupt():
            return 130, "interrupted"
        case Terminated():
            return 143, "terminated"
        case MemoryError():
            return 1, f"out of memory {error}".strip()
        case OSError():
            return 1, ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    return 1, f"{type(error).__name__}: {error} (unexpected; run again with --debug for the traceback)"


def one_line(message: str) -> str:
    """Keep a message to one line, with control characters, which may come from a file, made visible."""
    line = " ".join(message.splitlines())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
