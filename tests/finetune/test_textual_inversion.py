"""Textual Inversion as a user runs it: what it leaves, what loads it, what learned and what did not."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from word_runs import Train, trainer

from configs.errors import InputError, UsageError
from data_prep.folders.run_folder import EMBEDDINGS_FILE
from finetune.core.settings.methods import PriorConfig
from finetune.diffusion.adapters import load_adapter, set_adapter_scale
from finetune.diffusion.config import SamplingConfig
from finetune.diffusion.models import Models, load_models
from finetune.textual_inversion import TextualInversionRun, main

FAST = SamplingConfig(num_inference_steps=2, height=32, width=32, scheduler="model")


@pytest.fixture(scope="module")
def train_in(toy_sd: Path, captioned_images: Path) -> Train:
    """Run the recipe in this process; options given again win."""
    options = {"train_data_dir": captioned_images, "checkpointing_steps": 2, "logging_steps": 2}
    return trainer(main, TextualInversionRun, toy_sd, **options)


@pytest.fixture
def train(train_in: Train, tmp_path: Path) -> Train:
    return partial(train_in, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(train_in: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of six steps that nothing interrupted, in a nested folder given by its whole path."""
    return train_in(tmp_path_factory.mktemp("textual_inversion") / "nested" / "run", "--save_steps", 4)


def rows_of(folder: Path) -> torch.Tensor:
    (rows,) = load_file(folder / EMBEDDINGS_FILE).values()
    return rows


def files_of(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith("cache/"))


def test_a_run_leaves_exactly_these_files(whole: Path) -> None:
    """The advanced script makes a file name of the whole path, and ends with an error."""
    expected = [
        *(f"checkpoint-{n}/{name}.safetensors" for n in (2, 4, 6) for name in ("learned", "optimizer")),
        *(f"checkpoint-{n}/state.json" for n in (2, 4, 6)),
        *("config.yaml", "environment.json", "metrics.jsonl", "provenance.json", EMBEDDINGS_FILE),
        "learned_embeds-steps-4.safetensors",
    ]
    assert [name for name in files_of(whole) if name != "README.md"] == sorted(expected)


