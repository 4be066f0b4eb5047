"""Fidelity in an encoder's features: whose numbers they are, and whose code computes them."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from test_fidelity import NAMING, seen

from configs.errors import UsageError
from data_prep.folders.results import Result
from eval.likeness.encoder_rows import check_torch_fidelity, encoder_rows
from eval.likeness.rows import ClassifiedSets
from eval.tiles.encoders import Encoder

KINDS = ("held_out", "aside", "generated_tiles")


def rows_of(shift: float, *, with_torch_fidelity: bool = False) -> dict[tuple[str, str, str], Result]:
    """Compare tiles whose grey levels are the features: four of a pixel each, generated ones brighter by ``shift``."""
    sets = ClassifiedSets(
        held_out=seen(40, seed=1),
        held_out_matched=seen(40, seed=1),
        held_out_vae=None,
        aside=seen(40, seed=2),
        aside_vae=None,
        generated=seen(40, seed=4),
        generated_tiles=seen(40, seed=4),
        no_vae="no VAE",
        leak_unchecked="",
    )
    random = np.random.default_rng(0)
    levels = {name: random.normal(120, 10, (len(getattr(sets, name)), 2, 2)) for name in KINDS}
    levels["generated_tiles"] += shift
    pixels = {name: tiles.round().clip(0, 255).astype(np.uint8) for name, tiles in levels.items()}
    encoder = Encoder(kind="toy", hash="0", images=lambda tiles: tiles.reshape(len(tiles), -1) / 10.0 - 12)
    found = encoder_rows(encoder, sets, pixels, NAMING, with_torch_fidelity=with_torch_fidelity, draws=100, seed=0)
    return {(row.metric, row.set, row.prompt): row for row in found}


def test_tiles_of_one_distribution_are_within_the_floor_and_shifted_ones_are_not() -> None:
    same, far = rows_of(0.0), rows_of(15.0)
    assert same["kid_floor_ratio_toy", "generated", ""].verdict == "ok"
    assert far["kid_floor_ratio_toy", "generated", ""].verdict == "stop"
    assert (far["mmd_toy", "generated", ""].low or 0) > (same["mmd_toy", "generated", ""].high or 0)


def test_every_row_is_of_tier_b_and_named_after_its_encoder() -> None:
    rows = rows_of(0.0)
    assert {row.tier for row in rows.values()} == {"B"}
    assert all(metric.endswith("_toy") for metric, _, _ in rows)


def test_torch_fidelity_reads_the_same_kid_and_is_of_tier_c() -> None:
    extra = os.environ.get("TISSERAND_EXTRA_PACKAGES")
    if extra and extra not in sys.path:
        sys.path.append(extra)
    try:
        check_torch_fidelity()
    except UsageError as error:
        pytest.skip(str(error))
    rows = rows_of(5.0, with_torch_fidelity=True)
    assert {metric for (metric, _, _), row in rows.items() if row.tier == "C"} == {
        "fid_toy", "torch_fidelity_kid_toy", "precision_toy", "recall_toy"}  # fmt: skip
    value = rows["torch_fidelity_kid_toy", "generated", ""].value
    assert value is not None
    # Ours leaves out pairs of one block and weighs captions; theirs knows neither.
    assert value == pytest.approx(rows["kid_toy", "generated", ""].value, rel=0.2)


def test_torch_fidelity_that_is_not_installed_is_refused_with_what_to_do() -> None:
    if importlib.util.find_spec("torch_fidelity") is not None:
        pytest.skip("torch-fidelity is installed")
    with pytest.raises(UsageError, match=r"--torch_fidelity: torch_fidelity.* not installed; pip install"):
        check_torch_fidelity()


def test_torch_fidelity_that_cannot_be_imported_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a torchvision built for CUDA does beside a torch built for CPUs."""
    for name in ("torch_fidelity", "torchvision"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be imported \(operator torchvision::nms does not exist\)"):
        check_torch_fidelity()
