"""Train a small Stable Diffusion from scratch; made assets/tiny-sd.

    python -m data_prep.shapes --num_images 48000 --output_dir data/shapes
    python finetune/pretrain.py --config configs/pretrain_tiny.yaml

The settings are in ``diffusion/from_scratch/config.py``.
"""

from __future__ import annotations

from configs.load import command
from finetune.diffusion.from_scratch.config import PretrainConfig


def main(config: PretrainConfig) -> None:
    """Train VAE, text encoder and U-Net; write the pipeline folder."""
    from finetune.diffusion.from_scratch.train import train

    train(config)


if __name__ == "__main__":
    command(PretrainConfig, main)
