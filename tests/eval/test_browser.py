"""The report in a real browser: `make browser`; it needs chromium (Debian: `apt-get install chromium`)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report import SCRIPT, watch_run, write_dataset, write_drift, write_fidelity, write_run

from eval.report import ReportConfig, main

pytestmark = pytest.mark.browser

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--disable-features=OptimizationHints,OptimizationHintsFetching,OptimizationGuideModelDownloading",
)


def browse(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    if BROWSER is None:
        pytest.fail("no chromium found; install it, for instance with: apt-get install chromium")
    words = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    run = watch_run(write_run(folder / "lora", write_dataset(folder / "weave")))
    fidelity = write_fidelity(folder / "fidelity", caption=SCRIPT)
    checks = [write_drift(folder / name) for name in ("step-100", "step-200")]
    main(ReportConfig(run=run, results=(fidelity, *checks), output=folder / "report.html"))
    return folder / "report.html"


@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_is_drawn_within_the_width_of_the_screen(page: Path, tmp_path: Path, width: int) -> None:
    """A page that is too wide scrolls sideways; the probe writes both widths into its title."""
    widths = "root.scrollWidth + '/' + root.clientWidth"
    probe = f"<script>onload = () => {{ const root = document.documentElement; root.title = {widths} }}</script>"
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text()).replace("</body>", probe + "</body>")
    (tmp_path / "probe.html").write_text(text)
    dom = browse(tmp_path, f"--window-size={width},2000", "--dump-dom", (tmp_path / "probe.html").as_uri()).stdout
    found = re.search(r'<html[^>]*title="(\d+)/(\d+)"', dom)
    assert found is not None
    assert int(found.group(1)) <= int(found.group(2))


@pytest.mark.parametrize("width", [1280, 500])
def test_pictures_and_colours_reach_the_screen(page: Path, tmp_path: Path, width: int) -> None:
    shot = tmp_path / "shot.png"
    browse(tmp_path, f"--window-size={width},3000", f"--screenshot={shot}", page.as_uri())
    pixels = np.asarray(Image.open(shot).convert("RGB"), dtype=int)
    assert pixels.shape == (3000, width, 3)
    # The stop box of the drift verdict, and the grain of the sample strips.
    assert (np.abs(pixels - (0xFA, 0xE8, 0xE5)).max(axis=2) <= 2).sum() > 5000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200


def test_nothing_is_asked_from_outside_and_the_console_stays_silent(page: Path, tmp_path: Path) -> None:
    """What the page's own policy blocks would stand on the console; requests that got out, in the net log."""
    log = tmp_path / "net.json"
    done = browse(tmp_path, "--enable-logging=stderr", "--v=0", f"--log-net-log={log}", "--dump-dom", page.as_uri())
    assert "CONSOLE" not in done.stderr
    assert SCRIPT not in done.stdout
    empty = tmp_path / "empty.html"
    empty.write_text("<title>nothing</title>")
    own = tmp_path / "own.json"
    browse(tmp_path, f"--log-net-log={own}", "--dump-dom", empty.as_uri())
    assert hosts(log) <= hosts(own)


def hosts(log: Path) -> set[str]:
    """Return the hosts in a net log; an empty page gives those that the browser asks on its own account."""
    return set(re.findall(r'"url":"https?://([^/"]+)', log.read_text()))


def test_it_prints(page: Path, tmp_path: Path) -> None:
    paper = tmp_path / "report.pdf"
    browse(tmp_path, f"--print-to-pdf={paper}", page.as_uri())
    assert paper.read_bytes().startswith(b"%PDF")


def test_the_slider_shows_one_frame_of_each_film_and_names_it(page: Path, tmp_path: Path) -> None:
    """The probe moves the slider to its end, and writes what is seen into the title."""
    moved = "slider.value = slider.max; slider.dispatchEvent(new Event('input'))"
    seen = "[...film.querySelectorAll('.frame')].map((one) => one.offsetHeight > 0 ? 1 : 0).join('')"
    look = f"const film = document.querySelector('.film'), slider = film.querySelector('input'); const first = {seen}"
    names = "film.querySelector('output').value"
    probe = (
        f"<script>onload = () => {{ {look}; {moved}; document.title = first + '/' + {seen} + '/' + {names} }}</script>"
    )
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text()).replace("</body>", probe + "</body>")
    (tmp_path / "probe.html").write_text(text)
    dom = browse(tmp_path, "--dump-dom", (tmp_path / "probe.html").as_uri()).stdout
    assert "<title>100/001/step-200</title>" in dom


def test_the_pages_own_policy_lets_its_script_run(page: Path, tmp_path: Path) -> None:
    dom = browse(tmp_path, "--dump-dom", page.as_uri()).stdout
    assert 'class="film moves"' in dom
    assert 'aria-valuetext="base"' in dom
