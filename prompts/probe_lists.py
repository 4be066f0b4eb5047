"""Lists of probe prompts, which are asked of the base and of the tuned model to see what the tuning changed elsewhere.

A probe file names its sets and gives every probe a stable id, by which results are compared over time:

    version: 1
    light: [horse-beach]            the probes of a short check; all of them without this line
    sets:
      G0: {title: anchors, probes: {horse-beach: horse on a beach}}

The sets: G0 anchors, G1 words that share tokens with the captions, G2 neighbours of the domain, G3 far from it, G4 the
empty prompt, G5 both worlds in one prompt. A set of another name is judged like G3.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from configs.errors import UsageError

FOLDER = Path(__file__).with_name("probes")
EVERYDAY = Path(__file__).with_name("everyday_words.yaml")
LONGEST_PROMPT = 1000
MOST_PROBES = 1000
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")  # set names and ids become file names
ALLOWED = "letters a-z, digits, _ and -, at most 64, not first a -"
RESERVED = {"control", "captions"}
"""Sets of the results that are not probes."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One prompt with its stable id, its set and whether a light check asks it."""

    id: str
    prompt: str
    set: str
    is_light: bool = True

    @property
    def shown(self) -> str:
        """The prompt for tables and pictures; the empty one is named."""
        return self.prompt or "(empty prompt)"


def read_probes(name: str, flag: str = "--probes") -> list[Probe]:
    """Read a built-in probe list by its name, or a file.

    Args:
        name: ``tiny``, ``stable_diffusion``, or the path of a YAML probe file or of a text file with a prompt per line.
        flag: the option it was given to, for errors.

    Raises:
        UsageError: no such list or file, or the file is not a probe file, saying what is wrong in it.
    """
    built_in = {path.stem: path for path in FOLDER.glob("*.yaml")}
    path = built_in.get(name, Path(name))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{flag} {name}: neither a readable file nor one of {', '.join(sorted(built_in))}") from None
    if path.suffix.lower() not in {".yaml", ".yml"}:
        return _numbered(prompt_lines(text, f"{flag} {name}"))
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{flag} {name}: not readable as YAML ({' '.join(str(error).split())})") from None
    if isinstance(content, list):
        return _numbered(checked_prompts(content, f"{flag} {name}"))
    return _from_sets(content, f"{flag} {name}")


def probes_hash(probes: list[Probe]) -> str:
    """Return a SHA-256 of the ids, sets and prompts, in order: equal hashes mean comparable results."""
    text = json.dumps([[probe.set, probe.id, probe.prompt] for probe in probes])
    return hashlib.sha256(text.encode()).hexdigest()


def prompt_lines(text: str, where: str) -> list[str]:
    """Return the prompts of a text with one per line, blank lines left out."""
    return checked_prompts([line.strip() for line in text.splitlines() if line.strip()], where)


def checked_prompts(prompts: list[object], where: str) -> list[str]:
    """Return the prompts as given, or raise UsageError if they are not bounded text, or none."""
    if not 0 < len(prompts) <= MOST_PROBES:
        raise UsageError(f"{where}: holds {len(prompts)} prompts; from 1 to {MOST_PROBES}")
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str) or len(prompt) > LONGEST_PROMPT:
            raise UsageError(f"{where}: prompt {number} is not text of at most {LONGEST_PROMPT} characters (quote it?)")
    return [str(prompt) for prompt in prompts]


def shared_words(captions: Sequence[str], pieces: Sequence[str]) -> list[str]:
    """Return what captions share with everyday language: their words, prefixes and known pieces, each once.

    Args:
        captions: of the training slices.
        pieces: what the model's tokenizer makes of them, without its end-of-word marks; empty if it is not known.
    """
    words = [word.lower() for caption in captions for word in re.findall(r"[A-Za-z]+", caption)]
    return list(dict.fromkeys([*words, *(piece.lower() for piece in pieces if piece.isalpha() and len(piece) > 1)]))


