"""The autoencoder: built, trained, and what it makes of the pictures."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import trange

from finetune.diffusion.from_scratch.config import PretrainConfig


def new_vae(config: PretrainConfig, size: int) -> AutoencoderKL:
    """Autoencoder with random weights, a small relative of Stable Diffusion's."""
    levels = len(config.vae_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=config.vae_channels,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=16,
        sample_size=size,
    )


def train_vae(config: PretrainConfig, vae: AutoencoderKL, pictures: NDArray[np.uint8], device: torch.device) -> None:
    """Train the autoencoder in place on smooth L1 reconstruction and a light KL; a new one gets its scaling factor."""
    import numpy as np

    vae.train()
    size = pictures.shape[1]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.vae_learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.vae_learning_rate, total_steps=max(1, config.vae_steps)
    )
    random = np.random.default_rng((config.seed, 1))
    bar = trange(config.vae_steps, desc="vae", disable=None)
    for step in bar:
        is_whole = step >= config.vae_steps * 3 // 4
        side, batch = (size, config.vae_batch_size // 4) if is_whole else (size // 2, config.vae_batch_size)
        chosen, (top, left) = random.integers(len(pictures), size=batch), random.integers(size - side + 1, size=2)
        pixels = _pixels(pictures[chosen, top : top + side, left : left + side], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = functional.smooth_l1_loss(decoded.float(), pixels, beta=0.1)
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        (error + config.kl_weight * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 100 == 0:
            bar.set_postfix(error=f"{error.item():.4f}", kl=f"{divergence.item():.2f}")
            print(f"vae step {step}: error {error.item():.4f}, kl {divergence.item():.2f}", flush=True)
    vae.eval()
    if config.start_from is None:
        sample = moments_of(vae, pictures[:1000], device)
        spread = (sample[:, 0].var() + sample[:, 1].square().mean()).sqrt().item()
        vae.register_to_config(scaling_factor=round(1.0 / spread, 5))


def moments_of(vae: AutoencoderKL, pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Encode to posterior mean and standard deviation, unscaled: (N, 2, 4, h, w) float32 on the CPU."""
    parts = []
    with torch.inference_mode():
        for start in trange(0, len(pictures), 64, desc="encoding", disable=None):
            posterior = vae.encode(_pixels(pictures[start : start + 64], device)).latent_dist
            parts.append(torch.stack([posterior.mean, posterior.std], dim=1).cpu())
    return torch.cat(parts).clone()


def _pixels(pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
