"""Prompts to token ids and to embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from configs.errors import UsageError
from finetune.diffusion.models import Models


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
