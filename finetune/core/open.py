"""Open a run: what every recipe does between its images and what learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from configs.errors import UsageError
from finetune.core.data.prior import check_prior
from finetune.core.pictures.flips import ways_to_show
from finetune.core.pictures.images import CaptionedImage, data_hash
from finetune.core.run import OpenRun
from finetune.core.save.card import write_card
from finetune.core.save.hub import check_hub, find_repository, push
from finetune.core.settings.methods import PriorConfig
from finetune.core.settings.recipe import RecipeConfig
from finetune.core.start import start_run
from finetune.diffusion.hashes import model_hash
from finetune.diffusion.models import check_folder, load_models
from finetune.diffusion.noise import from_scheduler, trained_scheduler


@contextmanager
def open_run(
    config: RecipeConfig,
    images: list[CaptionedImage],
    data: dict[str, object],
    *,
    weights_file: str,
    more_files: tuple[str, ...] = (),
    prior: PriorConfig | None = None,
) -> Iterator[OpenRun | None]:
    """Check the base model, start or continue the run, load the model; for a ``with`` block.

    Yields None where the run is finished already.

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
    started = start_run(
        config,
        config.train,
        num_images=len(images),
        data_hash=data_hash(images),
        weights_file=weights_file,
        more_files=more_files,
        base_hash=base_hash,
    )
    if started is None:
        yield None
        return
    with started as run:
        pushes = config.hub.push_to_hub and run.is_main and not config.train.dry_run
        repository = find_repository(config.hub, run.folder) if pushes else None
        models = load_models(source.source, device=run.accelerator.device)
        base_scheduler = models.base_scheduler
        if config.train.enable_xformers_memory_efficient_attention:
            models.unet.enable_xformers_memory_efficient_attention()
        models = dataclasses.replace(models, base_scheduler=trained_scheduler(base_scheduler, config.noise))
        schedule = from_scheduler(models.scheduler.config)
        base_hash = base_hash or model_hash(name, revision=source.revision, cache_dir=source.cache_dir)
        yield OpenRun(
            run=run,
            models=models,
            base_scheduler=base_scheduler,
            schedule=schedule.to(run.accelerator.device),
            images=images,
            data=data,
            base={"name": name, "hash": base_hash},
        )
        if run.is_main and not run.train.dry_run:
            write_card(run.folder)
        if repository is not None:
            run.say(f"uploaded to {push(config.hub, repository, run.folder)}")
