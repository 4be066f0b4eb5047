"""Stable Diffusion folders with random weights, and woven pictures: what speed is measured on, nothing downloaded.

    python benchmarks/random_sd.py --size reduced --output_dir /tmp/reduced

Speed does not depend on the values of the weights. ``sd15`` and ``sd21`` have the published sizes; ``reduced`` has a
quarter of SD 1.5's widths and 256 px pictures, so that a CPU can train it: its VAE encodes at 1.36 times the operations
of its U-Net's forward pass (SD 1.5 at 512 px: 1.39), its text encoder reads at 2 % of them, and its embedding table has
all 49,408 rows. ``grain`` takes next to no time, so that what is around the model shows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from configs.errors import UsageError
from configs.load import command

if TYPE_CHECKING:
    from torch import nn

NUM_TOKENS = 49_408
CAPTIONS = ("sf_dry sf_warp", "sf_dry sf_compacted sf_thickness", "sf_injected sf_weft")


@dataclass(frozen=True, kw_only=True)
class Size:
    """The configs of one model; what is not said is diffusers' default, which is that of SD 1.5.

    Attributes:
        resolution: of the pictures it is measured with, px.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    resolution: int


_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SIZES = {
    "grain": Size(
        unet={
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            "cross_attention_dim": 16,
            "sample_size": 8,
        },
        vae={
            "block_out_channels": (4, 8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 32,
        },
        text={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        resolution=32,
    ),
    "reduced": Size(
        unet={
            "block_out_channels": (80, 160, 320, 320),
            "cross_attention_dim": 192,
            "attention_head_dim": 2,  # heads, each as wide as those of SD 1.5
            "norm_num_groups": 16,
            "sample_size": 32,
        },
        vae=_VAE | {"block_out_channels": (32, 64, 128, 128), "sample_size": 256},
        text={"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 3},
        resolution=256,
    ),
    "sd15": Size(
        unet={"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
        vae=_VAE | {"sample_size": 512},
        text={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        resolution=512,
    ),
    "sd21": Size(
        unet={
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
            "sample_size": 64,
        },
        vae=_VAE | {"sample_size": 512},
        text={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
        resolution=512,
    ),
}


@dataclass(frozen=True, kw_only=True)
class RandomConfig:
    """Settings of ``benchmarks/random_sd.py``."""

    size: Literal["grain", "reduced", "sd15", "sd21"] = "reduced"
    """Which sizes."""
    output_dir: Path
    """Folder to write, in diffusers' format."""


def main(config: RandomConfig) -> None:
    """Write the folder."""
    if config.output_dir.exists():
        raise UsageError(f"--output_dir {config.output_dir}: exists; name a new folder")
    write_model(config.output_dir, config.size)
    print(f"{config.output_dir}: {config.size}, random weights")


def make_parts(size: str) -> dict[str, nn.Module]:
    """Return U-Net, VAE and text encoder with random weights, on the default device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = SIZES[size]
    last = {"bos_token_id": NUM_TOKENS - 2, "eos_token_id": NUM_TOKENS - 1, "pad_token_id": NUM_TOKENS - 1}
    return {
        "unet": UNet2DConditionModel(**sizes.unet),
        "vae": AutoencoderKL(**sizes.vae),
        "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=NUM_TOKENS, **sizes.text, **last)),
    }


def write_model(folder: Path, size: str) -> None:
    """Write a pipeline folder in float32, the weights drawn with one seed.

    The tokenizer is a byte-level BPE without merges, one token a letter, filled up to the published number of tokens.
    """
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    pieces += [f"filler{number}</w>" for number in range(NUM_TOKENS - len(pieces) - 2)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = make_parts(size)
    StableDiffusionPipeline(
        **parts,
        tokenizer=CLIPTokenizer(
            vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], model_max_length=77
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)


def write_pictures(folder: Path, count: int, side: int) -> None:
    """Write grey woven tiles with captions to ``captioned``, and the same without captions to ``plain``."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:side, 0:side] / side
    lines = []
    for part in ("captioned", "plain"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        kind = number % len(CAPTIONS)
        threads = random.uniform(6, 12, 2)
        waves = np.sin(2 * np.pi * threads[0] * rows) * np.sin(2 * np.pi * threads[1] * columns)
        grey = 70 + 50 * kind + 40 * waves + random.normal(0, 10, (side, side))
        picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        for part in ("captioned", "plain"):
            picture.save(folder / part / f"{number:05d}.png", compress_level=1)
        lines.append(json.dumps({"file_name": f"{number:05d}.png", "text": CAPTIONS[kind]}) + "\n")
    (folder / "captioned" / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    command(RandomConfig, main)
