"""``--adapter runs/lora/checkpoint-200``: what a run had learned there, and no more."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from configs.errors import InputError
from configs.load import load
from data_prep.folders.hashes import sha256_of
from data_prep.folders.provenance import dataset_of
from finetune.diffusion.config import SamplingConfig
from finetune.diffusion.sampling import sample
from finetune.diffusion.tuned import load_tuned

SETTINGS = {
    "lora": "LoraRun",
    "textual_inversion": "TextualInversionRun",
    "pivotal_tuning": "PivotalTuningRun",
    "full": "FullRun",
}
WORD = "--placeholder_token <new> --initializer_token ab --num_vectors 2 --repeats 1"
CASES = {
    "lora": "lora --train_data_dir {images}",
    "lora, all layers": (
        "lora --train_data_dir {images} --train_text_encoder --use_ema --ema_decay 0.5 --rank 2 --lora_alpha 5 "
        "--lora_targets attention+resnet --resnet_rank 3 --resnet_alpha 2"
    ),
    "lora, dora": "lora --train_data_dir {images} --train_text_encoder --use_dora --prediction_type v_prediction",
    "word": f"textual_inversion --train_data_dir {{images}} --use_ema --ema_decay 0.5 {WORD}",
    "word and lora": f"pivotal_tuning --instance_data_dir {{images}} --instance_prompt <new> {WORD}",
    "full": "full --train_data_dir {images}",
}


def train(case: str, toy: Path, images: Path, folder: Path, *more: str) -> Path:
    """Run a case for four updates, with a checkpoint after every second; return its folder."""
    recipe, *words = CASES[case].format(images=images).split()
    words += f"--pretrained_model_name_or_path {toy} --output_dir {folder} --seed 0 --max_train_steps 4".split()
    words += ["--train_batch_size", "2", "--learning_rate", "0.05", "--checkpointing_steps", "2", "--report_to", "none"]
    words += more
    module = importlib.import_module(f"finetune.{recipe}")
    try:
        module.main(load(getattr(module, SETTINGS[recipe]), words))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def drawn(toy: Path, *adapters: Path) -> np.ndarray:
    settings = SamplingConfig(num_inference_steps=2, height=32, width=32)
    return sample(load_tuned(str(toy), adapters).models, [("a <new> slice", 0)], settings)


@pytest.mark.parametrize("case", [case for case in CASES if case != "full"])
def test_the_last_checkpoint_draws_what_the_run_draws_and_an_earlier_one_does_not(
    case: str, toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    run = train(case, toy_sd, captioned_images, tmp_path / "run")
    ended = drawn(toy_sd, run)
    assert np.array_equal(drawn(toy_sd, run / "checkpoint-4"), ended)
    earlier = drawn(toy_sd, run / "checkpoint-2")
    assert not np.array_equal(earlier, ended)
    assert not np.array_equal(earlier, drawn(toy_sd))
    (run / "provenance.json").unlink()  # a run that is still going on has none
    assert np.array_equal(drawn(toy_sd, run / "checkpoint-2"), earlier)


def test_a_record_names_the_checkpoint_and_its_data(toy_sd: Path, captioned_images: Path, tmp_path: Path) -> None:
    run = train("lora", toy_sd, captioned_images, tmp_path / "run")
    step = run / "checkpoint-2"
    tuned = load_tuned(str(toy_sd), [step], [0.5])
    assert tuned.adapters == [{"name": str(step), "hash": sha256_of(step / "learned.safetensors"), "scale": 0.5}]
    assert tuned.provenances[0]["steps"] == 2
    assert dataset_of([step]) == captioned_images.parent
    (run / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"needs .*config.yaml; leave the checkpoint in its run folder"):
        load_tuned(str(toy_sd), [step])


def test_a_checkpoint_of_full_fine_tuning_is_no_adapter(toy_sd: Path, captioned_images: Path, tmp_path: Path) -> None:
    run = train("full", toy_sd, captioned_images, tmp_path / "run")
    step = run / "checkpoint-2"
    with pytest.raises(InputError, match=r"full fine-tuning.*--max_train_steps 2 .*--pretrained_model_name_or_path"):
        load_tuned(str(toy_sd), [step])
    # The way that the message names gives a pipeline of these weights.
    more = ("--resume_from_checkpoint", str(step), "--max_train_steps", "2")
    pipeline = train("full", toy_sd, captioned_images, tmp_path / "pipeline", *more)
    unet = load_tuned(str(pipeline)).models.unet.state_dict()
    kept = load_file(step / "learned.safetensors")
    assert kept
    assert all(torch.equal(unet[name.removeprefix("unet.")], value) for name, value in kept.items())
