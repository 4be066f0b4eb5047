"""Look into a volume before slicing it: what the file is, three planes of each direction, its grey levels, the cost.

    python -m data_prep.inspect_volume scan.tif --output scan.png

The picture shows each direction's slices at a quarter, the middle and three quarters, and the histogram with the
window. Nothing is changed, and no more than a few hundred planes are read.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.errors import UsageError
from configs.load import Positional, as_dict, command
from data_prep.folders.publish import check_writable
from data_prep.readers.info import ReadConfig, VolumeInfo
from data_prep.readers.open import open_volume
from data_prep.readers.places import place_of
from data_prep.slicing.card import notices
from data_prep.slicing.config import AXES, SliceConfig
from data_prep.slicing.intensity import WindowConfig, WindowEstimate
from data_prep.slicing.plan import Plan, make_plans
from data_prep.slicing.planes import num_workers
from prompts.vocabulary import DEFAULT

if TYPE_CHECKING:
    from data_prep.page.inspection import Inspection

# Seconds a core takes to cut and encode a million pixels (benchmarks/slicing.py).
_SECONDS_PER_MEGAPIXEL = 0.018


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What to look at, and the settings of the slicer that change what would come out."""

    volume: Positional[str]
    """File, folder of slices, or URL."""
    output: Path | None = None
    """Picture to write, a PNG; inspect.png if not given."""
    overwrite: bool = False
    """Replace the picture if it is there."""
    thickness_axis: Literal["z", "y", "x"] = "z"
    """Stored axis that runs through the thickness of the material."""
    warp_axis: Literal["z", "y", "x"] = "y"
    """Stored axis along the warp."""
    weft_axis: Literal["z", "y", "x"] = "x"
    """Stored axis along the weft."""
    voxel_size_um: tuple[float, ...] | None = None
    """Edge of a voxel in micrometres, one number or three for z y x; what the file says if not given."""
    read: ReadConfig = ReadConfig()
    grey: WindowConfig = WindowConfig()
    stride: int = 1
    """Take every n-th slice of each direction."""
    max_per_axis: int | None = None
    """Widen the stride until at most this many slices are taken per direction."""
    memory_gb: float | None = None
    """Memory the process may use, in 10^9 bytes; by default 4 or a quarter of the machine's, if that is less."""
    dry_run: bool = False
    """Say what the file is, from its headers alone, and stop."""

    def __post_init__(self) -> None:
        _ = self.slicing  # refuses what the slicer would
        if self.output is not None and self.output.suffix.lower() != ".png":
            raise ValueError(f"--output {self.output}: name a file that ends with .png")

    @property
    def slicing(self) -> SliceConfig:
        """The slicer's settings; the state stands for any."""
        return SliceConfig(
            volumes=(f"{next(iter(DEFAULT.states))}={self.volume}",),
            output_dir=Path("out"),
            thickness_axis=self.thickness_axis,
            warp_axis=self.warp_axis,
            weft_axis=self.weft_axis,
            voxel_size_um=self.voxel_size_um,
            read=self.read,
            grey=self.grey,
            split="none",
            stride=self.stride,
            max_per_axis=self.max_per_axis,
            memory_gb=self.memory_gb,
        )


def main(config: InspectConfig) -> None:
    """Print what a volume is, draw it, and say what slicing it would give."""
    from data_prep.page.inspection import draw, look_at

    output = config.output or Path("inspect.png")
    if not config.dry_run:
        if output.exists() and not config.overwrite:
            raise UsageError(f"--output {output}: exists; name another file or pass --overwrite")
        check_writable(output, "--output")
    if config.dry_run:
        info = open_volume(place_of(config.volume), config.read).info
        _warn(info.warnings)
        print(_of_file(info))
        print("dry run: no voxel was read and nothing was written")
        return
    (plan,) = make_plans(config.slicing, DEFAULT)
    info, window = plan.volume.info, plan.volume.window
    _warn(notices(plan, config.slicing))
    look = look_at(plan, config.slicing.roles)
    print(_of_file(info))
    print(_of_values(window))
    print(_of_slicing(plan, look, config.slicing))
    draw(plan, look, config.slicing.roles, output)
    print(f"{output}: slices of the three directions, and the histogram with the window. Next:\n")
    print("  " + next_command(config, plan.volume.name))


def next_command(config: InspectConfig, name: str) -> str:
    """Return the command that slices what was looked at, as it was looked at; the state is left to be named."""
    slicing = config.slicing
    plain, default = as_dict(slicing), as_dict(SliceConfig(volumes=slicing.volumes, output_dir=slicing.output_dir))
    words = ["python -m data_prep.slice --volumes", f"STATE={shlex.quote(config.volume)}"]
    for flag, value in plain.items():
        if flag == "split" or value == default[flag]:
            continue
        several = [f"{key}={one}" for key, one in value.items()] if isinstance(value, dict) else value
        if several is True:
            words.append(f"--{flag}")
        else:
            words += [
                f"--{flag}",
                *(shlex.quote(str(one)) for one in (several if isinstance(several, list) else [several])),
            ]
    return " ".join([*words, f"--output_dir data/{name}"])


def _warn(warnings: Sequence[str]) -> None:
    """Print what is doubtful, a line each."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _of_file(info: VolumeInfo) -> str:
    """Say what the file is."""
    voxel = "unknown; give --voxel_size_um" if info.voxel_um is None else " x ".join(f"{e:g}" for e in info.voxel_um)
    lines = [
        f"{info.path}: {'x'.join(map(str, info.shape))} {info.dtype} (z y x), {info.num_bytes / 1e6:.1f} MB, "
        f"{info.storage}",
        f"  voxel (z y x, um): {voxel}",
    ]
    return "\n".join([*lines, *(f"  {note}" for note in info.notes)])


def _of_values(window: WindowEstimate) -> str:
    """Say what the voxels hold."""
    padding = "none" if window.padding is None else f"{window.padding:g} ({window.padding_share:.1%})"
    ends = f"{window.window.low:g} to {window.window.high:g} ({window.method})"
    return (
        f"  values: {window.minimum:g} to {window.maximum:g} in {window.num_planes} planes; padding {padding}; "
        f"not finite {window.non_finite:.1%}\n"
        f"  window: {ends}; {window.clipped_low:.2%} below and {window.clipped_high:.2%} above are clipped"
    )


def _of_slicing(plan: Plan, look: Inspection, config: SliceConfig) -> str:
    """Say what slicing would give: counts, time, disk."""
    parts, pixels = [], 0
    for name, axis in zip(AXES, config.roles, strict=True):
        several = [picture.row for (of, _), some in plan.pictures.items() if of == axis for picture in some]
        pixels += sum(row.width * row.height for row in several)
        if several:
            parts.append(f"{len(several)} {name} of {several[0].height}x{several[0].width}")
    depth, workers = plan.volume.info.shape[0], num_workers(config)
    seconds = plan.num_passes * depth * look.seconds_per_plane + pixels / 1e6 * _SECONDS_PER_MEGAPIXEL / workers
    return (
        f"  slicing gives {len(plan.all_pictures)} pictures ({', '.join(parts)}), about "
        f"{pixels * look.bytes_per_pixel / 1e6:.0f} MB, in about {max(seconds, 1):.0f} s with {workers} threads; "
        f"passes {plan.num_passes}"
    )


if __name__ == "__main__":
    command(InspectConfig, main)
