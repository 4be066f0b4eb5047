"""Checks of settings that every command shares: which setting is wrong, its value, and what is allowed."""

from __future__ import annotations


def refuse(flag: str, value: object, allowed: str) -> ValueError:
    """Say which setting is wrong, its value, and what is allowed."""
    return ValueError(f"--{flag} {value}: {allowed}")


def need_positive(**values: float | None) -> None:
    """Refuse the first given value that is not above zero."""
    for flag, value in values.items():
        if value is not None and not value > 0:
            raise refuse(flag, value, "must be above 0")


def need_not_negative(**values: float | None) -> None:
    """Refuse the first given value below zero."""
    for flag, value in values.items():
        if value is not None and not value >= 0:
            raise refuse(flag, value, "must be 0 or more")
