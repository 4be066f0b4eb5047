"""Weights for other programs: kohya's key names, the way there and back, and merged pipelines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configs.errors import InputError, UsageError
from configs.load import load
from data_prep.folders.run_folder import LORA_FILE
from finetune.core.learns.trainable import lora_adapters
from finetune.core.save.kohya import PREFIXES, to_diffusers, to_kohya
from finetune.core.save.weights import save_lora
from finetune.core.settings.methods import LoraConfig
from finetune.diffusion.adapters import load_adapter
from finetune.diffusion.config import SamplingConfig
from finetune.diffusion.denoiser import Denoiser
from finetune.diffusion.models import Models, load_models
from finetune.diffusion.text import tokenize
from finetune.export import ExportConfig, main

NAMES = Path(__file__).parent / "kohya_names.txt"
"""Recorded from kohya-ss/sd-scripts at commit 48d368f: ``LoRANetwork`` in networks/lora.py, ``create_modules`` with
``conv_lora_dim`` set, over the U-Net of library/original_unet.py and a CLIPTextModel of 12 (SD 1.x) or 23 layers.
"""


SHAPES = [{"height": 32, "width": 32, "captions": {"sf_dry": 1}}]


def write_lora(model: Path, folder: Path, *, text: bool = True, **settings: object) -> Path:
    """Save a LoRA with random, not small, weights."""
    folder.mkdir(exist_ok=True)
    models = load_models(str(model))
    config = LoraConfig(**({"rank": 2, "lora_alpha": 3.0} | settings))  # type: ignore[arg-type]
    learns = lora_adapters(models, config, learning_rate=1.0, seed=0, text_encoder_rate=1.0 if text else None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in learns.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    told = {"method": "lora", "height": 32, "width": 32, "captions": ["sf_dry"], "shapes": SHAPES}
    save_lora(folder, models, told)
    return folder


def export(*words: object) -> None:
    main(load(ExportConfig, [str(word) for word in words]))


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as reader:
        return load_file(path), reader.metadata()


@torch.no_grad()
def predict(models: Models) -> torch.Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    denoiser = Denoiser(models.text_encoder, models.unet)
    return denoiser(latents, torch.tensor([10, 500]), tokenize(models, ["sf_dry", "sf_warp"]))


@pytest.fixture(scope="module")
def full(toy_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a LoRA on everything that can carry one, whose alpha is not its rank."""
    return write_lora(
        toy_sd,
        tmp_path_factory.mktemp("export") / "run",
        lora_targets="attention+resnet",
        resnet_rank=4,
        resnet_alpha=1.0,
    )


def recorded(model: str) -> set[str]:
    lines = NAMES.read_text(encoding="utf-8").splitlines()[1:]
    return {line.split()[0] for line in lines if model in line.split()[1].split(",")}


def layers_of(model: str) -> dict[str, set[str]]:
    """Return the layers of a Stable Diffusion that our adapters lie on; nothing takes memory."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    is_2 = model == "sd2"
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=1024 if is_2 else 768,
            attention_head_dim=(5, 10, 20, 20) if is_2 else 8,
            use_linear_projection=is_2,
        )
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=23 if is_2 else 12, vocab_size=100)
        )
    attention = r"to_[qkv]|to_out\.0"
    targets = {"unet.": rf".*\.({attention}|conv1|conv2|conv_shortcut|time_emb_proj)", "text_encoder.": r".*_proj"}
    return {
        prefix: {
            ("" if prefix == "unet." else "text_model.") + name
            for name, _ in module.named_modules()
            if re.fullmatch(targets[prefix], name)
        }
        for prefix, module in (("unet.", unet), ("text_encoder.", text))
    }


@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_names_are_those_kohya_gives_to_the_same_layers(model: str) -> None:
    layers = layers_of(model)
    tensors = {
        f"{prefix}{layer}.lora_{end}.weight": torch.zeros(1, 1)
        for prefix, found in layers.items()
        for layer in found
        for end in "AB"
    }
    written, _ = to_kohya(tensors, {})
    ours = {name.partition(".")[0] for name in written}
    adapted = "to_[qkv]$|to_out_0$|resnets_.*(conv1|conv2|conv_shortcut|time_emb_proj)$|self_attn_.*_proj$"
    assert ours == {name for name in recorded(model) if re.search(adapted, name)}
    assert {name.partition(".")[2] for name in written} == {"lora_down.weight", "lora_up.weight", "alpha"}


@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_every_name_of_kohya_finds_its_layer(model: str) -> None:
    tensors = {f"{name}.lora_down.weight": torch.zeros(1, 1) for name in recorded(model)}
    written, _ = to_diffusers(tensors, {})
    paths = {name.removesuffix(".lora_A.weight") for name in written}
    for prefix, layers in layers_of(model).items():
        assert {prefix + layer for layer in layers} <= paths
    assert {PREFIXES[part] + path.removeprefix(part).replace(".", "_")
            for path in paths for part in PREFIXES if path.startswith(part)} == recorded(model)  # fmt: skip
    assert not any(
        re.search(r"\.(blocks|block|attn\.|proj$|model|shortcut)", path.replace("ff.net.0.proj", "")) for path in paths
    )


def test_text_encoder_has_the_prefix_of_a_single_one(full: Path, tmp_path: Path) -> None:
    """The export of diffusers writes lora_te1, as for SDXL, and kohya's loader for SD 1.x finds nothing."""
    export("--adapter", full, "--to", "kohya", "--output", tmp_path / "kohya.safetensors")
    tensors, metadata = read(tmp_path / "kohya.safetensors")
    assert {name.split("_text_model")[0] for name in tensors if name.startswith("lora_te")} == {"lora_te"}
    assert metadata["ss_network_module"] == "networks.lora"


