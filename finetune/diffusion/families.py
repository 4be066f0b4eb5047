"""Families of latent diffusion models: what differs between them, and which one a model folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one family of models has of its own.

    Attributes:
        pipeline: diffusers' class that samples from noise.
        img2img: diffusers' class that samples from a picture.
        parts: subfolders of a model, whose contents name it.
        text_encoder_layers: names of the layers of the text encoder that carry adapters.
        kohya_prefixes: of the names of layers, by their part in diffusers' layout.
    """

    pipeline: str
    img2img: str
    parts: tuple[str, ...]
    text_encoder_layers: tuple[str, ...]
    kohya_prefixes: Mapping[str, str]


STABLE_DIFFUSION = Family(
    pipeline="StableDiffusionPipeline",
    img2img="StableDiffusionImg2ImgPipeline",
    parts=("scheduler", "text_encoder", "tokenizer", "unet", "vae"),
    text_encoder_layers=("q_proj", "k_proj", "v_proj", "out_proj"),
    kohya_prefixes={"unet.": "lora_unet_", "text_encoder.": "lora_te_"},
)
"""Stable Diffusion 1.x and 2.x."""

_OTHERS = {"StableDiffusionXL": "Stable Diffusion XL", "StableDiffusion3": "Stable Diffusion 3", "Flux": "Flux"}
"""Beginnings of the names of pipelines of families that are not read."""


def check_family(folder: Path) -> None:
    """Refuse a model folder of another family, by the name of its pipeline in ``model_index.json``.

    Raises:
        UsageError: naming the family.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--pretrained_model_name_or_path {folder}: its model_index.json is not readable ({error})"
        ) from error
    name = str(index.get("_class_name", "")) if isinstance(index, dict) else ""
    for beginning, family in _OTHERS.items():
        if name.startswith(beginning):
            raise UsageError(
                f"--pretrained_model_name_or_path {folder}: is a {family} ({name}); give a Stable Diffusion 1.x or 2.x"
            )
