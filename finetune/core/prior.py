"""Prior preservation: what the base model made of a class, or of other prompts, should stay.

Two sources. Class images are generated once by the base model and trained on beside the others (Ruiz et al. 2022,
arXiv:2208.12242, section 4.2). Or the target for other prompts is what the base model itself predicts there, at the
same noisy latents, and no images are needed (learning without forgetting: Li and Hoiem 2016, arXiv:1606.09282). Either
way the loss is mean(images) + prior_loss_weight * mean(prior), and weights by the timestep hold for both.

Shapes: batch B, prompts U, token places L, width D, latents (4, h, w).
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from configs.errors import InputError, UsageError
from data_prep.manifest import METADATA_NAME
from eval.config import SamplingConfig
from finetune.core.batches import Batch, Batches, CaptionedBatches, Update, captioned_batches, distinct_rows
from finetune.core.config import TrainConfig
from finetune.core.images import SUFFIXES, CaptionedImage, data_hash, read_folder
from finetune.core.method_config import PriorConfig
from finetune.core.models import Denoiser, Models, encode_prompts, tokenize
from finetune.core.noise import NoiseSchedule, counter_seed, from_scheduler
from finetune.core.objective import noisy_latents, target
from prompts.probes import read_probes

if TYPE_CHECKING:
    from finetune.core.open import Opened

RECORD = "tisserand"
"""Key of the PNG text that says how a class image was made; it travels with the image, whoever copies it."""
_PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


class Prior(Protocol):
    """Where the prior rows of an update come from."""

    def __call__(self, number: int, update: Update) -> Update:
        """Return the prior rows of an update, from its number and its own images."""

    def cut(self, train: TrainConfig) -> Prior:
        """Return the same rows, in forward passes of as many images as these settings say."""


@dataclass(frozen=True, kw_only=True)
class WithPrior:
    """Updates of another ``Batches``, with prior rows beside its own.

    Attributes:
        images: what is to be learned.
        prior: the prior rows of an update.
        loss_weight: of the mean over prior rows beside the mean over images.
    """

    images: Batches
    prior: Prior
    loss_weight: float
    schedule: NoiseSchedule

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates in one pass over the images; the prior does not count."""
        return self.images.steps_per_epoch

    def cut(self, train: TrainConfig) -> WithPrior:
        """Return the same updates, in forward passes of as many images, and prior rows, as these settings say."""
        return dataclasses.replace(self, images=self.images.cut(train), prior=self.prior.cut(train))

    def update(self, number: int) -> Update:
        """Return this process's share of an update; rows of one shape go through the model together."""
        own = self.images.update(number)
        prior = self.prior(number, own)
        # The loop divides by the weight of the images alone: prior rows then come to loss_weight in all.
        share = self.loss_weight * own.weight / prior.weight
        weighted = [dataclasses.replace(batch, weights=batch.weights * share) for batch in prior.batches]
        batches: list[Batch] = []
        for pair in zip_longest(own.batches, weighted):
            batches += _joined([batch for batch in pair if batch is not None], self.schedule)
        return Update(batches=batches, weight=own.weight, num_images=own.num_images)


def _joined(batches: list[Batch], schedule: NoiseSchedule) -> list[Batch]:
    """Make batches one, if their latents and prompts have one shape."""
    if len({(batch.latents.shape[1:], batch.prompts.shape[1:]) for batch in batches}) > 1 or len(batches) == 1:
        return batches
    targets = None
    if any(batch.targets is not None for batch in batches):
        targets = torch.cat(
            [
                target(schedule, one.latents, one.noise, one.timesteps) if one.targets is None else one.targets
                for one in batches
            ]
        )
    return [
        Batch(
            latents=torch.cat([one.latents for one in batches]),
            noise=torch.cat([one.noise for one in batches]),
            input_noise=torch.cat([one.input_noise for one in batches]),
            timesteps=torch.cat([one.timesteps for one in batches]),
            prompts=torch.cat([one.prompts for one in batches]),
            weights=torch.cat([one.weights for one in batches]),
            names=tuple(name for one in batches for name in one.names),
            positions=tuple(place for one in batches for place in one.positions),
            targets=targets,
            distinct=_joined_rows([one.distinct for one in batches], [len(one.names) for one in batches]),
        )
    ]


