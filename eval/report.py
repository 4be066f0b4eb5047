"""Put a run and its checks on one page that needs nothing but a browser.

    python -m eval.report --run runs/lora --results out/slices out/drift out/fidelity --output out/report.html

The page is one file without outside resources: pictures are inside, so it can be mailed, archived and opened on a
machine without a network. Its one script moves the slider of filmstrips; no other runs. What has no results is a grey
box that names the command which would fill it. With --policy strict a box that says stop is also exit code 5.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.errors import GateError, TisserandError, UsageError
from configs.load import command

if TYPE_CHECKING:
    from eval.page.inputs import Folder, Run

TEMPLATE = "report.html.jinja"
SCRIPT = "report_film.js"


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
    from eval.page.inputs import LARGEST_PAGE, read_folder, read_run

    if config.output.is_dir():
        raise UsageError(f"--output {config.output}: is a folder; name a file that ends with .html")
    if config.output.exists() and not config.overwrite:
        raise UsageError(f"--output {config.output}: already exists; name another file or pass --overwrite")
    from eval.page.sections import verdict_boxes

    run = read_run(config.run) if config.run else None
    folders = [read_folder(path) for path in config.results]
    page = render(config, run, folders).encode()
    if len(page) > LARGEST_PAGE:
        raise TisserandError(
            f"--results: the page would have {len(page) / 1e6:.1f} MB, more than {LARGEST_PAGE / 1e6:.0f}; give fewer"
        )
    config.output.parent.mkdir(parents=True, exist_ok=True)
    partial = config.output.with_name(config.output.name + ".partial")
    partial.write_bytes(page)
    partial.replace(config.output)
    print(f"{config.output}: {len(page) / 1e6:.2f} MB; open it in a browser")
    stopped = [box for box in verdict_boxes(folders, run) if box["verdict"] == "stop"]
    if stopped and config.policy == "strict":
        found = "; ".join(f"{box['title'].lower()}: {box['reason']}" for box in stopped)
        raise GateError(f"--policy strict: {found} See {config.output}")


def render(config: ReportConfig, run: Run | None, folders: Sequence[Folder]) -> str:
    """Return the page; every text from a file is escaped by the template."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from eval.page import sections as sections
    from eval.page.curves import drift_curves, loss_curve, selection_line
    from eval.page.drift import drift_heats, drift_sections
    from eval.page.film import films
    from eval.page.inputs import Pictures, find_dataset

    pictures = Pictures()
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Our own file, not a text of the results: the only thing on the page that is not escaped.
    script = (Path(__file__).with_name(SCRIPT)).read_text(encoding="utf-8")
    samples = sections.sample_cards(folders, pictures)
    return environment.get_template(TEMPLATE).render(
        title=config.title or (config.run.name if config.run else "Tisserand report"),
        boxes=sections.verdict_boxes(folders, run),
        dataset=sections.dataset_box(find_dataset(run, folders)),
        curve=loss_curve(run),
        samples=samples,
        sheet="" if samples else sections.contact_sheet(folders, pictures),
        fidelity=sections.fidelity_checks(folders, pictures),
        memorization=sections.memorization_sections(folders, pictures),
        comparison=sections.compare_table(folders, pictures),
        selection=selection_line(run),
        curves=drift_curves(run),
        heats=drift_heats(run, folders),
        drift=drift_sections(folders, pictures),
        films=films(run, folders, pictures),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        suggest={
            name: sections.suggestion(f"eval.{name}", folders, run) for name in ("fidelity", "drift", "memorization")
        },
        appendix=sections.appendix(run, folders),
        num_left_out=pictures.num_left_out,
    )


if __name__ == "__main__":
    command(ReportConfig, main)
