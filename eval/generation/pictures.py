"""The pictures of a request and their records, drawn batch by batch into a folder; and all of them on one sheet."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.generation.request import PictureRequest, batches
from eval.generation.shares import Team
from eval.generation.tiff16 import write_slice
from eval.tiles.contact_sheet import contact_sheet
from finetune.diffusion.config import SamplingConfig
from finetune.diffusion.sampling import require_light, sample
from prompts.grids import write_grid

SHEET_COLUMNS = 8
SHEET_ROWS = 60
RECORDS_NAME = "records.jsonl"


@dataclass(frozen=True, kw_only=True)
class DrawnPictures:
    """Records of the pictures by their place in the request, and the pixels of those that the sheet shows."""

    records: dict[int, dict[str, object]]
    shown: dict[int, np.ndarray]


def draw_pictures(request: PictureRequest, folder: Path, team: Team) -> DrawnPictures:
    """Draw this process's share of the pictures into a folder; return what all processes have drawn.

    Whoever draws a batch, it has the same pictures: the bits do not depend on the number of processes.

    Raises:
        TisserandError: a picture came out black.
    """
    if request.scales:
        (folder / "tiff").mkdir(exist_ok=True)
    asked, seeds = request.grid.requests, len(request.grid.seeds)
    columns = min(seeds, SHEET_COLUMNS)
    mine = team.mine(list(batches(request)))
    known: dict[str, Tensor] = {}
    records: dict[int, dict[str, object]] = {}
    shown: dict[int, np.ndarray] = {}
    hidden = None if team.is_first else True
    with tqdm(total=sum(map(len, mine)), desc="generating", unit="picture", disable=hidden) as bar:
        for places in mine:
            batch = [asked[place] for place in places]
            pictures = sample(request.origin.tuned.models, batch, request.settings[batch[0][0]], known=known)
            require_light(pictures, batch)
            for index, picture in zip(places, pictures, strict=True):
                records[index] = _save_picture(request, folder, index, picture)
                if index % seeds < columns and index // seeds < SHEET_ROWS:
                    shown[index] = picture
            bar.update(len(batch))
    return DrawnPictures(records=team.merged(records), shown=team.merged(shown))


def write_lists(request: PictureRequest, folder: Path, drawn: DrawnPictures) -> None:
    """Write contact_sheet.png, records.jsonl and grid.json."""
    grid = request.grid
    rows, columns = min(len(grid.prompts), SHEET_ROWS), min(len(grid.seeds), SHEET_COLUMNS)
    labels = [prompt or "(empty prompt)" for prompt in grid.prompts[:rows]]
    headers = [f"seed {seed}" for seed in grid.seeds[:columns]]
    cells = _in_one_size([drawn.shown[place] for place in sorted(drawn.shown)])
    contact_sheet(cells, rows, columns, labels, headers).save(folder / "contact_sheet.png")
    lines = [json.dumps(drawn.records[place], ensure_ascii=False) + "\n" for place in sorted(drawn.records)]
    (folder / RECORDS_NAME).write_text("".join(lines), encoding="utf-8")
    write_grid(folder / "grid.json", grid)


def picture_name(number: int, prompt: str, seed: int) -> str:
    """Return a file name that sorts by prompt and seed and holds nothing but letters, digits, ``_`` and ``-``."""
    words = re.sub(r"[^a-z0-9_]+", "-", prompt.lower())[:48].strip("-") or "empty"
    return f"{number:03d}-{words}-seed{seed:04d}.png"


def _save_picture(request: PictureRequest, folder: Path, index: int, picture: np.ndarray) -> dict[str, object]:
    """Write one picture, and its 16-bit slice if asked for; return its record."""
    prompt, seed = request.grid.requests[index]
    name = picture_name(index // len(request.grid.seeds), prompt, seed)
    Image.fromarray(picture).save(folder / name)
    origin = request.origin
    record = _record(name, prompt, seed, request.settings[prompt], origin.base, origin.tuned.adapters)
    if request.scales:
        record["tiff"] = f"tiff/{Path(name).stem}.tif"
        spread = write_slice(folder / str(record["tiff"]), picture, request.scales[prompt])
        record["channel_spread"] = round(spread, 3)
    return record


def _record(
    name: str,
    prompt: str,
    seed: int,
    settings: SamplingConfig,
    base: Mapping[str, str],
    adapters: Sequence[Mapping[str, object]],
) -> dict[str, object]:
    """Write down everything that gives this picture again."""
    return {
        "file_name": name,
        "prompt": prompt,
        "negative_prompt": settings.negative_prompt,
        "seed": seed,
        "steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "scheduler": settings.scheduler,
        "height": settings.height,
        "width": settings.width,
        "batch_size": settings.batch_size,
        "adapters": adapters,
        "base_model": base,
    }


def _in_one_size(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return pictures (H, W, 3) in the size of the largest sides, on white."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    ends = [(height - picture.shape[0], width - picture.shape[1]) for picture in pictures]
    return [
        np.pad(picture, ((0, rows), (0, columns), (0, 0)), constant_values=255)
        for picture, (rows, columns) in zip(pictures, ends, strict=True)
    ]
