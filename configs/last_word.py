"""What a run says when it ends in error under ``accelerate launch`` or ``torchrun``.

A launcher answers an exit code with a traceback of its own, a page below the line that says what is wrong. So the line
is written once more as soon as the launcher has ended, by a small process that waits for that and for nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

_LAUNCHERS = {"accelerate", "accelerate-launch", "torchrun"}
_LAUNCHER_MODULES = {"accelerate.commands.accelerate_cli", "accelerate.commands.launch", "torch.distributed.run"}
_SILENT = {"-q", "--quiet"}
# The launcher first ends its other processes, which takes half a minute at most.
_PATIENCE_S = 60
_WAIT_AND_WRITE = f"""
import os, select, sys
if select.select([int(sys.argv[1])], [], [], {_PATIENCE_S})[0]:
    os.write(2, sys.argv[2].encode() + b"\\n")
"""


def tell_launcher(line: str) -> None:
    """Give torchrun the line of an error as the reason for its summary; every process of a run calls it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        failure = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": failure}), encoding="utf-8")


def repeat_below_launcher(line: str) -> None:
    """Write a line to stderr once more when the launcher has ended; do nothing without one, or where it is silent.

    Linux alone tells a process that another one has ended; elsewhere the line stays where it was written.
    """
    if not sys.platform.startswith("linux") or not is_launcher(_words_of(os.getppid())):
        return
    launcher = os.pidfd_open(os.getppid())
    subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WAIT_AND_WRITE, str(launcher), line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(launcher,),
        start_new_session=True,  # or it would end with the processes of the run
    )


def is_launcher(words: list[str]) -> bool:
    """Tell whether a command line starts a launcher that writes a traceback when a process of it fails."""
    script = next((place for place, word in enumerate(words) if place and word.endswith(".py")), len(words))
    own = words[:script]
    names = {Path(word).name for word in own[:2]} & _LAUNCHERS
    return bool(names or _LAUNCHER_MODULES & set(own)) and not _SILENT & set(own)


def _words_of(process: int) -> list[str]:
    """Return the command line of a process; nothing if it cannot be read."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")[:-1]
    except OSError:
        return []