def test_there_and_back_is_the_same_file(full: Path, tmp_path: Path) -> None:
    export("--adapter", full, "--to", "kohya", "--output", tmp_path / "kohya.safetensors")
    export("--adapter", tmp_path / "kohya.safetensors", "--to", "diffusers", "--output", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (full / LORA_FILE).read_bytes()


def test_diffusers_reads_the_exported_file_to_the_same_model(full: Path, toy_sd: Path, tmp_path: Path) -> None:
    export("--adapter", full, "--to", "kohya", "--output", tmp_path / "kohya.safetensors")
    ours, theirs = load_models(str(toy_sd)), load_models(str(toy_sd))
    base = predict(theirs)
    load_adapter(ours, full)
    load_adapter(theirs, tmp_path / "kohya.safetensors")
    assert torch.equal(predict(theirs), predict(ours))
    assert not torch.equal(predict(theirs), base)


def test_a_file_of_another_program_keeps_its_ranks_and_alphas(toy_sd: Path, tmp_path: Path) -> None:
    """The files of kohya have no description for peft, and may differ in rank and alpha from layer to layer."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for place, name in enumerate(("attn1_to_q", "attn1_to_k", "attn2_to_out_0")):
        full = f"lora_unet_mid_block_attentions_0_transformer_blocks_0_{name}"
        tensors[f"{full}.lora_down.weight"] = torch.randn(2 + place, 16, generator=generator)
        tensors[f"{full}.lora_up.weight"] = torch.randn(16, 2 + place, generator=generator)
        tensors[f"{full}.alpha"] = torch.tensor(0.5 + place)
    save_file(tensors, tmp_path / "kohya.safetensors", metadata={"ss_network_dim": "2"})
    with pytest.raises(InputError, match=r"alpha_pattern.*export.py --to diffusers rewrites it"):
        load_adapter(load_models(str(toy_sd)), tmp_path / "kohya.safetensors")
    export("--adapter", tmp_path / "kohya.safetensors", "--to", "diffusers", "--output", tmp_path / "d.safetensors")
    ours, by_hand = load_models(str(toy_sd)), load_models(str(toy_sd))
    load_adapter(ours, tmp_path / "d.safetensors")
    block = by_hand.unet.mid_block.attentions[0].transformer_blocks[0]
    for name, layer in {"attn1_to_q": block.attn1.to_q, "attn1_to_k": block.attn1.to_k,
                        "attn2_to_out_0": block.attn2.to_out[0]}.items():  # fmt: skip
        down, up, alpha = (
            tensors[f"lora_unet_mid_block_attentions_0_transformer_blocks_0_{name}.{end}"]
            for end in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        layer.weight += alpha / len(down) * up @ down
    torch.testing.assert_close(predict(ours), predict(by_hand), atol=1e-4, rtol=1e-4)


def test_a_merged_pipeline_gives_the_pixels_of_the_adapter(full: Path, toy_sd: Path, tmp_path: Path) -> None:
    from finetune.diffusion.sampling import sample
    from finetune.diffusion.tuned import load_tuned

    export("--adapter", full, "--adapter_scale", 0.5, "--to", "pipeline", "--pretrained_model_name_or_path", toy_sd,
           "--output_dir", tmp_path / "merged")  # fmt: skip
    settings = SamplingConfig(num_inference_steps=3, height=32, width=32)
    merged, tuned = load_tuned(str(tmp_path / "merged")).models, load_tuned(str(toy_sd), [full], (0.5,)).models
    assert not any("lora" in name for name, _ in [*merged.unet.named_modules(), *merged.text_encoder.named_modules()])
    # W x + s B A x there, (W + s B A) x here: float32 rounding, seen as a grey level beside a rounding edge.
    torch.testing.assert_close(predict(merged), predict(tuned), atol=1e-4, rtol=1e-4)
    first, second = (sample(models, [("sf_dry", 0)], settings).astype(int) for models in (merged, tuned))
    assert np.abs(first - second).max() <= 1
    assert np.abs(first - sample(load_models(str(toy_sd)), [("sf_dry", 0)], settings)).max() > 1


def test_a_merged_pipeline_says_what_it_is_made_of(full: Path, toy_sd: Path, tmp_path: Path) -> None:
    export(
        "--adapter", full, "--to", "pipeline", "--pretrained_model_name_or_path", toy_sd, "--output_dir", tmp_path / "m"
    )
    told = json.loads((tmp_path / "m" / "provenance.json").read_text())
    assert (told["method"], told["captions"], told["height"]) == ("merged", ["sf_dry"], 32)
    assert [adapter["scale"] for adapter in told["adapters"]] == [1.0]
    assert told["base_model"]["name"] == str(toy_sd)
    assert told["shapes"] == SHAPES


def test_dora_is_refused_with_the_reason_and_merges(toy_sd: Path, tmp_path: Path) -> None:
    dora = write_lora(toy_sd, tmp_path / "dora", text=False, use_dora=True)
    with pytest.raises(InputError, match=r"DoRA has no place in kohya's own layout.*--to pipeline"):
        export("--adapter", dora, "--to", "kohya", "--output", tmp_path / "kohya.safetensors")
    assert not (tmp_path / "kohya.safetensors").exists()
    export(
        "--adapter", dora, "--to", "pipeline", "--pretrained_model_name_or_path", toy_sd, "--output_dir", tmp_path / "m"
    )
    tuned = load_models(str(toy_sd))
    load_adapter(tuned, dora)
    torch.testing.assert_close(predict(load_models(str(tmp_path / "m"))), predict(tuned), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "not in kohya's layout"),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "not in kohya's layout"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "not in kohya's layout"),
    ],
)
def test_another_layout_is_refused(tmp_path: Path, name: str, message: str) -> None:
    save_file({name: torch.zeros(1, 1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message):
        export("--adapter", tmp_path / "x.safetensors", "--to", "diffusers", "--output", tmp_path / "y.safetensors")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "kohya"), "needs a file name"),
        (("--to", "kohya", "--output", "x.pt"), "ends in .safetensors"),
        (("--to", "pipeline", "--output_dir", "x"), "needs --pretrained_model_name_or_path"),
        (("--to", "kohya", "--output", "x.safetensors", "--adapter_scale", "0.5"), "keeps the strength"),
        (("--to", "kohya", "--output", "x.safetensors", "--adapter", "b"), "takes one, not 2"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(ExportConfig, ["--adapter", "a", *words])


def test_a_file_that_is_there_stays(full: Path, tmp_path: Path) -> None:
    (tmp_path / "kohya.safetensors").write_bytes(b"mine")
    with pytest.raises(UsageError, match="is there already"):
        export("--adapter", full, "--to", "kohya", "--output", tmp_path / "kohya.safetensors")
    assert (tmp_path / "kohya.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("with_lora", [True, False], ids=["word and adapters", "word alone"])
def test_a_word_goes_into_the_pipeline_with_the_adapters(
    full: Path, toy_sd: Path, tmp_path: Path, with_lora: bool
) -> None:
    from test_generate import write_word

    from finetune.diffusion.text import encode_prompts

    runs = [*([full] if with_lora else []), write_word(tmp_path / "word")]
    words = [word for run in runs for word in ("--adapter", run)]
    export(*words, "--to", "pipeline", "--pretrained_model_name_or_path", toy_sd, "--output_dir", tmp_path / "merged")
    tuned, merged = load_models(str(toy_sd)), load_models(str(tmp_path / "merged"))
    for run in runs:
        load_adapter(tuned, run)
    first, second = encode_prompts(merged, ["a <x> b"]), encode_prompts(tuned, ["a <x> b"])
    # Without adapters nothing was added up.
    torch.testing.assert_close(first, second, atol=1e-5 if with_lora else 0, rtol=1e-5 if with_lora else 0)
    torch.testing.assert_close(predict(merged), predict(tuned), atol=1e-4, rtol=1e-4)
