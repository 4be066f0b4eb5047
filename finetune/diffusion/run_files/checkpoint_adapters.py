"""What a run had learned at a checkpoint, as the files that it would have left if it had ended there.

A checkpoint holds parameters under their names in the model; the run's ``config.yaml`` beside it says what they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import InputError
from data_prep.folders.run_folder import CONFIG, EMBEDDINGS_FILE, LORA_FILE, PROVENANCE, PROVENANCE_KEY

LEARNED, AVERAGES = "learned.safetensors", "averages.safetensors"
"""What learns, and its running averages, in a checkpoint; with averages it is those that users get."""
ROWS = "token_rows"
"""Name of a new word's rows in a checkpoint."""
_PART = re.compile(r"(unet|text_encoder)\.(.+)\.(lora_[AB]|lora_magnitude_vector)\.[^.]+\.weight")


def weights_of(checkpoint: Path) -> Path | None:
    """Return the file of a checkpoint folder whose weights count, or None if it is no checkpoint."""
    if not re.fullmatch(r"checkpoint-\d+", checkpoint.name) or not (checkpoint / LEARNED).is_file():
        return None
    return checkpoint / AVERAGES if (checkpoint / AVERAGES).is_file() else checkpoint / LEARNED


def write_adapters(weights: Path, folder: Path) -> list[Path]:
    """Write what a checkpoint holds as a run leaves it: the rows of a word, a LoRA, or both.

    Args:
        weights: file of the checkpoint, from ``weights_of``.
        folder: where the files are written.

    Raises:
        InputError: the run's settings are not beside it, or it holds whole weights instead of an adapter.
    """
    checkpoint = weights.parent
    settings, provenance = _told(checkpoint)
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise InputError(f"--adapter {checkpoint}: the checkpoint is damaged ({error}); take an older one") from None
    rows = tensors.pop(ROWS, None)
    parts = {name: _PART.fullmatch(name) for name in tensors}
    if not all(parts.values()):
        step = checkpoint.name.removeprefix("checkpoint-")
        raise InputError(
            f"--adapter {checkpoint}: is a checkpoint of full fine-tuning, which is no adapter; make a pipeline of it "
            f"by the run's command with --resume_from_checkpoint {checkpoint} --max_train_steps {step} and another "
            "--output_dir, and give that as --pretrained_model_name_or_path"
        )
    metadata = {"format": "pt", PROVENANCE_KEY: json.dumps(provenance, sort_keys=True)}
    files = []
    if rows is not None:
        files.append(folder / EMBEDDINGS_FILE)
        save_file({str(settings["placeholder_token"]): rows}, files[-1], metadata)
    if tensors:
        layers = {name: (part[1], part[2], part[3]) for name, part in parts.items() if part}
        named = {_name(*layers[name]): value for name, value in tensors.items()}
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(_configs(layers, tensors, settings), sort_keys=True)
        files.append(folder / LORA_FILE)
        save_file(named, files[-1], metadata)
    return files


def _told(checkpoint: Path) -> tuple[dict[str, Any], dict[str, object]]:
    """Return the settings of the run, and what its weights would say of their training."""
    run = checkpoint.parent
    try:
        settings = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"--adapter {checkpoint}: needs {run / CONFIG}; leave the checkpoint in its run folder")
    try:
        provenance = json.loads((run / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the run has not ended yet
        provenance = {}
        if settings.get("prediction_type"):
            names = ("prediction_type", "rescale_betas_zero_snr")
            provenance["scheduler"] = {name: settings.get(name) for name in names}
        if isinstance(settings.get("resolution"), int):
            provenance |= {"height": settings["resolution"], "width": settings["resolution"]}
    return settings, provenance | {"steps": int(checkpoint.name.removeprefix("checkpoint-"))}


def _name(part: str, layer: str, kind: str) -> str:
    """Return the name of a LoRA's tensor as a run saves it, which is as diffusers reads it."""
    if part == "text_encoder" and not layer.startswith("text_model."):
        layer = f"text_model.{layer}"  # a level that newer transformers have dropped
    dropped = part == "unet" and kind == "lora_magnitude_vector"
    return f"{part}.{layer}.{kind}" + ("" if dropped else ".weight")


def _configs(
    layers: Mapping[str, tuple[str, str, str]], tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return peft's description of the LoRA on each part, layer by layer: its rank from its tensors, its alpha."""
    rank = int(settings["rank"])
    alpha = float(settings.get("lora_alpha") or rank)
    resnet_alpha = settings.get("resnet_alpha") or alpha * (settings.get("resnet_rank") or rank) / rank
    configs: dict[str, Any] = {}
    for part in sorted({part for part, _, _ in layers.values()}):
        ranks = {
            layer: tensors[name].shape[0]
            for name, (own, layer, kind) in sorted(layers.items())
            if own == part and kind == "lora_A"
        }
        alphas = {layer: float(resnet_alpha) if ".resnets." in layer else alpha for layer in ranks}
        described = {
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "target_modules": list(ranks),
            "rank_pattern": {layer: own for layer, own in ranks.items() if own != rank},
            "alpha_pattern": {layer: own for layer, own in alphas.items() if own != alpha},
            "use_dora": bool(settings.get("use_dora")),
        }
        configs |= {f"{part}.{key}": value for key, value in described.items()}
    return configs
