"""Captioned pictures in memory, and what a VAE takes and gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from configs.errors import InputError


def read_pictures(folder: Path, most: int | None) -> tuple[NDArray[np.uint8], list[str]]:
    """Read all pictures (N, H, W, 3) uint8 and their captions."""
    import numpy as np

    table = folder / "metadata.jsonl"
    if not table.is_file():
        raise InputError(
            f"--train_data_dir {folder}: no metadata.jsonl in it; write one with python -m data_prep.shapes"
        )
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()][:most]
    pictures = [
        np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in tqdm(rows, "reading", disable=None)
    ]
    sizes = {picture.shape for picture in pictures}
    if len(sizes) != 1 or len(set(pictures[0].shape[:2])) != 1:
        raise InputError(
            f"--train_data_dir {folder}: pictures must be square and of one size, found {sorted(sizes)[:4]}"
        )
    return np.stack(pictures), [row["text"] for row in rows]
