r"""Generate slices: prompts x seeds -> pictures, at the size the model was trained on, with a record each.

    python -m eval.generate --pretrained_model_name_or_path assets/tiny-sd --adapter runs/lora \
        --prompts "sf_dry sf_warp" "sf_injected sf_weft" --num_images 4 --seed 0 --output_dir out/slices

Writes one PNG per picture, records.jsonl, contact_sheet.png, grid.json and config.yaml. The same request gives the same
pixels. With --format tiff16 --dataset DIR each slice is also written to tiff/ in the counts of its volume. Started by
``torchrun --nproc_per_node 2 -m eval.generate ...`` two processes share the pictures and write the same folder.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.load import Repeatable, command, save
from data_prep.folders.publish import check_free, publish
from eval.generation.shares import join_team
from finetune.diffusion.config import SamplingConfig, each_scale


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Settings of ``python -m eval.generate``."""

    pretrained_model_name_or_path: str
    """Pipeline folder, also one that a run saved, or a name on the hub."""
    adapter: Repeatable[tuple[Path, ...]] = ()
    """Run folder, a checkpoint in it, LoRA file or embeddings file to put on top; give it several times for several."""
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
    check_free(config.output_dir, overwrite=config.overwrite, mark="records.jsonl")

    from eval.generation import next_step, pictures, request

    model = config.pretrained_model_name_or_path
    grid, scales = request.read_request(
        config.grid,
        config.prompts,
        config.prompts_file,
        config.dataset,
        count=config.num_images,
        seed=config.seed,
    )
    team = join_team()
    origin = request.open_origin(model, config.adapter, config.adapter_scale)
    if team.is_first:
        for remark in request.remarks(origin, grid.prompts):
            print(remark, file=sys.stderr)
    settings = request.sized_settings(origin, grid.prompts, config.sampling)
    asked = request.PictureRequest(grid=grid, settings=settings, origin=origin, scales=scales)
    if len(asked.sizes) == 1:
        config = dataclasses.replace(config, sampling=next(iter(asked.sizes.values())))

    published = publish(config.output_dir, overwrite=config.overwrite, mark="records.jsonl")
    with team.folder(published) as folder:
        drawn = pictures.draw_pictures(asked, folder, team)
        if not team.is_first:
            return
        pictures.write_lists(asked, folder, drawn)
        save(config, folder / "config.yaml")
    print(
        f"{len(drawn.records)} pictures of {', '.join(f'{height} x {width}' for height, width in asked.sizes)} px in "
        f"{config.output_dir}: "
        f"{len(grid.prompts)} prompts x {len(grid.seeds)} seeds; look at {config.output_dir / 'contact_sheet.png'}"
    )
    command_line = next_step.next_command(model, config.adapter, config.output_dir, grid.prompts, origin.came_from)
    print(f"next: {command_line}")


if __name__ == "__main__":
    command(GenerateConfig, main)
