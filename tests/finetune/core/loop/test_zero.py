"""Moments and gradients split over two processes by DeepSpeed, started as a user would: what each holds and leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_methods import PRIOR, run_recipe, words_of
from test_processes import ROOT, rows
from test_sharding import FULL, asked, differences
from test_watch import rows_of, write_images

from configs.errors import UsageError
from configs.load import load
from data_prep.folders.run_folder import LORA_FILE
from finetune.core.loop.zero import check_settings, stage_asked
from finetune.full import FullRun, main

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (pip install deepspeed)"
)
# Runs the recipe and leaves how many moments and gradients its process held.
RECORDER = """
import json, os, sys
from configs.load import load
from finetune.core.loop import zero
from finetune.full import FullRun, main

split, made = zero.split, {}

def watched(denoiser, optimizer, *rest, **options):
    engine, outer = split(denoiser, optimizer, *rest, **options)
    step = outer.step
    def counted():
        made["gradients"] = sum(value.numel() for values in outer.averaged_gradients.values() for value in values)
        step()
        made["moments"] = sum(state["exp_avg"].numel() for state in optimizer.state.values())
        made["whole"] = sum(value.numel() for value in denoiser.parameters() if value.requires_grad)
        made["stage"] = engine.zero_optimization_stage()
    outer.step = counted
    return engine, outer

zero.split = watched
main(load(FullRun, sys.argv[2:]))
with open(f"{sys.argv[1]}/rank-{os.environ['RANK']}.json", "w") as stream:
    json.dump(made, stream)
"""


def launch(*arguments: object, precision: str = "no") -> str:
    """Start two processes with the config that users start GPUs with, and return what they printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", precision]
    config = ["--config_file", str(ROOT / "configs" / "accelerate" / "deepspeed.yaml"), "--main_process_port", "0"]
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        [*command, *config, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, toy_sd: Path, captioned_images: Path) -> Path:
    """Return the folder of a run of two processes with two passes each; rank-0.json and rank-1.json lie beside it."""
    folder = tmp_path_factory.mktemp("split")
    (folder / "recorder.py").write_text(RECORDER)
    launch(folder / "recorder.py", folder, *asked(toy_sd, captioned_images, folder / "run", **FULL))
    return folder / "run"


