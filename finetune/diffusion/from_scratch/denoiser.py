"""Text encoder and U-Net: built with random weights and trained together."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor
from tqdm import trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from finetune.diffusion.from_scratch.config import PretrainConfig
from finetune.diffusion.from_scratch.spelling import CONTEXT_LENGTH, SPELLINGS, spell


def new_denoiser(
    config: PretrainConfig, tokenizer: CLIPTokenizer, latent_size: int
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Text encoder and U-Net with random weights, small relatives of Stable Diffusion 1.5's."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            projection_dim=config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    crossing = len(config.unet_channels) - 1
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=4,
        out_channels=4,
        block_out_channels=config.unet_channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * crossing + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossing,
        cross_attention_dim=config.text_width,
        attention_head_dim=tuple(channels // 32 for channels in config.unet_channels),
        norm_num_groups=16,
    )
    return text_encoder, unet


def train_denoiser(
    config: PretrainConfig,
    data: tuple[Tensor, list[str]],
    parts: tuple[AutoencoderKL, CLIPTokenizer, CLIPTextModel, UNet2DConditionModel],
    work: Path,
    device: torch.device,
) -> None:
    """Train text encoder and U-Net on epsilon with min-SNR weights; leave the averaged pipeline in ``work``."""
    moments, captions = data
    vae, tokenizer, text_encoder, unet = parts
    text_encoder.to(device).train()
    unet.to(device).train()
    noise_schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    scheduler = DDPMScheduler(**noise_schedule)
    sampler = DDIMScheduler(**noise_schedule, set_alpha_to_one=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae,
        text_encoder,
        tokenizer,
        unet,
        sampler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

    unique = sorted(set(captions))
    number = {caption: index for index, caption in enumerate(unique)}
    which = torch.tensor([number[caption] for caption in captions])
    spellings = spell(tokenizer, [*unique, ""], np.random.default_rng((config.seed, 3)))
    empty = len(unique)

    weights = [*text_encoder.parameters(), *unet.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.max_train_steps, pct_start=0.05
    )
    average = EMAModel(weights, decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    random = torch.Generator().manual_seed(config.seed + 2)
    batch, start = config.train_batch_size, time.monotonic()
    running = 0.0
    for step in trange(1, config.max_train_steps + 1, desc="denoiser", disable=None):
        chosen = torch.randint(len(moments), (batch,), generator=random)
        mean, spread = moments[chosen].to(device).unbind(1)
        latents = mean + spread * torch.randn(mean.shape, generator=random).to(device)
        latents = latents * vae.config.scaling_factor
        noise = torch.randn(mean.shape, generator=random).to(device)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=random)
        caption = which[chosen].masked_fill(torch.rand(batch, generator=random) < config.caption_dropout, empty)
        spelling = torch.randint(1, SPELLINGS + 1, (batch,), generator=random)
        spelling = spelling.masked_fill(torch.rand(batch, generator=random) >= config.spelling_dropout, 0)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            embeds = text_encoder(spellings[caption, spelling].to(device))[0]
            noisy = scheduler.add_noise(latents, noise, timesteps.to(device))
            prediction = unet(noisy, timesteps.to(device), embeds).sample
        snr = compute_snr(scheduler, timesteps.to(device))
        weight = snr.clamp(config.snr_floor, config.snr_gamma) / snr  # of the epsilon error
        loss = (weight * (prediction.float() - noise).square().mean(dim=(1, 2, 3))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate.step()
        average.step(weights)
        running += loss.item()
        if step % 100 == 0:
            print(f"denoiser step {step}: loss {running / 100:.4f}, {time.monotonic() - start:.0f} s", flush=True)
            running = 0.0
        if step % config.save_steps == 0 or step == config.max_train_steps:
            average.store(weights)
            average.copy_to(weights)
            pipeline.save_pretrained(work, safe_serialization=True)
            average.restore(weights)
