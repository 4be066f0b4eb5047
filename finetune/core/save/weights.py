"""What users load, each file with its provenance: in its own metadata, and in provenance.json beside it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from data_prep.folders.publish import write_whole
from data_prep.folders.run_folder import (
    EMBEDDINGS_FILE,
    LORA_FILE,
    PIPELINE_FILE,
    PIPELINE_PARTS,
    PROVENANCE,
    PROVENANCE_KEY,
)
from finetune.core.learns.averages import Averages
from finetune.core.learns.trainable import ADAPTER
from finetune.core.learns.words import NewWord
from finetune.core.run import Run
from finetune.diffusion.models import Models, as_pipeline


def save_pipeline(folder: Path, models: Models, provenance: dict[str, Any], *, with_text_encoder: bool = True) -> Path:
    """Write a pipeline into the run folder, for ``StableDiffusionPipeline.from_pretrained(folder)``.

    Its scheduler is the one that was trained; all weights are written in the precision they are held in. Without its
    text encoder it has to be given one when it is loaded.

    Returns:
        the folder; its ``model_index.json`` appears when all the rest is whole.
    """
    partial = folder / "pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pipeline = as_pipeline(models)
        if not with_text_encoder:
            pipeline.register_modules(text_encoder=None)
        pipeline.save_pretrained(partial, safe_serialization=True)
        (folder / PIPELINE_FILE).unlink(missing_ok=True)
        for part in PIPELINE_PARTS:
            if (folder / part).exists():
                shutil.rmtree(folder / part)
            if (partial / part).exists():
                (partial / part).rename(folder / part)
        _write_provenance(folder, provenance)
        (partial / PIPELINE_FILE).rename(folder / PIPELINE_FILE)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


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

    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for name, module in (("unet", models.unet), ("text_encoder", models.text_encoder)):
        if ADAPTER in getattr(module, "peft_config", {}):
            tensors |= {f"{name}.{key}": value for key, value in _adapter_tensors(module).items()}
            configs |= {f"{name}.{key}": value for key, value in _adapter_config(module).items()}
    metadata = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps(configs, sort_keys=True),
        PROVENANCE_KEY: json.dumps(provenance, sort_keys=True),
    }
    _write_provenance(folder, provenance)
    return write_tensors(folder / LORA_FILE, tensors, metadata)


def save_embeddings(folder: Path, word: NewWord, provenance: dict[str, Any], name: str = EMBEDDINGS_FILE) -> Path:
    """Write the rows of a new word, for ``pipeline.load_textual_inversion(folder)``; other programs read it as it is.

    Returns:
        the path of the file; it appears when it is whole.
    """
    if name == EMBEDDINGS_FILE:
        _write_provenance(folder, provenance)
    metadata = {"format": "pt", PROVENANCE_KEY: json.dumps(provenance, sort_keys=True)}
    return write_tensors(folder / name, {word.placeholder: word.rows.contiguous()}, metadata)


def copies_of(folder: Path) -> tuple[str, ...]:
    """Return the names of the copies that ``WordCopies`` left in a run folder."""
    return tuple(path.name for path in folder.glob("learned_embeds-steps-*.safetensors"))


@dataclass(frozen=True)
class WordCopies:
    """Copies of the rows of a word as they learn, ``learned_embeds-steps-N.safetensors``: an observer of the run.

    Attributes:
        every: steps between copies.
        run: whose folder they go to.
        word: whose rows.
        averages: of the rows; they are what is copied, where they are kept.
        provenance: of the run, but for the steps done.
    """

    every: int
    run: Run
    word: NewWord
    averages: Averages
    provenance: Callable[[], dict[str, Any]]

    def look(self, step: int, *, is_last: bool) -> bool:
        """Write a copy, if one is due after this step; never end the run."""
        if self.run.is_main and step and step % self.every == 0:
            name = f"learned_embeds-steps-{step}.safetensors"
            with self.averages.in_place():
                save_embeddings(self.run.folder, self.word, self.provenance() | {"steps": step}, name)
        return False


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write a safetensors file; equal content gives equal bytes, and the file appears when it is whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(_with_sorted_header(save(tensors, metadata=metadata)))
        return partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    """Write ``provenance.json``."""
    write_whole(folder / PROVENANCE, json.dumps(provenance, indent=2, sort_keys=True) + "\n")


def _adapter_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return an adapter's tensors under the names diffusers reads, float32, on the CPU."""
    from peft import get_peft_model_state_dict
    from transformers import PreTrainedModel

    state = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    # Newer transformers have dropped this level of the text encoder; diffusers reads names with it everywhere.
    level = "text_model." if isinstance(module, PreTrainedModel) and not hasattr(module, "text_model") else ""
    if isinstance(module, PreTrainedModel):
        # transformers leaves DoRA's lengths out, without a word, if they lack the last part of their own name.
        state = {key + ".weight" * key.endswith("lora_magnitude_vector"): value for key, value in state.items()}
    return {level + key: value.detach().to("cpu", torch.float32).contiguous() for key, value in state.items()}


def _adapter_config(module: nn.Module) -> dict[str, Any]:
    """Return peft's description of an adapter, without what only says where it came from."""
    config: dict[str, Any] = module.peft_config[ADAPTER].to_dict()  # type: ignore[index, union-attr]
    kept = {name: value for name, value in config.items() if name not in ("base_model_name_or_path", "revision")}
    kept["lora_dropout"] = 0.0  # the layers that diffusers makes of it stay in training mode, and would drop
    return {name: sorted(value) if isinstance(value, set) else value for name, value in kept.items()}


def _with_sorted_header(data: bytes) -> bytes:
    """Return a safetensors file with its header in a fixed order.

    The library writes the metadata in an order that changes from process to process, so that equal weights would give
    different files.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
