"""Write a dataset in the layout of other trainers: text beside pictures, kohya's scripts, WebDataset, parquet.

    python -m data_prep.export data/weave --format kohya --resolution 512 --output_dir data/weave-kohya

Pictures are copied byte for byte; nothing is resampled. The dataset is checked first.
"""

from __future__ import annotations

import io
import json
import shlex
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from configs.errors import InputError, UsageError
from configs.load import Positional, as_dict, command
from data_prep.folders import manifest
from data_prep.folders.checks import captioned, split_folders, verify
from data_prep.folders.publish import check_free, publish

if TYPE_CHECKING:
    import pyarrow

EXPORT_NAME = "export.json"
_LOCAL_OPTIONS = {"dataset", "output_dir", "overwrite", "dry_run"}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of the export."""

    dataset: Positional[Path]
    """Folder of the dataset, or of one split."""
    output_dir: Path
    """Folder to make."""
    format: Literal["txt", "kohya", "webdataset", "parquet"] = "txt"
    """txt: pictures with a caption file beside each; kohya: that and a dataset_config for sd-scripts; webdataset: tar
    shards; parquet: shards with the pictures inside."""
    overwrite: bool = False
    """Replace an export that is already there, once the new one is whole."""
    caption_extension: str = ".txt"
    """Ending of the caption files; some scripts look for .caption."""
    resolution: int = 512
    """kohya: edge that its pictures are counted in, in px."""
    batch_size: int = 1
    """kohya: pictures a step."""
    num_repeats: int = 1
    """kohya: how often a picture counts in an epoch."""
    bucket_step: int = 64
    """kohya: edges of its buckets are multiples of this, in px."""
    shard_size: int = 1000
    """webdataset, parquet: pictures a file."""
    dry_run: bool = False
    """Print what would be done and stop."""

    def __post_init__(self) -> None:
        for name in ("resolution", "batch_size", "num_repeats", "bucket_step", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not self.caption_extension.startswith(".") or not self.caption_extension[1:].isalnum():
            raise ValueError(f"--caption_extension {self.caption_extension}: give an ending such as .txt")


def main(config: ExportConfig) -> None:
    """Check, write, publish."""
    check_free(config.output_dir, overwrite=config.overwrite, mark=EXPORT_NAME)
    if config.output_dir.resolve().is_relative_to(config.dataset.resolve()):
        raise UsageError(f"--output_dir {config.output_dir}: lies inside the dataset; name another folder")
    verdict = verify(config.dataset, decode=False)
    if verdict.problems:
        raise InputError(
            f"{config.dataset}: {len(verdict.problems)} problems, the first: {verdict.problems[0]}; "
            "python -m data_prep.verify lists them"
        )
    folders = split_folders(config.dataset)
    records = {split: captioned(folder) for split, folder in folders.items()}
    _check_names(records, config)
    counts = ", ".join(f"{split} {len(rows)}" for split, rows in records.items())
    if config.dry_run:
        print(f"dry run: would write {counts} pictures as {config.format} to {config.output_dir}")
        return
    with publish(config.output_dir, overwrite=config.overwrite, mark=EXPORT_NAME) as target:
        for split, rows in records.items():
            _WRITERS[config.format](folders[split], rows, target, split, config)
        if config.format == "txt":
            # Without the card, loaders take the text files for the data set.
            endings = sorted({Path(str(row["file_name"])).suffix for rows in records.values() for row in rows})
            body = "Pictures with a text file beside each; exported by `python -m data_prep.export`.\n"
            number = sum(map(len, records.values()))
            manifest.write_card(target, body=body, splits=records, num_pictures=number, endings=endings)
        if config.format == "kohya":
            (target / "dataset.toml").write_text(_kohya_toml(config), encoding="utf-8")
        options = {name: value for name, value in as_dict(config).items() if name not in _LOCAL_OPTIONS}
        content = {"options": options, "counts": verdict.counts, "leak": verdict.leak}
        (target / EXPORT_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"{config.output_dir}: {counts} pictures as {config.format}. Next:\n")
    print("  " + _next(config))


def _check_names(records: Mapping[str, Sequence[Mapping[str, object]]], config: ExportConfig) -> None:
    """Refuse what the format cannot hold, before anything is written."""
    for split, rows in records.items():
        stems: dict[str, str] = {}
        for row in rows:
            name = str(row["file_name"])
            stem = _flat(name).rpartition(".")[0]
            if stem in stems:
                raise InputError(
                    f"{split}: {stems[stem]} and {name} would have the same caption file; rename one of them"
                )
            stems[stem] = name
            ending = Path(name).suffix.lower()
            if config.format == "kohya" and ending not in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
                raise InputError(f"{split}/{name}: sd-scripts does not read {ending}; save it as PNG")

    endings = {Path(str(row["file_name"])).suffix.lower() for rows in records.values() for row in rows}
    if config.format == "webdataset" and len(endings) > 1:
        raise InputError(
            f"{config.dataset}: pictures of several kinds ({', '.join(sorted(endings))}) would be several columns of a "
            "WebDataset; save them as one kind"
        )


def _flat(name: str) -> str:
    """Return a file name without folders: sd-scripts looks into no folder below the one it is given."""
    return name.replace("/", "-")


def _write_txt(source: Path, rows: Sequence[dict[str, Any]], target: Path, split: str, config: ExportConfig) -> None:
    """Copy the pictures of a split and write a caption beside each."""
    folder = target / split
    folder.mkdir()
    for row in rows:
        name = _flat(row["file_name"])
        shutil.copyfile(source / row["file_name"], folder / name)
        (folder / name).with_suffix(config.caption_extension).write_text(f"{row['text']}\n", encoding="utf-8")
    if config.format == "txt":
        manifest.write_records(folder, [row | {"file_name": _flat(row["file_name"])} for row in rows])


def _kohya_toml(config: ExportConfig) -> str:
    """Return the file for ``--dataset_config``: training pictures alone, where sd-scripts would split at random."""
    names = (config.output_dir.resolve() / "train", config.output_dir.resolve() / config.dataset.resolve().name)
    folder = names[0] if (config.dataset / "train").is_dir() else names[1]
    largest = max(1024, config.resolution) // config.bucket_step * config.bucket_step
    smallest = max(1, min(256, config.resolution // 2) // config.bucket_step) * config.bucket_step
    return f"""# For sd-scripts: --dataset_config dataset.toml. Held-out pictures are not in it; do not add
