"""Cut volumes into captioned slices of three directions: a training folder, split without leaks and verified.

    python -m data_prep.slice --volumes dry=dry.tif dry_compacted=dc.tif injected=inj.tif --output_dir data/weave

The settings are in ``config.py``, what they mean for each volume in ``plan.py``.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from configs.errors import TisserandError, UsageError
from configs.load import as_dict, command, save
from data_prep.folders import manifest
from data_prep.folders.checks import verify
from data_prep.folders.manifest import TRAIN, SliceRow
from data_prep.folders.publish import check_free, publish
from data_prep.page.render import REPORT_NAME, render
from data_prep.slicing.card import card, count_pictures, entry, notices
from data_prep.slicing.config import SliceConfig
from data_prep.slicing.cut import Found, joined, tasks_of
from data_prep.slicing.drops import drops_of, total
from data_prep.slicing.plan import Plan, make_plans
from data_prep.slicing.planes import num_workers
from data_prep.slicing.spread import Cluster, cut_here, cut_in_processes
from prompts.vocabulary import DEFAULT, OF_A_DATASET, Vocabulary, read_vocabulary

# Where things lie and how fast they are made is no property of the data.
_LOCAL_OPTIONS = {
    "volumes", "output_dir", "overwrite", "vocabulary", "memory_gb", "workers", "processes", "scheduler", "dry_run",
    "caption_tokenizer", "window_manifest",
}  # fmt: skip
_GB = 10**9
_LISTED_CAPTIONS = 20


def main(config: SliceConfig) -> None:
    """Plan, cut, verify and publish."""
    check_free(config.output_dir, overwrite=config.overwrite, mark=manifest.MANIFEST_NAME)
    words = _words(config)
    if config.dry_run:
        _show(make_plans(config, words), config)
        print(f"dry run: nothing was written to {config.output_dir}")
        return
    with ExitStack() as stack:
        # The folder is taken first: a second run into it has to learn so before it works for an hour.
        folder = stack.enter_context(
            publish(config.output_dir, overwrite=config.overwrite, mark=manifest.MANIFEST_NAME)
        )
        cluster = stack.enter_context(Cluster(config.scheduler)) if config.scheduler else None
        plans = make_plans(config, words)
        _show(plans, config)
        _check_disk(config.output_dir, plans)
        for split in {picture.split for plan in plans for picture in plan.all_pictures}:
            (folder / split).mkdir()
        found = _cut(plans, folder, config, cluster)
        drops = [drops_of(plan, one, config) for plan, one in zip(plans, found, strict=True)]
        for picture in (picture for one in drops for picture in one.left_out):
            (folder / picture.split / picture.row.file_name).unlink()
        rows: dict[str, list[SliceRow]] = {}
        for picture in sorted((p for one in drops for p in one.kept), key=lambda picture: picture.split != TRAIN):
            rows.setdefault(picture.split, []).append(picture.row)
        for split, some in rows.items():
            manifest.write_rows(folder / split, some)
        entries = [entry(*parts, config) for parts in zip(plans, found, drops, strict=True)]
        _write_papers(folder, entries, rows, config, words)
        verdict = verify(folder, decode=False)
        if verdict.problems:
            raise TisserandError(f"the written folder failed its own check: {verdict.problems[0]}")
        (folder / REPORT_NAME).write_text(render(folder, verdict), encoding="utf-8")
    print(_counts_text(entries, rows))
    left_out = ", ".join(f"{reason} {count}" for reason, count in total(drops).items())
    print(f"left out: {left_out or 'nothing'}")
    print(f"{config.output_dir}: {sum(map(len, rows.values()))} pictures written and verified; report.html shows them.")
    print("Next:\n")
    print(
        "  accelerate launch finetune/lora.py --pretrained_model_name_or_path assets/tiny-sd "
        f"--train_data_dir {shlex.quote(str(config.output_dir / TRAIN))} --output_dir runs/lora"
    )


def _words(config: SliceConfig) -> Vocabulary:
    """Return the words of the captions: the file's, with what was typed."""
    words = read_vocabulary(config.vocabulary) if config.vocabulary else DEFAULT
    words = dataclasses.replace(
        words,
        identifier=words.identifier if config.identifier is None else config.identifier,
        template=words.template if config.caption_template is None else config.caption_template,
    )
    if config.identifier and "{identifier}" not in words.template:
        raise UsageError(
            f"--identifier {config.identifier}: the caption {words.template!r} has no field {{identifier}} for it"
        )
    return words


def _cut(plans: Sequence[Plan], folder: Path, config: SliceConfig, cluster: Cluster | None) -> list[Found]:
    """Write all pictures, in shares of the work."""
    num_parts = cluster.num_workers if cluster else config.processes
    tasks = tasks_of(
        plans,
        # Another machine has its own current folder.
        folder.resolve(),
        roles=config.roles,
        num_parts=num_parts,
        num_threads=num_workers(config),
        filters=config.filters,
    )
    if cluster:
        found = cluster.cut(tasks)
    elif config.processes > 1:
        found = cut_in_processes(tasks, config.processes)
    else:
        found = cut_here(tasks)
    whole = joined(found)
    return [whole[number] for number in range(len(plans))]


