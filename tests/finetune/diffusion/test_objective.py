"""The objective against a naive loop over images, for every combination of its options."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from finetune.core.loss import denoising_loss
from finetune.core.run import Batch
from finetune.diffusion.denoiser import Denoiser
from finetune.diffusion.models import load_models
from finetune.diffusion.noise import NoiseSchedule, from_scheduler
from finetune.diffusion.objective import min_snr_weight
from finetune.diffusion.text import Conditions, encode_prompts


def make_batch(size: int, timesteps: list[int], prompts: Tensor, dtype: torch.dtype = torch.float64) -> Batch:
    latents, noise = torch.randn(2, size, 4, 8, 8, generator=torch.Generator().manual_seed(size)).to(dtype)
    return Batch(
        latents=latents,
        noise=noise,
        input_noise=noise,
        timesteps=torch.tensor(timesteps),
        conditions=Conditions(prompts=prompts.to(dtype)),
        weights=torch.ones(size),
        names=tuple(f"{index}.png" for index in range(size)),
        positions=tuple(range(size)),
    )


def naive_loss(denoiser: nn.Module, batch: Batch, scheduler: DDPMScheduler, gamma: float | None) -> list[float]:
    """One image at a time, by diffusers' scheduler and the papers' formulas in plain numbers."""
    losses = []
    for index in range(len(batch.names)):
        step = batch.timesteps[index : index + 1]
        latents, noise = batch.latents[index : index + 1], batch.noise[index : index + 1]
        alpha = float(scheduler.alphas_cumprod[step])
        noisy = scheduler.add_noise(latents, noise, step)
        is_v = scheduler.config.prediction_type == "v_prediction"
        wanted = scheduler.get_velocity(latents, noise, step) if is_v else noise
        prediction = denoiser(noisy, step, batch.conditions.prompts[index : index + 1])
        loss = float(((prediction - wanted) ** 2).mean())
        if gamma is not None:
            snr = alpha / (1 - alpha)
            loss *= min(snr, gamma) / (snr + 1 if is_v else snr)
        losses.append(loss)
    return losses


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("gamma", [None, 1.0, 5.0])
@pytest.mark.parametrize(
    "options",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ],
    ids=["epsilon", "v", "v-zero-terminal"],
)
@torch.no_grad()
def test_loss_equals_a_naive_loop_over_images(
    toy_sd: Path, options: dict[str, object], gamma: float | None, size: int
) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **options)
    models = load_models(str(toy_sd), dtype=torch.float64)
    prompts = encode_prompts(models, ["sf_dry", "sf_injected", "", "sf_warp", "sf_weft"][:size])
    batch = make_batch(size, [999, 0, 500, 20, 250][:size], prompts)
    denoiser = Denoiser(models.text_encoder, models.unet)
    loss = denoising_loss(denoiser, batch, schedule=from_scheduler(scheduler.config), snr_gamma=gamma)
    expected = torch.tensor(naive_loss(denoiser, batch, scheduler, gamma), dtype=torch.float64)
    # diffusers holds alphas_cumprod in float32 and takes its roots there.
    torch.testing.assert_close(loss, expected, atol=0, rtol=5e-6)


@pytest.mark.parametrize(
    ("kind", "snr", "expected"),
    [
        ("epsilon", 20.0, 0.25),  # 5 / 20
        ("epsilon", 5.0, 1.0),
        ("epsilon", 0.5, 1.0),
        ("v_prediction", 20.0, 5 / 21),
        ("v_prediction", 5.0, 5 / 6),
        ("v_prediction", 0.5, 1 / 3),
    ],
)
def test_min_snr_weight_is_the_papers(kind: str, snr: float, expected: float) -> None:
    schedule = NoiseSchedule(torch.tensor([snr / (1 + snr)], dtype=torch.float64), kind)
    assert math.isclose(float(min_snr_weight(schedule, torch.tensor([0]), 5.0)), expected, rel_tol=1e-12)


@pytest.mark.parametrize(("kind", "expected"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_weight_is_finite_where_no_signal_is_left(kind: str, expected: float) -> None:
    schedule = NoiseSchedule(torch.tensor([0.5, 0.0], dtype=torch.float64), kind)
    assert float(min_snr_weight(schedule, torch.tensor([1]), 5.0)) == expected


def test_perturbed_input_keeps_its_target() -> None:
    class Echo(nn.Module):
        def forward(self, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
            return noisy

    scheduler = DDPMScheduler()
    batch = make_batch(3, [10, 500, 999], torch.zeros(3, 77, 16))
    more = torch.randn(batch.noise.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    batch = dataclasses.replace(batch, input_noise=batch.noise + 0.1 * more)
    loss = denoising_loss(Echo(), batch, schedule=from_scheduler(scheduler.config))
    noisy = scheduler.add_noise(batch.latents, batch.noise + 0.1 * more, batch.timesteps)
    # diffusers holds alphas_cumprod in float32 and takes its roots there.
    torch.testing.assert_close(loss, (noisy - batch.noise).square().mean((1, 2, 3)), atol=0, rtol=5e-6)


def test_a_perfect_prediction_costs_nothing() -> None:
    class Oracle(nn.Module):
        def forward(self, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
            return batch.noise

    batch = make_batch(3, [1, 2, 3], torch.zeros(3, 77, 16))
    loss = denoising_loss(Oracle(), batch, schedule=from_scheduler(DDPMScheduler().config), snr_gamma=5.0)
    assert loss.tolist() == [0.0, 0.0, 0.0]


def test_token_ids_are_read_by_the_text_encoder(toy_sd: Path) -> None:
    models = load_models(str(toy_sd))
    denoiser = Denoiser(models.text_encoder, models.unet)
    latents, timesteps = torch.zeros(1, 4, 8, 8), torch.tensor([10])
    ids = torch.tensor(models.tokenizer(["sf_dry"], padding="max_length").input_ids)
    with torch.no_grad():
        from_ids = denoiser(latents, timesteps, ids)
        from_embeds = denoiser(latents, timesteps, encode_prompts(models, ["sf_dry"]))
    assert torch.equal(from_ids, from_embeds)
