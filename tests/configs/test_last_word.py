"""A run that is refused says why in the last line, with and without a launcher, in a terminal and in a pipe."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from configs.last_word import is_launcher

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
REFUSED = [
    *("finetune/lora.py", "--rank", "0", "--pretrained_model_name_or_path", "m"),
    *("--train_data_dir", "d", "--output_dir", "o"),
]
LINE = "error: --rank 0: must be above 0"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's word of another's end")


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_launcher_of_one_process_has_not_the_last_word_in_a_terminal() -> None:
    shown, terminal = pty.openpty()
    words = [str(BIN / "accelerate"), "launch", "--cpu", *REFUSED]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=terminal, stderr=terminal) as launched:
        os.close(terminal)
        text = b""
        try:
            while piece := os.read(shown, 4096):
                text += piece
        except OSError:  # how a terminal says that nobody writes any more
            pass
    os.close(shown)
    lines = text.decode().splitlines()
    assert launched.returncode == 1
    assert "CalledProcessError" in lines[-2]
    assert lines[-1] == LINE
    assert lines.count(LINE) == 2


def test_a_launcher_of_several_processes_names_the_reason_and_has_not_the_last_word() -> None:
    done = run(BIN / "torchrun", "--nproc_per_node", "2", *REFUSED)
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert lines[-1] == LINE
    assert f"  traceback : {LINE}" in lines[-4:]


def test_a_run_without_a_launcher_says_it_once() -> None:
    done = run(sys.executable, *REFUSED)
    assert (done.returncode, done.stderr.splitlines()) == (2, [LINE])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("/bin/python3 /bin/accelerate launch --cpu finetune/lora.py --rank 4", True),
        ("/bin/python3 -m accelerate.commands.launch finetune/lora.py", True),
        ("/bin/python3 /bin/torchrun --nproc_per_node 2 finetune/lora.py", True),
        ("/bin/python3 /bin/accelerate launch --quiet finetune/lora.py", False),
        ("/bin/python3 /bin/accelerate launch finetune/lora.py --quiet", True),
        ("bash -c accelerate", False),
        ("/bin/python3 benchmarks/training.py accelerate", False),
        ("", False),
    ],
)
def test_launchers_are_told_by_their_command_line(words: str, expected: bool) -> None:
    assert is_launcher(words.split()) is expected
