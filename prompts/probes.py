r"""Probe prompts: asked of the base and of the tuned model to see what the tuning changed elsewhere.

    python -m prompts.probes "sf_dry sf_warp" "sf_injected sf_weft" --pretrained_model_name_or_path assets/tiny-sd \
        --probes tiny --output out/probes.yaml

The command adds the set G1 to a list: everyday prompts for the words that the captions share tokens with, whatever
the vocabulary. What a probe file looks like is in prompts/probe_lists.py.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UsageError
from configs.load import Positional, command
from prompts.probe_lists import read_probes, shared_token_probes, write_probes
from prompts.tokenizer import WORD_END, load_tokenizer, split


@dataclass(frozen=True, kw_only=True)
class ProbesConfig:
    """Settings of ``python -m prompts.probes``."""

    captions: Positional[tuple[str, ...]]
    """Captions of the training slices."""
    pretrained_model_name_or_path: str
    """The model whose tokenizer splits them: a pipeline folder, or a name on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    probes: str = "stable_diffusion"
    """List to add to: a built-in one (tiny, stable_diffusion, composition), or a probe file. Its own G1 is replaced."""
    output: Path
    """The probe file to write."""
    overwrite: bool = False
    """Replace it if it is there."""

    def __post_init__(self) -> None:
        """Refuse no captions, and a file that would not be read as a probe list."""
        if not self.captions:
            raise ValueError("CAPTIONS: name at least one caption")
        if self.output.suffix not in {".yaml", ".yml"}:
            raise ValueError(f"--output {self.output}: name a file that ends with .yaml")


def main(config: ProbesConfig) -> None:
    """Split the captions, write the list with its own G1, and print what was added."""
    if config.output.exists() and not config.overwrite:
        raise UsageError(f"--output {config.output}: already exists; name another file or pass --overwrite")
    tokenizer = load_tokenizer(config.pretrained_model_name_or_path, config.revision)
    splits = [split(tokenizer, caption) for caption in config.captions]
    pieces = [piece.removesuffix(WORD_END) for item in splits for piece in item.pieces]
    known = [word for item in splits for word in item.known_words]
    others = [probe for probe in read_probes(config.probes) if probe.set != "G1"]
    taken = {probe.id for probe in others}
    shared = [probe for probe in shared_token_probes(config.captions, pieces, known) if probe.id not in taken]
    write_probes(config.output, [*others, *shared])
    for probe in shared:
        print(f"{probe.id}: {probe.prompt}")
    print(f"{config.output}: {len(others)} probes of {config.probes} and {len(shared)} for words the captions share")
    words = ["--pretrained_model_name_or_path", config.pretrained_model_name_or_path, "--adapter", "runs/lora"]
    print(f"next: python -m eval.drift {shlex.join([*words, '--probes', str(config.output)])} --output_dir out/drift")


if __name__ == "__main__":
    command(ProbesConfig, main)