def shared_token_probes(captions: Sequence[str], pieces: Sequence[str] = (), known: Sequence[str] = ()) -> list[Probe]:
    """Return the set G1: everyday prompts for the words whose tokens the captions train.

    Args:
        captions: of the training slices, such as ``sf_dry sf_warp``.
        pieces: what the model's tokenizer makes of them, without its end-of-word marks.
        known: those that are whole words of its vocabulary; one the table lacks is asked as ``a photo of WORD``.
    """
    table = yaml.safe_load(EVERYDAY.read_text(encoding="utf-8"))
    found: dict[str, Probe] = {}
    for word in shared_words(captions, pieces):
        prompts: Mapping[str, str] = table.get(word) or (
            {f"word-{word}": f"a photo of {word}"} if word in known else {}
        )
        for key, prompt in prompts.items():
            found.setdefault(key, Probe(id=key, prompt=prompt, set="G1"))
    return list(found.values())


def write_probes(path: Path, probes: Sequence[Probe]) -> None:
    """Write a probe file that ``read_probes`` reads back."""
    sets: dict[str, dict[str, dict[str, str]]] = {}
    for probe in probes:
        sets.setdefault(probe.set, {"probes": {}})["probes"][probe.id] = probe.prompt
    content = {"version": 1, "light": [probe.id for probe in probes if probe.is_light], "sets": sets}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000), encoding="utf-8")


def _numbered(prompts: list[str]) -> list[Probe]:
    """Make probes of a plain list."""
    return [Probe(id=f"p{number:03d}", prompt=prompt, set="own") for number, prompt in enumerate(prompts, start=1)]


def _from_sets(content: object, where: str) -> list[Probe]:
    """Check the mapping of a probe file and flatten it."""
    if not isinstance(content, dict) or not isinstance(content.get("sets"), dict) or content.get("version") != 1:
        raise UsageError(f"{where}: expected 'version: 1' and 'sets:' with a title and probes each")
    _refuse_unknown(content, ("version", "light", "sets"), where)
    light = content.get("light")
    found: list[Probe] = []
    for name, group in content["sets"].items():
        if not NAME.fullmatch(str(name)) or name in RESERVED:
            raise UsageError(f"{where}: set {name!r}: {ALLOWED}, and neither of {', '.join(sorted(RESERVED))}")
        if isinstance(group, dict):
            _refuse_unknown(group, ("title", "probes"), f"{where}: set {name}")
        prompts = group.get("probes") if isinstance(group, dict) else None
        if not isinstance(prompts, dict) or not all(isinstance(key, str) for key in prompts):
            raise UsageError(f"{where}: set {name} needs 'probes:' with lines 'id: prompt' (ids are text; quote them?)")
        if bad := [key for key in prompts if not NAME.fullmatch(key)]:
            raise UsageError(f"{where}: id {bad[0]!r} of set {name}: {ALLOWED}")
        for key, prompt in zip(prompts, checked_prompts(list(prompts.values()), f"{where}: set {name}"), strict=True):
            found.append(Probe(id=key, prompt=prompt, set=str(name), is_light=light is None or key in light))
    ids = [probe.id for probe in found]
    if repeated := sorted({key for key in ids if ids.count(key) > 1}):
        raise UsageError(f"{where}: ids must be unique, and these are not: {', '.join(repeated)}")
    files: dict[str, Probe] = {}
    for probe in found:
        other = files.setdefault(f"{probe.set}-{probe.id}".lower(), probe)
        if other is not probe:
            pair = f"{other.id} of set {other.set} and {probe.id} of set {probe.set}"
            raise UsageError(f"{where}: {pair} would write the same picture files; rename one")
    if light is not None and (not isinstance(light, list) or set(light) - set(ids)):
        raise UsageError(f"{where}: 'light:' must list ids of this file")
    return found


def _refuse_unknown(content: Mapping[object, object], known: Sequence[str], where: str) -> None:
    """Refuse a key that nothing reads, with the one that was meant."""
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{where}: unknown key {key!r}; known are {', '.join(known)}{hint}")
