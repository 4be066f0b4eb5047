"""A folder of captioned pictures, published whole."""

from __future__ import annotations

from pathlib import Path

from configs.errors import InputError, TisserandError
from data_prep.folders import manifest
from data_prep.folders.checks import verify


def publishable(
    folder: Path,
    records: dict[str, list[dict[str, object]]],
    *,
    options: dict[str, object],
    kind: str,
    title: str,
    notes: str = "",
) -> None:
    """Write rows, manifest and card of a folder of pictures, and check it.

    Raises:
        TisserandError: the folder fails the check.
    """
    for split, rows in records.items():
        manifest.write_records(folder / split, rows)
    counts = {split: len(rows) for split, rows in records.items()}
    content = {"schema": 1, "kind": kind, "volumes": [], "options": options, "counts": counts, "leak": "unchecked"}
    manifest.write_manifest(folder, content)
    endings = sorted({Path(str(row["file_name"])).suffix for rows in records.values() for row in rows})
    counted = "\n".join(f"- {split}: {count} pictures" for split, count in counts.items())
    body = f"# {title}\n\n{notes}{counted}\n\nLeaks between the splits are unchecked: the pictures have no place.\n"
    manifest.write_card(folder, body=body, splits=records, num_pictures=sum(counts.values()), endings=endings)
    verdict = verify(folder)
    if verdict.problems:
        raise InputError(f"the pictures do not make a dataset: {verdict.problems[0]}")
    if verdict.counts != counts:
        raise TisserandError(f"the written folder holds {verdict.counts} pictures instead of {counts}")
