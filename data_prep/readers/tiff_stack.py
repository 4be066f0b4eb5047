"""Which pages of a TIFF file are the planes of the volume, and in which order.

Metadata of ImageJ, OME and tifffile is believed only where it agrees with the pages that are there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tifffile

from configs.errors import InputError
from data_prep.readers.info import ReadConfig
from data_prep.readers.places import Place
from data_prep.readers.tiff_metadata import Axes, axes_of
from data_prep.readers.tiff_pages import TiffPage


class Stack(NamedTuple):
    """The pages that are the planes of a volume; ``num_planes`` follow one another from a single page if 1 page."""

    pages: list[TiffPage]
    num_planes: int
    warnings: tuple[str, ...]
    label: str
    start_plane: int = 0  # first plane and distance between planes within a block that one directory heads
    step: int = 1


def stack_of(path: Place, tif: tifffile.TiffFile, pages: list[TiffPage], num_bytes: int, config: ReadConfig) -> Stack:
    """Return the pages that are the planes of the volume, or say why they are not one volume."""
    full = [page for page in pages if not page.is_reduced] or pages
    runs: list[list[TiffPage]] = []
    for page in full:
        if runs and runs[-1][-1].kind == page.kind:
            runs[-1].append(page)
        else:
            runs.append([page])
    declared = axes_of(path, tif)
    if len(runs) == 1 and len(declared) > 1 and sum(one.num_planes for one in declared) == len(full) > len(declared):
        ends = np.cumsum([one.num_planes for one in declared])
        runs = [full[end - one.num_planes : end] for one, end in zip(declared, ends.tolist(), strict=True)]
    warnings = []
    if config.series is not None:
        if config.series >= max(len(runs), len(declared)):
            raise InputError(f"{path}: --series {config.series}: the file has {_listed(runs)}")
        chosen = config.series if config.series < len(runs) else 0
    else:
        chosen = _largest(path, runs)
    run = runs[chosen]
    if len(runs) > 1:
        warnings.append(f"{_listed([one for one in runs if one is not run])} in the file are left out")
    if len(full) < len(pages) and not config.level:
        warnings.append(f"{len(pages) - len(full)} smaller copies in the file are left out")
    axes = _declared(path, declared, runs, chosen, config)
    if run[0].kind.samples > 1 and not config.force_axes and len(run) == 1:
        sizes = run[0].kind
        raise InputError(
            f"{path}: this file says it is one RGB picture ({sizes.rows}x{sizes.columns}, {sizes.samples} samples), "
            f"not {sizes.samples} slices: holds colour pictures; save it again with photometric='minisblack', or pass "
            "--force_axes ZYX if its three axes are z, y and x"
        )
    stack = Stack(run, len(run), (), "") if axes is None else _declared_stack(path, axes, run, num_bytes, config)
    stack = stack._replace(warnings=(*warnings, *stack.warnings))
    return _smaller(path, tif, stack, pages, config.level) if config.level else stack


def _largest(path: Place, runs: list[list[TiffPage]]) -> int:
    """Return the run of pages that is the volume, beside thumbnails; all others must be clearly smaller."""
    if len(runs) == 1:
        return 0
    chosen = max(range(len(runs)), key=lambda number: sum(page.kind.rows * page.kind.columns for page in runs[number]))
    volume = runs[chosen][0].kind
    for number, run in enumerate(runs):
        is_thumbnail = 3 * run[0].kind.rows <= 2 * volume.rows and 3 * run[0].kind.columns <= 2 * volume.columns
        if number != chosen and not is_thumbnail:
            is_alike = len({run[0].kind for run in runs}) == 1
            what = "holds more than one volume" if is_alike else "pages differ in size or type"
            raise InputError(f"{path}: {what} ({_listed(runs)}); keep one per file, or choose by --series")
    return chosen


def _listed(runs: Sequence[Sequence[TiffPage]]) -> str:
    """Name stacks of pages, with the numbers --series takes."""
    words = [f"{len(run)} of {run[0].kind.rows}x{run[0].kind.columns} {run[0].kind.dtype.name}" for run in runs[:6]]
    return ", ".join(words) + (" ..." if len(runs) > 6 else "")


def _declared(
    path: Place, declared: list[Axes], runs: list[list[TiffPage]], chosen: int, config: ReadConfig
) -> Axes | None:
    """Return what the metadata says of the chosen pages, after checking it against what is there."""
    if not declared:
        return None
    if all(one.num_planes == 1 for one in declared) and len(declared) > 1:
        return None  # pages that each claim to be a series of their own
    if len(declared) == 1 and len(runs) == 1:
        return declared[0]
    if len(declared) == len(runs) and [one.num_planes for one in declared] == [len(run) for run in runs]:
        return declared[chosen]
    if len(declared) > 1 and config.series is None:
        several = ", ".join(one.words for one in declared)
        raise InputError(
            f"{path}: holds more than one volume ({len(declared)} series: {several}); choose one with --series"
        )
    if len(declared) > 1:
        return declared[config.series or 0]
    return None if len(runs) > 1 and declared[0].num_planes == 1 else declared[0]


def _declared_stack(path: Place, axes: Axes, run: list[TiffPage], num_bytes: int, config: ReadConfig) -> Stack:
    """Put the pages in the order that the metadata gives, and choose among channels and time steps."""
    stacked = {name: size for name, size in zip(axes.names, axes.sizes, strict=True) if name not in "YXS"}
    plane = [size for name, size in zip(axes.names, axes.sizes, strict=True) if name in "YX"]
    if axes.names[-1:] != "S" and axes.names[-2:] != "YX" and axes.sizes[-1] == 1:
        raise InputError(
            f"{path}: the last axis has one voxel ({'x'.join(map(str, axes.sizes))}), so there are no planes"
        )
    kind = run[0].kind
    if kind.depth > 1 or kind.samples > 1:
        return Stack(run, len(run), (), axes.names)
    if sorted(plane) != sorted((kind.rows, kind.columns)) or axes.names.rstrip("S")[-2:] != "YX":
        raise InputError(f"{path}: the metadata says {axes.words} and the pages are {kind.rows}x{kind.columns}")
    numbers = np.arange(math.prod(stacked.values())).reshape(tuple(stacked.values()))
    chosen = {name.upper(): index for name, index in (config.select or {}).items()}
    for name, index in chosen.items():
        if index >= stacked.get(name, 0):
            have = ", ".join(f"{axis.lower()} {size}" for axis, size in stacked.items())
            raise InputError(f"{path}: --select {name.lower()}={index}: the file has {have}")
    numbers = numbers[tuple(chosen.get(name, slice(None)) for name in stacked)]
    left = {name: size for name, size in stacked.items() if name not in chosen}
    long = [name for name, size in left.items() if size > 1]
    if len(long) > 1:
        sizes = ", ".join(f"{name.lower()} {size}" for name, size in left.items() if size > 1)
        other = next((name for name in long if name != "Z"), long[0]).lower()
        raise InputError(f"{path}: holds more than one volume ({sizes}); choose with --select {other}=0")
    warnings: tuple[str, ...] = ()
    if long and long[0] in "TC":
        what = {"T": "time steps", "C": "channels"}[long[0]]
        warnings = (f"the file calls its {left[long[0]]} planes {what}; they are taken as z",)
    order = [int(number) for number in numbers.ravel()]
    total = math.prod(stacked.values())
    pages = run if axes.pages is None else _by_number(path, axes.pages, run)
    label = "".join(name for name in axes.names if name != "S")
    if len(pages) == total:
        return Stack([pages[number] for number in order], len(order), warnings, label)
    if len(pages) == 1:
        # One directory heads a block of planes, as ImageJ writes beyond 4 GB.
        page, size = pages[0], kind.rows * kind.columns * kind.dtype.itemsize
        if page.start is None:
            raise InputError(f"{path}: is truncated: {total} planes are declared and one page is there")
        if page.start + total * size > num_bytes:
            raise InputError(
                f"{path}: is truncated: {page.start + total * size} bytes are declared and {num_bytes} are there"
            )
        step = order[1] - order[0] if len(order) > 1 else 1
        return Stack([page], len(order), warnings, label, start_plane=order[0], step=step)
    raise InputError(
        f"{path}: the metadata says {axes.words}, {total} planes, and {len(pages)} pages are there; the file is "
        "truncated or damaged"
    )


def _by_number(path: Place, numbers: Sequence[int | None], run: list[TiffPage]) -> list[TiffPage]:
    """Return pages in the order that OME metadata gives."""
    pages = {page.number: page for page in run}
    if None in numbers or len(set(numbers)) < len(numbers) or set(numbers) != set(pages):
        raise InputError(f"{path}: is truncated or damaged: its OME metadata names other pages than are there")
    return [pages[number] for number in numbers if number is not None]


def _smaller(path: Place, tif: tifffile.TiffFile, stack: Stack, pages: list[TiffPage], level: int) -> Stack:
    """Return the same planes at a smaller size: from the sub-directories, or from pages marked as reduced."""
    full = stack.pages[0].kind
    below = [page.sub_pages(tif) for page in stack.pages]
    sizes = sorted({page.kind for page in pages if page.is_reduced}, key=lambda kind: -kind.rows * kind.columns)
    if min(map(len, below)) >= level:
        smaller = [several[level - 1] for several in below]
    elif not any(below) and len(sizes) >= level:
        smaller = [page for page in pages if page.kind == sizes[level - 1] and page.is_reduced]
    else:
        raise InputError(
            f"{path}: --level {level}: the file has {max(min(map(len, below)), len(sizes))} smaller copies"
        )
    kind = smaller[0].kind
    if len(smaller) != stack.num_planes or any(page.kind != kind for page in smaller) or kind.rows > full.rows:
        raise InputError(f"{path}: --level {level}: the smaller copies are not one for each plane")
    return stack._replace(pages=smaller)
