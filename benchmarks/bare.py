"""The least that a training step can be: forward and backward of what must run, and the optimizer.

``benchmarks/training.py``, stage ``bounds``, has paced.py take such steps in turn with those of a recipe, with the
recipe's own modules in its own process: one start of a program is up to 10 % faster than the next, here both share one.
A bare step has no data, no noise to add, no clipping and no log. That of the U-Net alone, without text encoder and
optimizer, is the bound that no trainer of this model can pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.core.learns.trainable import Learns
    from finetune.diffusion.models import Models


class Bounds:
    """Counts the steps of our loop, and after some of them takes as many bare ones.

    Attributes:
        seconds: of a step, one value per turn, of each kind.
    """

    def __init__(self, warmup_steps: int, turn_steps: int, finish: Callable[[], None]) -> None:
        """Begin after the warm-up; ``finish`` waits for the device."""
        from finetune.core.loop import loop

        self.left, self.turn_steps, self.finish = warmup_steps, turn_steps, finish
        self.seconds: dict[str, list[float]] = {"ours": [], "bare": [], "unet": []}
        self.is_warm = self.is_inside = False
        self.began_s = 0.0
        backward = loop._backward

        def watched(run: Any, model: Any, loss: Any, update: Any) -> Any:
            self.accelerator, self.model, self.update = run.accelerator, model, update
            return backward(run, model, loss, update)

        loop._backward = watched

    def stepped(self, optimizer: Any, *_: object) -> None:
        """Count a step of ours; at the end of a turn let the others have theirs."""
        if self.is_inside:
            return
        self.left -= 1
        if self.left:
            return
        self.finish()
        if self.is_warm:
            self.seconds["ours"].append((time.perf_counter() - self.began_s) / self.turn_steps)
            self.is_inside = True
            self.seconds["bare"].append(self.timed(lambda: self.step(optimizer)))
            self.seconds["unet"].append(self.timed(lambda: self.step(None)))
            self.is_inside = False
        self.is_warm, self.left = True, self.turn_steps
        self.began_s = time.perf_counter()

    def timed(self, step: Callable[[], None]) -> float:
        """Return the seconds of a step, over a turn."""
        self.model.zero_grad()
        start = time.perf_counter()
        for _ in range(self.turn_steps):
            step()
        self.finish()
        return (time.perf_counter() - start) / self.turn_steps

    def step(self, optimizer: Any) -> None:
        """Do a step on the last batch; without an optimizer that of the U-Net alone."""
        import torch

        batch, denoiser = self.update.batches[-1], self.model
        prompts = batch.conditions.prompts
        if not prompts.is_floating_point() and optimizer is None:
            width = denoiser.unet.config.cross_attention_dim
            # Textual Inversion takes gradients through the whole U-Net, though none of its weights learn.
            through = not any(parameter.requires_grad for parameter in denoiser.unet.parameters())
            prompts = torch.zeros(*prompts.shape, width, device=prompts.device, requires_grad=through)
        with self.accelerator.autocast():
            predicted = denoiser(batch.latents, batch.timesteps, prompts, distinct=batch.conditions.distinct)
        (predicted.float() - batch.latents).square().mean().backward()
        if optimizer is None:
            denoiser.zero_grad()
        else:
            optimizer.step()
            optimizer.zero_grad()


def what_learns(models: Models, method: str, rank: int = 4) -> Learns:
    """Return what the recipe of a method trains, and make it learn."""
    from torch import nn

    from finetune.core.learns.trainable import Group, Learns, all_weights, lora_adapters
    from finetune.core.learns.words import ROWS, LearnedRows
    from finetune.core.settings.methods import LoraConfig

    if method == "lora":
        return lora_adapters(models, LoraConfig(rank=rank), learning_rate=1e-4, seed=0)
    if method == "textual_inversion":
        table: nn.Embedding = models.text_encoder.get_input_embeddings()
        rows = LearnedRows(table, table.weight[:1], table.num_embeddings)
        models.text_encoder.set_input_embeddings(rows)
        return Learns((Group({ROWS: rows.rows}, 1e-4),))
    return all_weights(models, learning_rate=1e-5, text_encoder_rate=1e-5 if method == "dreambooth" else None)
