"""What goes into an update: captioned images in a seeded order, each with its own draws.

Position p of the stream is image ``permutation(seed, p // N)[p % N]``, or, balanced, the next of a group of images. An
update takes the next global batch of an epoch, short at its end, whatever the number of processes and of forward passes
it is cut into. Pictures of several shapes may meet in an update; a forward pass has one shape.

Shapes: images N, batch B, captions U, token places L, width D, latents (4, h, w).
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch

from configs.errors import UsageError
from finetune.core.data.latents import Latents, cached_latents
from finetune.core.pictures.flips import ways_to_show
from finetune.core.pictures.images import CaptionedImage, raise_together
from finetune.core.pictures.pictures import (
    CENTRE,
    Shape,
    TrainingPicture,
    bucket_of,
    bucket_step,
    bucket_table,
    captions_by_shape,
    check_decodable,
    load_pixels,
    turned_shape,
)
from finetune.core.run import Batch, Run, Update
from finetune.core.settings.images import PictureConfig
from finetune.core.settings.training import TrainConfig
from finetune.diffusion.config import NoiseConfig
from finetune.diffusion.draws import Draws, counter_seed, draw, permutation
from finetune.diffusion.models import Models
from finetune.diffusion.text import Conditions, encode_prompts, tokenize
from finetune.diffusion.vae import Moments, encode, scaled_latents


@dataclass(frozen=True, kw_only=True)
class CaptionedBatches:
    """Updates of captioned images; a frozen value, so that an update is a function of its number alone.

    Attributes:
        pictures: for each image, in the order of its folder, the ways in which it is shown.
        groups: of places in ``pictures``; each group is shown as often as the others. One group: all of them.
        latents: what the pictures are encoded to, or None: encoded at each use.
        size: side of a square picture, px; buckets have about its area.
        conditions: of U + 1 captions, on the training device; row 0 belongs to the empty one.
        prompt_rows: for each caption, its row in ``conditions``.
    """

    pictures: list[tuple[TrainingPicture, ...]]
    groups: list[tuple[int, ...]]
    latents: Latents | None
    models: Models
    size: int
    conditions: Conditions
    prompt_rows: dict[str, int]
    num_timesteps: int
    config: PictureConfig
    noise: NoiseConfig
    seed: int
    train: TrainConfig
    num_processes: int
    process_index: int

    @property
    def shapes(self) -> dict[Shape, Counter[str]]:
        """The shapes of the pictures, that of most first, with how often each caption comes with it."""
        return captions_by_shape(picture for ways in self.pictures for picture in ways)

    @property
    def learns_text(self) -> bool:
        """Whether prompts are token ids, for a text encoder that learns."""
        return not self.conditions.prompts.is_floating_point()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates in as many images as there are; the last may be short."""
        return self.train.steps_per_epoch(len(self.pictures), self.num_processes)

    def update(self, number: int) -> Update:
        """Return this process's share of an update."""
        epoch, within = divmod(number, self.steps_per_epoch)
        count = len(self.pictures)
        across = self.train.micro_batch * self.num_processes
        per_update = self.train.images_per_update(self.num_processes)
        first, last = within * per_update, min((within + 1) * per_update, count)
        buckets = defaultdict(list)
        for position in range(epoch * count + first, epoch * count + last):
            picture = self.shown_at(position)
            buckets[picture.shape].append((picture, position))
        batches = []
        for shape in sorted(buckets):
            for start in range(0, len(buckets[shape]), across):
                together = buckets[shape][start : start + across]
                mine = together[self.process_index :: self.num_processes]
                # Every process must enter each forward pass: one with nothing to do takes an image that counts nothing.
                batches.append(self._batch(mine or together[:1], weight=1.0 if mine else 0.0))
        return Update(batches=batches, weight=float(last - first), num_images=last - first)

    def cut(self, train: TrainConfig) -> CaptionedBatches:
        """Return the same updates, in forward passes of as many images as these settings say."""
        return dataclasses.replace(self, train=train)

    def shown_at(self, position: int) -> TrainingPicture:
        """Return the picture at a position of the stream."""
        if len(self.groups) == 1:
            image = _turn(self.seed, self.groups[0], position)
        else:
            # As many positions in a row as there are groups hold one image of each, in an order of their own.
            block = position // len(self.groups)
            group = _turn(counter_seed(self.seed, "groups", 0), range(len(self.groups)), position)
            image = _turn(counter_seed(self.seed, "group", group), self.groups[group], block)
        ways = self.pictures[image]
        return ways[counter_seed(self.seed, "flip", position) % len(ways)]

    def _batch(self, rows: list[tuple[TrainingPicture, int]], weight: float) -> Batch:
        """Gather one forward pass from pictures of one shape and their positions."""
        shape = rows[0][0].shape
        draws = [
            draw(
                self.seed,
                position,
                shape=self._latent_shape(shape),
                num_timesteps=self.num_timesteps,
                noise_offset=self.noise.offset,
                input_perturbation=self.noise.input_perturbation,
                caption_dropout=self.config.caption_dropout,
            )
            for _, position in rows
        ]
        device = self.conditions.prompts.device
        prompts = [0 if one.drop_caption else self._prompt_row(*row) for one, row in zip(draws, rows, strict=True)]
        moments = self._moments([picture for picture, _ in rows], draws)
        spread = torch.stack([one.latent_noise for one in draws]).to(device, non_blocking=True)
        return Batch(
            latents=scaled_latents(self.models.vae, moments, spread),
            noise=torch.stack([one.noise for one in draws]).to(device, non_blocking=True),
            input_noise=torch.stack([one.input_noise for one in draws]).to(device, non_blocking=True),
            timesteps=torch.tensor([one.timestep for one in draws]).to(device, non_blocking=True),
            conditions=self.conditions.rows(prompts, each_once=True),
            weights=torch.full((len(rows),), weight, device=device),
            names=tuple(picture.image.path.name for picture, _ in rows),
            positions=tuple(position for _, position in rows),
        )

    def _latent_shape(self, shape: Shape) -> tuple[int, int, int]:
        """Return the shape of a picture's latents, (4, h, w)."""
        factor = self.models.vae_scale_factor
        return int(self.models.unet.config.in_channels), shape[0] // factor, shape[1] // factor

    def _prompt_row(self, picture: TrainingPicture, position: int) -> int:
        """Return the row of the caption that a picture comes with at this position."""
        return self.prompt_rows[picture.captions[counter_seed(self.seed, "caption", position) % len(picture.captions)]]

    def _moments(self, pictures: list[TrainingPicture], draws: list[Draws]) -> Moments:
        """Return the posterior of some pictures, from the cache or from the VAE."""
        if self.latents is None:
            cuts = [one.crop if self.config.crops_at_random else CENTRE for one in draws]
            return encode(self.models.vae, load_pixels(pictures, cuts, self.config))
        keys = []
        for picture, one in zip(pictures, draws, strict=True):
            places = picture.places(self.config.cache_crops)
            keys.append(picture.key(places[int(one.crop[0] * len(places))]))
        return self.latents.of(pictures[0].shape, keys, self.conditions.prompts.device)


