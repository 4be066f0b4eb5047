from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import GateError, InputError, UsageError
from configs.recipes import RECIPES
from data_prep.folders.manifest import write_manifest
from data_prep.folders.results import Result, read_results, write_results
from eval.page.inputs import LONGEST_SIDE, Pictures
from eval.report import ReportConfig, main

SCRIPT = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Collects tags, addresses and the classes of the verdict boxes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.boxes: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.addresses += [values[name] for name in ("src", "href", "srcset", "action", "data") if name in values]
        if values.get("class", "").startswith("box "):
            self.boxes.append(values["class"].removeprefix("box "))


def write_png(path: Path, side: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)).save(path)


def write_run(folder: Path, dataset: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"pretrained_model_name_or_path: assets/tiny-sd\ntrain_data_dir: {dataset}/train\nrank: 4\n"
    )
    lines = [{"step": step, "loss": 0.3 / step, "learning_rate": 1e-4} for step in range(1, 31)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "environment.json").write_text('{"torch": "2.13.0"}')
    return folder


def write_dataset(folder: Path) -> Path:
    folder.mkdir()
    volume = {
        "name": "part-7",
        "state": "dry",
        "shape": [104, 224, 288],
        "dtype": "uint16",
        "voxel_um": [80.0, 80.0, 80.0],
        "window": {"low": 12817.0, "high": 52431.0},
        "split": {"axis": "x", "train": [0, 181], "guard": [181, 208], "validation": [208, 288]},
        "audit": {"warp": {"num_slices": 56, "effective_number": 15.6}},
    }
    write_manifest(folder, {"volumes": [volume], "counts": {"train": {"dry warp": 12}, "validation": {"dry warp": 5}}})
    return folder


def write_fidelity(folder: Path, caption: str = "sf_dry sf_warp", verdict: str = "ok") -> Path:
    folder.mkdir()
    row = Result(metric="agreement_state", set="generated", value=0.95, low=0.9, high=0.98, n=144, verdict=verdict)
    row = replace(
        row, command="python -m eval.fidelity --real a --generated b --output_dir c", reason="because of a test"
    )
    distance = replace(row, metric="kid_floor_ratio", value=0.4, low=0.1, high=0.8)
    single = replace(row, prompt=caption, verdict="grey", reason="16 pictures, judged from 64")
    write_results(folder / "results.jsonl", [row, distance, single])
    for kind in ("real", "vae", "generated"):
        write_png(folder / "samples" / f"{kind}.png")
    files = {kind: f"samples/{kind}.png" for kind in ("real", "vae", "generated")}
    confusion = {"state": {"names": ["dry", "injected"], "held_out": [[30, 1], [2, 29]], "generated": [[7, 0], [0, 9]]}}
    overview = {"tile_px": 16, "captions": [{"caption": caption, "files": files}], "confusion": confusion}
    (folder / "overview.json").write_text(json.dumps(overview))
    return folder


def write_memorization(folder: Path, caption: str = "sf_dry sf_warp") -> Path:
    """Write a check that found copies, with one pair in its gallery."""
    row = Result(
        metric="memorisation",
        set="generated",
        value=1,
        n=3,
        verdict="stop",
        reason="copies likely (ncc copies)",
        command="python -m eval.memorization --real data/weave",
    )
    recall = replace(row, metric="ncc_recall", set="control", value=0.97, verdict="ok", reason="planted tiles found")
    write_png(folder / "gallery" / "00.png")
    write_png(folder / "distances.png")
    write_results(folder / "results.jsonl", [row, recall])
    pair = {"file": "gallery/00.png", "caption": caption, "generated": "a.png", "trained": "b.png", "score": 4.2}
    gallery = [{**pair, "box": [0, 1, 2, 3, 4, 5], "is_flagged": True}]
    (folder / "gallery.json").write_text(json.dumps(gallery))
    return folder


