"""Make a dataset of the Describable Textures Dataset, captioned ``dtd_braided`` and so on, in its own partitions.

    python -m data_prep.dtd path/to/dtd --classes braided woven --output_dir data/dtd

Give the unpacked archive, the folder around it, torchvision's root, or the archive itself (dtd-r1.0.1.tar.gz). The
pictures were collected from the web for research and carry no open licence: nothing of them is part of this project,
and the folder made here is not to be passed on.
"""

from __future__ import annotations

import difflib
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from configs.errors import InputError, UsageError
from configs.load import Positional, as_dict, command, one_line
from data_prep.folders import manifest
from data_prep.folders.dtd_archive import Archive, open_archive
from data_prep.folders.image_folder import publishable
from data_prep.folders.manifest import TRAIN, VALIDATION
from data_prep.folders.pictures import stems_of, take
from data_prep.folders.publish import check_free, publish

# The dataset's name of each split, and ours.
_SPLITS = {"train": TRAIN, "val": VALIDATION, "test": "test"}
_LOCAL_OPTIONS = {"source", "output_dir", "overwrite", "dry_run"}
_LARGEST_LIST, _LARGEST_PICTURE = 1_000_000, 20_000_000  # bytes


@dataclass(frozen=True, kw_only=True)
class DtdConfig:
    """Settings."""

    source: Positional[Path]
    """The unpacked dataset (with images and labels in it), a folder around it, or the .tar.gz archive."""
    output_dir: Path
    """Dataset folder to make."""
    overwrite: bool = False
    """Replace a dataset that is already there, once the new one is whole."""
    classes: tuple[str, ...] = ("braided",)
    """Textures to take; the word all takes every one."""
    partition: int = 1
    """Which of the ten official partitions divides the pictures."""
    splits: tuple[str, ...] = ("train", "val")
    """Official splits to take; their names are train, val and test. val becomes validation."""
    caption_template: str = "dtd_{class}"
    """Caption that is written; {class} is the texture, with spaces as it is spoken."""
    dry_run: bool = False
    """Print what would be done and stop."""

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("--classes: name at least one texture, or all")
        if not 1 <= self.partition <= 10:
            raise ValueError(f"--partition {self.partition}: must be from 1 to 10")
        if not self.splits or not set(self.splits) <= set(_SPLITS) or len(set(self.splits)) < len(self.splits):
            raise ValueError(f"--splits {' '.join(self.splits)}: name some of {', '.join(_SPLITS)}, each once")
        rest = self.caption_template.replace("{class}", "")
        if not rest.isprintable() or set(rest) & set("{}") or not self.caption_template.strip():
            raise ValueError(
                f"--caption_template {self.caption_template!r}: one line with no other field than {{class}}"
            )


def main(config: DtdConfig) -> None:
    """Read the lists, copy the pictures, verify, publish."""
    check_free(config.output_dir, overwrite=config.overwrite, mark=manifest.MANIFEST_NAME)
    archive = open_archive(config.source)
    classes = _classes(archive, config)
    names = _partition(archive, config, set(classes))
    counts = ", ".join(f"{split} {len(some)}" for split, some in names.items())
    print(f"{archive.where}: {len(classes)} textures, partition {config.partition}: {counts}")
    if config.dry_run:
        print(f"dry run: nothing was written to {config.output_dir}")
        return
    with publish(config.output_dir, overwrite=config.overwrite, mark=manifest.MANIFEST_NAME) as folder:
        records: dict[str, list[dict[str, object]]] = {}
        for split, some in names.items():
            (folder / split).mkdir()
            contents = archive.read([f"images/{name}" for name in some], _LARGEST_PICTURE)
            records[split] = []
            stems = stems_of([PurePosixPath(name).name for name in some])
            for name, stem in zip(some, stems, strict=True):
                texture = name.partition("/")[0]
                taken = take(contents[f"images/{name}"], stem, folder / split, f"{archive.where}: {name}")
                text = config.caption_template.replace("{class}", texture.replace("-", " "))
                row = {"file_name": taken.file_name, "text": text, "texture": texture}
                records[split].append(row | {"width": taken.width, "height": taken.height})
        options = {name: value for name, value in as_dict(config).items() if name not in _LOCAL_OPTIONS}
        notes = (
            "Made from the Describable Textures Dataset (Cimpoi et al., Describing Textures in the Wild, CVPR 2014), "
            "which is available for research and has no open licence. **Do not pass these pictures on.**\n\n"
        )
        publishable(folder, records, options=options, kind="dtd", title="Describable textures", notes=notes)
    print(f"{config.output_dir}: {counts} pictures. They are for your research alone; do not pass them on. Next:\n")
    train = shlex.quote(str(config.output_dir / next(iter(names))))
    print(
        "  accelerate launch finetune/lora.py --pretrained_model_name_or_path assets/tiny-sd "
        f"--train_data_dir {train} --output_dir runs/dtd"
    )


def _classes(archive: Archive, config: DtdConfig) -> list[str]:
    """Return the textures that are asked for."""
    there = sorted(
        {name.split("/")[1] for name in archive.files if name.startswith("images/") and name.count("/") == 2}
    )
    if config.classes == ("all",):
        return there
    if unknown := [name for name in config.classes if name not in there]:
        near = difflib.get_close_matches(unknown[0], there, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(there)}"
        raise UsageError(f"--classes {' '.join(unknown)}: no such texture in {archive.where}{hint}")
    return list(dict.fromkeys(config.classes))


def _partition(archive: Archive, config: DtdConfig, classes: set[str]) -> dict[str, list[str]]:
    """Return the pictures of each split, as class/file.jpg, in the order of the list."""
    lists = {split: f"labels/{split}{config.partition}.txt" for split in config.splits}
    contents = archive.read(list(lists.values()), _LARGEST_LIST)
    found: dict[str, list[str]] = {}
    for split, name in lists.items():
        try:
            lines = [line.strip() for line in contents[name].decode("utf-8").splitlines()]
        except UnicodeDecodeError:
            raise InputError(f"{archive.where}: {name} is not text") from None
        for line in lines:
            if line and (not manifest.is_inside(line) or line.count("/") != 1):
                raise InputError(f"{archive.where}: {name} names {one_line(line)!r}, which is not class/file.jpg")
        found[_SPLITS[split]] = [line for line in lines if line.partition("/")[0] in classes]
    listed = Counter(line for some in found.values() for line in some)
    if twice := [line for line, count in listed.items() if count > 1]:
        raise InputError(f"{archive.where}: partition {config.partition} lists {twice[0]} twice")
    if empty := [split for split, some in found.items() if not some]:
        raise InputError(f"{archive.where}: partition {config.partition} lists no picture for {empty[0]}")
    return found


if __name__ == "__main__":
    command(DtdConfig, main)
