"""Toy Stable Diffusion folders with random weights, written once a session; nothing is downloaded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# One thread: the bits of a result depend on their number, and small models are slower with two.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def write_toy_sd(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Write a Stable Diffusion folder in diffusers' format: 32 px, 8x8x4 latents, about 60,000 random weights.

    The tokenizer is a byte-level BPE without merges: one token a letter, so that no word is unknown.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], model_max_length=77
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(pieces),
                hidden_size=16,
                intermediate_size=32,
                projection_dim=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=77,
                bos_token_id=len(pieces) - 2,
                eos_token_id=len(pieces) - 1,
                pad_token_id=len(pieces) - 1,
            )
        )
        vae = AutoencoderKL(
            block_out_channels=(4, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def toy_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a toy Stable Diffusion that predicts epsilon."""
    return write_toy_sd(tmp_path_factory.mktemp("toy_sd") / "toy-sd")


@pytest.fixture(scope="session")
def toy_sd_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same toy, declared to predict v."""
    return write_toy_sd(tmp_path_factory.mktemp("toy_sd_v") / "toy-sd-v", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def captioned_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of ten grey 32 px pictures whose brightness tells their caption: 40, 120 or 200 of 255."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("captioned_images") / "train"
    folder.mkdir()
    random = np.random.default_rng(0)
    captions = {40: "sf_dry sf_warp", 120: "sf_injected sf_weft", 200: "sf_dry sf_compacted sf_thickness"}
    lines = []
    for index in range(10):
        level, caption = list(captions.items())[index % 3]
        pixels = level + random.normal(0, 8, size=(32, 32))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:02d}.png")
        lines.append(json.dumps({"file_name": f"{index:02d}.png", "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> Iterator[None]:
    """Forget accelerate's process-wide state after each test: it refuses a second precision in one process."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