def write_compare(folder: Path, name: str = "lora") -> Path:
    """Write a comparison of two runs."""
    best = Result(
        metric="pareto_best", value=1, n=2, reason=f"best: {name}", command="python -m eval.compare --runs a=b"
    )
    write_png(folder / "pareto.png")
    write_results(folder / "results.jsonl", [best])
    cell = {"value": 2.5, "low": 2.0, "high": 3.0, "n": 9, "verdict": "warn", "note": ""}
    lines = [{"name": name, "is_best": True, "cells": [cell]}, {"name": "full", "is_best": False, "cells": [None]}]
    table = {"columns": [{"name": "distance / real to real", "is_more_better": False}], "lines": lines}
    (folder / "table.json").write_text(json.dumps(table))
    return folder


def write_drift(folder: Path, prompt: str = "two zebras") -> Path:
    folder.mkdir()
    row = Result(
        metric="retention",
        set="G0",
        prompt=prompt,
        value=0.3,
        low=0.2,
        high=0.4,
        n=4,
        floor=0.98,
        verdict="stop",
        reason="beyond 0.5",
        command="python -m eval.drift --adapter runs/lora",
    )
    whole = replace(row, prompt="", reason="1 of 1 prompts beyond the stop limit")
    band = replace(whole, metric="retention_aa", value=0.98, low=0.9, high=1.0, verdict="grey", reason="A/A band")
    own = replace(row, metric="retention_aa", value=0.97, low=0.71, high=1.0, floor=None, verdict="grey")
    moved = replace(row, metric="divergence_ratio", value=0.2, floor=0.0, verdict="warn", reason="moved")
    overall = replace(row, metric="worst_prompt", unit="retention", reason="retention in G0")
    write_results(folder / "results.jsonl", [row, own, moved, whole, band, overall])
    records = []
    for model in ("base", "tuned"):
        write_png(folder / model / "a.png")
        records.append({"file_name": f"{model}/a.png", "model": model, "set": "G0", "prompt": prompt, "seed": 0})
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def watch_run(run: Path, prompt: str = "two zebras", name: str = "G0") -> Path:
    """Write what a run notes that was watched, stopped at step 200 and kept the weights of step 100."""
    lines: list[dict[str, object]] = []
    for step, kept in ((0, 1.0), (100, 0.9), (200, 0.2)):
        lines.append({"step": step, "kind": "pulse", "ratio": step / 400, "prompts": {}, "seconds": 0.1})
        row = {"metric": "retention", "set": name, "value": kept, "low": kept - 0.1, "high": min(1, kept + 0.1)}
        band = {"metric": "retention_aa", "set": name, "value": 0.98, "low": 0.9, "high": 1.0}
        overall = {"verdict": "stop" if kept < 0.5 else "ok", "prompt": prompt, "unit": "retention", "value": kept}
        rows = [row, {**row, "prompt": prompt}, band]
        lines.append({"step": step, "kind": "check", **overall, "rows": rows, "seconds": 1})
    (run / "drift.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    selection = {"selected_step": 100, "last_step": 200, "planned_steps": 600, "ended": "drift", "reason": prompt}
    (run / "selection.json").write_text(json.dumps({**selection, "cost": {"share": 0.04}}))
    return run


def render(output: Path, run: Path | None = None, *results: Path) -> str:
    main(ReportConfig(run=run, results=results, output=output))
    return output.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    run = write_run(folder / "lora", write_dataset(folder / "weave"))
    return render(folder / "report.html", run, write_fidelity(folder / "fidelity"), write_drift(folder / "drift"))


def test_a_probe_shows_its_score_beside_its_own_band_and_the_divergence_alone(whole: str) -> None:
    card = whole.partition("<span>two zebras</span>")[2].partition("</dl>")[0]
    scores = [re.sub(r"<[^>]+>", " ", text).split() for text in card.partition("<dl")[2].splitlines()]
    assert ["kept", "0.30", "A/A", "0.71", "to", "1.00"] in [words[-6:] for words in scores]
    assert ["moved", "0.20"] in scores


def test_each_question_shows_its_own_verdict(whole: str) -> None:
    assert Page(whole).boxes == ["ok", "ok", "stop", "grey"]


def test_without_any_results_every_box_is_grey_and_names_its_command(tmp_path: Path) -> None:
    text = render(tmp_path / "report.html")
    assert Page(text).boxes == ["grey"] * 4
    assert "python -m eval.fidelity --real data/weave" in text
    assert "python -m eval.drift --pretrained_model_name_or_path assets/tiny-sd" in text


def test_a_box_without_results_names_the_command_with_the_paths_that_are_known(tmp_path: Path) -> None:
    run = write_run(tmp_path / "lora", write_dataset(tmp_path / "weave"))
    assert f"--real {tmp_path / 'weave'} --generated" in render(tmp_path / "report.html", run)


def test_a_verdict_names_its_measures_as_the_tables_do(tmp_path: Path) -> None:
    folder = write_fidelity(tmp_path / "fidelity")
    rows = [replace(row, metric="swap_state", value=0.86, verdict="ok", prompt="") for row in
            read_results(folder / "results.jsonl")[:1]]  # fmt: skip
    write_results(folder / "results.jsonl", rows)
    assert "<p>State follows its word 0.86.</p>" in render(tmp_path / "report.html", None, folder)


def test_nothing_on_the_page_leaves_it(whole: str) -> None:
    page = Page(whole)
    assert len(page.addresses) > 5
    assert [address for address in page.addresses if not address.startswith(("data:", "#"))] == []
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "url(" not in whole
    assert "@import" not in whole


def test_the_dataset_box_shows_volumes_counts_window_and_split(whole: str) -> None:
    for text in ("part-7", "104 x 224 x 288 uint16", "12817 to 52431", "along x: train 0-181, guard 181-208", "17"):
        assert text in whole


def test_pictures_curve_tables_and_commands_are_there(whole: str) -> None:
    assert whole.count("data:image/png;base64,") == 3 + 2
    assert whole.count("data:image/svg+xml;base64,") == 1
    assert "Loss over 30 steps" in whole
    for text in (
        "State, held-out real",
        "State, generated",
        ">29<",
        "two zebras",
        "python -m eval.drift --adapter runs/lora",
    ):
        assert text in whole


@pytest.mark.parametrize("kind", ["caption", "probe", "setting", "volume", "title"])
def test_text_from_files_is_escaped(tmp_path: Path, kind: str) -> None:
    run = write_run(tmp_path / "lora", write_dataset(tmp_path / "weave"))
    if kind == "setting":
        (run / "config.yaml").write_text(f'note: "{SCRIPT}"\ntrain_data_dir: {tmp_path}/weave/train\n')
    if kind == "volume":
        write_manifest(tmp_path / "weave", {"volumes": [{"name": SCRIPT}]})
    fidelity = write_fidelity(tmp_path / "fidelity", SCRIPT if kind == "caption" else "sf_dry sf_warp")
    drift = write_drift(tmp_path / "drift", SCRIPT if kind == "probe" else "a horse")
    title = SCRIPT if kind == "title" else None
    main(ReportConfig(run=run, results=(fidelity, drift), output=tmp_path / "report.html", title=title))
    text = (tmp_path / "report.html").read_text()
    assert "script" not in Page(text).tags
    assert "&lt;script&gt;" in text


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "link.png"])
def test_pictures_outside_their_folder_are_not_shown(tmp_path: Path, name: str) -> None:
    write_png(tmp_path / "secret.png")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert Pictures().embed(folder, name) == ""


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    write_png(tmp_path / "large.png", side=LONGEST_SIDE + 200)
    content = base64.b64decode(Pictures().embed(tmp_path, "large.png").partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (LONGEST_SIDE, LONGEST_SIDE)


def test_pictures_without_room_are_left_out_and_counted(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png")
    size = len(base64.b64decode(Pictures().embed(tmp_path, "a.png").partition(",")[2]))
    pictures = Pictures(room=size + 10)
    assert [bool(pictures.embed(tmp_path, "a.png")) for _ in range(3)] == [True, False, False]
    assert pictures.num_left_out == 2


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "lora", write_dataset(tmp_path / "weave"))
    assert render(tmp_path / "one.html", run) == render(tmp_path / "two.html", run)


def test_it_writes_the_page_and_nothing_else(tmp_path: Path) -> None:
    render(tmp_path / "out" / "report.html")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_an_existing_page_is_replaced_only_when_asked(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    render(output)
    with pytest.raises(UsageError, match="already exists; name another file or pass --overwrite"):
        render(output)
    main(ReportConfig(output=output, overwrite=True))


def test_a_page_must_be_named_as_one() -> None:
    with pytest.raises(ValueError, match=re.escape("--output out/report: name a file that ends with .html")):
        ReportConfig(output=Path("out/report"))


def test_a_missing_folder_and_one_without_results_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--results .*gone: there is no such folder"):
        render(tmp_path / "report.html", None, tmp_path / "gone")
    with pytest.raises(InputError, match=r"holds neither results\.jsonl nor records\.jsonl"):
        render(tmp_path / "report.html", None, tmp_path)
    with pytest.raises(InputError, match=r"--run .*: no config\.yaml"):
        render(tmp_path / "report.html", tmp_path)


def test_copies_show_verdict_controls_curves_and_pairs(tmp_path: Path) -> None:
    text = render(tmp_path / "report.html", None, write_memorization(tmp_path / "memorization"))
    assert Page(text).boxes == ["grey", "grey", "grey", "stop"]
    for words in (
        "copies likely (ncc copies)",
        "planted copies found, correlation",
        "counts as a copy",
        "voxels 0, 1, 2",
    ):
        assert words in text
    assert text.count("data:image/png;base64,") == 2


def test_a_comparison_shows_a_line_a_run(tmp_path: Path) -> None:
    text = render(tmp_path / "report.html", None, write_compare(tmp_path / "compare"))
    assert "<strong>lora</strong>" in text
    assert "2.00 to 3.00" in text
    assert text.count("data:image/png;base64,") == 1


def test_descriptors_are_a_table_of_their_own(tmp_path: Path) -> None:
    folder = write_fidelity(tmp_path / "fidelity")
    command = read_results(folder / "results.jsonl")[0].command
    row = Result(metric="two_point", set="descriptor", value=3.2, low=2.0, high=4.0, n=9, unit="ratio", command=command)
    rows = [*read_results(folder / "results.jsonl"), row, replace(row, set="descriptor_vae", value=1.1)]
    rows.append(replace(row, prompt="sf_dry sf_warp", value=10.0))
    write_results(folder / "results.jsonl", rows)
    text = render(tmp_path / "report.html", None, folder)
    heat = text.partition('<table class="heat">')[2].partition("</table>")[0]
    assert "two-point probability" in heat
    assert "<td>1.1</td>" in heat
    assert '--share: 1.0">10.0</td>' in heat


def test_two_checks_of_drift_give_a_heat_map(tmp_path: Path) -> None:
    checks = [write_drift(tmp_path / name) for name in ("step-100", "step-200")]
    text = render(tmp_path / "report.html", None, *checks)
    heat = text.partition('<table class="heat looks">')[2].partition("</table>")[0]
    assert "step-100" in heat
    assert "step-200" in heat
    assert heat.count('--share: 0.7">0.30</td>') == 2


@pytest.mark.parametrize("kind", ["pair", "run"])
def test_text_of_copies_and_comparisons_is_escaped(tmp_path: Path, kind: str) -> None:
    if kind == "pair":
        folder = write_memorization(tmp_path / "check", SCRIPT)
    else:
        folder = write_compare(tmp_path / "check", SCRIPT)
    text = render(tmp_path / "report.html", None, folder)
    assert "script" not in Page(text).tags
    assert "&lt;script&gt;" in text


def test_a_watched_run_shows_curves_marks_and_what_was_kept(tmp_path: Path) -> None:
    run = watch_run(write_run(tmp_path / "lora", write_dataset(tmp_path / "weave")))
    text = render(tmp_path / "report.html", run)
    assert "Weights kept: step 100 of 200; stopped at step 200 of 600: drift." in text
    assert "Kept from 1.00 at step 0 to 0.20 at step 200." in text
    assert "Looking took 4.0% of the time." in text
    pictures = [base64.b64decode(found) for found in re.findall(r"svg\+xml;base64,([^\"]+)", text)]
    assert sum(b"kept, step 100" in picture and b"stopped, step 200" in picture for picture in pictures) == 2
    assert sum(b"base, A/A" in picture for picture in pictures) == 1
    heat = text.partition('<table class="heat looks">')[2].partition("</table>")[0]
    assert re.findall(r">([\d.]+)</td>", heat) == ["1.00", "0.90", "0.20"]


def test_the_drift_box_of_a_watched_run_says_what_the_run_saw_of_the_weights_it_kept(tmp_path: Path) -> None:
    run = watch_run(write_run(tmp_path / "lora", write_dataset(tmp_path / "weave")))
    text = render(tmp_path / "report.html", run)
    assert Page(text).boxes == ["grey", "grey", "ok", "grey"]
    assert "own check at step 100. Worst prompt: two zebras, retention 0.90." in text.replace("&#39;", "'")
    checked = render(tmp_path / "checked.html", run, write_drift(tmp_path / "drift"))
    assert Page(checked).boxes == ["grey", "grey", "stop", "grey"]


def test_the_dataset_box_says_how_many_slices_are_independent(whole: str) -> None:
    assert "<dt>independent slices</dt><dd>warp 16 of 56</dd>" in whole


def test_what_an_encoder_saw_of_drift_is_on_the_page(tmp_path: Path) -> None:
    folder = write_drift(tmp_path / "drift")
    rows = read_results(folder / "results.jsonl")
    alike = replace(rows[3], metric="dinov2_similarity", value=0.4321, tier="B")
    write_results(folder / "results.jsonl", [*rows, alike])
    text = render(tmp_path / "report.html", None, folder)
    assert "<th>alike (DINOv2)</th>" in text
    assert ">0.43" in text


def test_a_film_has_a_frame_per_check_after_the_base(tmp_path: Path) -> None:
    checks = [write_drift(tmp_path / name) for name in ("step-100", "step-200", "step-300")]
    page = Page(text := render(tmp_path / "report.html", None, *checks))
    film = text.partition('<div class="film">')[2].partition("</figure>")[0]
    assert 'data-names="base\nstep-100\nstep-200\nstep-300"' in film
    assert film.count('<div class="frame">') == film.count("data:image/png") == 4
    assert page.tags.count("script") == 1


def test_the_one_script_is_allowed_by_its_hash_and_no_other(tmp_path: Path) -> None:
    import hashlib

    checks = [write_drift(tmp_path / name) for name in ("a", "b")]
    text = render(tmp_path / "report.html", None, *checks)
    script = text.partition("<script>")[2].partition("</script>")[0]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'\"" in text


def test_previews_of_a_run_are_a_film(tmp_path: Path) -> None:
    run = write_run(tmp_path / "lora", write_dataset(tmp_path / "weave"))
    for step in (0, 100, 200):
        write_png(run / "previews" / f"step-{step:06d}.png")
    assert 'data-names="base\nstep 100\nstep 200"' in render(tmp_path / "report.html", run)


def test_strict_exits_as_a_gate_once_the_page_is_written(tmp_path: Path) -> None:
    drift, output = write_drift(tmp_path / "drift"), tmp_path / "report.html"
    with pytest.raises(GateError, match=r"--policy strict: drift: Worst prompt: two zebras"):
        main(ReportConfig(results=(drift,), output=output, policy="strict"))
    assert output.is_file()


def test_strict_lets_pass_what_does_not_stop(tmp_path: Path) -> None:
    main(ReportConfig(results=(write_fidelity(tmp_path / "f"),), output=tmp_path / "report.html", policy="strict"))


def test_the_split_is_drawn_as_shares_of_its_direction(whole: str) -> None:
    shares = re.findall(r'<span class="(train|guard|validation)" style="flex: ([\d.]+)"', whole)
    assert shares == [("train", "62.85"), ("guard", "9.38"), ("validation", "27.78")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_is_trained_again_by_its_own_recipe(recipe: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tmp_path / "data")
    (run / "environment.json").write_text(json.dumps({"command": [f"finetune/{recipe}.py", "--seed", "0"]}))
    main(ReportConfig(run=run, output=tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    assert f"accelerate launch finetune/{recipe}.py --config {run}/config.yaml --output_dir {run}-again" in text


def test_a_run_of_two_processes_is_trained_again_by_two(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tmp_path / "data")
    (run / "environment.json").write_text(json.dumps({"command": ["finetune/full.py"], "processes": 2}))
    main(ReportConfig(run=run, output=tmp_path / "page.html"))
    assert "torchrun --nproc_per_node 2 finetune/full.py --config" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("what", ["prompt", "name"])
def test_text_of_a_watched_run_is_escaped(tmp_path: Path, what: str) -> None:
    run = watch_run(write_run(tmp_path / "lora", write_dataset(tmp_path / "weave")), **{what: SCRIPT})
    text = render(tmp_path / "report.html", run)
    assert "script" not in Page(text).tags
    assert SCRIPT not in text


def write_weights(run: Path, base: str, content: bytes = b"weights") -> str:
    """Write what a LoRA run leaves of itself; return the hash of its weights."""
    (run / "pytorch_lora_weights.safetensors").write_bytes(content)
    (run / "provenance.json").write_text(json.dumps({"base_model": {"name": "sd", "hash": base}}))
    return hashlib.sha256(content).hexdigest()


def with_hashes(results: Path, **hashes: str) -> Path:
    """Let every row of a check name the models it was made with."""
    named = {name.replace("_", " "): value for name, value in hashes.items()}
    rows = [replace(row, hashes=named) for row in read_results(results / "results.jsonl")]
    write_results(results / "results.jsonl", rows)
    return results


@pytest.mark.parametrize(
    ("base", "adapter", "note"),
    [
        ("b", "own", ""),
        ("b", "other", "drift (other weights)"),
        ("other", "own", "drift (another base model)"),
    ],
)
def test_results_of_another_model_than_the_run_are_named(
    base: str, adapter: str, note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "lora", write_dataset(tmp_path / "weave"))
    own = write_weights(run, "b")
    check = with_hashes(write_drift(tmp_path / "drift"), base=base, adapter_0=own if adapter == "own" else adapter)
    text = render(tmp_path / "report.html", run, check, write_fidelity(tmp_path / "fidelity"))
    said = f"esults of another model than --run {run}: {tmp_path / note}. They say nothing about this run."
    assert (f"R{said}" in text, f"note: r{said}" in capsys.readouterr().err) == ((True, True) if note else (False,) * 2)
    assert ("of another model" in text) == bool(note)


def test_a_checkpoint_of_the_run_is_the_run_and_pictures_of_the_bare_base_are_not(tmp_path: Path) -> None:
    run = write_run(tmp_path / "lora", write_dataset(tmp_path / "weave"))
    write_weights(run, "b")
    (run / "checkpoint-100").mkdir()
    earlier = write_weights(run / "checkpoint-100", "b", b"earlier")
    check = with_hashes(write_drift(tmp_path / "drift"), base="b", adapter_0=earlier)
    slices = tmp_path / "slices"
    slices.mkdir()
    (slices / "records.jsonl").write_text(json.dumps({"base_model": {"hash": "b"}, "adapters": []}) + "\n")
    assert "slices (without its adapter). They" in render(tmp_path / "report.html", run, check, slices)


def test_a_tuned_pipeline_is_told_by_the_hash_of_its_parts(toy_sd: Path, tmp_path: Path) -> None:
    from finetune.diffusion.hashes import model_hash

    run = write_run(tmp_path / "full", write_dataset(tmp_path / "weave"))
    shutil.copytree(toy_sd, run, dirs_exist_ok=True)
    for name, tuned in (("right", model_hash(str(run))), ("wrong", "w")):
        check = with_hashes(write_drift(tmp_path / name), base="b", tuned=tuned)
        text = render(tmp_path / f"{name}.html", run, check)
        assert ("wrong (other weights). They" in text) == (name == "wrong")