def _joined_rows(parts: Sequence[tuple[Tensor, Tensor] | None], sizes: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """Return which prompts of batches made one are different, as in ``Batch``; those of two batches count as such."""
    first: list[Tensor] = []
    which: list[Tensor] = []
    places = rows = 0
    for part, size in zip(parts, sizes, strict=True):
        if part is None:
            return None
        first.append(part[0] + places)
        which.append(part[1] + rows)
        places, rows = places + size, rows + len(part[0])
    return torch.cat(first), torch.cat(which)


@dataclass(frozen=True)
class ClassImages:
    """Prior rows from class images, as many as there are images in an update."""

    batches: CaptionedBatches

    def cut(self, train: TrainConfig) -> ClassImages:
        """Return the same rows, in forward passes of as many images as these settings say."""
        return ClassImages(self.batches.cut(train))

    def __call__(self, number: int, update: Update) -> Update:
        """Return the class images of an update."""
        return self.batches.update(number)


@dataclass(frozen=True, kw_only=True)
class BasePrediction:
    """Prior rows from no images: the noisy latents of an update with other prompts; the base model says the target.

    Attributes:
        predict: the base model, from noisy latents, timesteps and prompts.
        prompts: (U, L, D) embeddings, or (U, L) int64 token ids where the text encoder learns.
    """

    predict: Predict
    prompts: Tensor
    schedule: NoiseSchedule
    seed: int

    def cut(self, train: TrainConfig) -> BasePrediction:
        """Return itself: it follows the batches of the images."""
        return self

    def __call__(self, number: int, update: Update) -> Update:
        """Return as many prior rows as the update has images, each with a prompt drawn by its position."""
        batches = []
        for batch in update.batches:
            drawn = [counter_seed(self.seed, "prior prompt", place) % len(self.prompts) for place in batch.positions]
            prompts = self.prompts[torch.tensor(drawn, device=self.prompts.device)]
            targets = self.predict(noisy_latents(self.schedule, batch), batch.timesteps, prompts)
            batches.append(
                dataclasses.replace(
                    batch,
                    prompts=prompts,
                    targets=targets.to(batch.latents.dtype),
                    names=tuple(f"the prior beside {name}" for name in batch.names),
                    distinct=None if batch.distinct is None else distinct_rows(drawn, prompts.device),
                )
            )
        return Update(batches=batches, weight=update.weight, num_images=update.num_images)


def with_prior(batches: CaptionedBatches, opened: Opened, config: PriorConfig, *, adapts: bool) -> Batches:
    """Put prior rows beside the images, or return the batches as they are without ``--with_prior_preservation``.

    To be called while the models are still those of the base: they generate the missing class images.

    Args:
        batches: of the images; class images become training pictures as they do.
        opened: the run.
        config: which prior.
        adapts: what learns are adapters, which can be switched off; else a frozen copy of the base is kept.

    Raises:
        UsageError: prompts that cannot be read, or a base model that does not fit the schedule that is trained.
        InputError: class images that are stale, unreadable, or too few beside a list of them.
    """
    if not config.with_prior_preservation:
        if config.class_prompt is not None or config.class_data_dir is not None:
            opened.run.say("note: no prior: --class_prompt and --class_data_dir wait for --with_prior_preservation")
        return batches
    run, models, schedule, learns_text = opened.run, opened.models, opened.schedule, batches.learns_text
    if config.prior_source == "base_prediction":
        _check_schedule(opened)
        prompts = prior_prompts(config)
        tokens = (tokenize if learns_text else encode_prompts)(models, prompts).to(opened.device)
        predict = _base_predictor(opened, learns_text=learns_text, adapts=adapts)
        run.say(f"prior: the base model's predictions for {len(prompts)} prompts, weight {config.prior_loss_weight:g}")
        rows = BasePrediction(predict=predict, prompts=tokens, schedule=schedule, seed=run.seed)
        return WithPrior(images=batches, prior=rows, loss_weight=config.prior_loss_weight, schedule=schedule)
    images = class_images(opened, config, batches.size)
    run.inputs["class_data_dir"] = data_hash(images)
    unturned = dataclasses.replace(batches.config, flips={})  # declared for axes of slices, which class images have not
    prior = captioned_batches(
        images, models, unturned, batches.noise, run, num_timesteps=schedule.num_timesteps, learns_text=learns_text
    )
    # Draws of their own: an image and the class image beside it must not share noise and timestep.
    prior = dataclasses.replace(prior, seed=counter_seed(run.seed, "prior", 0))
    return WithPrior(
        images=batches,
        prior=ClassImages(prior),
        loss_weight=config.prior_loss_weight,
        schedule=schedule,
    )


def check_prior(config: PriorConfig, base_hash: str | None) -> None:
    """Check, before a run starts, what can be checked without the model.

    Raises:
        UsageError: prompts that cannot be read.
        InputError: class images that belong to another base model or prompt.
    """
    if not config.with_prior_preservation:
        return
    if config.prior_source == "base_prediction":
        prior_prompts(config)
    else:
        wanted: dict[str, object] = {"prompt": config.class_prompt, "base_model": base_hash}
        check_class_images(config, {name: value for name, value in wanted.items() if value is not None})


def prior_prompts(config: PriorConfig) -> list[str]:
    """Return the prompts of ``--prior_prompts_file``, or the class prompt alone."""
    if config.prior_prompts_file is None:
        return [str(config.class_prompt)]
    try:
        return [probe.prompt for probe in read_probes(str(config.prior_prompts_file))]
    except UsageError as error:
        raise UsageError(str(error).replace("--probes", "--prior_prompts_file", 1)) from None


def _check_schedule(opened: Opened) -> None:
    """Refuse to hold a model to predictions that were learned for other noise."""
    base, trained = from_scheduler(opened.base_scheduler.config), opened.schedule
    if base.prediction_type != trained.prediction_type:
        raise UsageError(
            f"--prior_source base_prediction: the base model predicts {base.prediction_type}, and "
            f"{trained.prediction_type} is trained; use --prior_source class_images"
        )
    if not torch.equal(base.alphas_cumprod, trained.alphas_cumprod.cpu()):
        raise UsageError(
            "--prior_source base_prediction: the base model never saw the noise schedule of --rescale_betas_zero_snr, "
            "so its predictions there are no target; use --prior_source class_images"
        )


def _base_predictor(opened: Opened, *, learns_text: bool, adapts: bool) -> Predict:
    """Return the base model as a function: the model with its adapters off, or a frozen copy of it."""
    models, run = opened.models, opened.run
    if adapts:
        denoiser = Denoiser(models.text_encoder, models.unet)
    else:
        # The text encoder is read where it learns alone; else prompts come as embeddings.
        text_encoder = copy.deepcopy(models.text_encoder) if learns_text else models.text_encoder
        denoiser = Denoiser(text_encoder, copy.deepcopy(models.unet).to(run.weight_dtype))

    @torch.no_grad()
    def predict(noisy: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
        with run.accelerator.autocast(), adapters_off(models) if adapts else nullcontext():
            return denoiser(noisy, timesteps, prompts).float()

    return predict


@contextmanager
def adapters_off(models: Models) -> Iterator[None]:
    """Switch LoRA off, and dropout with it, and put everything back as it was: training goes on afterwards."""
    from peft.tuners.lora import LoraLayer

    from eval.sampling import evaluating

    parts = (models.unet, models.text_encoder)
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, LoraLayer)]
    learning = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
    with evaluating(models):
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
                layer.requires_grad_(False)
            for parameter in learning:
                parameter.requires_grad_(True)


