"""What is left out of a dataset, why, and how much of it there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from configs.errors import NothingLeftError
from data_prep.slicing.config import AXES, SliceConfig
from data_prep.slicing.cut import Found
from data_prep.slicing.filters import near_duplicates
from data_prep.slicing.plan import Plan, PlannedPicture
from data_prep.slicing.survey import slice_step


@dataclass(frozen=True, kw_only=True)
class Drops:
    """What became of the slices of one volume.

    Attributes:
        kept: the pictures that stay, in their order.
        left_out: the pictures that go.
        blank: axis -> pictures that show nothing.
        near_duplicates: axis -> slices, in stored voxels, that are like the last one kept before them.
        reasons: reason -> axis -> slices, or pictures for ``blank``, that are not in the dataset.
    """

    kept: list[PlannedPicture]
    left_out: list[PlannedPicture]
    blank: dict[str, int]
    near_duplicates: dict[str, list[int]]
    reasons: dict[str, dict[str, int]]


def drops_of(plan: Plan, found: Found, config: SliceConfig) -> Drops:
    """Sort the pictures of a volume into those that stay and those that go.

    Raises:
        NothingLeftError: no picture of a direction stays in a split that should have some.
    """
    volume, filters = plan.volume, config.filters
    same: dict[str, list[int]] = {}
    kept: list[PlannedPicture] = []
    left_out: list[PlannedPicture] = []
    blank = Counter[str]()
    for name, axis in zip(AXES, config.roles, strict=True):
        same[name] = _near_duplicates(plan, found, axis, filters.dedupe_above)
        for index in volume.wanted[axis]:
            pictures = plan.pictures[axis, index]
            is_same = filters.dedupe and index in set(same[name])
            for picture in pictures:
                is_blank = picture.row.file_name in found.blank
                blank[name] += is_blank
                (left_out if is_same or (filters.drop_blank and is_blank) else kept).append(picture)
    planned = Counter((picture.split, picture.row.axis) for picture in plan.all_pictures)
    stays = Counter((picture.split, picture.row.axis) for picture in kept)
    for split, name in planned:
        if not stays[split, name]:
            raise NothingLeftError(
                f"no {name} picture of volume '{volume.name}' is left in {split}, of {planned[split, name]}: "
                f"{blank[name]} are blank (--blank_below {filters.blank_below:g}, --least_content "
                f"{filters.least_content:g}), {len(same[name])} slices are like their neighbour "
                f"(--dedupe_above {filters.dedupe_above:g}); move these or leave a filter out"
            )
    reasons = _not_taken(plan, config)
    if filters.drop_blank:
        reasons["blank pictures"] = dict(blank)
    if filters.dedupe:
        reasons["near copies of a neighbour"] = {name: len(some) for name, some in same.items()}
    origin = dict(zip(AXES, (volume.origin[axis] for axis in config.roles), strict=True))
    return Drops(
        kept=kept,
        left_out=left_out,
        blank={name: blank[name] for name in AXES},
        near_duplicates={name: [index + origin[name] for index in some] for name, some in same.items()},
        reasons={reason: {name: n for name, n in some.items() if n} for reason, some in reasons.items()},
    )


def _near_duplicates(plan: Plan, found: Found, axis: int, above: float) -> list[int]:
    """Return the slices like the last one kept of their split: a copy in training is no reason to hold less out."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for index in plan.volume.wanted[axis]:
        splits = tuple(dict.fromkeys(picture.split for picture in plan.pictures[axis, index]))
        groups.setdefault(splits, []).append(index)
    return sorted(
        numbers[position]
        for numbers in groups.values()
        for position in near_duplicates([found.thumbnails[axis, index] for index in numbers], above)
    )


def _not_taken(plan: Plan, config: SliceConfig) -> dict[str, dict[str, int]]:
    """Count the slices that were never cut, by reason and direction."""
    volume = plan.volume
    reasons: dict[str, dict[str, int]] = {"outside the part that is cut": {}, "stride": {}, "guard slab": {}}
    for name, axis in zip(AXES, config.roles, strict=True):
        if name not in config.slice_axes:
            continue
        length = volume.info.shape[axis]
        taken = -(-length // slice_step(length, config))
        reasons["outside the part that is cut"][name] = volume.stored_shape[axis] - length
        reasons["stride"][name] = length - taken
        reasons["guard slab"][name] = taken - len(volume.wanted[axis])
    bad = {name: 0 for name in AXES}
    for name, axis in zip(AXES, config.roles, strict=True):
        bad[name] = sum(not plan.pictures[axis, index] for index in volume.wanted[axis])
    return reasons | {"planes that cannot be decoded": bad}


def total(drops: Sequence[Drops]) -> dict[str, int]:
    """Return what was left out of all volumes together, by reason."""
    found = Counter[str]()
    for one in drops:
        for reason, some in one.reasons.items():
            found[reason] += sum(some.values())
    return {reason: count for reason, count in found.items() if count}
