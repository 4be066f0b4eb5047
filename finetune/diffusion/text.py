"""What pictures are conditioned on: prompts, to token ids and to embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.errors import UsageError
from finetune.diffusion.models import Models


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What B pictures are conditioned on, as the denoiser reads it. Whatever goes with a picture later is a field here.

    Attributes:
        prompts: (B, L, D) embeddings, or (B, L) int64 token ids where the text encoder learns.
        distinct: the place of one picture for each different prompt, (U,) int64, and which of these each picture has,
            (B,) int64, so that a text encoder that learns reads each once; None: it reads one per picture.
    """

    prompts: Tensor
    distinct: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """What pictures must share to go through the model together."""
        return tuple(self.prompts.shape[1:])

    @property
    def arguments(self) -> dict[str, Any]:
        """How the denoiser is given them."""
        shared = {} if self.distinct is None else {"distinct": self.distinct}
        return {"prompt_embeds": self.prompts, **shared}

    def rows(self, places: Sequence[int], *, each_once: bool = False) -> Conditions:
        """Return those of some pictures, which may come several times.

        Args:
            places: of the pictures.
            each_once: a text encoder that learns is to read equal prompts once.
        """
        prompts = self.prompts[torch.tensor(places, device=self.prompts.device)]
        shares = each_once and not prompts.is_floating_point()
        return Conditions(prompts=prompts, distinct=_distinct_rows(places, prompts.device) if shares else None)


def joined(parts: Sequence[Conditions]) -> Conditions:
    """Return the conditions of several batches as those of one; equal prompts of two of them count as different."""
    prompts = torch.cat([one.prompts for one in parts])
    first: list[Tensor] = []
    which: list[Tensor] = []
    places = rows = 0
    for one in parts:
        if one.distinct is None:
            return Conditions(prompts=prompts)
        first.append(one.distinct[0] + places)
        which.append(one.distinct[1] + rows)
        places, rows = places + len(one.prompts), rows + len(one.distinct[0])
    return Conditions(prompts=prompts, distinct=(torch.cat(first), torch.cat(which)))


def _distinct_rows(rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first place of each different row, (U,) int64, and which of these each one is, (B,) int64."""
    different = list(dict.fromkeys(rows))
    first = torch.tensor([rows.index(row) for row in different], device=device)
    return first, torch.tensor([different.index(row) for row in rows], device=device)


def tokenize(models: Models, prompts: Sequence[str]) -> Tensor:
    """Return the token ids (N, L) of prompts, padded to the length of the text encoder.

    A learned word stands for all its rows, as in diffusers' own pipelines.

    Raises:
        UsageError: a prompt is longer than the text encoder reads; nothing is cut in silence.
    """
    from diffusers.loaders import TextualInversionLoaderMixin

    length = models.tokenizer.model_max_length
    texts = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), models.tokenizer)
    ids = models.tokenizer(texts, padding="max_length", max_length=length, truncation=False).input_ids
    for prompt, row in zip(prompts, ids, strict=True):
        if len(row) > length:
            raise UsageError(f"prompt '{prompt}' has {len(row)} tokens; the text encoder reads {length}: shorten it")
    return torch.tensor(ids, dtype=torch.int64)


@torch.no_grad()
def encode_prompts(models: Models, prompts: Sequence[str]) -> Tensor:
    """Return the embeddings (N, L, D) of prompts, each different one encoded once, on the U-Net's device.

    Raises:
        UsageError: a prompt is longer than the text encoder reads.
    """
    unique = list(dict.fromkeys(prompts))
    ids = tokenize(models, unique).to(models.text_encoder.device)
    # One at a time: what a prompt becomes must not depend on which others were asked for.
    embeds = torch.cat([models.text_encoder(row[None])[0] for row in ids])
    index = {prompt: place for place, prompt in enumerate(unique)}
    return embeds[[index[prompt] for prompt in prompts]].to(models.unet.device)
