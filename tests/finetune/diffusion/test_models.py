"""Loading models and adapters, and naming them by content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import InputError, UsageError
from data_prep.folders.run_folder import LORA_FILE
from finetune.core.learns.trainable import lora_adapters
from finetune.core.save.weights import save_lora
from finetune.core.settings.methods import LoraConfig
from finetune.diffusion.adapters import fold_adapters, load_adapter, set_adapter_scale
from finetune.diffusion.config import ModelSource
from finetune.diffusion.hashes import model_hash
from finetune.diffusion.models import Models, load_models
from finetune.diffusion.text import encode_prompts


def write_adapter(model: Path, folder: Path, seed: int = 0, targets: str = "attention") -> Path:
    """Save an adapter with random, not small, weights."""
    folder.mkdir(exist_ok=True)
    models = load_models(str(model))
    learns = lora_adapters(models, LoraConfig(rank=2, lora_targets=targets), learning_rate=1e-4, seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learns.parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save_lora(folder, models, {"method": "lora", "steps": 3})
    return folder


@torch.no_grad()
def predict(models: Models) -> torch.Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = encode_prompts(models, ["sf_dry", "sf_warp"])
    return models.unet(latents, torch.tensor([10, 500]), encoder_hidden_states=prompts).sample


def test_everything_loaded_is_frozen_and_float32(toy_sd: Path) -> None:
    models = load_models(str(toy_sd))
    parameters = [p for part in (models.unet, models.vae, models.text_encoder) for p in part.parameters()]
    assert not any(parameter.requires_grad for parameter in parameters)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}


def test_size_is_the_models_own(toy_sd: Path) -> None:
    models = load_models(str(toy_sd))
    assert (models.size_px, models.vae_scale_factor) == (32, 4)


def test_prediction_type_is_the_models_own(toy_sd_v: Path) -> None:
    assert load_models(str(toy_sd_v)).scheduler.config.prediction_type == "v_prediction"


def test_prompts_are_encoded_as_the_stock_pipeline_does(toy_sd: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(toy_sd, safety_checker=None)
    prompts = ["sf_dry sf_warp", "", "sf_injected", "sf_dry sf_warp"]
    expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    # The pipeline encodes them in one batch, we one by one.
    torch.testing.assert_close(encode_prompts(load_models(str(toy_sd)), prompts), expected, atol=1e-6, rtol=1e-5)


def test_a_prompt_does_not_depend_on_its_company(toy_sd: Path) -> None:
    models = load_models(str(toy_sd))
    alone = encode_prompts(models, ["sf_dry"])
    assert torch.equal(encode_prompts(models, ["a", "sf_dry", "b", "c"])[1:2], alone)


def test_a_prompt_that_would_be_cut_is_refused(toy_sd: Path) -> None:
    with pytest.raises(UsageError, match=r"82 tokens.*reads 77"):
        encode_prompts(load_models(str(toy_sd)), ["x" * 80])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "model_index.json").unlink(), "no model_index.json"),
        (lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "pickled weights"),
        (lambda folder: (folder / "vae" / "config.json").unlink(), "cannot be loaded"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(toy_sd: Path, tmp_path: Path, spoil: object, message: str) -> None:
    copy = shutil.copytree(toy_sd, tmp_path / "copy")
    spoil(copy)
    with pytest.raises(UsageError, match=message):
        load_models(str(copy))


@pytest.mark.parametrize(
    ("pipeline", "family"),
    [
        ("StableDiffusionXLPipeline", "Stable Diffusion XL"),
        ("StableDiffusion3Pipeline", "Stable Diffusion 3"),
        ("FluxPipeline", "Flux"),
    ],
)
def test_a_model_of_another_family_is_refused_by_its_name(
    toy_sd: Path, tmp_path: Path, pipeline: str, family: str
) -> None:
    index = json.loads((toy_sd / "model_index.json").read_text(encoding="utf-8")) | {"_class_name": pipeline}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UsageError, match=f"is a {family} ") as caught:
        load_models(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_hash_belongs_to_the_content_not_the_name(toy_sd: Path, toy_sd_v: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(toy_sd, tmp_path / "copy")
    assert model_hash(str(copy)) == model_hash(str(toy_sd))
    assert model_hash(str(toy_sd_v)) != model_hash(str(toy_sd))


def test_hash_sees_one_weight(toy_sd: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(toy_sd, tmp_path / "copy")
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert model_hash(str(copy)) != model_hash(str(toy_sd))


def test_an_adapter_at_scale_zero_is_the_base_exactly(toy_sd: Path, tmp_path: Path) -> None:
    base, models = load_models(str(toy_sd)), load_models(str(toy_sd))
    provenance = load_adapter(models, write_adapter(toy_sd, tmp_path / "run"), scale=0.0)
    assert provenance == {"method": "lora", "steps": 3}
    assert torch.equal(predict(models), predict(base))


def test_scale_goes_there_and_back(toy_sd: Path, tmp_path: Path) -> None:
    models = load_models(str(toy_sd))
    load_adapter(models, write_adapter(toy_sd, tmp_path / "run"))
    full = predict(models)
    for scale in (0.5, 0.0, 1.0):
        set_adapter_scale(models, scale)
        assert torch.equal(predict(models), full) == (scale == 1.0)


def test_two_adapters_add_up(toy_sd: Path, tmp_path: Path) -> None:
    models, twice = load_models(str(toy_sd)), load_models(str(toy_sd))
    folder = write_adapter(toy_sd, tmp_path / "run")
    load_adapter(models, folder, scale=1.0)
    load_adapter(twice, folder, scale=0.25)
    load_adapter(twice, folder / LORA_FILE, scale=0.75)
    # The same sum in another order.
    torch.testing.assert_close(predict(twice), predict(models), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", ["attention", "attention+resnet"])
def test_a_folded_adapter_predicts_the_same_without_a_layer_of_its_own(
    toy_sd: Path, tmp_path: Path, targets: str
) -> None:
    models = load_models(str(toy_sd))
    load_adapter(models, write_adapter(toy_sd, tmp_path / "run", targets=targets), scale=0.7)
    beside = predict(models)
    fold_adapters(models)
    torch.testing.assert_close(predict(models), beside, atol=1e-5, rtol=1e-5)
    assert not [name for name, _ in models.unet.named_parameters() if "lora" in name]


def test_folding_without_an_adapter_changes_nothing(toy_sd: Path) -> None:
    models = load_models(str(toy_sd))
    before = predict(models)
    fold_adapters(models)
    assert torch.equal(predict(models), before)


def test_a_loaded_adapter_is_frozen(toy_sd: Path, tmp_path: Path) -> None:
    models = load_models(str(toy_sd))
    load_adapter(models, write_adapter(toy_sd, tmp_path / "run"), scale=0.5)
    assert not any(parameter.requires_grad for parameter in models.unet.parameters())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.safetensors", None, "there is no absent.safetensors"),
        ("weights.bin", b"\x80\x04", "only .safetensors"),
        ("junk.safetensors", b"\x00" * 64, "does not load"),
    ],
)
def test_an_adapter_that_cannot_be_read_is_refused(
    toy_sd: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_adapter(load_models(str(toy_sd)), tmp_path / name)


def test_an_adapter_that_would_lose_layers_is_refused(toy_sd: Path, tmp_path: Path) -> None:
    write_adapter(toy_sd, tmp_path, targets="attention+resnet")
    tensors = load_file(tmp_path / LORA_FILE)
    foreign = {name.replace("mid_block", "middle_block"): value for name, value in tensors.items()}
    save_file(foreign, tmp_path / "foreign.safetensors", metadata={"format": "pt", "other": json.dumps({})})
    with pytest.raises(InputError, match="47 of its 61 layers"):
        load_adapter(load_models(str(toy_sd)), tmp_path / "foreign.safetensors")


def test_another_length_of_prompts_is_kept_within_what_the_text_encoder_reads(toy_sd: Path) -> None:
    models = load_models(ModelSource(name=str(toy_sd), tokenizer_max_length=20))
    assert encode_prompts(models, ["sf_dry"]).shape == (1, 20, 16)
    with pytest.raises(UsageError, match="--tokenizer_max_length 78: the text encoder reads 77 at most"):
        load_models(ModelSource(name=str(toy_sd), tokenizer_max_length=78))


def test_another_tokenizer_must_fit_the_text_encoder(toy_sd: Path, tmp_path: Path) -> None:
    tokenizer = load_models(str(toy_sd)).tokenizer
    tokenizer.model_max_length = 33
    tokenizer.save_pretrained(tmp_path / "same")
    assert (
        load_models(ModelSource(name=str(toy_sd), tokenizer_name=str(tmp_path / "same"))).tokenizer.model_max_length
        == 33
    )
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "more")
    with pytest.raises(UsageError, match=r"--tokenizer_name .*more: has 515 pieces, the text encoder knows 514"):
        load_models(ModelSource(name=str(toy_sd), tokenizer_name=str(tmp_path / "more")))


def test_a_folder_has_no_revision_for_its_unet(toy_sd: Path) -> None:
    with pytest.raises(UsageError, match=r"--non_ema_revision main: .* is a folder, which has no revisions"):
        load_models(ModelSource(name=str(toy_sd), unet_revision="main"))
