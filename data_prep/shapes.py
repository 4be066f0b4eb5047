"""Draw captioned coloured shapes and textures: the small world that the embedded base model knows.

    python -m data_prep.shapes --num_images 1000 --output_dir data/shapes

Two families of pictures, each with one caption form:

    two green squares on a white background     1-3 equal shapes of one colour on a plain ground
    a red and yellow striped texture            two colours in a pattern named with a word of the
    a grey woven texture                        Describable Textures kind; or grey, with scanner-like noise

A picture is a pure function of (seed, index). A few combinations are never drawn (``HELD_OUT``), so that a model
trained on this world can be asked for something new. Nothing here knows volumes, yarn geometry or the captions of
slices.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from configs.load import command, save
from data_prep.folders.publish import publish
from data_prep.worlds.shapes import picture

# Not config.yaml, which every command writes: it tells drawn shapes from folders that somebody needs.
SETTINGS_NAME = "shapes.yaml"


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """Settings of ``python -m data_prep.shapes``."""

    output_dir: Path
    """Folder to write; gets train/*.png and train/metadata.jsonl."""
    num_images: int = 1000
    """How many pictures."""
    resolution: int = 64
    """Side of a picture in px."""
    seed: int = 0
    """Picture number i of a seed is always the same."""
    overwrite: bool = False
    """Replace the folder if it is there."""

    def __post_init__(self) -> None:
        """Refuse sizes that no picture can have."""
        if self.num_images < 1:
            raise ValueError(f"--num_images {self.num_images}: at least 1")
        if not 16 <= self.resolution <= 1024:
            raise ValueError(f"--resolution {self.resolution}: from 16 to 1024 px")


def main(config: ShapesConfig) -> None:
    """Write a captioned image folder of shapes and textures."""
    with publish(config.output_dir, overwrite=config.overwrite, mark=SETTINGS_NAME) as folder:
        train = folder / "train"
        train.mkdir()
        with (train / "metadata.jsonl").open("w", encoding="utf-8") as rows:
            for index in tqdm(range(config.num_images), desc="drawing", disable=None):
                scene, pixels = picture(config.seed, index, config.resolution)
                name = f"{index:06d}.png"
                Image.fromarray(pixels).save(train / name, compress_level=1)
                rows.write(json.dumps({"file_name": name, "text": scene.caption}) + "\n")
        save(config, folder / SETTINGS_NAME)
    print(f"{config.num_images} pictures in {config.output_dir}/train")
    print(f"next: python -m data_prep.verify {config.output_dir}")


if __name__ == "__main__":
    command(ShapesConfig, main)
