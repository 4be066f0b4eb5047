"""Moments and gradients split over two processes by DeepSpeed, started as a user would: what each holds and leaves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from split_runs import FULL, asked, launch, ranks, recorded
from test_methods import PRIOR, run_recipe, words_of
from test_processes import ROOT
from test_sharding import (
    LARGEST,
    check_adapters_are_alike,
    check_it_goes_on_bitwise,
    check_one_process_leaves_the_same,
    differences,
)
from test_watch import rows_of, write_images

from configs.errors import UsageError
from finetune.core.loop.zero import check_settings, stage_asked

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (pip install deepspeed)"
)
# Counts the moments and gradients that a process holds in a step.
WATCHING = """
from finetune.core.loop import zero

split = zero.split

def watched(denoiser, optimizer, *rest, **options):
    engine, outer = split(denoiser, optimizer, *rest, **options)
    step = outer.step
    def counted():
        held["gradients"] = sum(value.numel() for values in outer.averaged_gradients.values() for value in values)
        step()
        held["moments"] = sum(state["exp_avg"].numel() for state in optimizer.state.values())
        held["whole"] = sum(value.numel() for value in denoiser.parameters() if value.requires_grad)
        held["stage"] = engine.zero_optimization_stage()
    outer.step = counted
    return engine, outer

zero.split = watched
"""


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, toy_sd: Path, captioned_images: Path) -> Path:
    """Return the folder of a run of two processes with two passes each."""
    return recorded("deepspeed", WATCHING, toy_sd, captioned_images, tmp_path_factory.mktemp("split"))


@pytest.mark.slow
@needs_deepspeed
def test_each_process_holds_its_share(split: Path) -> None:
    for held in ranks(split):
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
        launch("deepspeed", "--zero_stage", 1, ROOT / "finetune" / "full.py", *line)
        split = tmp_path / "run"
    check_one_process_leaves_the_same(split, toy_sd, captioned_images, tmp_path / "one")


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("done", [4, 6])
def test_a_split_run_goes_on_bitwise(
    done: int, split: Path, toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    check_it_goes_on_bitwise("deepspeed", done, split, toy_sd, captioned_images, tmp_path / "run")


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
    launch("deepspeed", ROOT / "finetune" / "lora.py", *line, precision=precision)
    run_recipe("lora", asked(toy_sd, captioned_images, tmp_path / "whole", **options, train_batch_size=4))
    check_adapters_are_alike(tmp_path / "split", tmp_path / "whole", precision)
    looks = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("split", "whole")]
    assert looks[0] == pytest.approx(looks[1], rel=LARGEST[precision])


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("source", ["class_images", "base_prediction"])
def test_a_subject_and_its_class_are_learned_split_as_whole(
    source: str, toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    line = words_of("lora_dreambooth", toy_sd, captioned_images, tmp_path) + PRIOR.format(root=tmp_path).split()
    line += ["--train_text_encoder", "--learning_rate", "1e-3", "--prior_source", source]
    halves = ["--train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    launch("deepspeed", ROOT / "finetune" / "lora_dreambooth.py", *line, *halves)
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
