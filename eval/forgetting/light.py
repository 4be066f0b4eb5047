"""Drift while a model learns: what the base makes of a few probes is kept once, and compared with again and again.

A pulse compares predictions, without a picture: seconds. A check makes pictures and judges them as ``eval.drift`` does.

Shapes: P is the number of probes, C of captions, S of seeds and T of timesteps. Latents are (P, 1, 4, h, w) of the
probes and (C, 1, 4, h, w) of the captions; predictions are (P, 1, T, 4, h, w) and (C, 1, T, 4, h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.folders.results import Result
from eval.forgetting.divergence import divergence, divergence_parts
from eval.forgetting.evidence import Evidence
from eval.forgetting.leak import LeakNet, learn_slices, round_trip
from eval.forgetting.policy import Policy
from eval.forgetting.scores import score_drift
from eval.forgetting.verdicts import MIN_PICTURES
from eval.stats.arrays import Grey
from finetune.diffusion.config import SamplingConfig
from finetune.diffusion.fixed_noise import predictions
from finetune.diffusion.models import Models
from finetune.diffusion.sampling import require_light, sample_latents
from finetune.diffusion.vae import decode
from prompts.probe_lists import Probe

MOST_PROBES = 8
MOST_CAPTIONS = 4
TIMESTEPS = 4
SEEDS = MIN_PICTURES
FEWEST_SLICES = 8
"""Fewer training slices cannot both teach what they look like and show that it was learned."""


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """How far the predictions are from those that were kept, as relative mean squares.

    Attributes:
        probes: over all probes.
        captions: over the captions that are trained.
        prompts: of each probe, by its id.
    """

    probes: float
    captions: float
    prompts: dict[str, float]

    @property
    def ratio(self) -> float | None:
        """What the probes moved in units of what the captions moved; None before these did."""
        return self.probes / self.captions if self.captions > 0 else None


@dataclass(frozen=True, kw_only=True)
class LightDrift:
    """A model that changes, and what is asked of it.

    Attributes:
        models: as they stand whenever a method is called.
        probes: P of them.
        captions: C prompts of what is trained.
        sampling: of the pictures.
        policy: what counts as drift.
        precision: context of the forward passes, such as autocast; the VAE is left out, which half precision breaks.
    """

    models: Models
    probes: tuple[Probe, ...]
    captions: tuple[str, ...]
    sampling: SamplingConfig
    policy: Policy
    precision: Callable[[], AbstractContextManager[object]] = nullcontext

    def keep(self) -> dict[str, Tensor]:
        """Return what the model makes of everything that is asked: latents, predictions, pictures of two sets of seeds.

        Raises:
            TisserandError: a picture is not finite, or all black.
        """
        latents, pictures = self._sample(self.probes, 0)
        again = self._sample(self.probes, SEEDS)[1]
        with self.precision():
            captions = sample_latents(self.models, [(text, 0) for text in self.captions], self.sampling)
        kept = {
            "latents": latents.unflatten(0, (len(self.probes), SEEDS))[:, :1].contiguous(),
            "caption_latents": captions.float().cpu()[:, None].contiguous(),
            "pictures": torch.from_numpy(pictures),
            "pictures_again": torch.from_numpy(again),
        }
        probes, captions = self._predict(kept)
        return {**kept, "predictions": probes, "caption_predictions": captions}

    def pulse(self, kept: Mapping[str, Tensor]) -> Pulse:
        """Compare predictions alone; exactly 0 for a model that did not change."""
        probes, captions = self._predict(kept)
        parts = divergence_parts(probes, kept["predictions"])
        return Pulse(
            probes=divergence(*parts),
            captions=divergence(*divergence_parts(captions, kept["caption_predictions"])),
            prompts={
                probe.id: float(difference.sum() / scale.sum())
                for probe, difference, scale in zip(self.probes, *parts, strict=True)
            },
        )

    def check(self, kept: Mapping[str, Tensor], detector: LeakNet | None, why_blind: str = "") -> list[Result]:
        """Judge predictions and pictures; the last row is that of the whole check.

        Args:
            kept: what the base makes, from ``keep``.
            detector: recognises training slices; None if there is none that can.
            why_blind: why there is none.

        Raises:
            TisserandError: a picture is not finite, or all black.
        """
        probes, captions = self._predict(kept)
        base, again = (kept[name].numpy() for name in ("pictures", "pictures_again"))
        # Where no prediction moved by a bit, pictures would be the same: textual inversion leaves other prompts alone.
        is_unchanged = torch.equal(probes, kept["predictions"])
        evidence = Evidence(
            base=base,
            base_again=again,
            base_more=again[0, :0],
            tuned=base if is_unchanged else self._sample(self.probes, 0)[1],
            base_predictions=kept["predictions"],
            tuned_predictions=probes,
            captions=self.captions,
            base_caption_predictions=kept["caption_predictions"],
            tuned_caption_predictions=captions,
        )
        return score_drift(self.probes, evidence, detector, why_blind, self.policy)[0]

    def learn_slices(self, kept: Mapping[str, Tensor], slices: Sequence[Grey]) -> tuple[LeakNet | None, str]:
        """Train the network that recognises training slices, on every other one; the rest calibrates and tests it.

        Returns:
            The network, or None and why it cannot be trusted.
        """
        if len(slices) < FEWEST_SLICES:
            return None, f"{len(slices)} training images are too few to recognise them by"
        again, base = (kept[name].flatten(0, 1).numpy() for name in ("pictures_again", "pictures"))
        through = round_trip(self.models, slices)
        learned = learn_slices([*slices[::2], *through[::2]], list(again), held_out=through[1::2], base=base)
        if learned.is_blind:
            said = f"finds {learned.recall:.0%} of slices, and {learned.false_alarm:.0%} of the base's pictures"
            return None, f"detector blind: {said}"
        return learned.net, ""

    def _sample(self, probes: Sequence[Probe], first_seed: int) -> tuple[Tensor, NDArray[np.uint8]]:
        """Return latents (P * S, 4, h, w) and pictures (P, S, H, W, 3) of the probes."""
        requests = [(probe.prompt, first_seed + seed) for probe in probes for seed in range(SEEDS)]
        with self.precision():
            latents = sample_latents(self.models, requests, self.sampling).float().cpu()
        pictures = decode(self.models, latents, requests, batch_size=self.sampling.batch_size)
        require_light(pictures, requests)
        return latents, pictures.reshape(len(probes), SEEDS, *pictures.shape[1:])

    def _predict(self, kept: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Predict for the kept latents of the probes, and of the captions."""
        prompts = [probe.prompt for probe in self.probes]
        with self.precision():
            probes, captions = (
                predictions(
                    self.models,
                    texts,
                    kept[name],
                    num_timesteps=TIMESTEPS,
                    batch_size=self.sampling.batch_size,
                )
                for texts, name in ((prompts, "latents"), (list(self.captions), "caption_latents"))
            )
        return probes.contiguous(), captions.contiguous()


def few_probes(probes: Sequence[Probe]) -> tuple[Probe, ...]:
    """Return the probes of a pulse: those of the short check, from every set in turn, at most ``MOST_PROBES``."""
    sets: dict[str, list[Probe]] = {}
    for probe in probes:
        if probe.is_light:
            sets.setdefault(probe.set, []).append(probe)
    in_turn = [probe for turn in zip_longest(*sets.values()) for probe in turn if probe is not None]
    chosen = set(in_turn[:MOST_PROBES])
    return tuple(probe for probe in probes if probe in chosen)


def few_captions(captions: Sequence[str]) -> tuple[str, ...]:
    """Return at most ``MOST_CAPTIONS`` different captions, spread over all of them."""
    unique = sorted(set(captions))
    count = min(MOST_CAPTIONS, len(unique))
    return tuple(unique[place * len(unique) // count] for place in range(count))
