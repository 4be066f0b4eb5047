"""What goes into an update: captioned images in a seeded order, each with its own draws.

Position p of the stream is image ``permutation(seed, p // N)[p % N]``. An update takes the next global batch of an
epoch, short at its end, whatever the number of processes and of forward passes it is cut into.

Shapes: images N, batch B, captions U, token places L, width D, latents (4, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from configs.errors import InputError, UsageError
from finetune.core.config import NoiseConfig, PictureConfig, TrainConfig
from finetune.core.images import CaptionedImage, raise_together
from finetune.core.latents import Moments, cache_folder, cached_moments, encode, module_hash, sample
from finetune.core.models import Models, encode_prompts, tokenize
from finetune.core.noise import Draws, counter_seed, draw, permutation
from finetune.core.run import Run


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images of one forward pass, on the training device.

    Attributes:
        latents: (B, 4, h, w) float32, scaled.
        noise: (B, 4, h, w) float32, to predict.
        input_noise: (B, 4, h, w) float32, to add: the same, but for input perturbation.
        timesteps: (B,) int64.
        prompts: (B, L, D) embeddings, or (B, L) int64 token ids where the text encoder learns.
        weights: (B,) float32, what each image counts in the mean.
        names: of the images' files, for messages.
        positions: in the stream, of each image.
        targets: (B, 4, h, w) float32, what to predict, where it is not the noise or v.
    """

    latents: Tensor
    noise: Tensor
    input_noise: Tensor
    timesteps: Tensor
    prompts: Tensor
    weights: Tensor
    names: tuple[str, ...]
    positions: tuple[int, ...]
    targets: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Update:
    """This process's share of one optimizer update, and what all processes together take into it."""

    batches: list[Batch]
    weight: float
    num_images: int


class Batches(Protocol):
    """What the loop asks of a recipe's data."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates in one pass over the images."""

    def update(self, number: int) -> Update:
        """Return the update with this number, counted from 0; the same number gives the same tensors."""


def prepare_pixels(image: Image.Image, size: int, interpolation: str, crop: Sequence[float] = (0.5, 0.5)) -> np.ndarray:
    """Resize the shorter side to ``size``, cut a square, and return (3, size, size) float32 in [-1, 1].

    ``crop`` places the square, from 0 (top, left) to 1 (bottom, right); 0.5 is the centre, as torchvision rounds it.
    """
    rgb = ImageOps.exif_transpose(image).convert("RGB")
    short = min(rgb.size)
    if short != size:
        columns, rows = (size if side == short else int(size * side / short) for side in rgb.size)
        rgb = rgb.resize((columns, rows), Image.Resampling[interpolation.upper()])
    left, top = (round((side - size) * share) for side, share in zip(rgb.size, crop[::-1], strict=True))
    levels = np.asarray(rgb.crop((left, top, left + size, top + size)), dtype=np.float32)
    return np.ascontiguousarray(levels.transpose(2, 0, 1)) / np.float32(127.5) - np.float32(1)


def _load_pixels(image: CaptionedImage, size: int, interpolation: str, crop: Sequence[float]) -> Tensor:
    """Decode and prepare one image, or name the one that cannot be decoded."""
    try:
        with Image.open(image.path) as opened:
            return torch.from_numpy(prepare_pixels(opened, size, interpolation, crop))
    except (OSError, SyntaxError) as error:
        raise InputError(f"{image.path}: cannot be decoded ({' '.join(str(error).split())})") from None


def _load_all(
    images: list[CaptionedImage], size: int, config: PictureConfig, crops: Sequence[Sequence[float]]
) -> Tensor:
    """Decode and prepare several images, in ``dataloader_num_workers`` threads if there are any."""

    def one(image: CaptionedImage, crop: Sequence[float]) -> Tensor:
        return _load_pixels(image, size, config.image_interpolation_mode, crop)

    if not config.dataloader_num_workers:
        return torch.stack(list(map(one, images, crops)))
    with ThreadPoolExecutor(config.dataloader_num_workers) as pool:
        return torch.stack(list(pool.map(one, images, crops)))


