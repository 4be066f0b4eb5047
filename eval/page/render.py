"""The page itself: every section, put into the template."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from configs.errors import TisserandError
from eval.page.appendix import appendix
from eval.page.comparison import compare_table
from eval.page.curves import drift_curves, loss_curve, selection_line
from eval.page.dataset import dataset_box
from eval.page.drift import drift_heats, drift_sections
from eval.page.fidelity import contact_sheet, fidelity_checks, sample_cards
from eval.page.film import films
from eval.page.inputs import (
    LARGEST_PAGE,
    Pictures,
    ReportedRun,
    ResultsFolder,
    find_dataset,
    read_folder,
    read_run,
)
from eval.page.memorization import memorization_sections
from eval.page.same_model import note_of_other_models
from eval.page.verdict_strip import suggestion, verdict_boxes

TEMPLATE = "report.html.jinja"
SCRIPT = "report_film.js"


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page, those of its verdict boxes that say stop, and a note if it mixes models."""

    content: bytes
    note: str
    stopped: tuple[dict[str, str], ...]


def make_page(run: Path | None, results: Sequence[Path], title: str | None) -> Page:
    """Read a run and its checks and render them.

    Args:
        run: run folder of a training.
        results: folders of checks, in any order.
        title: heading of the page; the name of the run if None.

    Raises:
        UsageError: there is no such folder.
        InputError: a folder is not what it should be, or cannot be read.
        TisserandError: the page would be too large to mail.
    """
    read = read_run(run) if run else None
    folders = [read_folder(path) for path in results]
    note = note_of_other_models(read, folders)
    page = render(title or (run.name if run else "Tisserand report"), read, folders, note).encode()
    if len(page) > LARGEST_PAGE:
        raise TisserandError(
            f"--results: the page would have {len(page) / 1e6:.1f} MB, more than {LARGEST_PAGE / 1e6:.0f}; give fewer"
        )
    stopped = [box for box in verdict_boxes(folders, read) if box["verdict"] == "stop"]
    return Page(content=page, note=note, stopped=tuple(stopped))


def render(title: str, run: ReportedRun | None, folders: Sequence[ResultsFolder], note: str = "") -> str:
    """Return the page, with a note at its top; every text from a file is escaped by the template."""
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
    samples = sample_cards(folders, pictures)
    return environment.get_template(TEMPLATE).render(
        title=title,
        note=note,
        boxes=verdict_boxes(folders, run),
        dataset=dataset_box(find_dataset(run, folders)),
        curve=loss_curve(run),
        samples=samples,
        sheet="" if samples else contact_sheet(folders, pictures),
        fidelity=fidelity_checks(folders, pictures),
        memorization=memorization_sections(folders, pictures),
        comparison=compare_table(folders, pictures),
        selection=selection_line(run),
        curves=drift_curves(run),
        heats=drift_heats(run, folders),
        drift=drift_sections(folders, pictures),
        films=films(run, folders, pictures),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        suggest={name: suggestion(f"eval.{name}", folders, run) for name in ("fidelity", "drift", "memorization")},
        appendix=appendix(run, folders),
        num_left_out=pictures.num_left_out,
    )
