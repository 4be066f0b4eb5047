"""What counts as drift: the limits of each probe set, read from a policy.

The limits are starting points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

from configs.errors import UsageError

POLICY_FILE = Path(__file__).with_name("drift_policy.yaml")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one probe set; None where a score does not count.

    ``leak`` is bad above, ``retention`` and ``colour`` are bad below.

    Attributes:
        leak_warn, leak_stop: share of leaked pictures.
        retention_warn, retention_stop: mean over the set; the stop asks for the whole interval.
        retention_stop_prompt: of one prompt.
        colour_warn, colour_stop: colour and brightness ratios.
        stop_share: share of the prompts that must be beyond a stop limit to stop the set; 0: any one.
    """

    leak_warn: float | None = None
    leak_stop: float | None = None
    retention_warn: float | None = None
    retention_stop: float | None = None
    retention_stop_prompt: float | None = None
    colour_warn: float | None = None
    colour_stop: float | None = None
    stop_share: float = 0.0

    def of(self, name: str, *, of_prompt: bool = False) -> tuple[float | None, float | None]:
        """Return the warn and the stop limit under a name, such as ``leak``; None each where there is none.

        Args:
            name: what a number declares as its limits.
            of_prompt: the stop limit of one prompt, where a set has another.
        """
        stop = getattr(self, f"{name}_stop", None)
        return getattr(self, f"{name}_warn", None), getattr(self, f"{name}_stop_prompt", stop) if of_prompt else stop


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What counts as drift.

    Attributes:
        sets: probe set -> its limits.
        other: limits of a set of the user's own.
        divergence_ratio: share of the in-domain change that other prompts may undergo unnoticed; None: not judged.
        is_gate: whether a stop ends the command with the exit code of a gate.
    """

    sets: Mapping[str, Limits]
    other: Limits
    divergence_ratio: float | None
    is_gate: bool = False

    def of(self, probe_set: str) -> Limits:
        """Return the limits of a set; one of the user's own is judged like those far from the domain."""
        return self.sets.get(probe_set, self.other)


def read_policy(name: str, flag: str = "--policy") -> Policy:
    """Read a policy: ``guard``, ``strict`` (half the margins, and a gate), ``report`` (judges nothing), or a YAML file.

    Args:
        name: which.
        flag: the option it was given to, for errors.

    Raises:
        UsageError: no such policy or file, or the file is no policy, saying what is wrong in it.
    """
    path = POLICY_FILE if name in {"guard", "strict", "report"} else Path(name)
    where = f"{flag} {name}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{where}: neither guard, strict, report nor a readable file") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or content.get("version") != 1 or not isinstance(content.get("sets"), dict):
        raise UsageError(f"{where}: expected 'version: 1' and 'sets:' with limits for each")
    if unknown := sorted(map(str, set(content) - {"version", "sets", "gate", "divergence_ratio"})):
        raise UsageError(f"{where}: unknown {unknown[0]}; known are version, gate, divergence_ratio, sets")
    sets = {str(key): _limits(value, f"{where}: set {key}") for key, value in content["sets"].items()}
    ratio = content.get("divergence_ratio")
    if ratio is not None and not _is_share(ratio):
        raise UsageError(f"{where}: divergence_ratio {ratio!r}: a number from 0 to 1")
    is_gate = content.get("gate", False)
    if not isinstance(is_gate, bool):
        raise UsageError(f"{where}: gate {is_gate!r}: true or false")
    policy = Policy(sets=sets, other=sets.pop("other", Limits()), divergence_ratio=ratio, is_gate=is_gate)
    if name == "report":
        return Policy(sets={key: Limits() for key in sets}, other=Limits(), divergence_ratio=None)
    return _halved(policy) if name == "strict" else policy


def _limits(content: object, where: str) -> Limits:
    """Check the limits of one set."""
    known = {entry.name for entry in fields(Limits)}
    if not isinstance(content, dict) or not set(content) <= known:
        raise UsageError(f"{where}: expected limits among {', '.join(sorted(known))}")
    if bad := [key for key, value in content.items() if not _is_share(value)]:
        raise UsageError(f"{where}: {bad[0]} {content[bad[0]]!r}: a number from 0 to 1")
    return Limits(**content)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _halved(policy: Policy) -> Policy:
    """Return the policy with half of each margin: twice as near to what the base itself shows."""

    def strict(limits: Limits) -> Limits:
        changed = {}
        for entry in fields(Limits):
            value = getattr(limits, entry.name)
            if value is not None and entry.name != "stop_share":
                changed[entry.name] = value / 2 if entry.name.startswith("leak") else 1 - (1 - value) / 2
        return replace(limits, **changed)

    ratio = policy.divergence_ratio
    return Policy(
        sets={name: strict(limits) for name, limits in policy.sets.items()},
        other=strict(policy.other),
        divergence_ratio=None if ratio is None else ratio / 2,
        is_gate=True,
    )


GUARD = read_policy("guard")
LIMITS, FAR = GUARD.sets, GUARD.other