def test_stock_pipeline_loads_the_word_to_the_same_pixels(whole: Path, toy_sd: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from finetune.diffusion.sampling import sample
    from finetune.diffusion.tuned import load_tuned

    pipeline = StableDiffusionPipeline.from_pretrained(toy_sd, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_textual_inversion(whole)
    generator = torch.Generator().manual_seed(3)
    stock = pipeline(
        "a <x> b", num_inference_steps=2, height=32, width=32, generator=generator, output_type="np"
    ).images
    ours = sample(load_tuned(str(toy_sd), [whole]).models, [("a <x> b", 3)], FAST)
    # Guidance is computed in one batch there and from embeddings made one by one here.
    assert np.abs(ours.astype(float) - stock * 255).max() <= 1


def test_sampling_sees_the_embeddings_that_training_saw(whole: Path, toy_sd: Path) -> None:
    """The advanced script drops the start and end tokens on one of the two ways."""
    from finetune.core.learns.words import add_word
    from finetune.core.settings.methods import TokenConfig
    from finetune.diffusion.denoiser import Denoiser
    from finetune.diffusion.text import encode_prompts, tokenize

    trained, sampled = load_models(str(toy_sd)), load_models(str(toy_sd))
    word = add_word(trained, TokenConfig(placeholder_token="<x>", initializer_token="a", num_vectors=2))
    with torch.no_grad():
        word.embedding.rows.copy_(rows_of(whole))
    load_adapter(sampled, whole)
    latents, steps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad():
        first = Denoiser(trained.text_encoder, trained.unet)(latents, steps, tokenize(trained, ["a <x>"]))
        second = Denoiser(sampled.text_encoder, sampled.unet)(latents, steps, encode_prompts(sampled, ["a <x>"]))
    assert torch.equal(first, second)


def test_nothing_but_the_rows_moves(train: Train, toy_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune.core.open

    trained: list[Models] = []

    def keep(*arguments: object, **options: object) -> Models:
        trained.append(load_models(*arguments, **options))  # type: ignore[arg-type]
        return trained[-1]

    monkeypatch.setattr(finetune.core.open, "load_models", keep)
    folder = train("--max_train_steps", 3)
    fresh = load_models(str(toy_sd))
    for part in ("unet", "vae", "text_encoder"):
        before = getattr(fresh, part).state_dict()
        after = {
            name.replace("token_embedding.table.", "token_embedding."): value
            for name, value in getattr(trained[0], part).state_dict().items()
        }
        rows = after.pop("embeddings.token_embedding.rows", None)
        assert after.keys() == before.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        if rows is not None:
            (start,) = fresh.tokenizer("a", add_special_tokens=False).input_ids
            assert (rows != fresh.text_encoder.get_input_embeddings().weight[start]).all()
            assert torch.equal(rows, rows_of(folder))


@pytest.mark.parametrize("more", [(), ("--use_ema", "--noise_offset", "0.1", "--repeats", "3")], ids=["plain", "ema"])
def test_resumed_is_uninterrupted_bit_for_bit(train: Train, more: tuple[str, ...]) -> None:
    """The advanced script's load hook never reads the rows that its save hook wrote."""
    folder = train(*more)
    uninterrupted = (folder / EMBEDDINGS_FILE).read_bytes()
    for name in (EMBEDDINGS_FILE, "provenance.json"):
        (folder / name).unlink()
    for step in (4, 6):
        shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
    train(*more)
    assert (folder / EMBEDDINGS_FILE).read_bytes() == uninterrupted


def test_rows_learn_in_half_precision(train: Train) -> None:
    """The advanced script rebinds them to a copy that the model does not own."""
    folder = train("--mixed_precision", "bf16")
    state = json.loads((folder / "provenance.json").read_text())
    rows = rows_of(folder)
    assert rows.dtype == torch.float32
    assert state["method"] == "textual_inversion"
    assert len(rows.unique(dim=0)) == 2  # both began as the same row


@pytest.mark.parametrize("name", [field.name for field in fields(PriorConfig)])
def test_options_of_a_prior_are_refused_with_the_reason(train: Train, name: str) -> None:
    values = {"with_prior_preservation": [], "prior_source": ["class_images"]}
    with pytest.raises(UsageError, match=f"--{name}: a class prompt does not hold the new word: its rows get no grad"):
        train(f"--{name}", *values.get(name, ["1"]))


@pytest.mark.parametrize(("kind", "count"), [("object", 27), ("style", 19)])
def test_captions_are_the_templates(train: Train, kind: str, count: int) -> None:
    folder = train("--learnable_property", kind, "--max_train_steps", 1)
    captions = json.loads((folder / "provenance.json").read_text())["captions"]
    assert len(captions) == len(set(captions)) >= count - 2
    assert all("<x>" in caption for caption in captions)


def test_an_own_sentence_takes_the_place_of_the_templates(train: Train) -> None:
    folder = train("--instance_prompt", "A <x> of carbon", "--max_train_steps", 1)
    assert json.loads((folder / "provenance.json").read_text())["captions"] == ["A <x> of carbon"]


def test_captions_without_the_word_are_refused_by_file_and_line(train: Train) -> None:
    with pytest.raises(InputError, match=r"metadata.jsonl:1: the caption 'sf_dry sf_warp' does not hold <x>"):
        train("--caption_column", "text")


def test_a_sentence_without_the_word_is_refused(train: Train) -> None:
    with pytest.raises(UsageError, match="--instance_prompt 'carbon': must hold <x>"):
        train("--instance_prompt", "carbon")


def test_a_word_the_tokenizer_knows_leaves_no_folder(train: Train, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the tokenizer knows 'a'"):
        train("--placeholder_token", "a", "--instance_prompt", "a")
    assert not (tmp_path / "run" / EMBEDDINGS_FILE).exists()


def test_an_epoch_shows_each_image_as_often_as_asked(train: Train) -> None:
    folder = train("--repeats", 3, "--max_train_steps", "null", "--num_train_epochs", 1)
    assert json.loads((folder / "provenance.json").read_text())["steps"] == 8  # 10 images x 3, 4 at a time


def test_the_whole_pipeline_knows_the_word(train: Train, toy_sd: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder = train("--save_as_full_pipeline")
    whole = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    loaded = StableDiffusionPipeline.from_pretrained(toy_sd, safety_checker=None)
    loaded.load_textual_inversion(folder)
    embeds = [one.encode_prompt("a <x> b", "cpu", 1, False)[0] for one in (whole, loaded)]
    assert torch.equal(*embeds)


def test_a_word_comes_and_goes_with_its_scale(whole: Path, toy_sd: Path) -> None:
    from finetune.diffusion.text import encode_prompts

    base, tuned = load_models(str(toy_sd)), load_models(str(toy_sd))
    load_adapter(tuned, whole)
    with_word = encode_prompts(tuned, ["a <x>"])
    set_adapter_scale(tuned, 0)
    assert torch.equal(encode_prompts(tuned, ["a <x>", "b"]), encode_prompts(base, ["a <x>", "b"]))
    set_adapter_scale(tuned, 1)
    assert torch.equal(encode_prompts(tuned, ["a <x>"]), with_word)
    assert not torch.equal(with_word, encode_prompts(base, ["a <x>"]))


def test_rows_of_another_width_are_refused(toy_sd: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"<x>": torch.zeros(2, 768)}, tmp_path / "word.safetensors")
    with pytest.raises(InputError, match=r"'<x>' has shape \(2, 768\); rows of 16 numbers fit"):
        load_adapter(load_models(str(toy_sd)), tmp_path / "word.safetensors")


def test_a_file_of_another_program_is_named_by_its_file(toy_sd: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"emb_params": torch.ones(2, 16)}, tmp_path / "weave-x.safetensors")
    models = load_models(str(toy_sd))
    load_adapter(models, tmp_path / "weave-x.safetensors")
    assert "weave-x" in models.tokenizer.get_vocab()


def test_the_file_carries_its_provenance(whole: Path) -> None:
    with safe_open(whole / EMBEDDINGS_FILE, framework="pt") as reader:
        told = json.loads(reader.metadata()["provenance"])
        assert list(reader.keys()) == ["<x>"]
    assert (told["method"], told["steps"], told["height"]) == ("textual_inversion", 6, 32)
