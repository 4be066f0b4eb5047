"""What users load: a stock pipeline gives the pixels of the trained model, and equal weights are equal files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from safetensors import safe_open

from data_prep.folders.run_folder import LORA_FILE
from finetune.core.learns.trainable import lora_adapters
from finetune.core.save.weights import save_lora
from finetune.core.settings.methods import LoraConfig
from finetune.diffusion.models import Models, as_pipeline, load_models

PROVENANCE = {"method": "lora", "captions": ["sf_dry"], "steps": 2}


def make_trained(model: Path, targets: str, alpha: float) -> Models:
    models = load_models(str(model))
    config = LoraConfig(rank=4, lora_alpha=alpha, lora_targets=targets)
    learns = lora_adapters(models, config, learning_rate=1e-4, seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in learns.parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return models


def render(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("sf_dry", num_inference_steps=3, generator=generator, output_type="np").images


def render_stock(model: Path, folder: Path) -> np.ndarray:
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.load_lora_weights(folder)
    return render(pipeline)


@pytest.mark.parametrize("alpha", [4.0, 16.0, 1.0])
@pytest.mark.parametrize("targets", ["attention", "attention+resnet"])
def test_a_stock_pipeline_gives_the_pixels_of_the_trained_model(
    toy_sd: Path, tmp_path: Path, targets: str, alpha: float
) -> None:
    models = make_trained(toy_sd, targets, alpha)
    save_lora(tmp_path, models, PROVENANCE)
    trained = render(as_pipeline(models))
    np.testing.assert_allclose(render_stock(toy_sd, tmp_path), trained, atol=1e-5, rtol=0)
    base = render(as_pipeline(load_models(str(toy_sd))))
    assert np.abs(trained - base).max() > 0.05


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters, an inconsistency")
@pytest.mark.parametrize(("targets", "alpha"), [("attention", 16.0), ("attention+resnet", 4.0)])
def test_saving_as_the_example_scripts_do_loses_alpha_and_layers(
    toy_sd: Path, tmp_path: Path, targets: str, alpha: float
) -> None:
    """Should this fail one day, diffusers has changed and ``save_lora`` can be simpler."""
    models = make_trained(toy_sd, targets, alpha)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(models.unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    difference = np.abs(render_stock(toy_sd, tmp_path) - render(as_pipeline(models)))
    assert difference.max() > 0.05


def test_provenance_stands_in_the_file_and_beside_it(toy_sd: Path, tmp_path: Path) -> None:
    path = save_lora(tmp_path, make_trained(toy_sd, "attention", 4.0), PROVENANCE)
    with safe_open(path, framework="pt") as reader:
        assert json.loads(reader.metadata()["provenance"]) == PROVENANCE
    assert json.loads((tmp_path / "provenance.json").read_text()) == PROVENANCE
    assert sorted(file.name for file in tmp_path.iterdir()) == ["provenance.json", LORA_FILE]


def test_saved_weights_are_float32(toy_sd: Path, tmp_path: Path) -> None:
    path = save_lora(tmp_path, make_trained(toy_sd, "attention", 4.0), PROVENANCE)
    with safe_open(path, framework="pt") as reader:
        assert {reader.get_tensor(name).dtype for name in reader.keys()} == {torch.float32}  # noqa: SIM118


def test_equal_weights_are_equal_files_in_any_process(toy_sd: Path, tmp_path: Path) -> None:
    """The library orders the metadata by a hash that differs between processes, so others must be asked."""
    code = (
        "import sys; from finetune.core.save.weights import _with_sorted_header as sort; import torch; "
        "from safetensors.torch import save; "
        "sys.stdout.buffer.write(sort(save({'a': torch.ones(3)}, metadata=dict(zip('zyxwv', 'abcde')))))"
    )
    files = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(files) == 1
    assert b'"v":"e","w":"d"' in files.pop()
