"""A model with its adapters on, as commands load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_prep.folders.hashes import sha256_of
from finetune.diffusion.adapters import adapter_files, load_adapter
from finetune.diffusion.config import each_scale
from finetune.diffusion.models import Models, load_models


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A model with its adapters on.

    Attributes:
        models: the parts.
        adapters: name, hash and scale of each adapter's file; a run that learned a word and a LoRA has two.
        provenances: what each adapter says of its training; empty dictionaries for foreign files.
    """

    models: Models
    adapters: list[dict[str, object]]
    provenances: list[dict[str, object]]


def load_tuned(name_or_path: str, adapters: Sequence[Path] = (), scales: Sequence[float] = (1.0,)) -> Tuned:
    """Load a model and put adapters on it, on the GPU if there is one."""
    models = load_models(name_or_path, device="cuda" if torch.cuda.is_available() else "cpu")
    return put_on(models, adapters, scales)


def put_on(models: Models, adapters: Sequence[Path], scales: Sequence[float] = (1.0,)) -> Tuned:
    """Put adapters on a loaded model, changing it in place; one scale for all, or one each."""
    provenances, described = [], []
    for adapter, scale in zip(adapters, each_scale(adapters, scales), strict=True):
        provenances.append(load_adapter(models, adapter, scale=scale))
        files = adapter_files(adapter)
        names = [adapter] if len(files) == 1 else files
        described += [
            {"name": str(name), "hash": sha256_of(file), "scale": scale}
            for name, file in zip(names, files, strict=True)
        ]
    return Tuned(models=models, adapters=described, provenances=provenances)
