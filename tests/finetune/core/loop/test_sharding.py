"""A model split over two processes (FSDP 2), started as a user would: what each holds, and what they leave."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from split_runs import FULL, asked, launch, ranks, recorded
from test_methods import PRIOR, run_recipe, words_of
from test_processes import ROOT, rows

from configs.errors import UsageError
from configs.load import load
from data_prep.folders.run_folder import LORA_FILE
from finetune.core.loop.sharding import check_settings, is_asked
from finetune.full import FullRun, main

# Counts the weights that a process holds, and those that it learns, after a step.
WATCHING = """
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from finetune.diffusion.denoiser import Denoiser

denoisers = []

def called(module, args, result):
    if isinstance(module, Denoiser):
        denoisers[:] = [module]

def stepped(optimizer, args, kwargs):
    weights = list(denoisers[0].parameters())
    learned = [value for group in optimizer.param_groups for value in group["params"]]
    held["whole"] = sum(value.numel() for value in weights)
    held["held"] = sum(value.to_local().numel() for value in weights)
    held["learned"] = sum(value.to_local().numel() for value in learned)

register_module_forward_hook(called)
register_optimizer_step_post_hook(stepped)
"""


def differences(ours: Path, theirs: Path) -> dict[str, float]:
    """Return by how much weights of the same names differ at most, by file."""
    found = {}
    for path in sorted(ours.rglob("*.safetensors")):
        name = path.relative_to(ours)
        if name.parts[0] != "cache":
            one, other = load_file(path), load_file(theirs / name)
            assert one.keys() == other.keys()
            assert all(one[key].dtype == other[key].dtype for key in one)
            # The bias of keys has no gradient but rounding errors, which Adam makes as large as any other.
            keys = [key for key in one if "k_proj.bias" not in key]
            found[str(name)] = max(float((one[key].float() - other[key].float()).abs().max()) for key in keys)
    return found


def check_one_process_leaves_the_same(split: Path, toy_sd: Path, images: Path, folder: Path) -> None:
    """Run in this process, in ``folder``, what two processes did in ``split``, and compare what they left."""
    main(load(FullRun, asked(toy_sd, images, folder, **{**FULL, "train_batch_size": 2})))
    found = differences(split, folder)
    # What learned, the averages and the moments, in both checkpoints; three parts of the pipeline.
    assert sum(name.startswith("checkpoint") for name in found) == 6
    assert {name.split("/")[0] for name in found} == {"checkpoint-4", "checkpoint-6", "text_encoder", "unet", "vae"}
    # As for two processes that are not split: weights moved by about 3e-3, and differ by a thousandth of that.
    assert max(found.values()) < 3e-6
    assert found["vae/diffusion_pytorch_model.safetensors"] == 0
    for ours, theirs in zip(rows(split), rows(folder), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    configs = [(run / "unet" / "config.json").read_text() for run in (split, folder)]
    assert configs[0] == configs[1]


def check_it_goes_on_bitwise(config: str, done: int, split: Path, toy_sd: Path, images: Path, folder: Path) -> None:
    """Go on in ``folder`` from the checkpoint of a split run, and compare the end."""
    line = asked(toy_sd, images, folder, **FULL)
    launch(config, ROOT / "finetune" / "full.py", *line, "--resume_from_checkpoint", split / f"checkpoint-{done}")
    found = differences(folder, split)
    assert set(found.values()) == {0.0}
    assert len(found) == 3 + 3 * (done < 6)


LARGEST = {"no": 1e-5, "bf16": 2e-3}
"""By how much losses may differ, relative to each other, by precision.

