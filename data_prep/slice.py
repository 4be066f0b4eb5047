"""Cut volumes into captioned slices of three directions: a training folder, split without leaks and verified.

    python -m data_prep.slice --volumes dry=dry.tif dry_compacted=dc.tif injected=inj.tif --output_dir data/weave

The settings are in ``config.py``, what they mean for each volume in ``plan.py``.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from configs.errors import TisserandError
from configs.load import as_dict, command, save
from data_prep import manifest, png
from data_prep.card import card, count_pictures, entry
from data_prep.config import AXES, SliceConfig
from data_prep.filters import count_near_duplicates, is_blank, thumbnail
from data_prep.manifest import SliceRow
from data_prep.plan import Picture, Plan, make_plans, num_workers, queue_length
from data_prep.planes import scan
from data_prep.split import TRAIN
from data_prep.verify import verify
from prompts.vocabulary import DEFAULT, Vocabulary, read_vocabulary

# Where things lie and how fast they are made is no property of the data.
_LOCAL_OPTIONS = {"volumes", "output_dir", "overwrite", "vocabulary", "memory_gb", "workers", "dry_run"}
_GB = 10**9

# What encoding a slice showed: blank pictures cut from it, and the slice in small.
_Seen = tuple[int, NDArray[np.float32]]


def main(config: SliceConfig) -> None:
    """Plan, cut, verify and publish."""
    manifest.check_free(config.output_dir, overwrite=config.overwrite, mark=manifest.MANIFEST_NAME)
    words = read_vocabulary(config.vocabulary) if config.vocabulary else DEFAULT
    plans = make_plans(config, words)
    for warning in _warnings(plans, config):
        print(f"warning: {warning}", file=sys.stderr)
    print(_plan_text(plans))
    if config.dry_run:
        print(f"dry run: nothing was written to {config.output_dir}")
        return
    _check_disk(config.output_dir, plans)
    with manifest.publish(config.output_dir, overwrite=config.overwrite, mark=manifest.MANIFEST_NAME) as folder:
        rows: dict[str, list[SliceRow]] = {}
        for picture in (picture for plan in plans for picture in plan.all_pictures):
            rows.setdefault(picture.split, []).append(picture.row)
        for split, some in rows.items():
            (folder / split).mkdir()
            manifest.write_rows(folder / split, some)
        entries = [_cut(plan, folder, config) for plan in plans]
        _write_papers(folder, entries, rows, config, words)
        verdict = verify(folder, decode=False)
        if verdict.problems:
            raise TisserandError(f"the written folder failed its own check: {verdict.problems[0]}")
    print(_counts_text(entries, rows))
    print(f"{config.output_dir}: {sum(map(len, rows.values()))} pictures written and verified. Next:\n")
    print(
        "  accelerate launch finetune/lora.py --pretrained_model_name_or_path assets/tiny-sd "
        f"--train_data_dir {shlex.quote(str(config.output_dir / TRAIN))} --output_dir runs/lora"
    )


def _cut(plan: Plan, folder: Path, config: SliceConfig) -> dict[str, Any]:
    """Write the pictures of one volume and return its entry of the manifest."""
    volume, num_non_finite = plan.volume, dict[int, int]()

    def to_uint8(z: int, plane: NDArray[Any]) -> NDArray[np.uint8]:
        if plane.dtype.kind == "f":
            num_non_finite[z] = plane.size - int(np.count_nonzero(np.isfinite(plane)))
        return volume.window.window.to_uint8(plane)

    seen: dict[tuple[int, int], _Seen] = {}
    waiting: deque[tuple[tuple[int, int], Future[_Seen]]] = deque()
    progress = tqdm(total=len(plan.pictures), desc=f"slicing {volume.name}", unit="slice", disable=None)
    stop = threading.Event()

    def collect(limit: int) -> None:
        while len(waiting) > limit:
            key, job = waiting.popleft()
            seen[key] = job.result()
            progress.update()

    with progress, ThreadPoolExecutor(num_workers(config)) as pool:
        digest = pool.submit(manifest.sha256_of, volume.info.path)
        try:
            for axis, index, stored in scan(volume.source, to_uint8, volume.wanted, plan.budget):
                rows_axis, columns_axis = (other for other in config.roles if other != axis)
                picture = stored if rows_axis < columns_axis else stored.T
                job = pool.submit(_encode, picture, plan.pictures[axis, index], folder, stop)
                waiting.append(((axis, index), job))
                collect(queue_length(config))
            collect(0)
        except BaseException:
            stop.set()
            raise
    by_axis = {
        name: [seen[axis, index][1] for index in volume.wanted[axis]]
        for name, axis in zip(AXES, config.roles, strict=True)
    }
    return entry(
        plan,
        digest=digest.result(),
        num_non_finite=sum(num_non_finite.values()),
        num_blank=sum(num_blank for num_blank, _ in seen.values()),
        num_near_duplicates={name: count_near_duplicates(thumbnails) for name, thumbnails in by_axis.items()},
    )


def _encode(whole: NDArray[np.uint8], pictures: Iterable[Picture], folder: Path, stop: threading.Event) -> _Seen:
    """Write the pictures of one slice."""
    num_blank = 0
    for picture in pictures:
        if stop.is_set():
            break
        pixels = picture.cut.apply(whole)
        (folder / picture.split / picture.row.file_name).write_bytes(png.encode(pixels))
        num_blank += is_blank(pixels)
    return num_blank, thumbnail(whole)


def _write_papers(
    folder: Path,
    entries: Sequence[Mapping[str, Any]],
    rows: Mapping[str, Sequence[SliceRow]],
    config: SliceConfig,
    words: Vocabulary,
) -> None:
    """Write manifest, card and settings."""
    counts = {split: count_pictures(some) for split, some in rows.items()}
    manifest.write_manifest(
        folder,
        {
            "schema": 1,
            "kind": "slices",
            "volumes": entries,
            "options": {name: value for name, value in as_dict(config).items() if name not in _LOCAL_OPTIONS},
            "vocabulary": {"prefix": words.prefix, "states": words.states, "axes": words.axes},
            "counts": {split: {f"{s} {a}": n for (s, a), n in some.items()} for split, some in counts.items()},
        },
    )
    num_pictures = sum(map(len, rows.values()))
    manifest.write_card(folder, body=card(entries, rows), splits=rows, num_pictures=num_pictures)
    save(config, folder / "config.yaml")


def _check_disk(output_dir: Path, plans: Sequence[Plan]) -> None:
    """Fail before the work is done if the pictures cannot fit; noisy slices hardly compress."""
    parents = (output_dir.resolve(), *output_dir.resolve().parents)
    existing = next(path for path in parents if path.exists())
    needed, free = _num_bytes(plans), shutil.disk_usage(existing).free
    if needed > free:
        raise TisserandError(
            f"{existing}: {needed / _GB:.1f} GB are needed and {free / _GB:.1f} GB are free on the disk"
        )


def _num_bytes(plans: Sequence[Plan]) -> int:
    """Return the bytes of all pictures, uncompressed."""
    return sum(picture.row.width * picture.row.height for plan in plans for picture in plan.all_pictures)


# ---- What is printed ----


def _plan_text(plans: Sequence[Plan]) -> str:
    """Return what will be read and written."""
    lines = []
    for plan in plans:
        info, estimate, region = plan.volume.info, plan.volume.window, plan.volume.region
        clipped = estimate.clipped_low + estimate.clipped_high
        splits = Counter(picture.split for picture in plan.all_pictures)
        lines.append(
            f"{plan.volume.name}: {'x'.join(map(str, info.shape))} {info.dtype}, {info.num_bytes / 1e6:.0f} MB, "
            f"{info.storage}; window {estimate.window.low:g} to {estimate.window.high:g}, {clipped:.2%} clipped; "
            f"passes {plan.num_passes}; {', '.join(f'{split} {count}' for split, count in splits.items())}"
        )
        if region is not None:
            lines.append(
                f"  cut along {'zyx'[region.axis]}: train {region.train[0]} to {region.train[1]}, "
                f"guard of {region.guard[1] - region.guard[0]}, "
                f"held out {region.validation[0]} to {region.validation[1]}"
            )
    num_pictures = sum(len(plan.all_pictures) for plan in plans)
    return "\n".join([*lines, f"{num_pictures} pictures, {_num_bytes(plans) / _GB:.2f} GB before compression"])


def _counts_text(entries: Sequence[Mapping[str, Any]], rows: Mapping[str, Sequence[SliceRow]]) -> str:
    """Return pictures per state, axis and split, a line each, and what a filter would find."""
    counts = {split: count_pictures(some) for split, some in rows.items()}
    lines = []
    for state, axis in dict.fromkeys(key for some in counts.values() for key in some):
        numbers = "  ".join(f"{split} {counts[split][state, axis]:5d}" for split in rows)
        lines.append(f"  {state:<14} {axis:<10} {numbers}")
    num_blank = sum(one["num_blank_pictures"] for one in entries)
    num_same = sum(sum(one["num_near_duplicate_slices"].values()) for one in entries)
    lines.append(f"nothing was dropped: {num_blank} blank pictures and {num_same} slices like their neighbour are kept")
    return "\n".join(lines)


def _warnings(plans: Sequence[Plan], config: SliceConfig) -> list[str]:
    """Return what a user should know before the slices are used, a line each."""
    found = []
    for plan in plans:
        volume, shape = plan.volume, plan.volume.info.shape
        found += [f"{volume.name}: {warning}" for warning in volume.info.warnings]
        if shape[config.roles[0]] > min(shape):
            found.append(
                f"{volume.name}: --thickness_axis {config.thickness_axis} is {shape[config.roles[0]]} voxels long and "
                "not the shortest axis; check the three --*_axis options"
            )
        padded = Counter(picture.row.axis for picture in plan.all_pictures if picture.cut.is_padded)
        found += [
            f"{volume.name}: {count} {axis} tiles are larger than their slice and padded by reflection"
            for axis, count in padded.items()
        ]
        if volume.window.non_finite > 0:
            found.append(f"{volume.name}: {volume.window.non_finite:.1%} of the voxels are not finite and become black")
    unknown = [plan.volume.name for plan in plans if plan.volume.voxel_um is None]
    if 0 < len(unknown) < len(plans):
        found.append(f"no voxel size is known for {', '.join(unknown)}; um_per_px is left out of all rows")
    return found


if __name__ == "__main__":
    command(SliceConfig, main)
