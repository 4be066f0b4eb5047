"""How far each of some words moves the predictions of a model, beside what their tokens say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from configs.errors import NothingLeftError
from eval.forgetting.divergence import divergence, divergence_parts
from finetune.diffusion.config import SamplingConfig
from finetune.diffusion.fixed_noise import predictions
from finetune.diffusion.models import Models
from finetune.diffusion.sampling import sample_latents
from finetune.diffusion.tuned import load_tuned
from prompts.rare_words import Grade, judge, propose
from prompts.word_vectors import WordVectors, read_word_vectors

STEPS = 20
"""Sampling steps of the pictures whose noisy versions the predictions are made for."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """A base model, the vectors of its words, and the words that may become identifiers."""

    models: Models
    vectors: WordVectors | None
    words: Sequence[str]

    def grade(self, word: str) -> Grade:
        """Return what the tokens of a word say of it."""
        return judge(self.models.tokenizer, word, self.vectors).grade


def open_candidates(name_or_path: str, words: Sequence[str], num_proposals: int) -> Candidates:
    """Load a base model; where no words are given, propose some of its rare ones.

    Raises:
        NothingLeftError: no words are given, and the vocabulary has none to propose.
    """
    models = load_tuned(name_or_path).models
    vectors = read_word_vectors(name_or_path, models.tokenizer)
    listed = list(dict.fromkeys(words)) or propose(models.tokenizer, num_proposals, vectors)
    if not listed:
        raise NothingLeftError("WORDS: this vocabulary has no rare words of one token to propose; name some")
    return Candidates(models=models, vectors=vectors, words=listed)


def influence(
    models: Models, prompts: Mapping[str, str], plain: str, *, num_latents: int, num_timesteps: int, seed: int
) -> dict[str, float]:
    """Return the relative mean squared change of the predictions that each word causes; 0 for a word that is not read.

    Args:
        models: the base model.
        prompts: the prompt with each word in it, by word.
        plain: the prompt without a word.
        num_latents: pictures of the plain prompt, whose noisy versions the predictions are made for.
        num_timesteps: noise levels.
        seed: seed of the pictures and of the noise.
    """
    settings = SamplingConfig(num_inference_steps=STEPS, height=models.size_px, width=models.size_px)
    requests = [(plain, one) for one in range(seed, seed + num_latents)]
    latents = sample_latents(models, requests, settings, progress="pictures").cpu()[None]

    def predicted(prompt: str) -> Tensor:
        return predictions(models, [prompt], latents, num_timesteps=num_timesteps, seed=seed)

    without = predicted(plain)
    return {word: divergence(*divergence_parts(predicted(prompt), without)) for word, prompt in prompts.items()}
