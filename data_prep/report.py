"""Show a dataset on one page: what it looks like, what is held out, what was left out, what a trainer will make of it.

    python -m data_prep.report data/weave --output weave.html

``data_prep.slice`` writes the same page into every dataset as report.html. It is one file without scripts and outside
resources.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from configs.errors import UsageError
from configs.load import Positional, command
from data_prep.folders.checks import verify
from data_prep.folders.publish import check_writable
from data_prep.page.render import render


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of the page."""

    dataset: Positional[Path]
    """Dataset folder."""
    output: Path
    """Page to write, such as weave.html."""
    overwrite: bool = False
    """Replace the page if it is there."""
    resolution: int = 512
    """Edge a trainer counts in, in px: 512 for Stable Diffusion 1.x, 768 for 2.x, 1024 for SDXL."""
    bucket_step: int = 64
    """Edges of a trainer's buckets are multiples of this, in px."""
    dry_run: bool = False
    """Check the dataset, say what would be written, and stop."""

    def __post_init__(self) -> None:
        if self.output.suffix not in {".html", ".htm"}:
            raise ValueError(f"--output {self.output}: name a file that ends with .html")
        if not 64 <= self.resolution <= 4096:
            raise ValueError(f"--resolution {self.resolution}: must be from 64 to 4096")
        if not 1 <= self.bucket_step <= self.resolution:
            raise ValueError(f"--bucket_step {self.bucket_step}: must be from 1 to --resolution")


def main(config: ReportConfig) -> None:
    """Check the dataset, render, write."""
    if config.output.is_dir():
        raise UsageError(f"--output {config.output}: is a folder; name a file that ends with .html")
    if config.output.exists() and not config.overwrite:
        raise UsageError(f"--output {config.output}: already exists; name another file or pass --overwrite")
    check_writable(config.output, "--output")
    verdict = verify(config.dataset)
    page = render(config.dataset, verdict, resolution=config.resolution, step=config.bucket_step)
    if config.dry_run:
        print(f"dry run: {len(page.encode()) / 1e6:.2f} MB would be written to {config.output}")
        return
    config.output.parent.mkdir(parents=True, exist_ok=True)
    partial = config.output.with_name(config.output.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(config.output)
    print(f"{config.output}: {len(page.encode()) / 1e6:.2f} MB; open it in a browser")


if __name__ == "__main__":
    command(ReportConfig, main)
