"""The round trip that the model card quotes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def tiny_sd() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "tiny_sd.py"
    specification = importlib.util.spec_from_file_location("tiny_sd", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["tiny_sd"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


class Reddening:
    """A VAE that only adds to red: 60 levels to dark pictures, 10 to others."""

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels))

    def decode(self, pixels: torch.Tensor) -> SimpleNamespace:
        pixels = pixels.clone()
        pixels[:, 0] += (60 if pixels.mean() < -0.5 else 10) / 127.5
        return SimpleNamespace(sample=pixels)


def test_the_round_trip_pools_squared_errors_over_channels_and_tiles(tiny_sd: ModuleType, tmp_path: Path) -> None:
    from data_prep.folders.manifest import SliceRow, write_rows

    folder = tmp_path / "validation"
    folder.mkdir()
    rows = []
    for index, grey in enumerate((20, 100)):
        Image.fromarray(np.full((8, 8), grey, dtype=np.uint8)).save(folder / f"{index}.png")
        name, box = f"{index}.png", (0, 1, 0, 8, 0, 8)
        rows.append(SliceRow(file_name=name, text="", volume="a", state="dry", axis="warp", index=index, box=box,
                             width=8, height=8))  # fmt: skip
    write_rows(folder, rows)
    # Squared errors 60^2 / 3 and 10^2 / 3: a mean of the two PSNR would read 25.1 dB.
    expected = 10 * np.log10(255**2 / ((60**2 + 10**2) / 6))
    assert tiny_sd._round_trip(SimpleNamespace(vae=Reddening()), tmp_path) == {"dry": pytest.approx(expected, abs=0.01)}


def test_the_noise_is_that_of_each_phantom(tiny_sd: ModuleType, tmp_path: Path) -> None:
    for state, sigma in (("dry", 8.25), ("injected", 9.5)):
        text = json.dumps({"state": state, "noise_sigma_windowed": sigma})
        (tmp_path / f"{state}.truth.json").write_text(text)
    assert tiny_sd._noise(tmp_path) == {"dry": 8.25, "injected": 9.5}
