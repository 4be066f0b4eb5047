"""The same prompts and seeds, rendered as training goes on; the picture of step 0 shows the base model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.core.config import PreviewConfig
from finetune.core.models import Models
from finetune.core.run import Run

if TYPE_CHECKING:
    from PIL.Image import Image


def is_due(config: PreviewConfig, step: int, *, total: int, steps_per_epoch: int) -> bool:
    """Tell whether a picture follows this step: at the set interval, before the first step and after the last."""
    every = config.validation_steps or config.validation_epochs * steps_per_epoch
    return bool(config.validation_prompt) and (step % every == 0 or step == total)


def render(models: Models, config: PreviewConfig, run: Run, *, size: int) -> Image:
    """Render every prompt with the seeds 0, 1, ...: a row a prompt. Training's own draws are not touched.

    Args:
        models: as they stand, adapters included.
        config: prompts and pictures a prompt.
        run: for its autocast.
        size: side of the pictures, px.
    """
    from eval.config import SamplingConfig
    from eval.sampling import contact_sheet, sample

    requests = [(prompt, seed) for prompt in config.validation_prompt for seed in range(config.num_validation_images)]
    with run.accelerator.autocast():
        images = sample(models, requests, SamplingConfig(height=size, width=size))
    rows, columns = len(config.validation_prompt), config.num_validation_images
    return contact_sheet(images, rows, columns, labels=config.validation_prompt)
