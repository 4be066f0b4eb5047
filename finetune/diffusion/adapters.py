"""Adapters on a model: loaded, scaled, switched off and on, folded in."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.errors import InputError
from data_prep.folders.run_folder import EMBEDDINGS_FILE, LORA_FILE, PROVENANCE_KEY
from finetune.diffusion.config import NoiseConfig
from finetune.diffusion.models import Models, as_pipeline, evaluating
from finetune.diffusion.noise import trained_scheduler
from finetune.diffusion.run_files.checkpoint_adapters import weights_of, write_adapters

_DOWN = ("lora_A.", "lora.down.", "lora_down.", "lora_linear_layer.down.")  # one tensor per adapted layer, by dialect


def load_adapter(models: Models, path: Path, *, scale: float = 1.0) -> dict[str, object]:
    """Put what a run learned on a model: a LoRA, the rows of a new word, or both; several may be loaded.

    Args:
        models: changed in place.
        path: a run folder, a checkpoint in one, or a ``.safetensors`` file: a LoRA in diffusers' or kohya's layout, or
            an embedding (Textual Inversion), told apart by what is in it.
        scale: strength of a LoRA; an embedding is there unless it is 0. 0 gives the base model exactly.

    Returns:
        The provenance written by the training run; empty for files of other programs.

    Raises:
        InputError: no such file, not safetensors, or it does not fit this model or the adapters on it.
    """
    provenance: dict[str, object] = {}
    for file in adapter_files(path):
        provenance |= _load_file(models, path, file, scale)
    return provenance


def fold_adapters(models: Models) -> None:
    """Add the adapters in force to the weights they stand beside, and take them off; equal within rounding.

    A fifth of a LoRA's sampling time. Not for models whose adapters are switched or rescaled later.
    """
    pipeline = as_pipeline(models)
    if any(getattr(part, "peft_config", None) for part in (models.unet, models.text_encoder)):
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()


def adapter_files(path: Path) -> list[Path]:
    """Return the weights that ``--adapter PATH`` stands for: the file itself, or those of a run or a checkpoint folder.

    Raises:
        InputError: there are none.
    """
    if weights := weights_of(path):
        return [weights]
    files = (
        [path / name for name in (EMBEDDINGS_FILE, LORA_FILE) if (path / name).is_file()] if path.is_dir() else [path]
    )
    if (path / "model_index.json").is_file() and not files:
        raise InputError(
            f"--adapter {path}: is a whole pipeline; give it as --pretrained_model_name_or_path {path}, and what "
            "it came from as --base where a comparison needs it"
        )
    if not files:
        raise InputError(f"--adapter {path}: there is no {LORA_FILE} or {EMBEDDINGS_FILE} in it")
    for file in files:
        if not file.is_file():
            raise InputError(f"--adapter {path}: there is no {file.name}")
        if file.suffix != ".safetensors":
            raise InputError(f"--adapter {path}: only .safetensors files are read, never pickles")
    return files


def _load_file(models: Models, path: Path, file: Path, scale: float) -> dict[str, object]:
    """Load one file by its content and return the provenance it carries."""
    if weights_of(path) == file:
        with tempfile.TemporaryDirectory() as folder:
            loaded = [_load_file(models, path, part, scale) for part in write_adapters(file, Path(folder))]
        return loaded[-1]
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as reader:
            metadata, keys = reader.metadata() or {}, list(reader.keys())
            if not any(mark in key for key in keys for mark in _DOWN):
                if len(keys) != 1:
                    raise InputError(f"--adapter {path}: {file.name} holds neither a LoRA nor the rows of one word")
                rows: Tensor | None = reader.get_tensor(keys[0])
            else:
                rows = None
        if rows is not None:
            # Other programs name the word by the file.
            _load_word(models, path, file.stem if keys[0] == "emb_params" else keys[0], rows, scale)
        else:
            _load_lora(models, path, file, keys, scale)
    except (SafetensorError, OSError, ValueError, RuntimeError, RuntimeWarning, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        # Diffusers' reader loses alphas that differ between attention layers; here that is an error.
        remedy = "; python finetune/export.py --to diffusers rewrites it" if "alpha_pattern" in reason else ""
        raise InputError(f"--adapter {path}: does not load into {models.name} ({reason}){remedy}") from error
    provenance = json.loads(metadata.get(PROVENANCE_KEY, "{}"))
    _keep_noise(models, path, provenance.get("scheduler", {}))
    models.adapters.is_on = any(models.adapters.scales.values())
    return provenance


def _keep_noise(models: Models, path: Path, trained: dict[str, Any]) -> None:
    """Keep the schedule an adapter was trained with, from the scheduler's config in its provenance."""
    kind, before = trained.get("prediction_type"), models.adapters.noise
    if kind is None:
        return
    try:
        noise = NoiseConfig(prediction_type=kind, rescale_betas_zero_snr=trained.get("rescale_betas_zero_snr") is True)
    except ValueError as error:
        raise InputError(f"--adapter {path}: its scheduler makes no sense ({error})") from error
    if before is not None and before != noise:
        told = [f"{one.prediction_type}{', zero-terminal' * one.rescale_betas_zero_snr}" for one in (noise, before)]
        raise InputError(f"--adapter {path}: predicts {told[0]}, an adapter before it {told[1]}")
    models.adapters.noise = noise
    models.adapters.scheduler = trained_scheduler(models.base_scheduler, noise)