@pytest.mark.slow
@needs_deepspeed
def test_each_process_holds_its_share(split: Path) -> None:
    for rank in (0, 1):
        held = json.loads((split.parent / f"rank-{rank}.json").read_text())
        assert held["stage"] == 2
        # Equal shares of what is padded to a multiple of the processes.
        assert 0 <= 2 * held["moments"] - held["whole"] < 16
        assert held["gradients"] == held["moments"]


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
def test_a_split_run_leaves_what_one_process_does(
    stage: int, split: Path, toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    if stage == 1:
        line = asked(toy_sd, captioned_images, tmp_path / "run", **FULL)
        launch("--zero_stage", 1, ROOT / "finetune" / "full.py", *line)
        split = tmp_path / "run"
    main(load(FullRun, asked(toy_sd, captioned_images, tmp_path / "one", **{**FULL, "train_batch_size": 2})))
    found = differences(split, tmp_path / "one")
    # What learned, the averages and the moments, in both checkpoints; three parts of the pipeline.
    assert sum(name.startswith("checkpoint") for name in found) == 6
    assert {name.split("/")[0] for name in found} == {"checkpoint-4", "checkpoint-6", "text_encoder", "unet", "vae"}
    # As for two processes that are not split: weights moved by about 3e-3, and differ by a thousandth of that.
    assert max(found.values()) < 3e-6
    assert found["vae/diffusion_pytorch_model.safetensors"] == 0
    for ours, theirs in zip(rows(split), rows(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    configs = [(folder / "unet" / "config.json").read_text() for folder in (split, tmp_path / "one")]
    assert configs[0] == configs[1]


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("done", [4, 6])
def test_a_split_run_goes_on_bitwise(
    done: int, split: Path, toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    line = asked(toy_sd, captioned_images, tmp_path / "run", **FULL)
    launch(ROOT / "finetune" / "full.py", *line, "--resume_from_checkpoint", split / f"checkpoint-{done}")
    found = differences(tmp_path / "run", split)
    assert set(found.values()) == {0.0}
    assert len(found) == 3 + 3 * (done < 6)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_split_adapters_learn_as_those_that_are_not(
    precision: str, toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    options = {"train_text_encoder": True, "use_dora": True, "gradient_checkpointing": True, "max_grad_norm": 1e-3}
    # What looks at the whole model in between; every gradient exceeds that norm.
    options |= {"validation_prompt": "sf_dry", "num_validation_images": 1, "heldout_steps": 3}
    options |= {"validation_data_dir": write_images(tmp_path / "heldout", 1, 5), "mixed_precision": precision}
    line = asked(toy_sd, captioned_images, tmp_path / "split", **options, train_batch_size=2)
    launch(ROOT / "finetune" / "lora.py", *line, precision=precision)
    run_recipe("lora", asked(toy_sd, captioned_images, tmp_path / "whole", **options, train_batch_size=4))
    ours, theirs = (load_file(tmp_path / name / LORA_FILE) for name in ("split", "whole"))
    assert ours.keys() == theirs.keys()
    assert {value.dtype for value in ours.values()} == {torch.float32}
    if precision == "no":
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=3e-6, rtol=0)
    # In bf16 a tiny gradient may turn its sign, and Adam makes as much of it as of any; losses show how little it is.
    largest = {"no": 1e-5, "bf16": 2e-3}[precision]
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("split", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=largest)
    looks = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("split", "whole")]
    assert looks[0] == pytest.approx(looks[1], rel=largest)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("source", ["class_images", "base_prediction"])
def test_a_subject_and_its_class_are_learned_split_as_whole(
    source: str, toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    line = words_of("lora_dreambooth", toy_sd, captioned_images, tmp_path) + PRIOR.format(root=tmp_path).split()
    line += ["--train_text_encoder", "--learning_rate", "1e-3", "--prior_source", source]
    halves = ["--train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    launch(ROOT / "finetune" / "lora_dreambooth.py", *line, *halves)
    run_recipe("lora_dreambooth", [*line, "--output_dir", str(tmp_path / "one")])
    assert max(differences(tmp_path / "run", tmp_path / "one").values()) < 1e-5


def settings(**options: object) -> dict[str, object]:
    return {"optimizer": "adamw", **options}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placeholder_token": "<dry>"}, "--placeholder_token <dry>: not with DeepSpeed: a few rows learn"),
        ({"optimizer": "adafactor"}, "--optimizer adafactor: not with DeepSpeed"),
        ({"use_8bit_adam": True}, "--use_8bit_adam True: not with DeepSpeed"),
    ],
)
def test_what_cannot_be_split_is_refused(options: dict[str, object], message: str) -> None:
    two = SimpleNamespace(num_processes=2, mixed_precision="no")
    check_settings(settings(), two)
    with pytest.raises(UsageError, match=message):
        check_settings(settings(**options), two)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"num_processes": 1, "mixed_precision": "no"}, "nothing to split over"),
        ({"num_processes": 2, "mixed_precision": "fp16"}, "--mixed_precision fp16: not with DeepSpeed"),
    ],
)
def test_what_the_launcher_gives_is_refused_if_it_cannot_split(state: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_settings(settings(), SimpleNamespace(**state))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ZERO_STAGE", "3", "zero_stage: 3: must be 1 or 2; configs/accelerate/fsdp.yaml splits the weights, too"),
        ("OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device: cpu: must be none"),
        ("CONFIG_FILE", "zero.json", "deepspeed_config_file: zero.json: must be none"),
    ],
)
def test_options_of_the_launcher_are_honoured_or_refused(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stage_asked() == 0
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert stage_asked() == 2
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    assert stage_asked() == 1
    monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    with pytest.raises(UsageError, match=message):
        stage_asked()


def test_what_the_recipe_has_an_option_for_is_refused_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.5")
    with pytest.raises(UsageError, match=r"gradient_clipping: 0.5: is not honoured, .* --max_grad_norm is"):
        stage_asked()


def test_deepspeed_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="DeepSpeed: it is not installed; pip install deepspeed"):
        stage_asked()