def _show(plans: Sequence[Plan], config: SliceConfig) -> None:
    """Print warnings, the plan, and how long the captions are."""
    for warning in _warnings(plans, config):
        print(f"warning: {warning}", file=sys.stderr)
    print(_plan_text(plans))
    if config.caption_tokenizer is not None:
        _show_tokens(plans, config.caption_tokenizer)


def _show_tokens(plans: Sequence[Plan], model: str) -> None:
    """Print the pieces of every caption, or of the longest ones if each slice has its own."""
    from prompts.tokenizer import load_tokenizer, split, table

    tokenizer = load_tokenizer(model)
    captions = dict.fromkeys(picture.row.text for plan in plans for picture in plan.all_pictures)
    splits = [split(tokenizer, text) for text in captions]
    splits.sort(key=lambda one: -len(one.pieces))
    print(table(splits[:_LISTED_CAPTIONS]))
    if len(splits) > _LISTED_CAPTIONS:
        print(f"... and {len(splits) - _LISTED_CAPTIONS} captions that are not longer")
    cut_off = sum(bool(one.cut_off) for one in splits)
    if cut_off:
        print(
            f"warning: {cut_off} of {len(splits)} captions are longer than the {splits[0].limit} pieces that the text "
            "encoder reads; their ends are lost",
            file=sys.stderr,
        )


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
            "vocabulary": _plain(words),
            "counts": {split: {f"{s} {a}": n for (s, a), n in some.items()} for split, some in counts.items()},
        },
    )
    num_pictures = sum(map(len, rows.values()))
    manifest.write_card(folder, body=card(entries, rows), splits=rows, num_pictures=num_pictures)
    save(config, folder / "config.yaml")
    if words != DEFAULT:
        # For --vocabulary of the checks, which have to know the same words.
        (folder / OF_A_DATASET).write_text(yaml.safe_dump(_plain(words), sort_keys=False), encoding="utf-8")


def _plain(words: Vocabulary) -> dict[str, Any]:
    """Return a vocabulary as it stands in a file."""
    return dataclasses.asdict(words) | {"states": {name: list(some) for name, some in words.states.items()}}


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
        if info.shape != plan.volume.stored_shape:
            ranges = ", ".join(f"{letter} {a} to {b}" for letter, (a, b) in zip("zyx", plan.volume.box, strict=True))
            lines.append(f"  of {'x'.join(map(str, plan.volume.stored_shape))}, cut {ranges}")
        for one in [region] if region is not None else plan.volume.blocks.values():
            at = plan.volume.origin[one.axis]
            lines.append(
                f"  cut along {'zyx'[one.axis]}: train {one.train[0] + at} to {one.train[1] + at}, "
                f"guard of {one.guard[1] - one.guard[0]}, "
                f"held out {one.validation[0] + at} to {one.validation[1] + at}"
            )
    num_pictures, num_bytes = sum(len(plan.all_pictures) for plan in plans), _num_bytes(plans)
    size = f"{num_bytes / _GB:.2f} GB" if num_bytes >= _GB else f"{num_bytes / 1e6:.1f} MB"
    return "\n".join([*lines, f"{num_pictures} pictures, {size} before compression"])


def _counts_text(entries: Sequence[Mapping[str, Any]], rows: Mapping[str, Sequence[SliceRow]]) -> str:
    """Return pictures per state, axis and split, a line each, and what a filter would find."""
    counts = {split: count_pictures(some) for split, some in rows.items()}
    lines = []
    for state, axis in dict.fromkeys(key for some in counts.values() for key in some):
        numbers = "  ".join(f"{split} {counts[split][state, axis]:5d}" for split in rows)
        lines.append(f"  {state:<14} {axis:<10} {numbers}")
    lines.append("how many of the slices are independent (N / (1 + 2 sum of their correlations)):")
    for one in entries:
        for axis, found in one["audit"].items():
            lines.append(
                f"  {one['name']:<14} {axis:<10} {found['effective_number']:6.0f} of {found['num_slices']:5d}; "
                f"correlation length {found['correlation_length']} voxels"
            )
    num_blank = sum(one["num_blank_pictures"] for one in entries)
    num_same = sum(sum(one["num_near_duplicate_slices"].values()) for one in entries)
    lines.append(f"the filters find {num_blank} blank pictures and {num_same} slices like their neighbour")
    return "\n".join(lines)


def _warnings(plans: Sequence[Plan], config: SliceConfig) -> list[str]:
    """Return what a user should know before the slices are used, a line each."""
    found = [f"{plan.volume.name}: {notice}" for plan in plans for notice in notices(plan, config)]
    if config.split == "index" and len(config.slice_axes) > 1:
        found.append(
            "--split index: slices of different directions cross, so held-out slices share lines of voxels with those "
            "for training; --split region has no such leak"
        )
    unknown = [plan.volume.name for plan in plans if plan.volume.voxel_um is None]
    if 0 < len(unknown) < len(plans):
        found.append(f"no voxel size is known for {', '.join(unknown)}; um_per_px is left out of all rows")
    return found


if __name__ == "__main__":
    command(SliceConfig, main)
