"""What can go wrong for a user, with the exit code of each kind."""

from __future__ import annotations


class TisserandError(Exception):
    """A run failed: a non-finite loss, memory, disk. The message is one line for the user."""

    exit_code = 1


class UsageError(TisserandError):
    """A setting is wrong: the message names it as typed, its value, what is allowed and what to do."""

    exit_code = 2


class InputError(TisserandError):
    """Input data cannot be used: the message names the file and what is wrong with it."""

    exit_code = 3


class NothingLeftError(TisserandError):
    """Nothing was left to do after the choices asked for."""

    exit_code = 4


class GateError(TisserandError):
    """A measurement crossed a limit that the user set."""

    exit_code = 5
