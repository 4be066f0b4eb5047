"""Loss on images that are held out, and on training images, always at the same (image, timestep, noise) triples.

What moves between two looks is the model alone. Each image is seen once in every band of timesteps; its draws hang on
its content, not on the run's seed, so runs compare. Training's own draws are not touched.

Shapes: images N, bands T, batch B, latents (4, h, w).
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object
from numpy.typing import NDArray

from configs.errors import InputError, UsageError
from data_prep.folders.run_folder import HELDOUT
from eval.stats.intervals import mean_interval
from finetune.core.data.batches import check_captions, make_pictures
from finetune.core.data.latents import CachedLatents, Latents, cached_latents
from finetune.core.learns.averages import Averages
from finetune.core.pictures.images import CaptionedImage, read_folder
from finetune.core.pictures.pictures import CENTRE, TrainingPicture
from finetune.core.run import HeldOut, OpenRun
from finetune.core.settings.images import PictureConfig
from finetune.core.settings.watching import WatchConfig
from finetune.diffusion.denoiser import Denoiser
from finetune.diffusion.draws import counter_seed, draw, permutation
from finetune.diffusion.fixed_noise import FixedNoise, squared_errors
from finetune.diffusion.models import evaluating
from finetune.diffusion.text import Conditions, encode_prompts, tokenize
from finetune.diffusion.vae import scaled_latents

Row = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Two fixed sets of pictures, and how to look at the loss on them.

    Attributes:
        sets: `validation` and `train`, or none: nothing is looked at.
        conditions: of U captions; row 0 belongs to the empty one.
        prompt_rows: for each caption, its row in ``conditions``.
        averages: looked at in the place of what learns, where they are kept.
    """

    config: WatchConfig
    opened: OpenRun
    sets: dict[str, list[TrainingPicture]]
    latents: Latents
    conditions: Conditions
    prompt_rows: dict[str, int]
    averages: Averages

    def of(self, opened: OpenRun) -> Watch:
        """Return the same watch of a run whose settings were completed."""
        return dataclasses.replace(self, opened=opened)

    def look(self, step: int, *, is_last: bool) -> bool:
        """Write the losses to ``heldout.jsonl`` and the trackers, if due after this step; never end the run."""
        run = self.opened.run
        every = self.config.heldout_steps
        if every is None or run.train.dry_run or (step % every and not is_last):
            return False
        rows = []
        for name, pictures in self.sets.items():
            losses = self.losses(pictures)
            first = losses if step == 0 else _first_losses(run.folder / HELDOUT, name, losses.shape)
            found = summary(losses, [one.image.caption for one in pictures], self.bands, first)
            if step == 0:
                found[0]["losses"] = losses.tolist()
            rows += [{"step": step, "set": name, **row} for row in found]
        if not run.is_main:
            return False
        with (run.folder / HELDOUT).open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in rows))
        whole = {str(row["set"]): row for row in rows if row["band"] is None and row["caption"] is None}
        values = {f"heldout/{name}": row["loss"] for name, row in whole.items()}
        for row in rows:
            if isinstance(row["band"], list):
                low, high = row["band"]
                values[f"heldout/{row['set']}/{low}-{high}"] = row["loss"]
        run.accelerator.log(values, step=step)
        if is_last:
            said = [f"{row['loss']:.4f} on {row['n']} {name} images" for name, row in whole.items()]
            run.say(f"loss at fixed noise: {', '.join(said)} ({HELDOUT})")
        return False

    @property
    def bands(self) -> list[tuple[int, int]]:
        """The bands of timesteps, half-open."""
        count, total = self.config.heldout_timesteps, self.opened.schedule.num_timesteps
        return [(band * total // count, (band + 1) * total // count) for band in range(count)]

    @torch.no_grad()
    def losses(self, pictures: Sequence[TrainingPicture]) -> NDArray[np.float64]:
        """Return the loss of each picture in each band, (N, T), without any weight; processes share the work."""
        run, models = self.opened.run, self.opened.models
        denoiser = Denoiser(models.text_encoder, models.unet)
        bands = len(self.bands)
        values = np.zeros((len(pictures), bands))
        mine: list[tuple[int, float]] = []
        with self.averages.in_place(), evaluating(models), run.accelerator.autocast():
            team, rank = run.accelerator.num_processes, run.accelerator.process_index
            share = list(self._cells(pictures))[rank::team]
            batches = (self._batch([(pictures[cell // bands], cell % bands) for cell in cells]) for cells in share)
            for cells, losses in zip(share, squared_errors(denoiser, batches, self.opened.schedule), strict=True):
                mine += zip(cells, losses.double().tolist(), strict=True)
        for cell, value in gather_object(mine):
            values.flat[cell] = value
        return values

    def _cells(self, pictures: Sequence[TrainingPicture]) -> Iterator[list[int]]:
        """Yield places in the table of losses: of pictures of one shape, as many at a time as training takes."""
        bands, size = len(self.bands), self.opened.run.train.micro_batch
        for shape in sorted({picture.shape for picture in pictures}):
            members = [place for place, picture in enumerate(pictures) if picture.shape == shape]
            cells = [place * bands + band for place in members for band in range(bands)]
            for start in range(0, len(cells), size):
                yield cells[start : start + size]

    def _batch(self, rows: Sequence[tuple[TrainingPicture, int]]) -> FixedNoise:
        """Return the triples of some pictures, each in one band."""
        models, device = self.opened.models, self.opened.device
        moments = self.latents.of(rows[0][0].shape, [picture.key(CENTRE) for picture, _ in rows], device)
        shape = (moments.mean.shape[1], moments.mean.shape[2], moments.mean.shape[3])
        total = self.opened.schedule.num_timesteps
        draws = [
            draw(counter_seed(0, picture.image.content, 0), band, shape=shape, num_timesteps=total)
            for picture, band in rows
        ]
        ends = [self.bands[band] for _, band in rows]
        timesteps = [low + one.timestep * (high - low) // total for one, (low, high) in zip(draws, ends, strict=True)]
        noise = torch.stack([one.noise for one in draws]).to(device)
        prompts = [self.prompt_rows[picture.image.caption] for picture, _ in rows]
        return FixedNoise(
            latents=scaled_latents(models.vae, moments),
            noise=noise,
            timesteps=torch.tensor(timesteps, device=device),
            conditions=self.conditions.rows(prompts),
        )


def _first_losses(path: Path, name: str, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    """Return the losses of step 0 from the file, or None if it has none of these images and bands."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        row = json.loads(line)
        if row["set"] == name and "losses" in row:
            found = np.array(row["losses"])
            return found if found.shape == shape else None
    return None


def summary(
    losses: NDArray[np.float64],
    captions: Sequence[str],
    bands: Sequence[tuple[int, int]],
    first: NDArray[np.float64] | None = None,
) -> list[Row]:
    """Return the mean loss with its interval: over all, by band of timesteps, and by caption.

    The interval is Student's t over the means of images, 95 %. It says how far other images of this kind would move the
    mean; neighbouring slices of one volume resemble each other, so with those it is too narrow. The change since step 0
    is that of the same triples, image by image, which mostly makes its interval the narrower one.

    Args:
        losses: (N, T), of each image in each band.
        captions: of the images; those with one image have no row of their own.
        bands: half-open ranges of timesteps.
        first: (N, T), losses at step 0, or None if they are not known.
    """
    everything = range(len(captions))
    parts: list[tuple[Row, Sequence[int], slice]] = [({"band": None, "caption": None}, everything, slice(None))]
    for number, band in enumerate(bands):
        parts.append(({"band": list(band), "caption": None}, everything, slice(number, number + 1)))
    for caption, count in sorted(Counter(captions).items()):
        if count > 1:
            chosen = [place for place, one in enumerate(captions) if one == caption]
            parts.append(({"band": None, "caption": caption}, chosen, slice(None)))
    rows = []
    for named, places, part in parts:
        loss, low, high = mean_interval(losses[places][:, part].mean(axis=1))
        row = {**named, "loss": loss, "low": low, "high": high, "n": len(places)}
        if first is not None:
            change = mean_interval((losses - first)[places][:, part].mean(axis=1))
            row |= dict(zip(("change", "change_low", "change_high"), change, strict=True))
        rows.append(row)
    return rows


def spread_over_captions(images: Sequence[CaptionedImage], count: int) -> list[CaptionedImage]:
    """Return a fixed subset of images that has every caption about equally often."""
    seen: Counter[str] = Counter()
    ranked = []
    for place in permutation(0, -2, len(images)).tolist():
        caption = images[place].caption
        ranked.append((seen[caption], place))
        seen[caption] += 1
    ranked.sort(key=lambda pair: pair[0])
    return [images[place] for _, place in ranked[:count]]


def watch_losses(
    config: WatchConfig,
    opened: OpenRun,
    pictures: PictureConfig,
    averages: Averages,
    heldout: HeldOut,
    *,
    learns_text: bool,
    for_drift: bool = False,
) -> Watch:
    """Choose the images to look at, encode them, and return the watch; without ``--heldout_steps`` it never looks.

    Args:
        config: how often, and at how much.
        opened: the run, with its training images.
        pictures: as in training, but for crops and flips: each is seen as it is, cut in the centre.
        averages: of what learns.
        heldout: where held-out images are.
        learns_text: the text encoder, or rows of its tokens, learn.
        for_drift: somebody else looks at these images, too; without ``--heldout_steps`` only if the folder is there
            or was named.

    Raises:
        UsageError: there is no such folder; nothing looks at the one named; the weights are spread over processes.
        InputError: as ``images.read_folder``; or all images of the folder are trained on.
    """
    run, models = opened.run, opened.models
    plain = dataclasses.replace(
        pictures, center_crop=True, random_crop=False, cache_crops=0, random_flip=False, flips={}
    )
    sets: dict[str, list[TrainingPicture]] = {}
    flag, named = "--validation_data_dir", config.validation_data_dir
    folder = named or heldout.beside.resolve().parent / "validation"
    if named is not None and config.heldout_steps is None and not for_drift:
        raise UsageError(f"{flag} {named}: needs --heldout_steps, how often to look, or --drift_probes")
    asked = f"{flag} {named}" if config.heldout_steps is None else f"--heldout_steps {config.heldout_steps}"
    if config.heldout_steps is not None or named is not None or (for_drift and folder.is_dir()):
        if run.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise UsageError(
                f"{asked}: not with {run.accelerator.distributed_type.value}, where no "
                "process holds the whole model; leave it out"
            )
        if not folder.is_dir():
            raise UsageError(f"{asked}: there is no folder {folder}; name one with {flag}")
        found = read_folder(
            folder,
            flag,
            captions=heldout.captions,
            image_column=heldout.image_column,
            caption_column=heldout.caption_column,
        )
        trained = {image.content: image for image in opened.images}
        # Blank slices are equal wherever they were cut; what is learned from cannot be held out.
        apart = [image for image in found if image.content not in trained]
        if not apart:
            raise InputError(
                f"{flag} {folder}: all its {len(found)} images are training images; name a folder of others"
            )
        if len(apart) < len(found):
            run.say(f"note: {len(found) - len(apart)} of {len(found)} held-out images are training images; left out")
        for name, images in (("validation", apart), ("train", list(trained.values()))):
            chosen = spread_over_captions(images, config.heldout_images)
            sets[name] = [way for (way,) in make_pictures(chosen, models, plain)]
    flat = [picture for members in sets.values() for picture in members]
    texts = sorted({picture.image.caption for picture in flat})
    if flat:
        check_captions(flat, models)
        sizes = ", ".join(f"{len(members)} {name} images" for name, members in sets.items())
        often = "at checks of drift" if config.heldout_steps is None else f"every {config.heldout_steps} steps"
        run.say(f"loss at fixed noise: {often}, on {sizes}")
    encoded = (tokenize if learns_text else encode_prompts)(models, ["", *texts])
    return Watch(
        config=config,
        opened=opened,
        sets=sets,
        latents=cached_latents(flat, models.vae, plain, run) if flat else CachedLatents(moments={}, rows={}),
        conditions=Conditions(prompts=encoded.to(opened.device)),
        prompt_rows={text: row for row, text in enumerate(texts, start=1)},
        averages=averages,
    )
