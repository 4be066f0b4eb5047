"""Put a run and its checks on one page that needs nothing but a browser.

    python -m eval.report --run runs/lora --results out/slices out/drift out/fidelity --output out/report.html

The page is one file without scripts and outside resources: pictures are inside, so it can be mailed, archived and
opened on a machine without a network. What has no results is a grey box that names the command which would fill it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import TisserandError, UsageError
from configs.load import command

if TYPE_CHECKING:
    from eval.report_inputs import Folder, Run

TEMPLATE = "report.html.jinja"


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
    overwrite: bool = False
    """Replace the page if it is there."""

    def __post_init__(self) -> None:
        """Refuse a page that would be taken for something else."""
        if self.output.suffix not in {".html", ".htm"}:
            raise ValueError(f"--output {self.output}: name a file that ends with .html")


def main(config: ReportConfig) -> None:
    """Read everything, render, check the size, and put the page in place when it is whole."""
    from eval.report_inputs import LARGEST_PAGE, read_folder, read_run

    if config.output.is_dir():
        raise UsageError(f"--output {config.output}: is a folder; name a file that ends with .html")
    if config.output.exists() and not config.overwrite:
        raise UsageError(f"--output {config.output}: already exists; name another file or pass --overwrite")
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


def render(config: ReportConfig, run: Run | None, folders: Sequence[Folder]) -> str:
    """Return the page; every text from a file is escaped by the template."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from eval import report_sections as sections
    from eval.report_inputs import Pictures, find_dataset

    pictures = Pictures()
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    samples = sections.sample_cards(folders, pictures)
    return environment.get_template(TEMPLATE).render(
        title=config.title or (config.run.name if config.run else "Tisserand report"),
        boxes=sections.verdict_boxes(folders, run),
        dataset=sections.dataset_box(find_dataset(run, folders)),
        curve=sections.loss_curve(run),
        samples=samples,
        sheet=sections.contact_sheet(folders, pictures) if samples is None else "",
        confusion=sections.confusion_tables(folders),
        fidelity=sections.fidelity_table(folders),
        descriptors=sections.descriptor_table(folders, pictures),
        memorization=sections.memorization_section(folders, pictures),
        comparison=sections.compare_table(folders, pictures),
        heat=sections.drift_heat(folders),
        drift=sections.drift_sections(folders, pictures),
        suggest={
            name: sections.suggestion(f"eval.{name}", folders, run) for name in ("fidelity", "drift", "memorization")
        },
        appendix=sections.appendix(run, folders),
        num_left_out=pictures.num_left_out,
    )


if __name__ == "__main__":
    command(ReportConfig, main)
