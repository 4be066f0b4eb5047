"""Train a small Stable Diffusion from scratch; made assets/tiny-sd.

    python -m data_prep.shapes --num_images 48000 --output_dir data/shapes
    python finetune/pretrain.py --config configs/pretrain_tiny.yaml

Learns  the VAE first; then, with its latents, text encoder and U-Net together from random weights.
Batch   captioned square pictures of one size.
Saves   a pipeline folder (averaged weights), loaded by StableDiffusionPipeline.from_pretrained.

The tokenizer is a byte-level BPE in CLIP's layout, learned from the captions: it spells any text with known pieces. A
share of the captions is split at random into smaller pieces (BPE dropout, Provilkov et al. 2020), so that the encoder
also learns to read letters, which is all it will see of a new word.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Settings of ``finetune/pretrain.py``."""

    train_data_dir: Path
    """Folder with metadata.jsonl (file_name, text) and square pictures of one size."""
    output_dir: Path
    """Pipeline folder to write; it must not exist. `<output_dir>.partial` keeps finished stages."""
    start_from: Path | None = None
    """Pipeline folder to go on from: all its weights learn on; the tokenizer and the VAE's scaling factor stay."""
    max_train_samples: int | None = None
    """Use the first so many pictures; None for all."""
    seed: int = 0
    """Seed of weights and draws."""
    vae_channels: tuple[int, ...] = (32, 64, 96)
    """Channels per VAE level; every level but the last halves the size."""
    vae_steps: int = 2400
    """Updates of the VAE; the first 3/4 on random quarter crops, which cost a quarter and hold the same detail. 0 keeps
    the VAE of `start_from` as it is."""
    vae_batch_size: int = 32
    """Crops per VAE update; a quarter of it once the pictures are whole."""
    vae_learning_rate: float = 2e-3
    """Peak of the VAE's one-cycle rate."""
    kl_weight: float = 3e-4
    """Weight of the mean KL term against the mean smooth L1 reconstruction error."""
    unet_channels: tuple[int, ...] = (64, 128, 128)
    """Channels per U-Net level; cross-attention on all but the deepest."""
    text_width: int = 128
    """Width of the text encoder."""
    text_layers: int = 3
    """Layers of the text encoder."""
    vocab_size: int = 1024
    """Pieces of the tokenizer, 514 of them bytes and markers."""
    max_train_steps: int = 5000
    """Updates of text encoder and U-Net."""
    train_batch_size: int = 32
    """Pictures per update."""
    learning_rate: float = 1e-3
    """Peak of the one-cycle rate."""
    snr_gamma: float = 5.0
    """Largest weight on the error of the clean latents (min-SNR, Hang et al. 2023)."""
    snr_floor: float = 0.0
    """Least weight on it: 1 is the truncated SNR of Salimans & Ho 2022; 0 leaves it out."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    spelling_dropout: float = 0.15
    """Share of captions split at random into smaller pieces."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, with diffusers' warm-up."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Autocast on the CPU or GPU; weights stay float32."""
    save_steps: int = 500
    """Write the averaged pipeline to `<output_dir>.partial` every so many updates, to look at it."""
