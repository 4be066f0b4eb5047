"""A byte-level BPE in CLIP's layout, and captions split in more ways than one."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from finetune.diffusion.from_scratch.config import PretrainConfig

CONTEXT_LENGTH = 77
SPELLINGS = 8
SPELLING_DROPOUT = 0.3


def train_tokenizer(config: PretrainConfig, captions: list[str], work: Path) -> CLIPTokenizer:
    """Learn a byte-level BPE in CLIP's layout from the captions; every byte is a piece, so nothing is unknown."""
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    folder = work / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def spell(tokenizer: CLIPTokenizer, captions: list[str], random: np.random.Generator) -> Tensor:
    """Token ids of each caption: (N, 1 + SPELLINGS, L); the first as usual, the others split at random."""
    backend = tokenizer.backend_tokenizer
    merges = json.loads(backend.to_str())["model"]["merges"]
    ranks = {tuple(merge): rank for rank, merge in enumerate(merges)}
    usual = tokenizer(captions, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH).input_ids
    spellings = [usual]
    for _ in range(SPELLINGS):
        rows = []
        for caption in captions:
            words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(caption))
            pieces = [piece for word, _ in words for piece in split_word(word, ranks, random, SPELLING_DROPOUT)]
            ids = tokenizer.convert_tokens_to_ids(pieces)[: CONTEXT_LENGTH - 2]
            rows.append([tokenizer.bos_token_id, *ids] + [tokenizer.eos_token_id] * (CONTEXT_LENGTH - 1 - len(ids)))
        spellings.append(rows)
    return torch.tensor(spellings).transpose(0, 1).contiguous()


def split_word(word: str, ranks: dict[tuple[str, ...], int], random: np.random.Generator, dropout: float) -> list[str]:
    """Split a word into pieces by merges, each skipped with probability ``dropout`` every time it is possible.

    The ``tokenizers`` library has this too, but from a source of randomness that cannot be seeded.

    Args:
        word: in byte-level letters, without the end-of-word mark.
        ranks: pair of pieces -> its place in the list of merges.
        random: source of randomness.
        dropout: 0 gives the usual split, 1 single letters (Provilkov et al. 2020, algorithm 1).
    """
    pieces = [*word[:-1], word[-1] + "</w>"]
    while True:
        possible = [
            (ranks[pair], place)
            for place, pair in enumerate(pairwise(pieces))
            if pair in ranks and random.random() >= dropout
        ]
        if not possible:
            return pieces
        _, place = min(possible)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
