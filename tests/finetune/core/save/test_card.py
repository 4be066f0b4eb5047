"""The card of a finished run: what it tells, and that text from files stays text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from data_prep.folders.run_folder import EMBEDDINGS_FILE, LORA_FILE
from finetune.core.save.card import write_card

NASTY = '<script>alert(1)</script> `x` ``` | [a](javascript:alert(1)) <img src=x onerror="y">\n# title'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return what a run leaves, with text that tries to break out."""
    run = tmp_path / "run `a` <b>"
    (run / "previews").mkdir(parents=True)
    told = {
        "method": "lora",
        "base_model": {"name": "some/base", "hash": "ab" * 32},
        "data": {"train_data_dir": "weave", "n_images": 9},
        "shapes": [{"height": 40, "width": 24, "captions": {}}, {"height": 24, "width": 40, "captions": {}}],
        "captions": ["sf_dry sf_warp", NASTY, *(f"caption {number}" for number in range(40))],
        "window": {"vol|ume": [0, 255]},
        "config_hash": "cd" * 32,
        "steps": 8,
    }
    rows = [{"step": 2, "loss": 0.5}, {"step": 8, "loss": 0.25, "elapsed_s": 12.5}]
    heldout = [
        {"step": 8, "set": "validation", "band": None, "caption": None, "loss": 0.125},
        {"step": 8, "set": "validation", "band": [0, 100], "caption": None, "loss": 0.75},
    ]
    (run / "provenance.json").write_text(json.dumps(told))
    (run / "environment.json").write_text(json.dumps({"device": "cpu x", "libraries": {"torch": "2"}}))
    (run / "config.yaml").write_text(f"rank: 4\nvalidation_prompt: {json.dumps([NASTY])}\nnote: '``` </code>'\n")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in heldout))
    (run / LORA_FILE).write_bytes(b"")
    for step in (0, 4, 8):
        Image.new("L", (4, 4)).save(run / "previews" / f"step-{step:06d}.png")
    return run


def test_the_card_tells_base_data_method_settings_and_metrics(folder: Path) -> None:
    text = write_card(folder).read_text()
    told = [
        "`some/base`",
        "ab" * 32,
        "`weave`",
        "low-rank adapters",
        "rank: 4",
        "| `0.25` |",
        "`12.5`",
        "`0.125`",
        "`40x24, 24x40`",
    ]
    assert all(piece in text for piece in told)
    assert "0.75" not in text  # one band of the held-out loss
    assert "and 12 more" in text


def test_the_hub_reads_the_head_of_the_card(folder: Path) -> None:
    data = ModelCard.load(write_card(folder)).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("some/base", "diffusers", "text-to-image")
    assert "lora" in data.tags


def test_a_base_in_a_local_folder_is_not_named_as_one_of_the_hub(folder: Path) -> None:
    told = json.loads((folder / "provenance.json").read_text())
    told["base_model"]["name"] = "/data/sd: 'x'\n- y"
    (folder / "provenance.json").write_text(json.dumps(told))
    assert ModelCard.load(write_card(folder)).data.base_model is None


def test_samples_show_the_first_preview_and_the_last(folder: Path) -> None:
    text = write_card(folder).read_text()
    assert [f"previews/step-00000{step}.png" in text for step in (0, 4, 8)] == [True, False, True]


def test_text_from_files_is_never_markup(folder: Path) -> None:
    markdown = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"html": True, "linkify": False})
    body = write_card(folder).read_text().split("---\n", 2)[2]
    page = markdown.render(body)
    assert "&lt;script&gt;" in page
    assert [mark for mark in ("<script", "<img src=x", 'javascript:alert(1)"', "<b>") if mark in page] == []
    assert page.count("<h1>") == 1
    headings = ["Base model", "Data", "Training", "Samples", "Use", "Settings"]
    assert [line for line in headings if f"<h2>{line}</h2>" not in page] == []
    assert page.count("<h2>") == len(headings)


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ((LORA_FILE,), f"pipeline.load_lora_weights('{LORA_FILE}')"),
        ((EMBEDDINGS_FILE,), f"pipeline.load_textual_inversion('{EMBEDDINGS_FILE}')"),
        (("model_index.json", "text_encoder"), "pipeline = StableDiffusionPipeline.from_pretrained('.')"),
        (("model_index.json",), "StableDiffusionPipeline.from_pretrained('.', text_encoder=text_encoder)"),
    ],
)
def test_the_card_says_how_to_load_what_is_there(folder: Path, files: tuple[str, ...], line: str) -> None:
    (folder / LORA_FILE).unlink()
    for name in files:
        (folder / name).mkdir() if name == "text_encoder" else (folder / name).write_bytes(b"")
    text = write_card(folder).read_text()
    assert line in text
    assert text.count("pipeline.load_") == len({LORA_FILE, EMBEDDINGS_FILE} & set(files))
