"""Rare identifiers: pieces, verdicts and proposals on a small vocabulary whose order is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from prompts.identifiers import IdentifiersConfig, main
from prompts.rare_words import judge, propose
from prompts.word_vectors import WordVectors, nearest_words, read_word_vectors

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789_"
# Merged in this order: the later, the rarer.
MERGES = [
    ("d", "o"), ("do", "g</w>"), ("h", "o"), ("ho", "n"), ("hon", "e"), ("hone", "y"), ("hone", "y</w>"), ("r", "o"),
    ("ro", "ck</w>"), ("c", "k</w>"), ("x", "x"), ("q", "z"), ("qz", "w</w>"), ("s", "k"), ("sk", "s</w>"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *("".join(pair) for pair in MERGES)]
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=MERGES, model_max_length=12)


@pytest.mark.parametrize(
    ("word", "grade", "reason"),
    [
        ("sks", "good", "one rare token"),
        ("w17h3r", "poor", "6 pieces, mostly single letters"),
        ("1nj3C7", "poor", "6 pieces"),
        ("xxy5syt00", "poor", "8 pieces"),
        ("dog_honey", "poor", "shares dog, honey with everyday words"),
        ("xx_", "usable", "3 pieces, none of them a known word"),
        ("é", "poor", "the vocabulary does not hold it"),
    ],
)
def test_an_identifier_is_judged_by_its_pieces(tokenizer: CLIPTokenizer, word: str, grade: str, reason: str) -> None:
    found = judge(tokenizer, word)
    assert (found.grade, found.reason[: len(reason)]) == (grade, reason), found


def test_a_common_word_of_one_token_is_a_poor_identifier() -> None:
    pieces = ["dog</w>", *(f"{a}{b}</w>" for a in "abcdefghij" for b in "abcdefghij"), "d", "o", "g</w>", "do"]
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[("d", "o"), ("do", "g</w>")])
    assert judge(tokenizer, "dog").reason.startswith("one common token, number 0 of ")


def test_proposals_are_single_tokens_from_the_end_of_the_vocabulary(tokenizer: CLIPTokenizer) -> None:
    assert propose(tokenizer, 2) == ["sks", "qzw"]


def test_of_the_rare_tokens_those_that_were_moved_least_are_proposed(tokenizer: CLIPTokenizer) -> None:
    """Rows far from the mean of all rows were moved in training: they mean something."""
    rows = np.zeros((len(tokenizer), 4), dtype=np.float32)
    rows[tokenizer.get_vocab()["sks</w>"]] = 5
    assert propose(tokenizer, 1, WordVectors(rows=rows, words={})) == ["qzw"]


def test_the_nearest_word_is_the_one_in_the_same_direction(tokenizer: CLIPTokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    rows = np.zeros((len(tokenizer), 3), dtype=np.float32)
    words = {"dog": vocabulary["dog</w>"], "honey": vocabulary["honey</w>"]}
    rows[words["dog"]], rows[words["honey"]], rows[vocabulary["sks</w>"]] = (8, 0, 0), (0, 8, 0), (6, 1, 0)
    found = nearest_words(WordVectors(rows=rows, words=words), tokenizer, "sks", 2)
    assert [word for word, _ in found] == ["dog", "honey"]
    assert found[0][1] == pytest.approx(0.98, abs=0.03)


def test_the_command_judges_and_proposes_with_the_models_own_table(
    toy_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(IdentifiersConfig(words=("sks",), pretrained_model_name_or_path=str(toy_sd)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["sks", "usable"]  # three letters of a vocabulary without merges
    assert lines[2] == "rare words of one token: none in this vocabulary"
    assert "finetune/lora_dreambooth.py" in lines[3]


def test_the_table_of_a_folder_is_read_without_torch(toy_sd: Path) -> None:
    from prompts.tokenizer import load_tokenizer

    vectors = read_word_vectors(str(toy_sd), load_tokenizer(str(toy_sd)))
    assert vectors is not None
    assert vectors.rows.shape == (len(load_tokenizer(str(toy_sd))), 16)


def test_the_next_command_takes_the_best_of_the_users_words(toy_sd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(IdentifiersConfig(words=("w17h3r", "sks"), pretrained_model_name_or_path=str(toy_sd), num_proposals=0))
    assert "'a sks texture'" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("word", ["", "a b"])
def test_what_is_not_one_word_is_no_identifier(word: str) -> None:
    with pytest.raises(ValueError, match=f"WORDS: '{word}' is not one word"):
        IdentifiersConfig(words=(word,), pretrained_model_name_or_path="x")
