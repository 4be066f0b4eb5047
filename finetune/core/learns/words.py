"""New words: rows of the token embedding that learn, while the table of the known words stays as it is.

Shapes: prompts B, token places L, rows of a new word N, embedding width D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.errors import UsageError
from finetune.core.learns.trainable import Group, Learns, always
from finetune.core.pictures.images import CaptionedImage, raise_together, read_folder
from finetune.core.run import HeldOut
from finetune.core.settings.methods import SentenceConfig, TokenConfig
from finetune.diffusion.models import Models
from prompts.templates import fill

ROWS = "token_rows"
"""Name of the rows among what learns, in checkpoints."""


class LearnedRows(nn.Module):
    """A token embedding whose rows from id ``first`` on are parameters of their own; the table is not touched.

    peft's trainable tokens copy the whole table in every forward pass to put their rows into it (38 million numbers in
    SD 1.x), so the rows are looked up beside the table here. They are float32, whatever the table is held in.
    """

    def __init__(self, table: nn.Embedding, rows: Tensor, first: int) -> None:
        """Take the frozen table, the first values (N, D) of the rows, and the id of the first of them."""
        super().__init__()
        self.table = table
        self.rows = nn.Parameter(rows.detach().to(table.weight.device, torch.float32, copy=True))
        self.first = first

    @property
    def weight(self) -> Tensor:
        """The table, for those who ask an embedding for its width or dtype."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings (B, L, D) of ids (B, L) int64, in the table's dtype."""
        new = (ids >= self.first) & (ids < self.first + len(self.rows))
        known = self.table(ids.masked_fill(new, 0))
        # Without a new word in the batch the rows still take part: every process then has a gradient, of zeros.
        learned = self.rows[(ids - self.first).masked_fill(~new, 0)].to(known.dtype)
        return torch.where(new[..., None], learned, known)


@dataclass(frozen=True, kw_only=True)
class NewWord:
    """A word the tokenizer has learned.

    Attributes:
        placeholder: what is typed; alone it stands for all its rows.
        pieces: the tokens it becomes, one per row, named as diffusers' ``load_textual_inversion`` names them.
        embedding: holds its rows.
    """

    placeholder: str
    pieces: tuple[str, ...]
    embedding: LearnedRows

    @property
    def rows(self) -> Tensor:
        """The rows as they stand, (N, D) float32, on the CPU."""
        return self.embedding.rows.detach().float().cpu()

    def learns(self, learning_rate: float, share: Callable[[int], float] = always) -> Learns:
        """Return the rows as what learns; ``share`` as in ``Group``."""
        return Learns((Group({ROWS: self.embedding.rows}, learning_rate, share),))


def add_word(models: Models, config: TokenConfig) -> NewWord:
    """Teach the tokenizer a new word and give its rows the values of the initializer, changing the models in place.

    A word of several rows becomes the tokens ``word word_1 word_2 ...`` wherever a prompt holds it. Several rows take
    the pieces of the initializer in turn.

    Raises:
        UsageError: the word is known already or cannot be one token, or the initializer has more pieces than rows.
    """
    word, tokenizer = config.placeholder_token, models.tokenizer
    if word != word.strip() or any(letter.isspace() for letter in word):
        raise UsageError(f"--placeholder_token '{word}': must be one word; write it with hyphens, such as <dry-slice>")
    pieces = (word, *(f"{word}_{number}" for number in range(1, config.num_vectors)))
    for piece in pieces:
        if piece in tokenizer.get_vocab() or len(tokenizer.tokenize(piece)) == 1:
            raise UsageError(
                f"--placeholder_token {word}: the tokenizer knows '{piece}'; to move what it means would change every "
                f"prompt with it; choose a new word, such as <{word.strip('<>')}-new>"
            )
    start = _initial_rows(models, config)
    if tokenizer.add_tokens(list(pieces)) != len(pieces):
        raise UsageError(f"--placeholder_token {word}: cannot be told from a word the tokenizer knows; choose another")
    first, *more = tokenizer.convert_tokens_to_ids(list(pieces))
    if more != list(range(first + 1, first + len(pieces))):
        raise UsageError(f"--placeholder_token {word}: the tokenizer gives its {len(pieces)} pieces no ids in a row")
    embedding = LearnedRows(models.text_encoder.get_input_embeddings(), start, first)
    models.text_encoder.set_input_embeddings(embedding)
    return NewWord(placeholder=word, pieces=pieces, embedding=embedding)


def _initial_rows(models: Models, config: TokenConfig) -> Tensor:
    """Return the rows (N, D) of the initializer's pieces, taken in turn."""
    ids = models.tokenizer(config.initializer_token, add_special_tokens=False).input_ids
    if len(ids) > config.num_vectors:
        pieces = " | ".join(models.tokenizer.convert_ids_to_tokens(ids))
        raise UsageError(
            f"--initializer_token '{config.initializer_token}': has {len(ids)} pieces ({pieces}), and --num_vectors is "
            f"{config.num_vectors}; give --num_vectors {len(ids)}, or a word of one piece (python -m prompts.tokens)"
        )
    table = models.text_encoder.get_input_embeddings().weight
    turns = [ids[number % len(ids)] for number in range(config.num_vectors)]
    return table[torch.tensor(turns, device=table.device)]


def word_images(
    folders: Sequence[Path], flag: str, tokens: TokenConfig, sentences: SentenceConfig
) -> list[CaptionedImage]:
    """Read the images of a new word, each with the sentences that it comes with.

    Raises:
        InputError: as ``images.read_folder``, or a caption does not hold the word: it would give its rows no gradient.
    """
    word = tokens.placeholder_token
    captions, column = _sources(tokens, sentences)
    images = [one for folder in folders for one in read_folder(folder, flag, captions=captions, caption_column=column)]
    without = {text: image for image in reversed(images) for text in image.captions if word not in text}
    if sentences.instance_prompt is not None and without:
        raise UsageError(f"--instance_prompt '{sentences.instance_prompt}': must hold {word}, to learn anything of it")
    raise_together(
        [f"{image.where}: the caption '{text}' does not hold {word}" for text, image in without.items()][::-1]
    )
    return images


def heldout_images(beside: Path, tokens: TokenConfig, sentences: SentenceConfig) -> HeldOut:
    """Return where held-out images of a new word are, and the sentences they come with."""
    captions, column = _sources(tokens, sentences)
    return HeldOut(beside=beside, captions=captions, caption_column=column)


def _sources(tokens: TokenConfig, sentences: SentenceConfig) -> tuple[tuple[str, ...], str]:
    """Return the sentences of all images, none where they have their own, and the key of those."""
    if sentences.caption_column is not None:
        return (), sentences.caption_column
    if sentences.instance_prompt is not None:
        return (sentences.instance_prompt,), "text"
    return fill(tokens.learnable_property, tokens.placeholder_token), "text"


def into_table(models: Models, word: NewWord) -> None:
    """Make the rows a part of the table, so that the model can be saved whole; they do not learn any more."""
    encoder, first = models.text_encoder, word.embedding.first
    encoder.set_input_embeddings(word.embedding.table)
    size = max(first + len(word.pieces), word.embedding.table.num_embeddings)
    table = encoder.resize_token_embeddings(size, mean_resizing=False).weight
    table.data[first : first + len(word.pieces)] = word.embedding.rows.detach().to(table.dtype)
    encoder.requires_grad_(False)