# validation_split, which draws at random from neighbouring slices. Change image_dir if this folder moves.
[general]
caption_extension = {json.dumps(config.caption_extension)}
shuffle_caption = false
keep_tokens = 0
flip_aug = false
color_aug = false

[[datasets]]
resolution = {config.resolution}
batch_size = {config.batch_size}
enable_bucket = true
bucket_reso_steps = {config.bucket_step}
min_bucket_reso = {smallest}
max_bucket_reso = {largest}

  [[datasets.subsets]]
  image_dir = {json.dumps(str(folder), ensure_ascii=False)}
  num_repeats = {config.num_repeats}
"""


def _shards(rows: Sequence[Mapping[str, Any]], size: int) -> Iterator[tuple[int, Sequence[Mapping[str, Any]]]]:
    """Yield (number, rows) of each file."""
    for number, first in enumerate(range(0, len(rows), size)):
        yield number, rows[first : first + size]


def _write_webdataset(
    source: Path, rows: Sequence[Mapping[str, Any]], target: Path, split: str, config: ExportConfig
) -> None:
    """Write tar files of key.png, key.txt and key.json, without times and owners: same input, same bytes."""
    for number, some in _shards(rows, config.shard_size):
        with tarfile.open(target / f"{split}-{number:05d}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for row in some:
                # Everything behind the first dot names the column.
                stem, _, ending = _flat(row["file_name"]).rpartition(".")
                key = stem.replace(".", "-")
                _add(tar, f"{key}.{ending.lower()}", (source / row["file_name"]).read_bytes())
                _add(tar, f"{key}.txt", str(row["text"]).encode())
                _add(tar, f"{key}.json", json.dumps(dict(row)).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to an archive."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _write_parquet(
    source: Path, rows: Sequence[Mapping[str, Any]], target: Path, split: str, config: ExportConfig
) -> None:
    """Write parquet files whose column ``image`` the library datasets decodes by itself."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError("--format parquet: needs the package pyarrow; install it with: pip install datasets") from None
    shards = list(_shards(rows, config.shard_size))
    folder = target / "data"
    folder.mkdir(exist_ok=True)
    for number, some in shards:
        images = [{"bytes": (source / row["file_name"]).read_bytes(), "path": _flat(row["file_name"])} for row in some]
        columns = {name: [row[name] for row in some] for name in some[0] if name != "file_name"}
        table = pyarrow.table({"image": images} | columns)
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": _features(table)}})})
        name = f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
        pyarrow.parquet.write_table(table, folder / name, compression="none", row_group_size=100)


def _features(table: pyarrow.Table) -> dict[str, object]:
    """Return what the library datasets calls the columns."""
    import pyarrow

    found: dict[str, object] = {"image": {"_type": "Image"}}
    for field in table.schema:
        if field.name == "image":
            continue
        inner = field.type.value_type if pyarrow.types.is_list(field.type) else field.type
        value = {"dtype": str(inner).replace("double", "float64"), "_type": "Value"}
        found[field.name] = {"feature": value, "_type": "List"} if pyarrow.types.is_list(field.type) else value
    return found


def _next(config: ExportConfig) -> str:
    """Return the command that reads the export."""
    where = config.output_dir
    if config.format == "kohya":
        return f"accelerate launch train_network.py --dataset_config {shlex.quote(str(where / 'dataset.toml'))}"
    if config.format == "txt":
        return f"python -m data_prep.verify {shlex.quote(str(where))}"
    files = "*.tar" if config.format == "webdataset" else "data/*.parquet"
    loaded = f'load_dataset("{config.format}", data_files={{"train": "train-{files}"}}, streaming=True)'
    return f"in Python, in {where}: datasets.{loaded.replace('train-data/', 'data/train-')}"


_WRITERS = {"txt": _write_txt, "kohya": _write_txt, "webdataset": _write_webdataset, "parquet": _write_parquet}


if __name__ == "__main__":
    command(ExportConfig, main)
