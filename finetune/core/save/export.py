"""Weights for other programs: one LoRA in another layout, or adapters merged into a pipeline folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import InputError, UsageError
from data_prep.folders.provenance import captions_of, shapes_of, size_of
from data_prep.folders.publish import check_writable, publish
from data_prep.folders.run_folder import EMBEDDINGS_FILE, PIPELINE_FILE
from finetune.core.save.kohya import to_diffusers, to_kohya
from finetune.core.save.weights import save_pipeline, write_tensors
from finetune.diffusion.adapters import adapter_files, fold_adapters
from finetune.diffusion.hashes import model_provenance
from finetune.diffusion.models import load_models
from finetune.diffusion.tuned import put_on


def rename(given: Path, target: Path, *, to: str, overwrite: bool) -> None:
    """Write one LoRA in the other layout.

    Args:
        given: run folder or weights file.
        target: file to write.
        to: ``kohya`` or ``diffusers``.
        overwrite: replace the file if it is there.

    Raises:
        UsageError: the file is there already.
        InputError: there is no LoRA in the other layout in it.
    """
    if target.exists() and not overwrite:
        raise UsageError(f"--output {target}: is there already; name another file or pass --overwrite")
    check_writable(target, "--output")
    files = [file for file in adapter_files(given) if file.name != EMBEDDINGS_FILE]
    if not files:
        raise InputError(f"--adapter {given}: holds the rows of a word alone; other programs read that file as it is")
    tensors, metadata = _read(given, files[0])
    try:
        convert = to_kohya if to == "kohya" else to_diffusers
        tensors, metadata = convert(tensors, metadata)
    except ValueError as error:
        raise InputError(f"--adapter {given}: {error}") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(target, tensors, metadata)
    print(f"{len(tensors)} tensors in {target}")
    back = "diffusers" if to == "kohya" else "kohya"
    print(f"next: python finetune/export.py --adapter {target} --to {back} --output back.safetensors")


def merge(adapters: Sequence[Path], scales: Sequence[float], base: str, target: Path, *, overwrite: bool) -> None:
    """Add the adapters to the weights of the base model and save a pipeline that needs none.

    Args:
        adapters: run folders or weights files, a word's rows among them, too.
        scales: strength of the adapters, one for all or one each.
        base: the base model.
        target: folder to write.
        overwrite: replace the folder if it is there.
    """
    with publish(target, overwrite=overwrite, mark=PIPELINE_FILE) as folder:
        models = load_models(base)
        tuned = put_on(models, adapters, scales)
        fold_adapters(models)
        height, width = size_of(tuned.provenances) or (models.size_px, models.size_px)
        provenance = {
            "method": "merged",
            "base_model": model_provenance(models),
            "adapters": tuned.adapters,
            "captions": captions_of(tuned.provenances),
            "height": height,
            "width": width,
            "shapes": shapes_of(tuned.provenances),
            "scheduler": dict(models.scheduler.config),
        }
        save_pipeline(folder, models, provenance)
    print(f"a pipeline in {target}, {len(adapters)} adapter(s) merged")
    print(
        f"next: python -m eval.drift --pretrained_model_name_or_path {target} --base {base} "
        f"--output_dir {target.parent / 'drift'}"
    )


def _read(given: Path, file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file."""
    try:
        with safe_open(file, framework="pt") as reader:
            return {name: reader.get_tensor(name) for name in reader.keys()}, reader.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"--adapter {given}: cannot be read ({' '.join(str(error).split())})") from None
