"""How prompts are split into tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import UsageError
from prompts.tokenizer import load_tokenizer, split, table
from prompts.tokens import TokensConfig, main


def write_clip_tokenizer(folder: Path) -> Path:
    """Write a CLIP tokenizer with a small vocabulary: three words have merges, everything else is letters."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz_"
    merges = [("d", "r"), ("dr", "y</w>"), ("s", "f"), ("w", "e"), ("f", "t</w>")]
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=12).save_pretrained(folder / "tokenizer")
    return folder


def test_a_word_splits_into_the_pieces_of_the_merges(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_clip_tokenizer(tmp_path)))
    # By hand: `d r` then `dr y</w>` merge; `w e` and `f t</w>` merge, and nothing joins them.
    assert split(tokenizer, "dry weft").pieces == ("dry</w>", "we", "ft</w>")


def test_text_outside_the_vocabulary_is_counted_as_unknown(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_clip_tokenizer(tmp_path)))
    assert (split(tokenizer, "dry 7").unknown, split(tokenizer, "dry").unknown) == (1, 0)


def test_what_the_text_encoder_never_reads_is_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_clip_tokenizer(tmp_path)))
    # 12 places, two of them for start and end: ten words of one piece fit, and `weft` behind them does not.
    item = split(tokenizer, " ".join(["dry"] * 10 + ["weft"]))
    assert (item.cut_off, "cut off after 10" in table([item])) == ("weft", True)


def test_a_prompt_that_fits_is_whole(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_clip_tokenizer(tmp_path)))
    assert split(tokenizer, " ".join(["dry"] * 10)).cut_off == ""


def test_the_command_prints_a_line_per_prompt(toy_sd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(TokensConfig(prompts=("sf_dry", ""), pretrained_model_name_or_path=str(toy_sd)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["'sf_dry'", "6", "whole", "none", "s", "|", "f", "|", "_", "|", "d", "|", "r", "|", "y"]
    assert lines[2].split() == ["''", "0", "whole", "none"]
    assert lines[-1].startswith("next: python -m eval.generate ")


def test_pieces_that_are_words_of_their_own_are_named(tmp_path: Path) -> None:
    """As CLIP splits `dtd_honeycombed`: honey is a known word although here another piece follows it."""
    letters = "abcdefghijklmnopqrstuvwxyz_"
    merges = [("h", "o"), ("ho", "n"), ("hon", "e"), ("hone", "y"), ("hone", "y</w>"), ("c", "o"), ("co", "m")]
    merges += [("b", "e"), ("be", "d</w>"), ("t", "d</w>"), ("s", "f"), ("d", "r"), ("dr", "y</w>")]
    from transformers import CLIPTokenizer

    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocab, merges=merges).save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path))
    item = split(tokenizer, "dtd_honeycombed sf_dry")
    assert item.pieces[:6] == ("d", "td</w>", "_</w>", "honey", "com", "bed</w>")
    # com is no word of this vocabulary, sf too short to be one.
    assert item.known_words == ("honey", "bed", "dry")


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no folder named tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_long_prompt_does_not_widen_the_table(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_clip_tokenizer(tmp_path)))
    lines = table([split(tokenizer, "dry " * 50), split(tokenizer, "dry")]).splitlines()
    assert lines[2].index("whole") < 90
