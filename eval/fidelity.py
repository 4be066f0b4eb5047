"""Do generated slices look like real ones, and like the slices asked for?

    python -m eval.fidelity --real data/weave --generated out/slices --output_dir out/fidelity

Trains a small classifier on the real training slices, tests it on held-out ones, and reads the generated slices with
it: does each show the state and axis of its prompt, and how far are they from held-out slices, measured by how far
real slices are from each other? No outside weights are needed; the base model named in the records gives the VAE
round trip.

And what an engineer would measure (grey levels, spectrum, directions, texture, phases, chord lengths), each in units of
how much real slices differ among themselves.

Writes results.jsonl, overview.json, confusion.png, samples.png, samples/ (the strips of each caption), descriptors/
(the curves of each caption) and config.yaml.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from configs.load import command, save
from data_prep.folders.publish import check_free, publish
from data_prep.folders.results import command_line
from eval.tiles.config import SlicesConfig, check_encoders


@dataclass(frozen=True, kw_only=True)
class FidelityConfig:
    """Compare generated slices with held-out real ones and with their prompts."""

    slices: SlicesConfig
    output_dir: Path
    """Folder to write."""
    train_tiles: int = 400
    """Real tiles per caption that the classifier learns from."""
    held_out_tiles: int = 80
    """Held-out real tiles per caption, at least; as many as generated ones if those are more."""
    classifier_steps: int = 600
    """Updates of the classifier."""
    classify_slices: int = 0
    """Held-out slices that the model itself reads, by its loss under each caption; 0: leave it out, 45: a minute."""
    num_timesteps: int = 8
    """Noise levels of that loss."""
    encoder: dict[str, Path] = field(default_factory=dict)
    """Local encoders that compare the tiles as well: clip=DIR, dinov2=DIR; folders with safetensors."""
    torch_fidelity: bool = False
    """Add FID, KID, precision and recall by torch-fidelity, where it is installed, on the features of --encoder."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the classifier and the VAE run. Only the CPU gives the same numbers bit by bit."""
    overwrite: bool = False
    """Replace the folder if it is there."""

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to learn from or to compare."""
        for name, least in (
            ("train_tiles", 8),
            ("held_out_tiles", 2),
            ("classifier_steps", 1),
            ("classify_slices", 0),
            ("num_timesteps", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: at least {least}")
        check_encoders(self.encoder, ("clip", "dinov2"))
        if self.torch_fidelity and not self.encoder:
            raise ValueError("--torch_fidelity: measures features of an encoder; give --encoder dinov2=DIR")


def main(config: FidelityConfig) -> None:
    """Draw tiles, train the classifier, measure, judge, and publish the folder when it is whole."""
    check_free(config.output_dir, overwrite=config.overwrite, mark="results.jsonl")

    from eval.likeness import check

    comparison = check.compare(
        config.slices,
        config.encoder,
        with_torch_fidelity=config.torch_fidelity,
        train_tiles=config.train_tiles,
        held_out_tiles=config.held_out_tiles,
    )
    for remark in comparison.remarks:
        print(remark)
    measured = check.measure(comparison, classifier_steps=config.classifier_steps, device=config.device)
    rows = [
        *check.rows_by_tiles(comparison, measured),
        *check.rows_by_model(comparison, num_slices=config.classify_slices, num_timesteps=config.num_timesteps),
        *check.rows_by_descriptors(comparison, measured),
        *check.rows_by_encoders(comparison, measured, with_torch_fidelity=config.torch_fidelity),
    ]
    hashes = check.hashes(comparison, measured)
    rows = [replace(row, hashes=hashes, command=command_line("eval.fidelity", config)) for row in rows]
    with publish(config.output_dir, overwrite=config.overwrite, mark="results.jsonl") as folder:
        check.save_check(folder, rows, comparison, measured)
        save(config, folder / "config.yaml")
    for line in check.summary(rows):
        print(line)
    print(f"look at {config.output_dir / 'samples.png'} and {config.output_dir / 'confusion.png'}")
    results = shlex.join([str(config.slices.generated), str(config.output_dir)])
    print(f"next: python -m eval.report --results {results} --output {config.output_dir.parent / 'report.html'}")


if __name__ == "__main__":
    command(FidelityConfig, main)
