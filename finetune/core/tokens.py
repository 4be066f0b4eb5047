"""New words: rows of the token embedding that learn, while the table of the known words stays as it is.

Shapes: prompts B, token places L, rows of a new word N, embedding width D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from configs.errors import UsageError
from finetune.core.method_config import TokenConfig
from finetune.core.models import Models
from finetune.core.trainable import Group, Learns

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
    def weight(self) -> nn.Parameter:
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

    def learns(self, learning_rate: float, share: Callable[[int], float] | None = None) -> Learns:
        """Return the rows as what learns; ``share`` as in ``Group``."""
        parameters = {ROWS: self.embedding.rows}
        return Learns((Group(parameters, learning_rate, **({} if share is None else {"share": share})),))


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


def check_prompts(prompts: list[str], word: str, flag: str) -> None:
    """Refuse prompts to learn a word from that do not hold it: they would give its rows no gradient.

    Raises:
        UsageError: naming the first of them.
    """
    for prompt in prompts:
        if word not in prompt:
            raise UsageError(f"{flag} '{prompt}': does not hold {word}, so nothing would be learned from it")
