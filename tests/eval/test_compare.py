"""Several runs on one table: like with like, and which of them no other beats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from configs.errors import InputError
from data_prep.folders.results import Result, read_results, write_results
from eval.compare import CompareConfig, main


def write_run(
    folder: Path, *, far: float, kept: float, n: int = 144, probes: str = "p", seed: int = 0, real: str = "v"
) -> Path:
    """Write the results of fidelity and drift of one run, and the records they name."""
    slices = folder / "slices"
    slices.mkdir(parents=True)
    record = {"prompt": "sf_dry sf_warp", "seed": seed, "height": 64, "width": 64, "steps": 20}
    (slices / "records.jsonl").write_text(json.dumps(record) + "\n")
    fidelity = Result(
        metric="descriptor_floor_ratio",
        set="generated",
        value=far,
        low=far - 0.2,
        high=far + 0.2,
        n=n,
        unit="ratio",
        verdict="warn",
        hashes={"train": "t", "validation": real, "records": str(folder)},
        command="python -m eval.fidelity --real w",
    )
    drift = replace(
        fidelity,
        metric="worst_prompt",
        set="G0",
        prompt="two zebras",
        value=kept,
        low=None,
        high=None,
        n=4,
        unit="retention",
        hashes={"base": "b", "probes": probes},
        command="python -m eval.drift --adapter a",
    )
    for name, row in (("fidelity", fidelity), ("drift", drift)):
        (folder / name).mkdir()
        write_results(folder / name / "results.jsonl", [row])
    (folder / "fidelity" / "config.yaml").write_text(f"generated: {slices}\n")
    (folder / "drift" / "config.yaml").write_text("num_images: 4\n")
    return folder


def test_the_table_has_a_line_a_run_and_names_those_that_no_other_beats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {
        "near": write_run(tmp_path / "near", far=2.0, kept=0.3),
        "kept": write_run(tmp_path / "kept", far=4.0, kept=0.9),
        "beaten": write_run(tmp_path / "beaten", far=5.0, kept=0.8),
    }
    main(CompareConfig(runs=runs, output_dir=tmp_path / "out"))
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [(line["name"], line["is_best"]) for line in table["lines"]] == [
        ("near", True),
        ("kept", True),
        ("beaten", False),
    ]
    assert [cell["value"] for cell in table["lines"][0]["cells"]] == [2.0, 0.3]
    assert [row.value for row in read_results(tmp_path / "out" / "results.jsonl")][-1] == 2
    with Image.open(tmp_path / "out" / "pareto.png") as plot:
        assert plot.size[0] > 400
    assert "forgot less: near, kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 100}, "descriptor_floor_ratio of a is made of 144 and of b of 100; only equal numbers are compared"),
        ({"probes": "q"}, "eval.drift of a and b differ in probes"),
        ({"seed": 1}, "eval.fidelity of a and b differ in records grid"),
        ({"real": "x"}, "eval.fidelity of a and b differ in validation"),
    ],
)
def test_what_was_not_measured_alike_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    first = write_run(tmp_path / "a", far=2.0, kept=0.3)
    second = write_run(tmp_path / "b", **{"far": 2.0, "kept": 0.3, **changes})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        main(CompareConfig(runs={"a": first, "b": second}, output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_check_that_only_one_has_is_refused(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / name, far=2.0, kept=0.3) for name in "ab")
    (second / "drift" / "results.jsonl").unlink()
    with pytest.raises(InputError, match=r"eval\.drift was run for only one of a and b"):
        main(CompareConfig(runs={"a": first, "b": second}, output_dir=tmp_path / "out"))


def test_a_folder_without_results_is_one_clear_line(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", far=2.0, kept=0.3)
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match=r"--runs b=.*: holds no results of eval\.fidelity, eval\.drift"):
        main(CompareConfig(runs={"a": first, "b": tmp_path / "b"}, output_dir=tmp_path / "out"))


def test_one_run_is_no_comparison() -> None:
    with pytest.raises(ValueError, match="--runs: 1 given; name at least two"):
        CompareConfig(runs={"a": Path("a")}, output_dir=Path("out"))
