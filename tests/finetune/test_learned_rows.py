"""New words: a lookup with rows of its own, and a tokenizer that knows the word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from configs.errors import UsageError
from finetune.core.learns.words import LearnedRows, add_word, into_table
from finetune.core.settings.methods import TokenConfig
from finetune.diffusion.denoiser import Denoiser
from finetune.diffusion.models import Models, load_models
from finetune.diffusion.text import encode_prompts, tokenize
from prompts.templates import fill


def make_lookup(rows: int = 2) -> tuple[LearnedRows, nn.Embedding]:
    """Return a lookup of 50 known words and some new ones, and the plain table with both."""
    generator = torch.Generator().manual_seed(0)
    table = nn.Embedding(50, 8, _weight=torch.randn(50, 8, generator=generator)).requires_grad_(False)
    values = torch.randn(rows, 8, generator=generator)
    whole = nn.Embedding(50 + rows, 8, _weight=torch.cat([table.weight, values]))
    return LearnedRows(table, values, first=50), whole


IDS = torch.tensor([[3, 50, 51, 3], [0, 1, 50, 49]])


def word(models: Models, **settings: object) -> TokenConfig:
    return TokenConfig(**({"placeholder_token": "<x>", "initializer_token": "a"} | settings))


def test_rows_are_read_as_if_they_stood_in_the_table() -> None:
    lookup, whole = make_lookup()
    assert torch.equal(lookup(IDS), whole(IDS))


def test_gradient_of_the_rows_is_that_of_the_table() -> None:
    lookup, whole = make_lookup()
    target = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    for module in (lookup, whole):
        (module(IDS) - target).square().sum().backward()
    assert whole.weight.grad is not None
    assert torch.equal(lookup.rows.grad, whole.weight.grad[50:])
    assert lookup.table.weight.grad is None


def test_a_batch_without_the_word_gives_zeros_and_not_nothing() -> None:
    """With nothing, processes that drew the word would wait for those that did not."""
    lookup, _ = make_lookup()
    lookup(torch.tensor([[1, 2]])).sum().backward()
    assert lookup.rows.grad is not None
    assert not lookup.rows.grad.any()


def test_rows_learn_as_in_a_whole_table_whose_other_rows_are_put_back(toy_sd: Path) -> None:
    """The way of diffusers' script: optimise the whole table, then copy the known rows back after every step."""
    ours, naive = load_models(str(toy_sd)), load_models(str(toy_sd))
    learned = add_word(ours, word(ours, num_vectors=2))
    known = len(naive.tokenizer)
    naive.tokenizer.add_tokens(list(learned.pieces))
    naive.text_encoder.resize_token_embeddings(known + 2, mean_resizing=False)
    table = naive.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    with torch.no_grad():
        table[known:] = learned.rows
    before = table.detach().clone()
    optimizers = [torch.optim.AdamW([parameter], lr=1e-2) for parameter in (learned.embedding.rows, table)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
        steps = torch.randint(1000, (2,), generator=generator)
        for models, optimizer in zip((ours, naive), optimizers, strict=True):
            prompts = tokenize(models, ["a <x> b", "<x>"])
            prediction = Denoiser(models.text_encoder, models.unet)(latents + noise, steps, prompts)
            (prediction - noise).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            table[:known] = before[:known]
    # The same sums in another order.
    torch.testing.assert_close(learned.rows, table[known:].detach(), atol=1e-6, rtol=1e-5)
    assert not torch.equal(learned.rows, before[known:])


class Largest(TorchDispatchMode):
    """Keep the size of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        outputs = found if isinstance(found, tuple | list) else [found]
        self.numel = max([self.numel, *(one.numel() for one in outputs if isinstance(one, Tensor))])
        return found


def test_a_step_makes_nothing_as_large_as_the_table() -> None:
    table = nn.Embedding(10_000, 8).requires_grad_(False)
    lookup = LearnedRows(table, torch.zeros(2, 8), first=10_000)
    optimizer = torch.optim.AdamW(lookup.parameters())
    with Largest() as largest:
        lookup(IDS + 9_950).sum().backward()
        optimizer.step()
    assert 0 < largest.numel <= 2 * 4 * 8


def test_rows_stay_float32_beside_a_half_table() -> None:
    lookup, _ = make_lookup()
    lookup = LearnedRows(lookup.table.to(torch.bfloat16), lookup.rows.to(torch.bfloat16), first=50)
    assert lookup.rows.dtype == torch.float32
    assert lookup(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_word_becomes_as_many_tokens_as_it_has_rows(toy_sd: Path, rows: int) -> None:
    models = load_models(str(toy_sd))
    known = len(models.tokenizer)
    learned = add_word(models, word(models, num_vectors=rows))
    (ids,) = tokenize(models, ["a <x> b"])
    pieces = models.tokenizer.convert_ids_to_tokens(ids[1 : 3 + rows].tolist())
    assert pieces == ["a</w>", *learned.pieces, "b</w>"]
    assert ids[2 : 2 + rows].tolist() == list(range(known, known + rows))


def test_prompts_without_the_word_stay_as_they_are(toy_sd: Path) -> None:
    models = load_models(str(toy_sd))
    before = encode_prompts(models, ["sf_dry sf_warp", ""])
    add_word(models, word(models, num_vectors=2))
    assert torch.equal(encode_prompts(models, ["sf_dry sf_warp", ""]), before)


def test_rows_start_as_the_initializer(toy_sd: Path) -> None:
    models = load_models(str(toy_sd))
    table = models.text_encoder.get_input_embeddings().weight
    (start,) = models.tokenizer("b", add_special_tokens=False).input_ids
    learned = add_word(models, word(models, initializer_token="b", num_vectors=2))
    assert torch.equal(learned.rows, table[[start, start]])


def test_several_rows_take_the_pieces_of_several_words_in_turn(toy_sd: Path) -> None:
    models = load_models(str(toy_sd))
    table = models.text_encoder.get_input_embeddings().weight
    a, b = models.tokenizer("a b", add_special_tokens=False).input_ids
    learned = add_word(models, word(models, initializer_token="a b", num_vectors=3))
    assert torch.equal(learned.rows, table[[a, b, a]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placeholder_token": "a"}, "the tokenizer knows 'a'"),
        ({"placeholder_token": "<|endoftext|>"}, "the tokenizer knows"),
        ({"placeholder_token": "dry slice"}, "must be one word"),
        ({"initializer_token": "woven"}, r"has 5 pieces \(w \| o \| v \| e \| n</w>\).*--num_vectors 5"),
    ],
)
def test_a_word_that_cannot_be_learned_is_refused(toy_sd: Path, settings: dict[str, str], message: str) -> None:
    models = load_models(str(toy_sd))
    with pytest.raises(UsageError, match=message):
        add_word(models, word(models, **settings))


def test_the_same_word_is_not_learned_twice(toy_sd: Path) -> None:
    models = load_models(str(toy_sd))
    add_word(models, word(models))
    with pytest.raises(UsageError, match="the tokenizer knows '<x>'"):
        add_word(models, word(models))


def test_rows_put_into_the_table_mean_the_same(toy_sd: Path) -> None:
    models = load_models(str(toy_sd))
    learned = add_word(models, word(models, num_vectors=2))
    with torch.no_grad():
        learned.embedding.rows.add_(1)
    before = encode_prompts(models, ["a <x>", "b"])
    into_table(models, learned)
    assert torch.equal(encode_prompts(models, ["a <x>", "b"]), before)


@pytest.mark.parametrize(("kind", "count"), [("object", 27), ("style", 19)])
def test_every_template_holds_the_word_once(kind: str, count: int) -> None:
    sentences = fill(kind, "<x>")  # type: ignore[arg-type]
    assert len(sentences) == count
    assert all(sentence.count("<x>") == 1 and "{" not in sentence for sentence in sentences)