In bf16 a tiny gradient may turn its sign, and Adam makes as much of it as of any; losses show how little it is.
"""


def check_adapters_are_alike(split: Path, whole: Path, precision: str) -> None:
    """Compare the adapters and the losses of two runs."""
    ours, theirs = (load_file(folder / LORA_FILE) for folder in (split, whole))
    assert ours.keys() == theirs.keys()
    assert {value.dtype for value in ours.values()} == {torch.float32}
    if precision == "no":
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=3e-6, rtol=0)
    losses = [[row["loss"] for row in rows(folder)] for folder in (split, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=LARGEST[precision])


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, toy_sd: Path, captioned_images: Path) -> Path:
    """Return the folder of a run of two processes with two passes each."""
    return recorded("fsdp", WATCHING, toy_sd, captioned_images, tmp_path_factory.mktemp("split"))


def test_each_process_holds_its_share(split: Path) -> None:
    both = ranks(split)
    assert [rank["held"] for rank in both] == [rank["learned"] for rank in both]
    assert sum(rank["held"] for rank in both) == both[0]["whole"]
    # Rows are split, so that of an odd number one process holds one more.
    assert max(rank["held"] for rank in both) < 0.55 * both[0]["whole"]


def test_a_split_run_leaves_what_one_process_does(
    split: Path, toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    check_one_process_leaves_the_same(split, toy_sd, captioned_images, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("done", [4, 6])
def test_a_split_run_goes_on_bitwise(
    done: int, split: Path, toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    check_it_goes_on_bitwise("fsdp", done, split, toy_sd, captioned_images, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "frees"), [("no", "false"), ("bf16", "true")])
def test_split_adapters_learn_as_those_that_are_not(
    precision: str, frees: str, toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    options = {"train_text_encoder": True, "use_dora": True, "gradient_checkpointing": True, "train_batch_size": 2}
    line = asked(toy_sd, captioned_images, tmp_path / "split", **options)
    recipe = ROOT / "finetune" / "lora.py"
    launch("fsdp", "--fsdp_reshard_after_forward", frees, recipe, *line, precision=precision)
    launch("multi_gpu", recipe, *line, "--output_dir", tmp_path / "whole", precision=precision)
    check_adapters_are_alike(tmp_path / "split", tmp_path / "whole", precision)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dreambooth", "lora_dreambooth"])
def test_a_subject_and_its_class_are_learned_split_as_whole(
    recipe: str, toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    line = words_of(recipe, toy_sd, captioned_images, tmp_path) + PRIOR.format(root=tmp_path).split()
    line += ["--train_text_encoder", "--use_ema", "--learning_rate", "1e-3"]
    halves = ["--train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    launch("fsdp", ROOT / "finetune" / f"{recipe}.py", *line, *halves)
    run_recipe(recipe, [*line, "--output_dir", str(tmp_path / "one")])
    assert max(differences(tmp_path / "run", tmp_path / "one").values()) < 1e-5


def settings(**options: object) -> dict[str, object]:
    return {"optimizer": "adamw", "prior_source": "class_images", **options}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_prompt": "sf_dry"}, "--validation_prompt sf_dry: not with FSDP: no process holds the whole"),
        ({"heldout_steps": 10}, "--heldout_steps 10: not with FSDP"),
        ({"placeholder_token": "<dry>"}, "--placeholder_token <dry>: not with FSDP: a few rows learn"),
        ({"optimizer": "adafactor"}, "--optimizer adafactor: not with FSDP"),
        ({"use_8bit_adam": True}, "--use_8bit_adam True: not with FSDP"),
        ({"offload_ema": True}, "--offload_ema True: not with FSDP"),
        (
            {"with_prior_preservation": True, "prior_source": "base_prediction"},
            "--prior_source base_prediction: not with FSDP",
        ),
    ],
)
def test_what_a_split_model_cannot_do_is_refused(options: dict[str, object], message: str) -> None:
    two = SimpleNamespace(num_processes=2, mixed_precision="no")
    check_settings(settings(), two)
    with pytest.raises(UsageError, match=message):
        check_settings(settings(**options), two)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"num_processes": 1, "mixed_precision": "no"}, "nothing to split over"),
        ({"num_processes": 2, "mixed_precision": "fp16"}, "--mixed_precision fp16: not with FSDP"),
    ],
)
def test_what_the_launcher_gives_is_refused_if_it_cannot_split(state: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_settings(settings(), SimpleNamespace(**state))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FSDP_VERSION", None, "fsdp_version: 1: must be 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: true: must be false"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "fsdp_auto_wrap_policy: SIZE_BASED_WRAP: must be no_wrap"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: true: must be false"),
        ("FSDP_IGNORED_MODULES", "vae", "fsdp_ignored_modules: vae: is not honoured, leave it out"),
    ],
)
def test_options_of_the_launcher_are_honoured_or_refused(
    name: str, value: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_asked()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert is_asked()
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        is_asked()
