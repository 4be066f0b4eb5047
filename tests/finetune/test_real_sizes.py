"""The architectures people fine-tune, at their real size with random weights, and a small one that predicts v.

The sizes are those of the published configs of Stable Diffusion 1.5 and 2.1 (768 px); nothing is downloaded.
"""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from configs.load import load
from configs.recipes import RECIPES
from data_prep.folders.run_folder import LORA_FILE
from eval.generate import GenerateConfig
from eval.generate import main as generate
from finetune.diffusion.models import load_models

TINY_SD = Path(__file__).parents[2] / "assets" / "tiny-sd"
LAYERS = 128
"""Projections that get adapters: 16 transformer blocks, two attentions in each, four projections in each."""
SIZES = {
    "sd15": {
        "unet": {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "activation": "quick_gelu",
        "prediction_type": "epsilon",
        "num_weights": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
        "lora_weights": 797_184,
        "size_px": 512,
    },
    "sd21": {
        "unet": {
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
            "sample_size": 96,
        },
        "text": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
        "activation": "gelu",
        "prediction_type": "v_prediction",
        "num_weights": {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863},
        "lora_weights": 829_952,
        "size_px": 768,
    },
}


def write_real_size(folder: Path, toy: Path, name: str) -> Path:
    """Write a pipeline folder of a real size in float16, its tokenizer that of the toy."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    size = SIZES[name]
    tokenizer = CLIPTokenizer.from_pretrained(toy / "tokenizer")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # half the memory while the weights are drawn
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            text_encoder = CLIPTextModel(
                CLIPTextConfig(vocab_size=49408, hidden_act=size["activation"], **size["text"], **ids)
            )
            vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
                sample_size=size["size_px"],
            )
            unet = UNet2DConditionModel(**size["unet"])
    finally:
        torch.set_default_dtype(default)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=size["prediction_type"],
    )
    StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module", params=list(SIZES))
def real(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toy_sd: Path
) -> Iterator[tuple[str, Path]]:
    folder = write_real_size(tmp_path_factory.mktemp(request.param) / "model", toy_sd, request.param)
    yield request.param, folder
    shutil.rmtree(folder)  # 2.2 and 2.6 GB


@pytest.mark.slow
def test_a_real_model_is_read_as_it_is(real: tuple[str, Path]) -> None:
    name, folder = real
    models, size = load_models(str(folder)), SIZES[name]
    parts = {"unet": models.unet, "text_encoder": models.text_encoder, "vae": models.vae}
    counted = {part: sum(weight.numel() for weight in module.parameters()) for part, module in parts.items()}
    assert counted == size["num_weights"]
    assert {weight.dtype for weight in models.unet.parameters()} == {torch.float32}
    assert models.text_encoder.config.num_hidden_layers == size["text"]["num_hidden_layers"]
    assert models.scheduler.config.prediction_type == size["prediction_type"]
    assert models.size_px == size["size_px"]


@pytest.mark.slow
def test_one_lora_step_of_a_real_model_leaves_the_file_diffusers_reads(
    real: tuple[str, Path], captioned_images: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    from finetune.lora import LoraRun, main

    name, folder = real
    words = f"--pretrained_model_name_or_path {folder} --train_data_dir {captioned_images} --output_dir {tmp_path}/run"
    # At 64 px the innermost blocks see one place, whose attention to itself has no gradient.
    words += " --resolution 128 --max_train_samples 1 --train_batch_size 1 --max_train_steps 1 --rank 4 --seed 0"
    main(load(LoraRun, f"{words} --mixed_precision bf16 --lr_warmup_steps 0 --report_to none".split()))
    path = tmp_path / "run" / LORA_FILE
    with safe_open(path, framework="pt") as reader:
        shapes = {key: reader.get_slice(key).get_shape() for key in reader.keys()}  # noqa: SIM118
        moved = [key for key in shapes if key.endswith("lora_B.weight") and bool(reader.get_tensor(key).any())]
        told = json.loads(reader.metadata()["provenance"])
    width = SIZES[name]["unet"]["cross_attention_dim"]
    assert shapes["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"] == [4, width]
    assert len(shapes) == 2 * LAYERS
    assert len(moved) == LAYERS
    num_weights = sum(rows * columns for rows, columns in shapes.values())
    assert num_weights == SIZES[name]["lora_weights"]
    assert 0 < path.stat().st_size - 4 * num_weights < 60_000  # the header: names, provenance
    assert told["scheduler"]["prediction_type"] == SIZES[name]["prediction_type"]
    state, *_ = StableDiffusionPipeline.lora_state_dict(path)
    assert len(state) == 2 * LAYERS


METHODS = {
    "full": "--train_data_dir {images}",
    "lora": "--train_data_dir {images}",
    "textual_inversion": ("--train_data_dir {images} --placeholder_token <x> --initializer_token a --repeats 1"),
    "dreambooth": "--instance_data_dir {images} --instance_prompt a",
    "lora_dreambooth": "--instance_data_dir {images} --instance_prompt a",
    "pivotal_tuning": ("--instance_data_dir {images} --placeholder_token <x> --initializer_token a"),
}


def train_method(method: str, model: Path, captioned_images: Path, root: Path, more: str = "") -> Path:
    """Train two steps; return the run folder."""
    config_class, words = RECIPES[method].settings, METHODS[method]
    module = importlib.import_module(f"finetune.{method}")
    images = root / "images"  # without captions of their own
    shutil.copytree(captioned_images, images, ignore=shutil.ignore_patterns("metadata.jsonl"))
    if method in ("full", "lora"):
        images = captioned_images
    words = f"--pretrained_model_name_or_path {model} {words.format(images=images)} --output_dir {root}/run"
    words += f" --max_train_steps 2 --train_batch_size 2 --seed 0 --snr_gamma 5 --report_to none {more}"
    module.main(load(getattr(module, config_class), words.split()))
    return root / "run"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_model_that_predicts_v_as_one(
    method: str, toy_sd_v: Path, captioned_images: Path, tmp_path: Path
) -> None:
    run = train_method(method, toy_sd_v, captioned_images, tmp_path)
    told = json.loads((run / "provenance.json").read_text())
    assert told["scheduler"]["prediction_type"] == "v_prediction"
    saved = run / "scheduler" / "scheduler_config.json"
    assert not saved.is_file() or json.loads(saved.read_text())["prediction_type"] == "v_prediction"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_embedded_model_and_keeps_what_was_selected(
    method: str, captioned_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With probes watched; the command it names next draws with what it kept."""
    more = "--drift_probes tiny --drift_steps 1 --learning_rate 1e-4"
    run = train_method(method, TINY_SD, captioned_images, tmp_path, more)
    selected = json.loads((run / "selection.json").read_text())
    assert json.loads((run / "provenance.json").read_text())["steps"] == selected["selected_step"]
    assert {json.loads(line)["step"] for line in (run / "drift.jsonl").read_text().splitlines()} == {0, 1, 2}
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[:3] == ["python", "-m", "eval.generate"]
    generate(load(GenerateConfig, [*words[3:], "--num_images", "1", "--num_inference_steps", "2"]))
    assert len((Path(f"{run}-slices") / "records.jsonl").read_text().splitlines()) == 1
