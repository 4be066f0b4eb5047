r"""Generate slices: prompts x seeds -> pictures, at the size the model was trained on, with a record each.

    python -m eval.generate --pretrained_model_name_or_path assets/tiny-sd --adapter runs/lora \
        --prompts "sf_dry sf_warp" "sf_injected sf_weft" --num_images 4 --seed 0 --output_dir out/slices

Writes one PNG per picture, records.jsonl, contact_sheet.png, grid.json and config.yaml. The same request gives the same
pixels. With --format tiff16 --dataset DIR each slice is also written to tiff/ in the counts of its volume. Started by
``torchrun --nproc_per_node 2 -m eval.generate ...`` two processes share the pictures and write the same folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.errors import UsageError
from configs.load import Repeatable, command, save
from finetune.diffusion.config import SamplingConfig, each_scale

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from finetune.diffusion.vae import Request

SHEET_COLUMNS = 8
SHEET_ROWS = 60


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Settings of ``python -m eval.generate``."""

    pretrained_model_name_or_path: str
    """Pipeline folder, also one that a run saved, or a name on the hub."""
    adapter: Repeatable[tuple[Path, ...]] = ()
    """Run folder, LoRA file or embeddings file to put on top; give it several times for several."""
    adapter_scale: tuple[float, ...] = (1.0,)
    """Strength of the adapters, one for all or one each in their order; 0 leaves an adapter out exactly."""
    prompts: tuple[str, ...] = ()
    """What to generate."""
    prompts_file: Path | None = None
    """More prompts: a text file with one per line, or a YAML list."""
    grid: Path | None = None
    """Prompts and seeds of an earlier request, from its grid.json, instead of prompts, num_images and seed."""
    num_images: int = 4
    """Pictures per prompt."""
    seed: int = 0
    """The pictures of a prompt have the seeds seed, seed + 1, ..."""
    format: Literal["png", "tiff16"] = "png"
    """tiff16: also write 16-bit slices in counts, with the size of a voxel, by the window of the dataset's volumes."""
    dataset: Path | None = None
    """Dataset folder whose windows tiff16 turns round, such as data/weave."""
    sampling: SamplingConfig = SamplingConfig()
    output_dir: Path
    """Folder to write."""
    overwrite: bool = False
    """Replace the folder if it is there."""

    def __post_init__(self) -> None:
        """Refuse a request for nothing and seeds that a generator cannot take."""
        if not self.prompts and self.prompts_file is None and self.grid is None:
            raise ValueError("--prompts: nothing to generate; give prompts, or a --prompts_file")
        if self.grid is not None and (self.prompts or self.prompts_file is not None):
            raise ValueError(f"--grid {self.grid}: holds its own prompts; leave --prompts and --prompts_file out")
        if (self.format == "tiff16") != (self.dataset is not None):
            raise ValueError(f"--format {self.format}: --dataset goes with tiff16, which needs it for the grey windows")
        if self.num_images < 1:
            raise ValueError(f"--num_images {self.num_images}: at least 1")
        each_scale(self.adapter, self.adapter_scale)
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"--seed {self.seed}: from 0 to 2^62")


