"""Put a run and its checks on one page that needs nothing but a browser.

    python -m eval.report --run runs/lora --results out/slices out/drift out/fidelity --output out/report.html

The page is one file without outside resources: pictures are inside, so it can be mailed, archived and opened on a
machine without a network. Its one script moves the slider of filmstrips; no other runs. What has no results is a grey
box that names the command which would fill it. With --policy strict a box that says stop is also exit code 5.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.errors import GateError, UsageError
from configs.load import command


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one self-contained HTML page."""

    run: Path | None = None
    """Run folder of a training: its curve, settings and dataset."""
    results: tuple[Path, ...] = ()
    """Folders written by eval.generate, eval.drift, eval.fidelity and the like, in any order."""
    output: Path
    """The page to write, such as out/report.html."""
    title: str | None = None
    """Heading of the page. Default: the name of the run."""
    policy: Literal["report", "strict"] = "report"
    """strict: exit with 5 if a box says stop, once the page is written."""
    overwrite: bool = False
    """Replace the page if it is there."""

    def __post_init__(self) -> None:
        """Refuse a page that would be taken for something else."""
        if self.output.suffix not in {".html", ".htm"}:
            raise ValueError(f"--output {self.output}: name a file that ends with .html")


def main(config: ReportConfig) -> None:
    """Read everything, render, check the size, and put the page in place when it is whole."""
    from eval.page.render import make_page

    if config.output.is_dir():
        raise UsageError(f"--output {config.output}: is a folder; name a file that ends with .html")
    if config.output.exists() and not config.overwrite:
        raise UsageError(f"--output {config.output}: already exists; name another file or pass --overwrite")
    page = make_page(config.run, config.results, config.title)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    partial = config.output.with_name(config.output.name + ".partial")
    partial.write_bytes(page.content)
    partial.replace(config.output)
    print(f"{config.output}: {len(page.content) / 1e6:.2f} MB; open it in a browser")
    if page.note:
        print(f"note: {page.note[:1].lower()}{page.note[1:]}", file=sys.stderr)
    if page.stopped and config.policy == "strict":
        found = "; ".join(f"{box['title'].lower()}: {box['reason']}" for box in page.stopped)
        raise GateError(f"--policy strict: {found} See {config.output}")


if __name__ == "__main__":
    command(ReportConfig, main)
