"""What diffusers' own tests check of its example scripts holds for the recipes that do their job.

After examples/*/test_*.py: names of the outputs, ``checkpoint-N`` folders, their limit, resuming, and that the stock
pipeline loads the result.
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from configs.load import load

PIPELINE = {"unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json", "model_index.json"}
LORA = {"pytorch_lora_weights.safetensors"}
SCRIPTS = {
    "full": ("FullRun", "--train_data_dir {images}", PIPELINE),
    "lora": ("LoraRun", "--train_data_dir {images}", LORA),
    "textual_inversion": (
        "TextualInversionRun",
        "--train_data_dir {plain} --placeholder_token <x> --initializer_token a --learnable_property object",
        {"learned_embeds.safetensors"},
    ),
    "dreambooth": ("DreamBoothRun", "--instance_data_dir {plain} --instance_prompt photo", PIPELINE),
    "lora_dreambooth": (
        "LoraDreamBoothRun",
        "--instance_data_dir {plain} --instance_prompt photo --train_text_encoder",
        LORA,
    ),
}


def train(script: str, images: Path, plain: Path, model: Path, folder: Path, words: str) -> None:
    config_class, own, _ = SCRIPTS[script]
    module = importlib.import_module(f"finetune.{script}")
    common = f"--pretrained_model_name_or_path {model} --output_dir {folder} --resolution 32 --train_batch_size 1 "
    common += "--gradient_accumulation_steps 1 --learning_rate 5.0e-04 --scale_lr --lr_scheduler constant "
    common += "--lr_warmup_steps 0 --seed 0 --report_to none --checkpointing_steps 2 "
    module.main(load(getattr(module, config_class), (common + own.format(images=images, plain=plain) + words).split()))
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module", params=list(SCRIPTS))
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toy_sd: Path, captioned_images: Path
) -> tuple[str, Path, Path]:
    """Return the script, its run of six steps with at most two checkpoints, and pictures without captions."""
    root = tmp_path_factory.mktemp(request.param)
    plain = root / "plain"
    shutil.copytree(captioned_images, plain, ignore=shutil.ignore_patterns("metadata.jsonl"))
    words = " --max_train_steps 6 --checkpoints_total_limit 2"
    train(request.param, captioned_images, plain, toy_sd, root / "run", words)
    return request.param, root / "run", plain


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


def test_outputs_have_the_names_of_the_script(trained: tuple[str, Path, Path]) -> None:
    script, folder, _ = trained
    assert [name for name in SCRIPTS[script][2] if not (folder / name).is_file()] == []


def test_checkpoints_have_their_names_and_their_limit(trained: tuple[str, Path, Path]) -> None:
    assert checkpoints(trained[1]) == {"checkpoint-4", "checkpoint-6"}


def test_resuming_goes_on_and_prunes(
    trained: tuple[str, Path, Path], toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    script, folder, plain = trained
    shutil.copytree(folder, tmp_path / "run")
    words = " --max_train_steps 8 --checkpoints_total_limit 2 --resume_from_checkpoint=checkpoint-4"
    train(script, captioned_images, plain, toy_sd, tmp_path / "run", words)
    assert checkpoints(tmp_path / "run") == {"checkpoint-6", "checkpoint-8"}


def test_stock_pipeline_loads_the_result(trained: tuple[str, Path, Path], toy_sd: Path) -> None:
    script, folder, _ = trained
    outputs = SCRIPTS[script][2]
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder if outputs is PIPELINE else toy_sd, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    if outputs is LORA:
        pipeline.load_lora_weights(folder)
        keys = load_file(folder / "pytorch_lora_weights.safetensors")
        parts = {key.partition(".")[0] for key in keys}
        assert parts == ({"unet", "text_encoder"} if script == "lora_dreambooth" else {"unet"})
        assert all("lora" in key for key in keys)
    elif script == "textual_inversion":
        pipeline.load_textual_inversion(folder)
    assert len(pipeline("<x>", num_inference_steps=1, height=32, width=32).images) == 1
