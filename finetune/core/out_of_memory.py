"""Memory that ran out: how to tell, and what to lower."""

from __future__ import annotations

import torch

from finetune.core.settings.training import TrainConfig


def advice(config: TrainConfig) -> str:
    """Say what to lower, naming only what is not lowered yet."""
    ways = []
    if config.train_batch_size != "auto" and config.train_batch_size > 1:
        ways.append(f"lower --train_batch_size {config.train_batch_size} and raise --gradient_accumulation_steps")
    if not config.gradient_checkpointing:
        ways.append("add --gradient_checkpointing")
    if config.mixed_precision in (None, "no"):
        ways.append("use --mixed_precision bf16")
    if config.optimizer == "adamw" and not config.use_8bit_adam:
        ways.append("use --optimizer adafactor (or --use_8bit_adam on a GPU)")
    return "; ".join([*ways, "or lower --resolution"])


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
