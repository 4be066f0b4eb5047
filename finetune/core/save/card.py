"""The model card of a finished run: what it is, how it was made, how well it went, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from configs.load import one_line
from configs.recipes import RECIPES
from data_prep.folders.publish import write_whole
from data_prep.folders.run_folder import (
    CARD,
    CONFIG,
    EMBEDDINGS_FILE,
    ENVIRONMENT,
    HELDOUT,
    LORA_FILE,
    METRICS,
    PROVENANCE,
)

_MOST_CAPTIONS = 30


def write_card(folder: Path) -> Path:
    """Write ``README.md`` from what a finished run left in its folder; return its path.

    Text from files (captions, names, settings) stands in code blocks, where neither Markdown nor HTML is read.
    diffusers' own card is not used: it asks the hub first, and needs a prompt and a tracker.
    """
    told = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    settings = (folder / CONFIG).read_text(encoding="utf-8")
    method, base = str(told.get("method", "unknown")), told.get("base_model", {})
    name = str(base.get("name", "unknown"))
    parts = [
        "---\n" + yaml.safe_dump(_metadata(name, method), sort_keys=False, allow_unicode=True) + "---",
        f"# {_code(folder.resolve().name)}",
        f"Stable Diffusion, fine-tuned by {RECIPES[method].method if method in RECIPES else _code(method)}.",
        _table("Base model", {"name": name, "SHA-256 of its parts": base.get("hash")}),
        _table("Data", _data(told)),
        _captions(told.get("captions", [])),
        _table("Training", _training(folder, told)),
        _samples(folder),
        "## Use\n\n" + _fenced(_usage(folder, name), "python"),
        "The safety checker of Stable Diffusion 1.x is not part of this model and was never run: it blacks out grey "
        "slices. What is generated was learned from the images above and from those of the base model; it is no "
        "measurement.",
        "## Settings\n\n" + _fenced(settings, "yaml"),
    ]
    write_whole(folder / CARD, "\n\n".join(part for part in parts if part) + "\n")
    return folder / CARD


def _metadata(base: str, method: str) -> dict[str, Any]:
    """Return what the hub reads: a base model is named there by its id alone."""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    kind = "lora" if "lora" in method else "textual_inversion" if method == "textual_inversion" else "full"
    return {
        **({"base_model": base} if is_id else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", kind, "tisserand"],
        "inference": True,
    }


def _data(told: Mapping[str, Any]) -> dict[str, object]:
    """Return what is said about the images."""
    windows = {f"window of {name}": json.dumps(window) for name, window in told.get("window", {}).items() if window}
    shapes = ", ".join(f"{shape['height']}x{shape['width']}" for shape in told.get("shapes", []))
    return {**told.get("data", {}), "rows x columns of the pictures, most frequent first": shapes, **windows}


def _captions(captions: Sequence[object]) -> str:
    """Return the captions, as many as a reader can take in."""
    shown = [one_line(str(caption)) for caption in captions[:_MOST_CAPTIONS]]
    more = f"\n\nand {len(captions) - len(shown)} more" if len(captions) > len(shown) else ""
    return f"Captions:\n\n{_fenced(chr(10).join(shown), 'text')}{more}" if shown else ""


def _training(folder: Path, told: Mapping[str, Any]) -> dict[str, object]:
    """Return how it was trained and how that went: the last lines of the metrics."""
    last = _rows(folder / METRICS)[-1:]
    machine = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    heldout = [row for row in _rows(folder / HELDOUT) if row.get("band") is None and row.get("caption") is None]
    whole = {f"loss at fixed noise, {row['set']} images": row["loss"] for row in heldout}
    return {
        "steps": told.get("steps"),
        "steps planned": None if told.get("planned_steps") == told.get("steps") else told.get("planned_steps"),
        "mean loss since the line before the last": last[0].get("loss") if last else None,
        "seconds": last[0].get("elapsed_s") if last else None,
        **whole,
        "device": machine.get("device"),
        "processes": machine.get("processes"),
        "precision": machine.get("mixed_precision"),
        "code": machine.get("git_revision"),
        "libraries": ", ".join(f"{name} {version}" for name, version in machine.get("libraries", {}).items()),
        "SHA-256 of the settings": told.get("config_hash"),
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _samples(folder: Path) -> str:
    """Show the last preview: the prompts of the settings, with the same seeds as the first."""
    previews = sorted((folder / "previews").glob("step-*.png"))
    if not previews:
        return ""
    shown = dict.fromkeys((previews[0], previews[-1]))
    pictures = "\n\n".join(f"![{path.stem}](previews/{path.name})" for path in shown)
    return "## Samples\n\nThe same prompts and seeds, before training and after, each row a prompt.\n\n" + pictures


def _usage(folder: Path, base: str) -> str:
    """Return the lines that load it into a stock pipeline."""
    is_whole = (folder / "model_index.json").is_file()
    lines, given = ["from diffusers import StableDiffusionPipeline", ""], ""
    if is_whole and not (folder / "text_encoder").is_dir():
        lines.insert(1, "from transformers import CLIPTextModel")
        lines.append(f"text_encoder = CLIPTextModel.from_pretrained({base!r}, subfolder='text_encoder')")
        given = ", text_encoder=text_encoder"
    lines.append(f"pipeline = StableDiffusionPipeline.from_pretrained({'.' if is_whole else base!r}{given})")
    if (folder / EMBEDDINGS_FILE).is_file() and not is_whole:
        lines.append(f"pipeline.load_textual_inversion({EMBEDDINGS_FILE!r})")
    if (folder / LORA_FILE).is_file():
        lines.append(f"pipeline.load_lora_weights({LORA_FILE!r})")
    return "\n".join(lines)


def _table(title: str, rows: Mapping[str, object]) -> str:
    """Return a section with a table of what is known."""
    lines = [f"| {_code(name)} | {_code(value)} |" for name, value in rows.items() if value not in (None, "", {}, [])]
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *lines])


def _code(value: object) -> str:
    """Return a text as a code span for a table: one line, bars escaped, in a fence longer than any in it."""
    text = one_line(str(value)).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _fenced(text: str, language: str) -> str:
    """Return a text as a code block whose fence is longer than any in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
