"""Weights for other programs: a LoRA in kohya's layout and back, or merged into a pipeline folder.

    python finetune/export.py --adapter runs/lora --to kohya --output lora.safetensors
    python finetune/export.py --adapter lora.safetensors --to diffusers --output back.safetensors
    python finetune/export.py --adapter runs/lora --to pipeline --pretrained_model_name_or_path assets/tiny-sd \
        --output_dir merged

kohya's layout is what A1111, Forge and ComfyUI read. The rows of a learned word need none: they read
learned_embeds.safetensors as it is, by its file name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.load import Repeatable, command
from finetune.diffusion.config import each_scale


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of ``python finetune/export.py``."""

    adapter: Repeatable[tuple[Path, ...]]
    """Run folder or weights file; for a pipeline several, with a word's rows among them, too."""
    to: Literal["kohya", "diffusers", "pipeline"]
    """Layout to write: `kohya` from diffusers' layout, `diffusers` from kohya's, `pipeline` merged into the base."""
    output: Path | None = None
    """File to write, ending in .safetensors."""
    output_dir: Path | None = None
    """Folder to write, for a pipeline."""
    pretrained_model_name_or_path: str | None = None
    """Base model to merge into, for a pipeline."""
    adapter_scale: tuple[float, ...] = (1.0,)
    """Strength of the adapters in a pipeline, one for all or one each."""
    overwrite: bool = False
    """Replace the file or folder if it is there."""

    def __post_init__(self) -> None:
        """Check that the output belongs to the layout."""
        each_scale(self.adapter, self.adapter_scale)
        if self.to == "pipeline":
            for flag in ("output_dir", "pretrained_model_name_or_path"):
                if getattr(self, flag) is None:
                    raise ValueError(f"--to pipeline: needs --{flag}")
            return
        if self.output is None or self.output.suffix != ".safetensors":
            raise ValueError(f"--output {self.output}: --to {self.to} needs a file name that ends in .safetensors")
        if len(self.adapter) != 1:
            raise ValueError(f"--adapter: --to {self.to} takes one, not {len(self.adapter)}")
        if self.adapter_scale != (1.0,):
            raise ValueError(
                f"--adapter_scale: --to {self.to} keeps the strength as trained; the program that reads it asks"
            )


def main(config: ExportConfig) -> None:
    """Convert one file, or merge and save."""
    from finetune.core.save.export import merge, rename

    if config.to == "pipeline":
        base, folder = str(config.pretrained_model_name_or_path), Path(str(config.output_dir))
        merge(config.adapter, config.adapter_scale, base, folder, overwrite=config.overwrite)
    else:
        rename(config.adapter[0], Path(str(config.output)), to=config.to, overwrite=config.overwrite)


if __name__ == "__main__":
    command(ExportConfig, main)
