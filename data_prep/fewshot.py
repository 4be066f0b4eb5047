"""Draw a few slices per state and direction, far apart in the volume: instance folders for DreamBooth and the like.

    python -m data_prep.fewshot data/weave --states dry --num_per_axis 3 --seed 0 --output_dir data/few

Each state gets a folder: 3 thickness, 3 warp and 3 weft slices are 9 pictures. Only the training part is drawn from.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.errors import InputError, NothingLeftError, UsageError
from configs.load import Positional, as_dict, command
from data_prep.folders import manifest
from data_prep.folders.manifest import TRAIN, SliceRow
from data_prep.folders.publish import check_free, publish

_LOCAL_OPTIONS = {"dataset", "output_dir", "overwrite", "dry_run"}


@dataclass(frozen=True, kw_only=True)
class FewshotConfig:
    """Settings."""

    dataset: Positional[Path]
    """Dataset folder made by data_prep.slice."""
    output_dir: Path
    """Folder to make, with a folder of pictures per state."""
    overwrite: bool = False
    """Replace what is already there, once the new one is whole."""
    states: tuple[str, ...] = ()
    """States to draw from; all of them if not given."""
    axes: tuple[str, ...] = ()
    """Directions to draw; all of them if not given."""
    num_per_axis: int = 3
    """Slices per state and direction."""
    seed: int = 0
    """Where in the volume the draw begins."""
    dry_run: bool = False
    """Print what would be done and stop."""

    def __post_init__(self) -> None:
        if self.num_per_axis < 1:
            raise ValueError(f"--num_per_axis {self.num_per_axis}: must be at least 1")


def main(config: FewshotConfig) -> None:
    """Draw, copy, publish."""
    check_free(config.output_dir, overwrite=config.overwrite, mark=manifest.MANIFEST_NAME)
    if config.output_dir.resolve().is_relative_to(config.dataset.resolve()):
        raise UsageError(f"--output_dir {config.output_dir}: lies inside the dataset; name another folder")
    source = config.dataset / TRAIN
    whole = manifest.read_manifest(config.dataset)
    chosen = draw(manifest.read_rows(source), config)
    for state, rows in chosen.items():
        drawn = ", ".join(f"{row.axis} {row.index}" for row in rows)
        print(f"{state}: {len(rows)} pictures ({drawn})")
    if config.dry_run:
        print(f"dry run: nothing was written to {config.output_dir}")
        return
    with publish(config.output_dir, overwrite=config.overwrite, mark=manifest.MANIFEST_NAME) as folder:
        for state, rows in chosen.items():
            instance = folder / _folder_name(state)
            instance.mkdir()
            for row in rows:
                if not (source / row.file_name).is_file():
                    raise InputError(f"{source / row.file_name}: listed, but there is no such file; verify the dataset")
                shutil.copyfile(source / row.file_name, instance / row.file_name)
            manifest.write_rows(instance, rows)
        options = {name: value for name, value in as_dict(config).items() if name not in _LOCAL_OPTIONS}
        content = whole | {"kind": "fewshot", "drawn": options, "counts": {s: len(rows) for s, rows in chosen.items()}}
        manifest.write_manifest(folder, content)
        (folder / "draw.json").write_text(
            json.dumps({s: [row.file_name for row in rows] for s, rows in chosen.items()}, indent=2) + "\n", "utf-8"
        )
    instance_dir = shlex.quote(str(config.output_dir / _folder_name(next(iter(chosen)))))
    print(f"{config.output_dir}: {sum(map(len, chosen.values()))} pictures. Next:\n")
    print(
        "  accelerate launch finetune/lora_dreambooth.py --pretrained_model_name_or_path assets/tiny-sd "
        f"--instance_data_dir {instance_dir} --output_dir runs/few"
    )


def draw(rows: Sequence[SliceRow], config: FewshotConfig) -> dict[str, list[SliceRow]]:
    """Return the pictures drawn, by state: direction by direction, in the order of the volume.

    The slices of a state and direction stand in a row, volume after volume, and are taken at equal distances from a
    place drawn by the seed: as far apart as they can be. Of a slice cut into tiles, one tile is drawn.

    Raises:
        UsageError: an unknown state or direction.
        NothingLeftError: there are fewer slices than asked for.
    """
    states = list(dict.fromkeys(row.state for row in rows))
    axes = list(dict.fromkeys(row.axis for row in rows))
    for flag, asked, there in (("states", config.states, states), ("axes", config.axes, axes)):
        if unknown := [name for name in asked if name not in there]:
            raise UsageError(f"--{flag} {' '.join(unknown)}: not in {config.dataset}; there are {', '.join(there)}")
    random = np.random.default_rng(config.seed)
    chosen: dict[str, list[SliceRow]] = {}
    for state in config.states or states:
        for axis in config.axes or axes:
            slices: dict[tuple[str, int], list[SliceRow]] = {}
            for row in rows:
                if (row.state, row.axis) == (state, axis):
                    slices.setdefault((row.volume, row.index), []).append(row)
            if len(slices) < config.num_per_axis:
                raise NothingLeftError(
                    f"--num_per_axis {config.num_per_axis}: {config.dataset} has {len(slices)} {axis} slices of {state}"
                )
            places = sorted(slices)
            spacing = len(places) / config.num_per_axis
            start = float(random.random()) * spacing
            for number in range(config.num_per_axis):
                tiles = slices[places[int(start + number * spacing)]]
                chosen.setdefault(state, []).append(tiles[int(random.integers(len(tiles)))])
    return chosen


def _folder_name(state: str) -> str:
    """Return a state as a folder name."""
    return state.replace("_", "-")


if __name__ == "__main__":
    command(FewshotConfig, main)
