"""(prompt, seed) to pixels: the same pixels for the same request, whatever surrounds it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from configs.errors import TisserandError
from eval.tiles.contact_sheet import contact_sheet
from finetune.diffusion.config import Sampler, SamplingConfig
from finetune.diffusion.models import Models, load_models
from finetune.diffusion.sampling import make_scheduler, require_light, sample
from finetune.diffusion.vae import decode

SETTINGS = SamplingConfig(num_inference_steps=3, batch_size=4)
REQUESTS = [("dry", 0), ("weft", 0), ("dry", 1), ("", 0), ("weft", 1)]


@pytest.fixture(scope="module")
def models(toy_sd: Path) -> Models:
    return load_models(str(toy_sd))


def test_pictures_are_those_of_the_stock_pipeline(models: Models, toy_sd: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(toy_sd, safety_checker=None, requires_safety_checker=False)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for _, seed in REQUESTS[:4]]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array__ implementation doesn't accept a copy keyword")
        prompts = [prompt for prompt, _ in REQUESTS[:4]]
        expected = stock(prompts, num_inference_steps=3, generator=generators, output_type="np").images
    ours = sample(models, REQUESTS[:4], SETTINGS)
    # Rounding to 8 bit moves a value by at most half a level, batched text encoding by far less than another half.
    assert np.abs(ours - expected * 255).max() <= 0.51


def test_the_same_request_gives_the_same_pixels(models: Models) -> None:
    np.testing.assert_array_equal(sample(models, REQUESTS, SETTINGS), sample(models, REQUESTS, SETTINGS))


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "ddpm"])
def test_a_picture_does_not_depend_on_its_batch(models: Models, scheduler: str) -> None:
    together = sample(models, REQUESTS, SamplingConfig(num_inference_steps=3, batch_size=5, scheduler=scheduler))
    alone = sample(models, REQUESTS, SamplingConfig(num_inference_steps=3, batch_size=1, scheduler=scheduler))
    difference = np.abs(together.astype(int) - alone)
    # Batched kernels may sum in another order; a value next to a rounding edge then falls to the other side.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_sampling_leaves_the_random_state_and_the_training_mode_alone(models: Models) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    models.unet.train()
    torch.manual_seed(7)
    sample(models, REQUESTS[:1], SamplingConfig(num_inference_steps=2, scheduler="ddpm"))
    assert (torch.rand(3) == expected).all()
    assert models.unet.training
    assert not models.vae.training
    models.unet.eval()


@pytest.mark.parametrize("scheduler", get_args(Sampler))
def test_every_sampler_ends_on_a_finite_picture(models: Models, scheduler: str) -> None:
    settings = SamplingConfig(num_inference_steps=2, scheduler=scheduler)
    assert sample(models, REQUESTS[:1], settings).std() > 0


def test_a_sampler_keeps_the_prediction_type_of_the_model(toy_sd_v: Path) -> None:
    scheduler = load_models(str(toy_sd_v)).scheduler
    assert make_scheduler(scheduler, "dpmsolver++").config.prediction_type == "v_prediction"


def test_the_size_is_in_rows_and_columns(models: Models) -> None:
    settings = SamplingConfig(num_inference_steps=1, height=24, width=40)
    assert sample(models, REQUESTS[:1], settings).shape == (1, 24, 40, 3)


def test_a_picture_that_is_not_finite_is_named(models: Models) -> None:
    latents = torch.zeros(2, 4, 8, 8)
    latents[1, 0, 0, 0] = torch.nan
    with pytest.raises(TisserandError, match="'weft' with seed 0 is not finite"):
        decode(models, latents, REQUESTS[:2])


def test_an_all_black_picture_is_named() -> None:
    pictures = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    pictures[0, 3, 3] = 1
    with pytest.raises(TisserandError, match=r"'weft' with seed 0 is all black \(1 of 2 are\)"):
        require_light(pictures, REQUESTS[:2])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"height": 100}, "--height 100: a multiple of 8 is needed; nearest: 96 or 104"),
        ({"width": 4}, "--width 4: a multiple of 8 is needed; nearest: 8 or 16"),
        ({"num_inference_steps": 0}, "--num_inference_steps 0"),
        ({"guidance_scale": float("nan")}, "--guidance_scale nan"),
        ({"batch_size": 0}, "--batch_size 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**wrong)


def test_a_contact_sheet_holds_the_pictures_row_by_row() -> None:
    images = np.zeros((6, 128, 128, 3), dtype=np.uint8)
    images[:, :, :, 0] = np.arange(1, 7)[:, None, None] * 40
    sheet = np.asarray(contact_sheet(images, 2, 3, labels=["a", "b"], headers=["x", "y", "z"]))
    rows, columns = (134 * np.arange(n) for n in (2, 3))
    found = [sheet[100 + (152 * r), 70 + c, 0] for r in range(len(rows)) for c in columns]
    assert found == [40, 80, 120, 160, 200, 240]


def test_a_contact_sheet_refuses_a_wrong_number_of_pictures() -> None:
    with pytest.raises(ValueError, match="5 pictures do not fill 2 x 3 cells"):
        contact_sheet(np.zeros((5, 8, 8, 3), dtype=np.uint8), 2, 3)
