"""What users load, each file with its provenance: in its own metadata, and in provenance.json beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from finetune.core.models import LORA_FILE, PROVENANCE_KEY, Models
from finetune.core.run import PROVENANCE
from finetune.core.trainable import ADAPTER


def save_lora(folder: Path, models: Models, provenance: dict[str, Any]) -> Path:
    """Write ``pytorch_lora_weights.safetensors`` so that a stock pipeline gives the pixels of the trained model.

    ``pipeline.load_lora_weights(folder)`` reads it. Two things that are easily lost are kept. peft's own names are
    written: renamed to diffusers' older ones, as its example scripts do, only the attention layers are translated back,
    and beside ResNet layers they are dropped without a word. And peft's config goes into the metadata where diffusers
    looks for it: without it alpha is taken to be the rank.

    Returns:
        the path of the file; it appears when it is whole.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(models.unet, adapter_name=ADAPTER)
    tensors = {f"unet.{name}": value.detach().to("cpu", torch.float32).contiguous() for name, value in state.items()}
    config = {
        name: sorted(value) if isinstance(value, set) else value for name, value in _adapter_config(models).items()
    }
    metadata = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps(
            {f"unet.{name}": value for name, value in config.items()}, sort_keys=True
        ),
        PROVENANCE_KEY: json.dumps(provenance, sort_keys=True),
    }
    partial = folder / f"{LORA_FILE}.{os.getpid()}.partial"
    partial.write_bytes(_with_sorted_header(save(tensors, metadata=metadata)))
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return partial.replace(folder / LORA_FILE)


def _adapter_config(models: Models) -> dict[str, Any]:
    """Return peft's description of the adapter, without what only says where it came from."""
    config = models.unet.peft_config[ADAPTER].to_dict()
    return {name: value for name, value in config.items() if name not in ("base_model_name_or_path", "revision")}


def _with_sorted_header(data: bytes) -> bytes:
    """Return a safetensors file with its header in a fixed order.

    The library writes the metadata in an order that changes from process to process, so that equal weights would give
    different files.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
