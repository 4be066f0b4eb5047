"""Where words lie in the first layer of a model's text encoder: one row of its table per token; torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from prompts.tokenizer import WORD_END, known_word

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TABLE_KEYS = ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight")


@dataclass(frozen=True, kw_only=True)
class WordVectors:
    """The rows of the table.

    Attributes:
        rows: (V, D) float32, a row a token.
        words: known whole words with their tokens.
    """

    rows: NDArray[np.float32]
    words: dict[str, int]


def read_word_vectors(
    name_or_path: str, tokenizer: PreTrainedTokenizerBase, revision: str | None = None
) -> WordVectors | None:
    """Read the table of a pipeline folder, or of a hub model that is on this machine; None if there is none.

    Raises:
        InputError: the file holds no such table.
    """
    from safetensors import safe_open

    folder = Path(name_or_path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name_or_path, "text_encoder/model.safetensors", revision=revision)
        if not isinstance(found, str):
            return None
        path = Path(found)
    else:
        path = folder / "text_encoder" / "model.safetensors"
        if not path.is_file():
            return None
    with safe_open(path, framework="numpy") as reader:
        key = next((key for key in reader.keys() if key in TABLE_KEYS), None)  # noqa: SIM118  # not a mapping
        if key is None:
            raise InputError(f"{path}: holds no token embedding")
        rows = np.asarray(reader.get_tensor(key), dtype=np.float32)
    vocabulary = tokenizer.get_vocab()
    words = {
        word: index
        for piece, index in vocabulary.items()
        if piece.endswith(WORD_END) and index < len(rows) and (word := known_word(piece, vocabulary))
    }
    return WordVectors(rows=rows, words=words)


def nearest_words(
    vectors: WordVectors, tokenizer: PreTrainedTokenizerBase, word: str, count: int
) -> list[tuple[str, float]]:
    """Return the known words nearest to a word by cosine, nearest first, without the word itself.

    A word in pieces lies at the mean of its rows; the mean of all rows is taken out first, which all tokens share.
    """
    ids = [index for index in tokenizer(word, add_special_tokens=False)["input_ids"] if index < len(vectors.rows)]
    names = [name for name in vectors.words if name != word.lower()]
    if not ids or not names:
        return []
    centre = vectors.rows.mean(axis=0)
    own = vectors.rows[ids].mean(axis=0) - centre
    others = vectors.rows[[vectors.words[name] for name in names]] - centre
    norms = np.linalg.norm(others, axis=1) * np.linalg.norm(own)
    cosines = others @ own / np.maximum(norms, 1e-12)
    return [(names[place], float(cosines[place])) for place in np.argsort(-cosines, kind="stable")[:count]]
