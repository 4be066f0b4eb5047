"""Several runs or checkpoints on one table: which is nearest to real slices, and which has forgotten least?

    python -m eval.compare --runs full=out/full lora=out/lora --output_dir out/compare

Each entry is a name and a folder that holds the results of its checks: any folders below it with results.jsonl of
eval.fidelity, eval.drift and eval.memorization. Only what was measured alike is compared: the same held-out slices, the
same prompts and seeds, the same probes, the same numbers of pictures. Otherwise it is refused, naming the difference.

Writes results.jsonl, table.json, pareto.png and config.yaml.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from configs.load import command, save
from data_prep.folders.results import command_line


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Put several runs on one table."""

    runs: dict[str, Path]
    """Name and folder of each, as name=FOLDER; the results are looked for below it."""
    output_dir: Path
    """Folder to write."""
    overwrite: bool = False
    """Replace the folder if it is there."""

    def __post_init__(self) -> None:
        """Refuse a comparison of one thing."""
        if len(self.runs) < 2:
            raise ValueError(f"--runs: {len(self.runs)} given; name at least two, as name=FOLDER")


def main(config: CompareConfig) -> None:
    """Compare the runs, and say where to look."""
    from eval.comparison.write import compare_runs

    compare_runs(
        config.runs,
        config.output_dir,
        overwrite=config.overwrite,
        command=command_line("eval.compare", config),
        save=lambda path: save(config, path),
    )
    print(f"look at {config.output_dir / 'pareto.png'}")
    words = ["--results", str(config.output_dir), "--output", str(config.output_dir.parent / "report.html")]
    print(f"next: python -m eval.report {shlex.join(words)}")


if __name__ == "__main__":
    command(CompareConfig, main)