def _turn(seed: int, members: Sequence[int], number: int) -> int:
    """Return which of some members has its turn at this number; each comes once in a round, in a seeded order."""
    turn, place = divmod(number, len(members))
    return members[_order(seed, turn, len(members))[place]]


@lru_cache(maxsize=128)
def _order(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return the order of a round; asked for once per image, and small, as many rounds are kept."""
    return permutation(seed, epoch, length).numpy().astype(np.int32)


def captioned_batches(
    images: list[CaptionedImage],
    models: Models,
    config: PictureConfig,
    noise: NoiseConfig,
    run: Run,
    *,
    learns_text: bool = False,
    balance: Sequence[str] = (),
) -> CaptionedBatches:
    """Encode images and captions, once each, and return the updates they make; say how images become pictures.

    Args:
        images: that passed the checks.
        models: encode pictures and captions.
        config: how images become pictures.
        noise: how they are made noisy.
        run: its seed, processes and folder.
        learns_text: the text encoder, or rows of its tokens, learn: captions are only turned into token ids.
        balance: columns of the images; every combination of their values comes equally often.

    Raises:
        UsageError: a resolution that the VAE cannot give back, or a pipeline not generate; a flip that makes a caption
            untrue.
        InputError: images that do not decode, or captions longer than the text encoder reads, with their files.
    """
    pictures = make_pictures(images, models, config)
    flat = [picture for ways in pictures for picture in ways]
    groups = _groups(images, balance)
    check_captions(flat, models)
    captions = sorted({caption for picture in flat for caption in picture.captions})
    # An image that is there many times, for a word that is learned, is said once.
    unique = {(picture.image.path, picture.turn): picture for picture in flat}
    run.say(f"pictures from {len({path for path, _ in unique})} images, rows x columns:")
    run.say(bucket_table(list(unique.values())))
    if balance:
        run.say(balance_table(images, groups))
    latents = None
    if config.cache_crops or not config.crops_at_random or all(one.resized == one.shape for one in flat):
        latents = cached_latents(flat, models.vae, config, run)
    else:
        check_decodable(images, config)
    encoded = (tokenize if learns_text else encode_prompts)(models, ["", *captions])
    return CaptionedBatches(
        pictures=pictures,
        groups=groups,
        latents=latents,
        models=models,
        size=config.resolution or models.size_px,
        conditions=Conditions(prompts=encoded.to(run.accelerator.device)),
        prompt_rows={caption: row for row, caption in enumerate(captions, start=1)},
        num_timesteps=int(models.scheduler.config.num_train_timesteps),
        config=config,
        noise=noise,
        seed=run.seed,
        train=run.train,
        num_processes=run.accelerator.num_processes,
        process_index=run.accelerator.process_index,
    )


def make_pictures(
    images: Sequence[CaptionedImage], models: Models, config: PictureConfig
) -> list[tuple[TrainingPicture, ...]]:
    """Return for each image the ways in which it is shown: flips, and the shape of each.

    Raises:
        UsageError: as ``captioned_batches``.
    """
    size = config.resolution or models.size_px
    multiple = max(8, models.vae_scale_factor)  # 8: pipelines generate no other sizes, whatever the VAE
    if size % multiple:
        near = max(1, size // multiple) * multiple
        raise UsageError(f"--resolution {size}: must be a multiple of {multiple}, such as {near}")
    step = config.bucket_step or bucket_step(size, multiple)
    if step % multiple or step > size:
        raise UsageError(f"--bucket_step {step}: must be a multiple of {multiple}, and at most {size}")

    @cache
    def shape_of(image: Shape) -> Shape:
        return bucket_of(image, size, step) if config.buckets else (size, size)

    return [
        tuple(
            TrainingPicture(image=image, turn=turn, captions=captions, shape=shape_of(turned_shape(image, turn)))
            for turn, captions in ways
        )
        for image, ways in zip(images, ways_to_show(images, config), strict=True)
    ]


def check_captions(pictures: Sequence[TrainingPicture], models: Models) -> None:
    """Refuse captions that the text encoder would cut.

    Raises:
        InputError: naming their files and lengths.
    """
    limit = models.tokenizer.model_max_length
    unique = {caption: picture.image for picture in reversed(pictures) for caption in picture.captions}
    lengths = [len(ids) for ids in models.tokenizer(list(unique)).input_ids]
    raise_together(
        [
            f"{image.where}: the caption has {length} tokens, {limit} are read; shorten it"
            for image, length in zip(unique.values(), lengths, strict=True)
            if length > limit
        ][::-1]
    )


def _groups(images: Sequence[CaptionedImage], balance: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the places of images that share the values of some columns, group by group; all in one without columns."""
    groups = defaultdict(list)
    for place, image in enumerate(images):
        groups[tuple(image.columns[key] for key in balance)].append(place)
    return [tuple(groups[values]) for values in sorted(groups)]


def balance_table(images: Sequence[CaptionedImage], groups: Sequence[Sequence[int]]) -> str:
    """Return a table of captions: how many images have each, and how often an epoch shows it on average."""
    share = len(images) / len(groups)
    counts = Counter(image.caption for image in images)
    shown: dict[str, float] = defaultdict(float)
    for group in groups:
        for place in group:
            shown[images[place].caption] += share / len(group)
    width = max(map(len, counts))
    lines = [f"  {'caption'.ljust(width)}  images  shown an epoch"]
    lines += [f"  {caption.ljust(width)}  {counts[caption]:6}  {shown[caption]:14.1f}" for caption in sorted(counts)]
    return "\n".join(lines)
