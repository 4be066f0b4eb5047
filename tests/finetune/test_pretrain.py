"""A base model from scratch: its tokenizer knows every text, its folder loads as a stock pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from configs.errors import InputError, UsageError
from data_prep.shapes import ShapesConfig
from data_prep.shapes import main as draw
from finetune.diffusion.from_scratch.config import PretrainConfig
from finetune.diffusion.from_scratch.spelling import split_word
from finetune.pretrain import main

TINY = {
    "vae_channels": (16, 16),
    "vae_steps": 8,
    "vae_batch_size": 8,
    "unet_channels": (32, 32),
    "text_width": 32,
    "text_layers": 1,
    "max_train_steps": 4,
    "train_batch_size": 4,
    "vocab_size": 600,
    "mixed_precision": "no",
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "shapes"
    draw(ShapesConfig(output_dir=folder, num_images=40, resolution=32))
    return folder / "train"


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "model"
    main(PretrainConfig(train_data_dir=shapes, output_dir=folder, **TINY))
    return folder


def test_folder_loads_as_a_stock_pipeline_and_samples(trained: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(trained)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a grey woven texture", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (32, 32, 3)
    assert np.isfinite(picture).all()


@pytest.mark.parametrize(
    "text", ["sf_dry sf_compacted sf_warp", "horse on a beach", "w17h3r th1ck w@rp", "\u00e9\u65e5 \u00b5m"]
)
def test_any_text_is_spelled_with_known_pieces_and_read_back(trained: Path, text: str) -> None:
    tokenizer = StableDiffusionPipeline.from_pretrained(trained).tokenizer
    ids = tokenizer(text).input_ids
    assert tokenizer.eos_token_id not in ids[1:-1]
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("text", ["two green squares on a white background", "a grey honeycombed texture", "sf_dry"])
def test_word_is_split_as_usual_without_dropout_and_into_letters_with_all_of_it(trained: Path, text: str) -> None:
    tokenizer = StableDiffusionPipeline.from_pretrained(trained).tokenizer
    backend = tokenizer.backend_tokenizer
    ranks = {tuple(merge): rank for rank, merge in enumerate(json.loads(backend.to_str())["model"]["merges"])}
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    random = np.random.default_rng(0)
    assert [piece for word in words for piece in split_word(word, ranks, random, 0.0)] == tokenizer.tokenize(text)
    assert [len(split_word(word, ranks, random, 1.0)) for word in words] == [len(word) for word in words]


def test_same_seed_gives_the_same_weights(shapes: Path, trained: Path, tmp_path: Path) -> None:
    main(PretrainConfig(train_data_dir=shapes, output_dir=tmp_path / "again", **TINY))
    name = "unet/diffusion_pytorch_model.safetensors"
    first, second = load_file(trained / name), load_file(tmp_path / "again" / name)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_going_on_keeps_vae_and_tokenizer_and_moves_the_denoiser(shapes: Path, trained: Path, tmp_path: Path) -> None:
    going_on = {**TINY, "max_train_samples": 8, "snr_floor": 1.0, "vae_steps": 0}
    main(PretrainConfig(train_data_dir=shapes, output_dir=tmp_path / "on", start_from=trained, **going_on))
    for name in ("vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"):
        assert (tmp_path / "on" / name).read_bytes() == (trained / name).read_bytes()
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        before, after = load_file(trained / name), load_file(tmp_path / "on" / name)
        assert all((before[key] != after[key]).any() for key in before if before[key].is_floating_point())


def test_going_on_with_the_vae_keeps_its_scaling_factor(shapes: Path, trained: Path, tmp_path: Path) -> None:
    main(PretrainConfig(train_data_dir=shapes, output_dir=tmp_path / "on", start_from=trained, **TINY))
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "on" / name).read_bytes() != (trained / name).read_bytes()
    first, second = (json.loads((path / "vae/config.json").read_text()) for path in (trained, tmp_path / "on"))
    assert first["scaling_factor"] == second["scaling_factor"]


def test_latents_have_unit_spread_after_scaling(trained: Path, shapes: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(trained)
    pictures = np.stack([np.asarray(image) for image in _images(shapes)]).transpose(0, 3, 1, 2)
    latents = pipeline.vae.encode(torch.from_numpy(pictures / 127.5 - 1).float()).latent_dist
    spread = (latents.mean.var() + latents.std.square().mean()).sqrt() * pipeline.vae.config.scaling_factor
    assert spread.item() == pytest.approx(1.0, rel=1e-3)


def _images(folder: Path) -> list[np.ndarray]:
    from PIL import Image

    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def test_existing_output_is_refused_and_kept(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match="already there"):
        main(PretrainConfig(train_data_dir=shapes, output_dir=tmp_path, **TINY))
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_folder_without_captions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no metadata\.jsonl"):
        main(PretrainConfig(train_data_dir=tmp_path, output_dir=tmp_path / "out", **TINY))
