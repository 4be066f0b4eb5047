"""What both models make of the same prompts, seeds and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from eval.drift_check.models import BaseAndTuned
from eval.forgetting.evidence import Evidence, Latents
from finetune.diffusion.config import SamplingConfig
from finetune.diffusion.fixed_noise import predictions
from finetune.diffusion.models import Models
from finetune.diffusion.sampling import require_light, sample, sample_latents
from finetune.diffusion.vae import decode
from prompts.probe_lists import Probe

NUM_EMPTY = 16


@dataclass(frozen=True, kw_only=True)
class DriftRequest:
    """Everything that decides what the models are asked.

    Attributes:
        probes: P of them.
        captions: prompts of the trained domain, to compare the change with.
        num_images: pictures per probe.
        seed: of the first picture of a probe, and of the noise.
        num_timesteps: noise levels at which predictions are compared.
        sampling: with height and width.
        has_pictures: False for a pulse, which compares predictions alone.
        real: dataset folder with the training slices, to recognise them in pictures; None if it is not known.
        num_slices: training slices to learn from.
    """

    probes: Sequence[Probe]
    captions: tuple[str, ...]
    num_images: int
    seed: int
    num_timesteps: int
    sampling: SamplingConfig
    has_pictures: bool
    real: Path | None
    num_slices: int

    @property
    def seeds(self) -> range:
        """Of the pictures of a probe."""
        return range(self.seed, self.seed + self.num_images)


def gather(request: DriftRequest, models: BaseAndTuned) -> tuple[Evidence, Latents]:
    """Run both models; where adapters make the difference, they are off for the base's part."""
    settings, count, probes, base = request.sampling, request.num_images, request.probes, models.base
    seeds = request.seeds
    num_latents = min(2, count)
    has_pictures = request.has_pictures
    asked = [(probe.prompt, seed) for probe in probes for seed in (seeds if has_pictures else seeds[:num_latents])]
    others = [(prompt, seed + count) for prompt, seed in asked]

    models.set_strength(0.0)
    made = sample_latents(base, asked, settings, progress="base")
    latents = made.unflatten(0, (len(probes), -1))[:, :num_latents].cpu()
    # The base makes the most varied pictures of no prompt, and no slices of the captions yet: both show what is none.
    num_empty = NUM_EMPTY if request.real and has_pictures else 0
    empty = [("", request.seed + 2 * count + index) for index in range(num_empty)]
    more = [sample(base, empty, settings, progress="base, empty prompt")] if empty else []
    base_in, caption_latents = None, None
    if request.captions:
        of_captions = [(text, seed) for text in request.captions for seed in seeds[:num_latents]]
        caption_latents = sample_latents(base, of_captions, settings, progress="base, captions")
        caption_latents = caption_latents.unflatten(0, (len(request.captions), num_latents)).cpu()
        base_in = _predict(request, base, request.captions, caption_latents)
        if has_pictures:
            more.append(decode(base, caption_latents.flatten(0, 1), of_captions, batch_size=settings.batch_size))
    base_predictions = _predict(request, base, [probe.prompt for probe in probes], latents)
    pictures = again = np.zeros((0, settings.height or 0, settings.width or 0, 3), dtype=np.uint8)
    if has_pictures:
        pictures = decode(base, made, asked, batch_size=settings.batch_size)
        again = sample(base, others, settings, progress="base, other seeds")
        require_light(pictures, asked)
    shape = (len(probes), count if has_pictures else 0, *pictures.shape[1:])
    evidence = Evidence(
        base=pictures.reshape(shape),
        base_again=again.reshape(shape),
        base_more=np.concatenate([*more, again[:0]]),
        tuned=pictures.reshape(shape),
        base_predictions=base_predictions,
        tuned_predictions=base_predictions,
        captions=request.captions,
        base_caption_predictions=base_in,
        tuned_caption_predictions=base_in,
    )
    both = Latents(probes=latents, captions=caption_latents)
    return at_strength(request, models, evidence, both, 1.0), both


def at_strength(
    request: DriftRequest, models: BaseAndTuned, evidence: Evidence, latents: Latents, strength: float
) -> Evidence:
    """Return the evidence with the tuned model's part made anew, its adapters at a share of the strength asked for."""
    models.set_strength(strength)
    probes, tuned = request.probes, models.tuned
    seeds = request.seeds if request.has_pictures else ()
    asked = [(probe.prompt, seed) for probe in probes for seed in seeds]
    pictures = evidence.base
    if asked:
        progress = "tuned" if strength == 1 else f"tuned, strength {strength:g}"
        made = sample(tuned, asked, request.sampling, progress=progress)
        require_light(made, asked)
        pictures = made.reshape(evidence.base.shape)
    captions = latents.captions
    return replace(
        evidence,
        tuned=pictures,
        tuned_predictions=_predict(request, tuned, [probe.prompt for probe in probes], latents.probes),
        tuned_caption_predictions=None if captions is None else _predict(request, tuned, request.captions, captions),
    )


def _predict(request: DriftRequest, models: Models, prompts: Sequence[str], latents: Tensor) -> Tensor:
    """Predict at the noise levels and with the noise that both models share."""
    return predictions(
        models,
        prompts,
        latents,
        num_timesteps=request.num_timesteps,
        seed=request.seed,
        batch_size=request.sampling.batch_size,
    )