def class_images(opened: Opened, config: PriorConfig, size: int) -> list[CaptionedImage]:
    """Return ``--num_class_images`` class images, after the base model has generated those that are missing.

    Every process generates its share; a picture depends on its prompt and its seed alone. Images of the user's own,
    which carry no record, count like generated ones.

    Raises:
        InputError: a generated image of another prompt, base model or sampler; the remedy is named.
    """
    run, folder = opened.run, Path(str(config.class_data_dir))
    settings = SamplingConfig(height=size, width=size, batch_size=config.sample_batch_size)
    wanted = _wanted(config, settings, opened.base["hash"])
    found = check_class_images(config, wanted)
    missing = config.num_class_images - len(found)
    if missing > 0:
        if (folder / METADATA_NAME).is_file():
            raise InputError(
                f"--class_data_dir {folder}: {METADATA_NAME} names {len(found)} images, and generated ones would not "
                f"be in it; give --num_class_images {len(found)}, or another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        free = (number for number in range(len(found) + config.num_class_images) if not _path(folder, number).exists())
        numbers = [number for number, _ in zip(free, range(missing), strict=False)]
        run.accelerator.wait_for_everyone()  # all have listed the folder before one changes it
        _generate(opened, config, settings, wanted, numbers)
        run.accelerator.wait_for_everyone()
    run.say(f"prior: {len(found)} class images found in {folder}, {max(missing, 0)} generated")
    images = read_folder(folder, "--class_data_dir", captions=(str(config.class_prompt),))
    return images[: config.num_class_images]


def check_class_images(config: PriorConfig, wanted: dict[str, object]) -> list[Path]:
    """Return the class images that are there, or refuse those that were generated otherwise.

    Args:
        config: names the folder.
        wanted: what the record of a generated image has to say, keys that are left out excepted.
    """
    folder = Path(str(config.class_data_dir))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--class_data_dir {folder}: is a file; name a folder")
    if not folder.is_dir():
        return []
    if (folder / METADATA_NAME).is_file():
        listed = read_folder(folder, "--class_data_dir", captions=(str(config.class_prompt),))
        paths = [image.path for image in listed]
    else:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    stale = [(path, said) for path in paths if (said := _difference(_record(path), wanted))]
    if stale:
        path, said = stale[0]
        raise InputError(
            f"--class_data_dir {folder}: {len(stale)} of its {len(paths)} images were generated otherwise "
            f"({path.name}: {said}); remove them, or name another folder, and they are generated anew"
        )
    return paths


def _wanted(config: PriorConfig, settings: SamplingConfig, base_hash: str) -> dict[str, object]:
    """Return what the record of a class image has to say."""
    return {
        "prompt": config.class_prompt,
        "base_model": base_hash,
        "steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "scheduler": settings.scheduler,
        "height": settings.height,
        "width": settings.width,
    }


def _record(path: Path) -> dict[str, object]:
    """Return what an image says of how it was made; nothing for one of the user's own."""
    try:
        with Image.open(path) as image:
            text = image.info.get(RECORD, "{}") if image.format == "PNG" else "{}"
        record = json.loads(str(text))
    except (OSError, UnidentifiedImageError, SyntaxError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as an image ({' '.join(str(error).split())})") from None
    return record if isinstance(record, dict) else {}


def _difference(record: dict[str, object], wanted: dict[str, object]) -> str:
    """Say in what a record differs, or nothing."""
    changed = [name for name in wanted if record and record.get(name) != wanted[name]]
    return ", ".join(f"{name} {record.get(name)} then, {wanted[name]} now" for name in changed)


def _path(folder: Path, number: int) -> Path:
    """Return the place of a generated class image."""
    return folder / f"class-{number:05d}.png"


def _generate(
    opened: Opened, config: PriorConfig, settings: SamplingConfig, wanted: dict[str, object], numbers: list[int]
) -> None:
    """Generate this process's share of class images, each from seed + number, each file whole or not there.

    An image shares its batch with the same numbers always, whichever are missing: its bits may depend on them.
    """
    from eval.sampling import decode, require_light, sample_latents

    accelerator = opened.run.accelerator
    precision = config.prior_generation_precision or _fast_precision(accelerator.device)
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("--prior_generation_precision fp16: needs a GPU; use bf16 or fp32")
    dtype = _PRECISIONS.get(precision)
    models = dataclasses.replace(opened.models, scheduler=opened.base_scheduler)
    size, missing = config.sample_batch_size, set(numbers)
    groups = sorted({number // size for number in numbers})[accelerator.process_index :: accelerator.num_processes]
    known: dict[str, Tensor] = {}
    with tqdm(total=len(groups) * size, desc="class images", disable=None if opened.run.is_main else True) as bar:
        for group in groups:
            batch = range(group * size, min((group + 1) * size, max(numbers) + 1))
            requests = [(str(config.class_prompt), opened.run.seed + number) for number in batch]
            with torch.autocast(accelerator.device.type, dtype=dtype) if dtype else nullcontext():
                latents = sample_latents(models, requests, settings, known=known)
            pictures = decode(models, latents, requests)  # in float32: half precision overflows in this VAE
            require_light(pictures, requests)
            for number, picture, (_, seed) in zip(batch, pictures, requests, strict=True):
                if number not in missing:
                    continue
                notes = PngImagePlugin.PngInfo()
                notes.add_text(RECORD, json.dumps({**wanted, "seed": seed, "precision": precision}))
                path = _path(Path(str(config.class_data_dir)), number)
                partial = path.with_suffix(".partial")
                Image.fromarray(picture).save(partial, format="PNG", pnginfo=notes)
                partial.replace(path)
            bar.update(len(batch))


def _fast_precision(device: torch.device) -> str:
    """Return the precision that a device samples fastest in; a CPU with AVX512-BF16 takes 0.6 of its time in bf16."""
    if device.type == "cpu":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    return "fp16" if device.type == "cuda" else "fp32"
