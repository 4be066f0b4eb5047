"""Models named by their content."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import UsageError
from data_prep.folders.hashes import sha256_of
from finetune.diffusion.families import STABLE_DIFFUSION

if TYPE_CHECKING:
    from finetune.diffusion.families import STABLE_DIFFUSION
from finetune.diffusion.models import Models


def model_hash(name_or_path: str, *, revision: str | None = None, cache_dir: Path | None = None) -> str:
    """Return a SHA-256 over the names and contents of a model's parts: weights, configs, tokenizer files.

    A folder and its copy under another name have the same hash. A hub model is looked up among the downloaded ones.

    Raises:
        UsageError: the model is neither a folder nor a downloaded hub model.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=True)
            )
        except (OSError, ValueError) as error:
            raise UsageError(f"--pretrained_model_name_or_path {name_or_path}: there is no such folder") from error
    files = [
        path
        for part in STABLE_DIFFUSION.parts
        for path in (folder / part).glob("*")
        if path.suffix in {".safetensors", ".json", ".txt"}
    ]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def model_provenance(models: Models, revision: str | None = None, cache_dir: Path | None = None) -> dict[str, str]:
    """Return what a weights file says about its base model: the name as typed, and the hash."""
    return {"name": models.name, "hash": model_hash(models.name, revision=revision, cache_dir=cache_dir)}
