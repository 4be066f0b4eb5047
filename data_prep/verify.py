"""Check an image folder before training: rows, pictures, captions and splits.

    python -m data_prep.verify data/weave

Works on any folder of pictures with captions, whoever made it: in ``metadata.jsonl`` or ``metadata.csv``, or in a text
file beside each picture; one folder per split, or one alone. Boxes are compared where the rows have them; without them
a leak between the splits cannot be excluded, and the verdict says so. Captions are compared with the columns ``state``
and ``axis`` where the rows have those.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError, UsageError
from configs.load import Positional, command, one_line
from data_prep.folders.checks import captioned, split_folders, verify

_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Settings of the check."""

    dataset: Positional[Path]
    """Folder of the dataset, or of one split."""
    load: bool = False
    """Load it with the library datasets, whole and streamed, and compare the number of rows and the captions."""
    dry_run: bool = False
    """Say what would be checked and stop."""


def _load_problems(dataset: Path, folders: dict[str, Path], cache: Path) -> list[str]:
    """Load the folder as trainers do, whole and streamed, and compare what arrives with the rows."""
    try:
        import datasets
    except ImportError:
        raise UsageError("--load: needs the package datasets; install it with: pip install datasets") from None
    problems = []
    datasets.disable_progress_bars()
    for split, folder in folders.items():
        texts = sorted(str(record.get("text")) for record in captioned(folder))
        for how, streaming in (("whole", False), ("streamed", True)):
            try:
                loaded = datasets.load_dataset(
                    "imagefolder", data_dir=str(folder), split="train", streaming=streaming, cache_dir=str(cache)
                )
                found = sorted(str(row.get("text")) for row in loaded.remove_columns("image"))
            # Whatever the library raises, a trainer would meet it too.
            except Exception as error:
                problems.append(f"{split}: datasets cannot load it {how} ({one_line(str(error))[:200]})")
                continue
            if found != texts:
                problems.append(
                    f"{split}: datasets loads {len(found)} captions {how}, other than the {len(texts)} here"
                )
    return problems


def main(config: VerifyConfig) -> None:
    """Check the folder, print what was found, and fail if anything was."""
    if config.dry_run:
        folders = split_folders(config.dataset)
        print(f"dry run: would check {', '.join(f'{split} in {path}' for split, path in folders.items())}")
        return
    verdict = verify(config.dataset)
    problems = list(verdict.problems)
    if config.load and not problems:
        with tempfile.TemporaryDirectory(prefix="verify-") as cache:
            problems += _load_problems(config.dataset, split_folders(config.dataset), Path(cache))
    for problem in problems[:_LISTED]:
        print(one_line(problem))
    if len(problems) > _LISTED:
        print(f"... and {len(problems) - _LISTED} more")
    if problems:
        raise InputError(f"{config.dataset}: {len(problems)} problems, listed above")
    counts = ", ".join(f"{split} {count}" for split, count in verdict.counts.items())
    print(f"{config.dataset}: nothing wrong ({counts} pictures); {verdict.leak}")


if __name__ == "__main__":
    command(VerifyConfig, main)
