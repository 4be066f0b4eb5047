"""Open a run: what every recipe does between its images and what learns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from configs.errors import UsageError
from finetune.core.batches import CaptionedBatches
from finetune.core.card import write_card
from finetune.core.config import HubConfig, ModelConfig, NoiseConfig, PictureConfig, TrainConfig
from finetune.core.flips import ways_to_show
from finetune.core.hub import check_hub, find_repository, push
from finetune.core.images import CaptionedImage, data_hash
from finetune.core.method_config import PriorConfig
from finetune.core.models import Models, check_folder, load_models, model_hash
from finetune.core.noise import NoiseSchedule, from_scheduler, trained_scheduler
from finetune.core.prior import check_prior
from finetune.core.run import Run, start_run

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class Recipe(Protocol):
    """What the settings of every recipe hold."""

    @property
    def model(self) -> ModelConfig:
        """The Stable Diffusion to start from."""

    @property
    def noise(self) -> NoiseConfig:
        """How pictures are made noisy."""

    @property
    def pictures(self) -> PictureConfig:
        """How images become training pictures."""

    @property
    def train(self) -> TrainConfig:
        """The loop."""

    @property
    def hub(self) -> HubConfig:
        """Whether to upload what the run leaves."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A run in progress with its base model.

    Attributes:
        models: as loaded: float32, frozen, on the training device; the scheduler is the one that is trained.
        base_scheduler: as loaded; what the base model itself is sampled with.
        schedule: what is trained, on the training device.
        images: that passed the checks.
        data: what the weights file says about them.
        base: what the weights file says about the base model: its name as typed, and its hash.
    """

    run: Run
    models: Models
    base_scheduler: SchedulerMixin
    schedule: NoiseSchedule
    images: list[CaptionedImage]
    data: dict[str, object]
    base: dict[str, str]

    @property
    def device(self) -> torch.device:
        """Where the forward pass runs."""
        return self.run.accelerator.device

    def provenance(self, method: str, batches: CaptionedBatches, prior: PriorConfig | None = None) -> dict[str, Any]:
        """Return what the weights say about where they come from, and in which shapes pictures are made of them."""
        shapes = batches.shapes
        height, width = next(iter(shapes))
        return {
            "method": method,
            "base_model": self.base,
            **self.data,
            "config_hash": self.run.config_hash,
            "height": height,
            "width": width,
            "shapes": [
                {"height": rows, "width": columns, "captions": dict(captions)}
                for (rows, columns), captions in shapes.items()
            ],
            "scheduler": dict(self.models.scheduler.config),
            "steps": self.run.total_steps,
            "planned_steps": self.run.planned_steps,
            **(prior.provenance if prior else {}),
        }


@contextmanager
def open_run(
    config: Recipe,
    images: list[CaptionedImage],
    data: dict[str, object],
    *,
    weights_file: str,
    more_files: tuple[str, ...] = (),
    prior: PriorConfig | None = None,
) -> Iterator[Opened]:
    """Check the base model, start or continue the run, load the model; for a ``with`` block.

    When the block has ended well, the model card is written, and the folder uploaded with ``--push_to_hub``.

    Args:
        config: the recipe's settings, whole.
        images: that passed the checks.
        data: what the weights file says about them, from ``batches.data_provenance``.
        weights_file: what the finished run leaves; written last, so that it says that the run is finished.
        more_files: what else it leaves, files or folders; all go with ``--overwrite``.
        prior: what is to be preserved, checked before the run starts.

    Raises:
        UsageError: no such model, a flip that makes a caption untrue, or a run that cannot be started or continued.
        InputError: class images that belong to another base model or prompt.
    """
    check_hub(config.hub)
    source, base_hash = config.model, None
    name = source.pretrained_model_name_or_path
    check_folder(name)
    with suppress(UsageError):  # a model of the hub that is not downloaded yet
        base_hash = model_hash(name, revision=source.revision, cache_dir=source.cache_dir)
    ways_to_show(images, config.pictures)
    if prior is not None:
        check_prior(prior, base_hash)
    with start_run(
        config,
        config.train,
        num_images=len(images),
        data_hash=data_hash(images),
        weights_file=weights_file,
        more_files=more_files,
        base_hash=base_hash,
    ) as run:
        pushes = config.hub.push_to_hub and run.is_main and not config.train.dry_run
        repository = find_repository(config.hub, run.folder) if pushes else None
        models = load_models(
            name,
            revision=source.revision,
            variant=source.variant,
            cache_dir=source.cache_dir,
            device=run.accelerator.device,
            unet_revision=source.non_ema_revision,
            tokenizer_name=source.tokenizer_name,
            tokenizer_max_length=source.tokenizer_max_length,
        )
        base_scheduler = models.scheduler
        if config.train.enable_xformers_memory_efficient_attention:
            models.unet.enable_xformers_memory_efficient_attention()
        models.scheduler = trained_scheduler(base_scheduler, config.noise)
        schedule = from_scheduler(models.scheduler.config)
        base_hash = base_hash or model_hash(name, revision=source.revision, cache_dir=source.cache_dir)
        yield Opened(
            run=run,
            models=models,
            base_scheduler=base_scheduler,
            schedule=schedule.to(run.accelerator.device),
            images=images,
            data=data,
            base={"name": name, "hash": base_hash},
        )
        if run.is_main:
            write_card(run.folder)
        if repository is not None:
            run.say(f"uploaded to {push(config.hub, repository, run.folder)}")
