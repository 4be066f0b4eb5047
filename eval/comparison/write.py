"""The work of ``eval.compare``: read, check that like is compared with like, write the folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from data_prep.folders.publish import check_free, publish
from data_prep.folders.results import write_results
from eval.comparison.entries import check_alike, read_entry
from eval.comparison.plot import save_pareto
from eval.comparison.table import compare_rows, table_of, written


def compare_runs(
    runs: Mapping[str, Path], output_dir: Path, *, overwrite: bool, command: str, save: Callable[[Path], None]
) -> None:
    """Write the table and the plot of several runs, and print the table.

    Args:
        runs: name -> folder that holds the results of its checks.
        output_dir: folder to write.
        overwrite: replace it if it is there.
        command: that gives the rows again.
        save: writes the settings to a file.

    Raises:
        InputError: a folder holds no results, or they were not measured alike.
        UsageError: the folder is there already.
    """
    check_free(output_dir, overwrite=overwrite, mark="results.jsonl")
    entries = [read_entry(name, folder) for name, folder in runs.items()]
    check_alike(entries)
    rows = [replace(row, command=command) for row in compare_rows(entries)]
    table = table_of(entries)
    with publish(output_dir, overwrite=overwrite, mark="results.jsonl") as folder:
        write_results(folder / "results.jsonl", rows)
        (folder / "table.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        save_pareto(folder / "pareto.png", entries)
        save(folder / "config.yaml")
    print(written(table))
    for row in rows:
        if row.metric == "pareto_best":
            print(row.reason)