def main(config: GenerateConfig) -> None:
    """Load, generate batch by batch, and publish the folder when it is whole."""
    from data_prep.folders.publish import check_free, publish
    from eval.tiles.tiff16 import scales_of, write_slice
    from prompts.grids import make_grid, read_grid, read_prompts, write_grid

    check_free(config.output_dir, overwrite=config.overwrite, mark="records.jsonl")
    prompts = [*config.prompts, *(read_prompts(config.prompts_file) if config.prompts_file else ())]
    grid = read_grid(config.grid) if config.grid else make_grid(prompts, config.num_images, config.seed)
    scales = scales_of(config.dataset, grid.prompts) if config.dataset else {}

    from PIL import Image
    from tqdm import tqdm

    from data_prep.folders.provenance import base_mismatch, captions_of, dataset_of, pipeline_provenance, size_of
    from eval.page.contact_sheet import contact_sheet
    from finetune.diffusion.adapters import fold_adapters
    from finetune.diffusion.hashes import model_hash
    from finetune.diffusion.sampling import require_light, sample
    from finetune.diffusion.shares import join_team
    from finetune.diffusion.tuned import load_tuned

    team = join_team()
    tuned = load_tuned(config.pretrained_model_name_or_path, config.adapter, config.adapter_scale)
    fold_adapters(tuned.models)
    notes = []
    base = {"name": config.pretrained_model_name_or_path, "hash": model_hash(config.pretrained_model_name_or_path)}
    if other := base_mismatch(tuned.provenances, base["hash"]):
        notes.append(f"note: the adapter was trained on another base model ({other})")
    provenances = [pipeline_provenance(config.pretrained_model_name_or_path), *tuned.provenances]
    notes += _near_captions(grid.prompts, captions_of(provenances))
    if team.is_first:
        print("".join(f"{note}\n" for note in notes), end="", file=sys.stderr)
    settings = {
        prompt: resolve_size(config.sampling, size_of(provenances, prompt), tuned.models.size_px)
        for prompt in grid.prompts
    }
    sizes = {(one.height, one.width): one for one in settings.values()}
    if len(sizes) == 1:
        config = dataclasses.replace(config, sampling=next(iter(sizes.values())))

    requests = grid.requests
    shown: dict[int, np.ndarray] = {}
    columns = min(len(grid.seeds), SHEET_COLUMNS)
    published = publish(config.output_dir, overwrite=config.overwrite, mark="records.jsonl")
    with team.folder(published) as folder:
        records: dict[int, dict[str, object]] = {}
        if scales:
            (folder / "tiff").mkdir(exist_ok=True)
        # Whoever makes a batch, it has the same pictures: the bits do not depend on the number of processes.
        batches = team.mine(list(_batches(requests, settings)))
        known: dict[str, Tensor] = {}
        hidden = None if team.is_first else True
        bar = tqdm(total=sum(map(len, batches)), desc="generating", unit="picture", disable=hidden)
        for places in batches:
            batch = [requests[place] for place in places]
            pictures = sample(tuned.models, batch, settings[batch[0][0]], known=known)
            require_light(pictures, batch)
            for index, picture, (prompt, seed) in zip(places, pictures, batch, strict=True):
                name = picture_name(index // len(grid.seeds), prompt, seed)
                Image.fromarray(picture).save(folder / name)
                record = _record(name, prompt, seed, settings[prompt], base, tuned.adapters)
                if scales:
                    record["tiff"] = f"tiff/{Path(name).stem}.tif"
                    spread = write_slice(folder / str(record["tiff"]), picture, scales[prompt])
                    record["channel_spread"] = round(spread, 3)
                records[index] = record
                if index % len(grid.seeds) < columns and index // len(grid.seeds) < SHEET_ROWS:
                    shown[index] = picture
            bar.update(len(batch))
        bar.close()
        records, shown = team.merged(records), team.merged(shown)
        if not team.is_first:
            return
        rows = min(len(grid.prompts), SHEET_ROWS)
        labels = [prompt or "(empty prompt)" for prompt in grid.prompts[:rows]]
        headers = [f"seed {seed}" for seed in grid.seeds[:columns]]
        cells = _in_one_size([shown[place] for place in sorted(shown)])
        contact_sheet(cells, rows, columns, labels, headers).save(folder / "contact_sheet.png")
        text = "".join(json.dumps(records[place], ensure_ascii=False) + "\n" for place in sorted(records))
        (folder / "records.jsonl").write_text(text, encoding="utf-8")
        write_grid(folder / "grid.json", grid)
        save(config, folder / "config.yaml")

    print(
        f"{len(records)} pictures of {', '.join(f'{height} x {width}' for height, width in sizes)} px in "
        f"{config.output_dir}: "
        f"{len(grid.prompts)} prompts x {len(grid.seeds)} seeds; look at {config.output_dir / 'contact_sheet.png'}"
    )
    dataset = dataset_of([*config.adapter, Path(config.pretrained_model_name_or_path)])
    base_model = provenances[0].get("base_model")
    came_from = str(base_model["name"]) if isinstance(base_model, dict) and "name" in base_model else None
    print(f"next: {_next(config, dataset, grid.prompts, came_from)}")


def resolve_size(settings: SamplingConfig, trained: tuple[int, int] | None, own: int) -> SamplingConfig:
    """Fill in the height and width: as set, else the training size, else the model's own.

    Raises:
        UsageError: the training size is not a multiple of 8 and cannot be generated as it is.
    """
    height, width = trained or (own, own)
    height, width = settings.height or height, settings.width or width
    if height % 8 or width % 8:
        raise UsageError(
            f"the adapter was trained at {height} x {width} px, which is not a multiple of 8; pass --height "
            f"{-(-height // 8) * 8} --width {-(-width // 8) * 8}"
        )
    return dataclasses.replace(settings, height=height, width=width)


def _batches(requests: Sequence[Request], settings: Mapping[str, SamplingConfig]) -> Iterator[list[int]]:
    """Yield the places of requests that are generated together: of one size, in their order."""
    places = defaultdict(list)
    for place, (prompt, _) in enumerate(requests):
        places[settings[prompt].height, settings[prompt].width].append(place)
    for of_one_size in places.values():
        size = settings[requests[of_one_size[0]][0]].batch_size
        yield from (of_one_size[start : start + size] for start in range(0, len(of_one_size), size))


def _in_one_size(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return pictures (H, W, 3) in the size of the largest sides, on white."""
    import numpy as np

    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    ends = [(height - picture.shape[0], width - picture.shape[1]) for picture in pictures]
    return [
        np.pad(picture, ((0, rows), (0, columns), (0, 0)), constant_values=255)
        for picture, (rows, columns) in zip(pictures, ends, strict=True)
    ]


def picture_name(number: int, prompt: str, seed: int) -> str:
    """Return a file name that sorts by prompt and seed and holds nothing but letters, digits, ``_`` and ``-``."""
    words = re.sub(r"[^a-z0-9_]+", "-", prompt.lower())[:48].strip("-") or "empty"
    return f"{number:03d}-{words}-seed{seed:04d}.png"


def _record(
    name: str, prompt: str, seed: int, settings: SamplingConfig, base: dict[str, str], adapters: list[dict[str, object]]
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


def _near_captions(prompts: Sequence[str], captions: Sequence[str]) -> list[str]:
    """Say which prompts are a letter or two away from a training caption: most likely a slip."""
    notes = []
    for prompt in prompts:
        near = [] if prompt in captions else difflib.get_close_matches(prompt, captions, n=1, cutoff=0.9)
        notes += [f"note: '{prompt}' is not a training caption; did you mean '{text}'?" for text in near]
    return notes


def _next(config: GenerateConfig, dataset: Path | None, prompts: Sequence[str], came_from: str | None) -> str:
    """Return the command that makes sense after this one; ``came_from`` is the base model of a tuned pipeline."""
    from prompts.captions import parse_caption
    from prompts.vocabulary import DEFAULT

    model = ["--pretrained_model_name_or_path", config.pretrained_model_name_or_path]
    adapters = [word for adapter in config.adapter for word in ("--adapter", str(adapter))]
    beside = config.output_dir.parent
    if dataset is not None and any(parse_caption(prompt, DEFAULT) for prompt in prompts):
        words = [
            "--real",
            str(dataset),
            "--generated",
            str(config.output_dir),
            "--output_dir",
            str(beside / "fidelity"),
        ]
        return f"python -m eval.fidelity {shlex.join(words)}"
    if adapters or came_from:
        words = [*model, *(("--base", came_from) if came_from else ()), *adapters]
        return f"python -m eval.drift {shlex.join([*words, '--output_dir', str(beside / 'drift')])}"
    words = [*model, "--train_data_dir", "data/weave/train", "--output_dir", "runs/lora"]
    return f"accelerate launch finetune/lora.py {shlex.join(words)}"


if __name__ == "__main__":
    command(GenerateConfig, main)
