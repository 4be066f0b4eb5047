"""What a user should know of a volume before its slices are used: printed, and kept in manifest and report."""

from __future__ import annotations

from collections import Counter

from data_prep.slicing.config import SliceConfig
from data_prep.slicing.plan import Plan

_CLIPPED = 0.1  # share of the voxels outside the window that nobody asks for
# How far an edge may differ from another before a picture would look stretched.
_CUBE_WITHIN = 0.01


def notices(plan: Plan, config: SliceConfig) -> list[str]:
    """Return what is doubtful about one volume and its slices, a line each, without its name.

    Args:
        plan: what is cut from it.
        config: the settings it was planned with.
    """
    volume, shape, window = plan.volume, plan.volume.info.shape, plan.volume.window
    found = list(volume.info.warnings)
    if volume.info.is_inverted:
        if window.window.low > window.window.high:
            found.append("the file says that low values are white; grey levels are turned round")
        else:
            found.append(f"the file says that low values are white; they stay black ({_direction(config)})")
    elif window.window.low > window.window.high and config.grey.window == "manifest":
        found.append("--window_manifest turns grey levels round, and the file does not ask for it")
    if shape[config.roles[0]] > min(shape):
        found.append(
            f"--thickness_axis {config.thickness_axis} is {shape[config.roles[0]]} voxels long and not the shortest "
            "axis; check the three --*_axis options"
        )
    # Pixels of one size in micrometres are square whatever the voxels are.
    edges = None if config.resize_um_per_px else volume.voxel_um
    if edges is not None and max(edges) > min(edges) * (1 + _CUBE_WITHIN):
        found.append(
            f"voxels are not cubes, {' x '.join(f'{edge:g}' for edge in edges)} um (z y x), and slices look "
            "stretched; --fit resize --resize_um_per_px evens it out"
        )
    padded = Counter(picture.row.axis for picture in plan.all_pictures if picture.cut.is_padded)
    found += [
        f"{count} {axis} tiles are larger than their slice and padded by reflection" for axis, count in padded.items()
    ]
    if window.non_finite > 0:
        grey = "black" if window.window.fill == 0 else f"grey level {window.window.fill}"
        found.append(f"{window.non_finite:.1%} of the voxels are not finite and become {grey}")
    if window.clipped_low + window.clipped_high > _CLIPPED:
        found.append(
            f"{window.clipped_low:.1%} of the voxels lie below the window and {window.clipped_high:.1%} above it; "
            "check --window"
        )
    return found


def _direction(config: SliceConfig) -> str:
    """Return the option that decided against turning grey levels round."""
    return "--window manifest" if config.grey.window == "manifest" else f"--invert {config.grey.invert}"
