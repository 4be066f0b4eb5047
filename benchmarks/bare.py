"""The least that a training step can be: forward and backward of what must run, and the optimizer.

    python benchmarks/paced.py '{}' benchmarks/bare.py --method lora --pretrained_model_name_or_path MODEL

No data, no clipping, no log: random latents that stay where they are. ``--part unet`` leaves the text encoder and the
optimizer out: it is the bound that no trainer of this model can pass. ``benchmarks/training.py`` starts it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.load import command

if TYPE_CHECKING:
    from finetune.core.models import Models
    from finetune.core.trainable import Learns


@dataclass(frozen=True, kw_only=True)
class BareConfig:
    """Settings of ``benchmarks/bare.py``."""

    method: Literal["lora", "full", "textual_inversion", "dreambooth"]
    """What learns."""
    part: Literal["all", "unet"] = "all"
    """Everything that must run, or the U-Net's forward and backward pass alone."""
    pretrained_model_name_or_path: str
    """A pipeline folder."""
    resolution: int
    """Side of a picture, px."""
    train_batch_size: int
    """Pictures of a step."""
    max_train_steps: int
    """Steps."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """As in the recipes."""
    rank: int = 4
    """Of LoRA."""


def main(config: BareConfig) -> None:
    """Train on nothing."""
    import torch

    from finetune.core.config import TrainConfig
    from finetune.core.models import encode_prompts, load_models, tokenize
    from finetune.core.optimizer import make_optimizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = load_models(config.pretrained_model_name_or_path, device=device)
    low = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]
    prompt = "a texture"
    embeds = encode_prompts(models, [prompt])
    ids = tokenize(models, [prompt]).to(device)
    learns = what_learns(models, config, low)
    side = config.resolution // models.vae_scale_factor
    latents = torch.randn(config.train_batch_size, 4, side, side, device=device)
    timesteps = torch.randint(1000, (config.train_batch_size,), device=device)
    models.unet.train()
    reads = config.part == "all" and config.method in ("textual_inversion", "dreambooth")
    if config.part == "unet":
        # Textual Inversion takes gradients through the whole U-Net, though none of its weights learn.
        embeds.requires_grad_(config.method == "textual_inversion")
        optimizer = torch.optim.SGD([torch.zeros(1, device=device, requires_grad=True)])
    else:
        optimizer = make_optimizer(learns, TrainConfig(output_dir=Path("unused")))
    for _ in range(config.max_train_steps):
        with torch.autocast(device.type, low) if low else nullcontext():
            text = (models.text_encoder(ids)[0] if reads else embeds).expand(len(latents), -1, -1)
            predicted = models.unet(latents, timesteps, encoder_hidden_states=text, return_dict=False)[0]
        (predicted.float() - latents).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        models.unet.zero_grad()
        embeds.grad = None


def what_learns(models: Models, config: BareConfig, low: object) -> Learns:
    """Return what the recipe of a method trains."""
    from torch import nn

    from finetune.core.method_config import LoraConfig
    from finetune.core.tokens import ROWS, LearnedRows
    from finetune.core.trainable import Group, Learns, all_weights, lora_adapters

    if config.method == "lora":
        models.unet.to(low)
        return lora_adapters(models, LoraConfig(rank=config.rank), learning_rate=1e-4, seed=0)
    if config.method == "textual_inversion":
        models.unet.to(low)
        table: nn.Embedding = models.text_encoder.get_input_embeddings()
        rows = LearnedRows(table, table.weight[:1], table.num_embeddings)
        models.text_encoder.set_input_embeddings(rows)
        return Learns((Group({ROWS: rows.rows}, 1e-4),))
    return all_weights(models, learning_rate=1e-5, text_encoder_rate=1e-5 if config.method == "dreambooth" else None)


if __name__ == "__main__":
    command(BareConfig, main)
