"""The same prompts and seeds, rendered as training goes on; the picture of step 0 shows the base model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass

from PIL import Image, ImageOps

from configs.errors import InputError, TisserandError
from eval.tiles.contact_sheet import contact_sheet
from finetune.core.learns.averages import Averages
from finetune.core.pictures.pictures import Shape
from finetune.core.run import Run
from finetune.core.settings.watching import PreviewConfig
from finetune.diffusion.config import SamplingConfig
from finetune.diffusion.models import Models
from finetune.diffusion.sampling import sample_latents
from finetune.diffusion.vae import decode

_EVERY_STEPS = 100


@dataclass(frozen=True)
class Previews:
    """Pictures of every prompt (rows) with the seeds 0, 1, ... (columns), from the models as they stand.

    Attributes:
        models: adapters included.
        config: prompts, pictures a prompt or pictures to start from, and how often.
        run: for its folder, its trackers and its autocast.
        shape: rows and columns of the pictures, px.
        steps_per_epoch: for an interval in epochs.
        averages: shown in the place of what learns, where they are kept.
    """

    models: Models
    config: PreviewConfig
    run: Run
    _: KW_ONLY
    shape: Shape
    steps_per_epoch: int
    averages: Averages | None = None

    def look(self, step: int, *, is_last: bool) -> bool:
        """Render and keep the pictures, if they are due after this step; never end the run.

        They are due before the first step, at the set interval, and after the last step.
        """
        epochs = self.config.validation_epochs
        every = self.config.validation_steps or (epochs * self.steps_per_epoch if epochs else _EVERY_STEPS)
        is_due = step % every == 0 or is_last
        prompts = self.config.prompts
        count = len(self.config.validation_images) or self.config.num_validation_images
        if not (self.run.is_main and prompts and count and is_due) or self.run.train.dry_run:
            return False
        starts = self._starts() * len(prompts)
        requests = [(prompt, seed) for prompt in prompts for seed in range(count)]
        settings = SamplingConfig(scheduler=self.config.sampler, height=self.shape[0], width=self.shape[1])
        averaged = self.averages.in_place() if self.averages else nullcontext()
        with averaged, self.run.accelerator.autocast():
            latents = sample_latents(self.models, requests, settings, begin_with=starts)
        try:
            pictures = decode(self.models, latents, requests)  # in float32: half precision overflows in this VAE
        except TisserandError as error:
            self.run.say(f"note: no preview at step {step}: {error}")
            return False
        self.run.show(contact_sheet(pictures, len(prompts), count, labels=prompts), step)
        return False

    def _starts(self) -> list[Image.Image]:
        """Return the pictures to start from, in the shape of the previews."""
        found = []
        for path in self.config.validation_images:
            try:
                with Image.open(path) as picture:
                    found.append(ImageOps.fit(picture.convert("RGB"), self.shape[::-1]))
            except OSError as error:
                raise InputError(f"--validation_images {path}: not readable as a picture ({error})") from None
        return found