@dataclass(frozen=True, kw_only=True)
class CaptionedBatches:
    """Updates of captioned images; a frozen value, so that an update is a function of its number alone.

    Attributes:
        images: in the order of metadata.jsonl.
        moments: posterior of each image on the training device, or None: encoded at each use (random crops).
        size: side of the training pictures, px.
        prompts: (U + 1, L, D) embeddings, or (U + 1, L) int64 token ids where the text encoder learns, on the training
            device; row 0 belongs to the empty caption.
        prompt_rows: for each image, the rows of its captions in ``prompts``.
        shape: of a latent, (4, h, w).
    """

    images: list[CaptionedImage]
    moments: Moments | None
    models: Models
    size: int
    prompts: Tensor
    prompt_rows: list[tuple[int, ...]]
    shape: tuple[int, int, int]
    num_timesteps: int
    config: PictureConfig
    noise: NoiseConfig
    seed: int
    train: TrainConfig
    num_processes: int
    process_index: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates in one pass over the images; the last may be short."""
        return self.train.steps_per_epoch(len(self.images), self.num_processes)

    def update(self, number: int) -> Update:
        """Return this process's share of an update."""
        epoch, within = divmod(number, self.steps_per_epoch)
        count = len(self.images)
        order = _order(self.seed, epoch, count)
        across = self.train.train_batch_size * self.num_processes
        per_update = across * self.train.gradient_accumulation_steps
        places = range(within * per_update, min((within + 1) * per_update, count))
        batches = []
        for first in range(places.start, places.stop, across):
            together = range(first, min(first + across, places.stop))
            mine = together[self.process_index :: self.num_processes]
            # Every process must enter each forward pass: one with nothing to do takes an image that counts nothing.
            weight = 1.0 if mine else 0.0
            rows = [(order[place], epoch * count + place) for place in (mine or together[:1])]
            batches.append(self._batch(rows, weight))
        return Update(batches=batches, weight=float(len(places)), num_images=len(places))

    def _batch(self, rows: list[tuple[int, int]], weight: float) -> Batch:
        """Gather one forward pass from (image, position) pairs."""
        draws = [
            draw(
                self.seed,
                position,
                shape=self.shape,
                num_timesteps=self.num_timesteps,
                noise_offset=self.noise.offset,
                input_perturbation=self.noise.input_perturbation,
                caption_dropout=self.config.caption_dropout,
            )
            for _, position in rows
        ]
        device = self.prompts.device
        index = torch.tensor([image for image, _ in rows])
        prompts = torch.tensor(
            [0 if one.drop_caption else self._prompt_row(*row) for one, row in zip(draws, rows, strict=True)]
        )
        moments = self._moments(index, draws)
        spread = torch.stack([one.latent_noise for one in draws]).to(device, non_blocking=True)
        return Batch(
            latents=sample(moments.mean, moments.std, spread, self.models.vae.config.scaling_factor),
            noise=torch.stack([one.noise for one in draws]).to(device, non_blocking=True),
            input_noise=torch.stack([one.input_noise for one in draws]).to(device, non_blocking=True),
            timesteps=torch.tensor([one.timestep for one in draws]).to(device, non_blocking=True),
            prompts=self.prompts[prompts.to(device)],
            weights=torch.full((len(rows),), weight, device=device),
            names=tuple(self.images[image].path.name for image, _ in rows),
            positions=tuple(position for _, position in rows),
        )

    def _prompt_row(self, image: int, position: int) -> int:
        """Return the row of the caption that this image comes with at this position."""
        rows = self.prompt_rows[image]
        return rows[counter_seed(self.seed, "caption", position) % len(rows)]

    def _moments(self, index: Tensor, draws: list[Draws]) -> Moments:
        """Return the posterior of some images, from the cache or, with random crops, from the VAE."""
        if self.moments is not None:
            index = index.to(self.moments.mean.device)
            return Moments(self.moments.mean[index], self.moments.std[index])
        chosen = [self.images[image] for image in index.tolist()]
        return encode(self.models.vae, _load_all(chosen, self.size, self.config, [one.crop.tolist() for one in draws]))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, length: int) -> list[int]:
    """Return the images of an epoch in order; asked for once per update."""
    return permutation(seed, epoch, length).tolist()


