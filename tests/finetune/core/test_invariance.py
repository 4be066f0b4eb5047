"""Things that must not matter, do not: how a batch is cut, where a run was stopped, whether latents were cached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune.core.data.batches import CaptionedBatches, captioned_batches
from finetune.core.data.latents import CachedLatents, Moments
from finetune.core.learns.trainable import lora_adapters
from finetune.core.loop.loop import train
from finetune.core.loss import denoising_loss
from finetune.core.pictures.images import read_images
from finetune.core.settings.images import ImageFolderConfig, PictureConfig
from finetune.core.settings.methods import LoraConfig
from finetune.core.settings.training import TrainConfig
from finetune.core.start import start_run
from finetune.diffusion.config import NoiseConfig
from finetune.diffusion.denoiser import Denoiser
from finetune.diffusion.models import load_models
from finetune.diffusion.noise import from_scheduler
from finetune.diffusion.text import Conditions

Result = tuple[dict[str, Tensor], list[float]]
TrainToy = Callable[..., Result]


def in_float64(latents: CachedLatents) -> CachedLatents:
    moments = {shape: Moments(one.mean.double(), one.std.double()) for shape, one in latents.moments.items()}
    return dataclasses.replace(latents, moments=moments)


@pytest.fixture
def train_toy(toy_sd: Path, captioned_images: Path, tmp_path: Path) -> TrainToy:
    """Train a toy adapter; return what was learned and the loss of every step."""

    def run_once(
        folder: str = "run",
        *,
        double: bool = False,
        stop_after: int | None = None,
        change: Callable[[CaptionedBatches], CaptionedBatches] = lambda batches: batches,
        snr_gamma: float | None = None,
        **options: object,
    ) -> Result:
        pictures = PictureConfig(caption_dropout=0.2)
        noise = NoiseConfig(noise_offset=0.1)
        settings = {"output_dir": tmp_path / folder, "seed": 0, "report_to": "none", "learning_rate": 1e-2}
        config = TrainConfig(**(settings | {"max_train_steps": 6, "train_batch_size": 4} | options))
        images = read_images(ImageFolderConfig(train_data_dir=(captioned_images,)))
        run = start_run(config, config, num_images=len(images), data_hash="", weights_file="w.safetensors")
        models = load_models(str(toy_sd))
        batches = captioned_batches(images, models, pictures, noise, run)
        learns = lora_adapters(models, LoraConfig(rank=2), learning_rate=1e-2, seed=0)
        if double:
            models.unet.double()
            latents = batches.latents and in_float64(batches.latents)
            batches = dataclasses.replace(
                batches, latents=latents, conditions=Conditions(prompts=batches.conditions.prompts.double())
            )
        loss = partial(denoising_loss, schedule=from_scheduler(models.scheduler.config), snr_gamma=snr_gamma)
        losses = []
        for step in train(run, Denoiser(models.text_encoder, models.unet), learns, change(batches), loss):
            losses.append(float(step.loss))
            if step.number == stop_after:
                break
        run.__exit__()
        return {name: value.detach().clone() for name, value in learns.parameters.items()}, losses

    return run_once


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_four_times_one_is_one_times_four(train_toy: TrainToy, snr_gamma: float | None) -> None:
    """In float64, so that only rounding is left: 1e-9 of weights of about 1."""
    together, first = train_toy("a", double=True, snr_gamma=snr_gamma)
    apart, second = train_toy("b", double=True, snr_gamma=snr_gamma, train_batch_size=1, gradient_accumulation_steps=4)
    assert first == pytest.approx(second, rel=1e-10)
    for name in together:
        torch.testing.assert_close(together[name], apart[name], atol=1e-9, rtol=1e-9)


def test_an_interrupted_run_ends_bitwise_as_the_uninterrupted_one(train_toy: TrainToy) -> None:
    whole, losses = train_toy("whole", checkpointing_steps=2)
    _, before = train_toy("parts", checkpointing_steps=2, stop_after=5)  # stopped one step after a checkpoint
    resumed, after = train_toy("parts", checkpointing_steps=2)
    assert before + after == [*losses[:5], *losses[4:]]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_can_be_repeated_bitwise(train_toy: TrainToy) -> None:
    (first, losses), (second, again) = train_toy("a"), train_toy("b")
    assert losses == again
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_is_another_run(train_toy: TrainToy) -> None:
    assert train_toy("a")[1] != train_toy("b", seed=1)[1]


def test_latents_from_the_cache_train_as_latents_encoded_each_time(train_toy: TrainToy) -> None:
    cached, _ = train_toy("a")
    encoded, _ = train_toy("b", change=lambda batches: dataclasses.replace(batches, latents=None))
    # The VAE sees batches of another size, which moves the last bits of its convolutions.
    for name in cached:
        torch.testing.assert_close(cached[name], encoded[name], atol=2e-3, rtol=0)


def test_gradient_checkpointing_changes_no_result(train_toy: TrainToy) -> None:
    def with_checkpointing(batches: CaptionedBatches) -> CaptionedBatches:
        batches.models.unet.enable_gradient_checkpointing()
        return batches

    plain, _ = train_toy("a", double=True)
    recomputed, _ = train_toy("b", double=True, change=with_checkpointing)
    for name in plain:
        torch.testing.assert_close(plain[name], recomputed[name], atol=1e-9, rtol=1e-9)


def test_two_processes_add_up_to_one(train_toy: TrainToy, toy_sd: Path, captioned_images: Path) -> None:
    """The gradients of two shares, averaged as DDP does, are the gradient of the whole update."""
    kept: list[CaptionedBatches] = []

    def keep(batches: CaptionedBatches) -> CaptionedBatches:
        kept.append(batches)
        return batches

    train_toy("a", max_train_steps=1, double=True, change=keep)
    (alone,) = kept
    models = load_models(str(toy_sd))
    learns = lora_adapters(models, LoraConfig(rank=2), learning_rate=1e-2, seed=0)
    models.unet.double()
    denoiser, parameters = Denoiser(models.text_encoder, models.unet), list(learns.parameters.values())

    def gradient(batches: CaptionedBatches, number: int) -> Tensor:
        update = batches.update(number)
        share = batches.num_processes / update.weight
        schedule = from_scheduler(models.scheduler.config)
        losses = [(denoising_loss(denoiser, one, schedule=schedule) * one.weights).sum() for one in update.batches]
        return torch.cat([g.flatten() for g in torch.autograd.grad(sum(losses) * share, parameters)])

    settings = dataclasses.replace(alone.train, train_batch_size=2)
    for number in (0, 2):  # a full update, and the short one at the end of the epoch
        halves = [
            gradient(dataclasses.replace(alone, train=settings, num_processes=2, process_index=rank), number)
            for rank in (0, 1)
        ]
        torch.testing.assert_close((halves[0] + halves[1]) / 2, gradient(alone, number), atol=1e-12, rtol=1e-9)