def _load_lora(models: Models, path: Path, file: Path, keys: Sequence[str], scale: float) -> None:
    """Put a LoRA on the U-Net and the text encoder, whichever it has layers for."""
    name = f"adapter_{len(models.adapters.scales)}"
    with warnings.catch_warnings():
        # peft warns that an adapter is there already: here that is meant.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        # Layers of the file that found no place would be left out of the pictures without a word.
        warnings.filterwarnings("error", message="While injecting the PEFT adapters, an inconsistency")
        as_pipeline(models).load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    written = sum(any(mark in key for mark in _DOWN) for key in keys)
    placed = sum(name in layer.scaling for layer in _adapted_layers(models))
    if not placed or placed < written:
        raise InputError(f"--adapter {path}: {placed} of its {written} layers found a place in {models.name}")
    models.adapters.scales[name] = scale
    _scale_one(models, name, scale)


def _load_word(models: Models, path: Path, word: str, rows: Tensor, scale: float) -> None:
    """Teach the tokenizer a word of one or several rows, (D,) or (N, D), through diffusers' own reader."""
    width = models.text_encoder.get_input_embeddings().weight.shape[1]
    if not rows.is_floating_point() or rows.ndim not in (1, 2) or rows.shape[-1] != width or not rows.numel():
        raise InputError(
            f"--adapter {path}: '{word}' has shape {tuple(rows.shape)}; rows of {width} numbers fit {models.name}"
        )
    if word in models.adapters.scales:
        raise InputError(f"--adapter {path}: an adapter before it holds '{word}', too")
    models.adapters.scales[word] = scale
    if not scale:
        return
    if models.adapters.tokenizer is None:
        models.adapters.tokenizer = copy.deepcopy(models.base_tokenizer)
    models.adapters.is_on = True  # so that the word is taught to this tokenizer
    as_pipeline(models).load_textual_inversion({word: rows})
    models.text_encoder.requires_grad_(False)


def set_adapter_scale(models: Models, scale: float) -> None:
    """Set the strength of all adapters, relative to the one each was loaded with, for sampling.

    0 gives the base model exactly, new words unknown again; 1 what was loaded.
    """
    names = {*getattr(models.unet, "peft_config", {}), *getattr(models.text_encoder, "peft_config", {})}
    for name in names:
        _scale_one(models, name, scale * models.adapters.scales.get(name, 1.0))
    models.adapters.is_on = bool(scale)


def _scale_one(models: Models, name: str, scale: float) -> None:
    """Set the strength of one adapter, relative to its alpha / rank, and leave out of the sum what has none."""
    for layer in _adapted_layers(models):
        if name in layer.scaling:
            layer.set_scale(name, scale)
            active = [other for other, strength in layer.scaling.items() if strength != 0]
            layer.enable_adapters(bool(active))
            layer.set_adapter(active, inference_mode=True)


def _adapted_layers(models: Models) -> list[Any]:
    """Return the layers that carry adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = (models.unet, models.text_encoder)
    return [module for part in parts for module in part.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def adapters_off(models: Models) -> Iterator[None]:
    """Run the base model for a ``with`` block: adapters of every kind are off, and dropout with them.

    Afterwards all is as it was: what is on, what has gradients, what is in training mode.
    """
    layers = [layer for layer in _adapted_layers(models) if not layer.disable_adapters]
    learning = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    with evaluating(models):
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, learned in learning:  # peft lets whatever is active learn
                parameter.requires_grad_(learned)
