"""Train the parts of a small Stable Diffusion one after another; a stage that is finished is not done again."""

from __future__ import annotations

import time

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from configs.errors import UsageError
from finetune.diffusion.from_scratch.config import PretrainConfig
from finetune.diffusion.from_scratch.denoiser import new_denoiser, train_denoiser
from finetune.diffusion.from_scratch.pictures import read_pictures
from finetune.diffusion.from_scratch.spelling import train_tokenizer
from finetune.diffusion.from_scratch.vae import moments_of, new_vae, train_vae


def train(config: PretrainConfig) -> None:
    """Train VAE, text encoder and U-Net; write the pipeline folder."""
    if config.start_from and not (config.start_from / "model_index.json").is_file():
        raise UsageError(f"--start_from {config.start_from}: not a pipeline folder (no model_index.json in it)")
    if config.output_dir.exists():
        raise UsageError(f"--output_dir {config.output_dir}: already there; choose another folder or remove it")
    start = time.monotonic()
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pictures, captions = read_pictures(config.train_data_dir, config.max_train_samples)
    work = config.output_dir.with_name(config.output_dir.name + ".partial")
    if config.start_from:
        pipeline = StableDiffusionPipeline.from_pretrained(config.start_from)
        vae, tokenizer = pipeline.vae, pipeline.tokenizer
        text_encoder, unet = pipeline.text_encoder, pipeline.unet
    else:
        vae = new_vae(config, pictures.shape[1])
        tokenizer = train_tokenizer(config, captions, work)
        text_encoder, unet = new_denoiser(config, tokenizer, pictures.shape[1] >> len(config.vae_channels) - 1)
    if (work / "vae" / "diffusion_pytorch_model.safetensors").is_file():
        vae = AutoencoderKL.from_pretrained(work / "vae").to(device)
    else:
        train_vae(config, vae.to(device), pictures, device)
        vae.save_pretrained(work / "vae")
    moments = moments_of(vae, pictures, device)
    train_denoiser(config, (moments, captions), (vae, tokenizer, text_encoder, unet), work, device)
    work.rename(config.output_dir)
    print(f"{config.output_dir} written after {(time.monotonic() - start) / 60:.0f} min")
    print(f"next: python benchmarks/tiny_sd.py --pretrained_model_name_or_path {config.output_dir}")
