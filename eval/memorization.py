"""Are generated slices copies of training slices?

    python -m eval.memorization --real data/weave --generated out/slices --output_dir out/memorization

A copy is a tile that is closer to the training slices than held-out real tiles are, beyond the quantile they set; with
a periodic weave resemblance alone proves nothing. Two detectors look for shifted, flipped and turned copies: one by
correlation, one by a small network trained on the training slices. Each is shown 32 planted copies and the held-out
tiles it was not calibrated on; a detector that misses the planted ones is called blind. Two more signs need no search:
seeds that agree with each other more than real tiles do, and a loss that is lower on what was trained on.

Writes results.jsonl, gallery.json, gallery/ (the closest pairs), distances.png and config.yaml.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from configs.load import Repeatable, command, save
from data_prep.folders.publish import check_free, publish
from data_prep.folders.results import command_line
from eval.tiles.config import SlicesConfig, check_encoders


@dataclass(frozen=True, kw_only=True)
class MemorizationConfig:
    """Look for copies of training slices among generated ones."""

    slices: SlicesConfig
    output_dir: Path
    """Folder to write."""
    train_data_dir: Path | None = None
    """What the model was trained on, if that is not all of train/: a folder of few slices, with its metadata.jsonl."""
    adapter: Repeatable[tuple[Path, ...]] = ()
    """Adapters behind the slices. Default: those named in the records."""
    base: str | None = None
    """What a tuned pipeline folder came from, for its loss to be compared with."""
    reference_tiles: int = 400
    """Training tiles per caption that are searched."""
    held_out_tiles: int = 80
    """Held-out real tiles per caption."""
    generated_tiles: int = 80
    """Generated tiles per caption, at most."""
    copy_net_steps: int = 300
    """Updates of the copy network; 0 leaves it out."""
    encoder: dict[str, Path] = field(default_factory=dict)
    """Local network that looks for copies as well: sscd=DIR, a folder with safetensors."""
    loss_slices: int = 48
    """Training and held-out slices each whose loss is compared; 0 leaves it out."""
    num_timesteps: int = 8
    """Noise levels of that loss."""
    gallery: int = 20
    """Closest pairs to show."""
    overwrite: bool = False
    """Replace the folder if it is there."""

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to compare."""
        for name, least in (
            ("reference_tiles", 1),
            ("held_out_tiles", 4),
            ("generated_tiles", 1),
            ("copy_net_steps", 0),
            ("loss_slices", 0),
            ("num_timesteps", 1),
            ("gallery", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: at least {least}")
        check_encoders(self.encoder, ("sscd",))


def main(config: MemorizationConfig) -> None:
    """Draw tiles, search them, test the detectors, and publish the folder when it is whole."""
    check_free(config.output_dir, overwrite=config.overwrite, mark="results.jsonl")

    from eval.copying import check

    comparison = check.compare(
        config.slices,
        config.train_data_dir,
        config.encoder,
        reference_tiles=config.reference_tiles,
        held_out_tiles=config.held_out_tiles,
        generated_tiles=config.generated_tiles,
    )
    tiles = comparison.tiles
    print(
        f"{len(tiles.generated)} generated tiles, {len(tiles.reference)} training tiles to search, "
        f"{len(tiles.held_out)} held-out ones, of {tiles.reference.pixels.shape[1]} px"
    )
    model, no_model = check.load_behind(comparison, config.adapter, config.base)
    searched = check.seek(comparison, model, copy_net_steps=config.copy_net_steps)
    rows = check.judge(
        comparison,
        searched,
        model,
        no_model,
        loss_slices=config.loss_slices,
        num_timesteps=config.num_timesteps,
    )
    hashes = check.hashes(comparison)
    rows = [replace(row, hashes=hashes, command=command_line("eval.memorization", config)) for row in rows]
    with publish(config.output_dir, overwrite=config.overwrite, mark="results.jsonl") as folder:
        check.save_check(folder, rows, comparison, searched, config.gallery)
        save(config, folder / "config.yaml")
    for line in check.summary(rows):
        print(line)
    print(f"look at {config.output_dir / 'gallery'} and {config.output_dir / 'distances.png'}")
    results = shlex.join([str(config.slices.generated), str(config.output_dir)])
    print(f"next: python -m eval.report --results {results} --output {config.output_dir.parent / 'report.html'}")


if __name__ == "__main__":
    command(MemorizationConfig, main)