def captioned_batches(
    images: list[CaptionedImage],
    models: Models,
    config: PictureConfig,
    noise: NoiseConfig,
    run: Run,
    *,
    num_timesteps: int,
    learns_text: bool = False,
) -> CaptionedBatches:
    """Encode images and captions, once each, and return the updates they make.

    Where the text encoder or rows of its tokens learn (``learns_text``), captions are only turned into token ids.

    Raises:
        UsageError: a resolution that the VAE cannot give back, or a pipeline not generate.
        InputError: an image that does not decode, or a caption longer than the text encoder reads, with its file.
    """
    size = config.resolution or models.size_px
    multiple = max(8, models.vae_scale_factor)  # 8: pipelines generate no other sizes, whatever the VAE
    if size % multiple:
        near = max(1, size // multiple) * multiple
        raise UsageError(f"--resolution {size}: must be a multiple of {multiple}, such as {near}")
    _check_captions(images, models)
    captions = sorted({caption for image in images for caption in image.captions})
    rows = {caption: row for row, caption in enumerate(captions, start=1)}
    cell = size // models.vae_scale_factor
    device = run.accelerator.device
    moments = None
    if config.center_crop or all(_is_square(image) for image in images):
        moments = _cached(images, models, config, size, run)
        moments = Moments(moments.mean.to(device), moments.std.to(device))
    return CaptionedBatches(
        images=images,
        moments=moments,
        models=models,
        size=size,
        prompts=(tokenize if learns_text else encode_prompts)(models, ["", *captions]).to(device),
        prompt_rows=[tuple(rows[caption] for caption in image.captions) for image in images],
        shape=(int(models.unet.config.in_channels), cell, cell),
        num_timesteps=num_timesteps,
        config=config,
        noise=noise,
        seed=run.seed,
        train=run.train,
        num_processes=run.accelerator.num_processes,
        process_index=run.accelerator.process_index,
    )


def _check_captions(images: list[CaptionedImage], models: Models) -> None:
    """Refuse captions that the text encoder would cut."""
    limit = models.tokenizer.model_max_length
    unique = {caption: image for image in reversed(images) for caption in image.captions}
    lengths = [len(ids) for ids in models.tokenizer(list(unique)).input_ids]
    raise_together(
        [
            f"{image.where}: the caption has {length} tokens, {limit} are read; shorten it"
            for image, length in zip(unique.values(), lengths, strict=True)
            if length > limit
        ][::-1]
    )


def _is_square(image: CaptionedImage) -> bool:
    """Tell whether a random crop of this image is always the whole of it."""
    return image.width == image.height


def _cached(images: list[CaptionedImage], models: Models, config: PictureConfig, size: int, run: Run) -> Moments:
    """Return the posteriors from the cache; other processes wait for the first one to fill it."""
    root = config.latent_cache_dir or run.folder / "cache"
    preprocessing = {"size": size, "interpolation": config.image_interpolation_mode, "crop": "center"}
    folder = cache_folder(root, module_hash(models.vae), preprocessing)

    def pixels(places: Sequence[int]) -> Tensor:
        return _load_all([images[place] for place in places], size, config, [(0.5, 0.5)] * len(places))

    with run.accelerator.main_process_first():
        moments, encoded = cached_moments(folder, [image.content for image in images], pixels, models.vae)
    run.say(f"latents: {encoded} images encoded, {len(images) - encoded} from {root}")
    return moments
