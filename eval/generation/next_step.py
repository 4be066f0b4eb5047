"""Which command makes sense after pictures have been generated."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from data_prep.folders.provenance import dataset_of
from prompts.captions import parse_caption
from prompts.vocabulary import OF_A_DATASET, words_of


def next_command(
    model: str, adapters: Sequence[Path], output_dir: Path, prompts: Sequence[str], came_from: str | None
) -> str:
    """Return a command line: compare with the dataset, else look for drift, else train.

    Args:
        model: the pipeline as it was named.
        adapters: the adapters as they were named.
        output_dir: the folder of the pictures.
        prompts: what was generated.
        came_from: the base model of a tuned pipeline.
    """
    dataset = dataset_of([*adapters, Path(model)])
    named = ["--pretrained_model_name_or_path", model]
    put_on = [word for adapter in adapters for word in ("--adapter", str(adapter))]
    beside = output_dir.parent
    if dataset is not None and any(parse_caption(prompt, words_of(dataset)) for prompt in prompts):
        own = dataset / OF_A_DATASET
        folders = ["--real", str(dataset), "--generated", str(output_dir)]
        folders += ["--vocabulary", str(own)] if own.is_file() else []
        return f"python -m eval.fidelity {shlex.join([*folders, '--output_dir', str(beside / 'fidelity')])}"
    if adapters or came_from:
        words = [*named, *(("--base", came_from) if came_from else ()), *put_on]
        return f"python -m eval.drift {shlex.join([*words, '--output_dir', str(beside / 'drift')])}"
    words = [*named, "--train_data_dir", "data/weave/train", "--output_dir", "runs/lora"]
    return f"accelerate launch finetune/lora.py {shlex.join(words)}"
