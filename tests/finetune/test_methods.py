"""Every method: exactly what should learn moves, a stopped run ends as a whole one, stock pipelines load the rest."""

from __future__ import annotations

import importlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import finetune.core.open
from configs.errors import InputError, UsageError
from configs.load import load
from configs.recipes import RECIPES
from data_prep.folders.run_folder import EMBEDDINGS_FILE, LORA_FILE, PIPELINE_FILE
from finetune.diffusion.denoiser import Denoiser
from finetune.diffusion.models import Models, as_pipeline, load_models

PRIOR = "--with_prior_preservation --class_prompt ab --class_data_dir {root}/class --num_class_images 3"
BASE = "--with_prior_preservation --class_prompt ab --prior_source base_prediction"
RESNET = "--lora_targets attention+resnet --resnet_rank 2 --lora_alpha 8"
DORA = "--use_dora --lora_dropout 0.2"
CASES = {
    "full": "full",
    "full, text encoder, average": "full --train_text_encoder --use_ema",
    "full, class images": f"full {PRIOR} --snr_gamma 5",
    "dreambooth": "dreambooth",
    "dreambooth, text encoder, base prediction": f"dreambooth --train_text_encoder {BASE}",
    "dreambooth, class images, average": f"dreambooth {PRIOR} --use_ema",
    "lora, text encoder": "lora --train_text_encoder --text_encoder_lr 0.001",
    "lora, resnet": f"lora {RESNET}",
    "lora, DoRA and dropout": f"lora {DORA} --train_text_encoder",
    "lora, base prediction": f"lora {BASE} {RESNET}",
    "lora_dreambooth, class images": f"lora_dreambooth {PRIOR} --train_text_encoder",
    "lora_dreambooth, base prediction, average": f"lora_dreambooth {BASE} {DORA} --use_ema",
}
USUAL = {
    "full, text encoder, average",
    "dreambooth, text encoder, base prediction",
    "lora, DoRA and dropout",
    "lora_dreambooth, class images",
}
"""Cases of the default run; ``make slow`` takes all."""


def cases(*, averaged: bool = True) -> list[Any]:
    chosen = [case for case in CASES if averaged or "average" not in case]
    return [pytest.param(case, marks=[] if case in USUAL else [pytest.mark.slow]) for case in chosen]


every_case = pytest.mark.parametrize("case", cases())
Go = Callable[..., Path]


def words_of(recipe: str, toy: Path, images: Path, root: Path) -> list[str]:
    """Return the words that a recipe needs for six small steps on the toy."""
    words = (
        f"--pretrained_model_name_or_path {toy} --output_dir {root}/run --seed 0 --max_train_steps 6 "
        "--train_batch_size 4 --learning_rate 0.01 --checkpointing_steps 2 --logging_steps 2 --report_to none"
    ).split()
    if recipe in ("full", "lora"):
        return [*words, "--train_data_dir", str(images)]
    if recipe == "textual_inversion":
        new = "--placeholder_token <new> --initializer_token a --repeats 1"
        return [*words, "--train_data_dir", str(images), *new.split()]
    if recipe == "pivotal_tuning":
        new = "--placeholder_token <new> --initializer_token a --instance_prompt <new> --repeats 1"
        return [*words, "--instance_data_dir", str(images), *new.split()]
    return [*words, "--instance_data_dir", str(images), "--instance_prompt", "sks"]


def run_recipe(recipe: str, words: list[str]) -> None:
    """Run a recipe in this process, as a process of its own would."""
    module = importlib.import_module(f"finetune.{recipe}")
    try:
        module.main(load(getattr(module, RECIPES[recipe].settings), words))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def go(toy_sd: Path, captioned_images: Path, tmp_path: Path) -> Go:
    """Run a case, its recipe and options as text; options given again win. Returns the run folder."""

    def run(text: str, *more: object, folder: str = "run") -> Path:
        recipe, *words = text.format(root=tmp_path).split()
        given = ["--output_dir", str(tmp_path / folder), *(str(word) for word in more)]
        run_recipe(recipe, [*words_of(recipe, toy_sd, captioned_images, tmp_path), *words, *given])
        return tmp_path / folder

    return run


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Models]:
    """Keep the models that recipes load, for a look at them afterwards."""
    kept: list[Models] = []

    def load_and_keep(*arguments: Any, **options: Any) -> Models:
        kept.append(load_models(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr(finetune.core.open, "load_models", load_and_keep)
    return kept


def tensors(models: Models) -> dict[str, Tensor]:
    """Return all tensors by name; a layer's own ones keep their names under adapters."""
    parts = {"unet": models.unet, "vae": models.vae, "text_encoder": models.text_encoder}
    return {
        f"{part}.{name}".replace(".base_layer", ""): value
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }


def learned(folder: Path, step: int) -> dict[str, Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "learned.safetensors")


@every_case
def test_exactly_what_should_learn_moves(go: Go, loaded: list[Models], toy_sd: Path, case: str) -> None:
    folder = go(CASES[case], "--max_train_steps", 3, "--checkpointing_steps", 1)
    base, after = tensors(load_models(str(toy_sd))), tensors(loaded[0])
    first, last = learned(folder, 1), learned(folder, 3)
    assert {name for name in first if torch.equal(first[name], last[name])} == set()
    adapts, text = "lora" in case, "--train_text_encoder" in CASES[case]
    expected = {"unet", "text_encoder"} if text else {"unet"}
    if adapts:
        assert {name.partition(".")[0] for name in last} == expected
        assert all("lora_" in name for name in last)
        assert all(torch.equal(value, after[name]) for name, value in base.items())
    else:
        assert set(last) == {name for name in base if name.partition(".")[0] in expected}
        assert all(torch.equal(value, after[name]) for name, value in base.items() if name not in last)


@every_case
def test_a_stopped_run_ends_bitwise_as_a_whole_one(go: Go, case: str) -> None:
    whole = go(CASES[case], folder="whole")
    go(CASES[case], "--max_train_steps", 3, folder="parts")  # its checkpoint is that of step 2
    parts = go(CASES[case], folder="parts")
    names = [path.relative_to(whole) for path in whole.glob("**/*.safetensors") if path.parent.name != "cache"]
    names = [name for name in names if name.parts[0] not in ("cache", "checkpoint-2")]
    assert names
    assert [name for name in names if (whole / name).read_bytes() != (parts / name).read_bytes()] == []


def render(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("ab", num_inference_steps=3, generator=generator, output_type="np").images


@pytest.mark.parametrize("case", cases(averaged=False))
def test_a_stock_pipeline_gives_the_pixels_of_what_was_trained(
    go: Go, loaded: list[Models], toy_sd: Path, case: str
) -> None:
    folder = go(CASES[case], "--max_train_steps", 3)
    if "lora" in case:
        stock = StableDiffusionPipeline.from_pretrained(toy_sd, safety_checker=None)
        untrained = render(stock)
        stock.load_lora_weights(folder)
    else:
        untrained = render(as_pipeline(load_models(str(toy_sd))))
        stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for module in (loaded[0].unet, loaded[0].text_encoder):
        module.eval()
    trained = render(as_pipeline(loaded[0]))
    np.testing.assert_allclose(render(stock), trained, atol=1e-5, rtol=0)
    assert np.abs(trained - untrained).max() > 1e-3


def test_a_saved_pipeline_is_whole_and_says_where_it_comes_from(go: Go, toy_sd: Path) -> None:
    folder = go(f"full {BASE}", "--prediction_type", "epsilon")
    told = json.loads((folder / "provenance.json").read_text())
    assert (told["method"], told["steps"], told["prior"]["source"]) == ("full", 6, "base_prediction")
    expected = {path.relative_to(toy_sd) for path in toy_sd.rglob("*") if path.is_file()}
    assert expected == {
        path.relative_to(folder) for part in toy_sd.iterdir() for path in files_under(folder / part.name)
    }
    assert not list(folder.glob("*.partial"))


def files_under(path: Path) -> list[Path]:
    return [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]


def test_the_saved_scheduler_is_the_one_that_was_trained(go: Go) -> None:
    folder = go("full", "--rescale_betas_zero_snr", "--prediction_type", "v_prediction", "--max_train_steps", 1)
    saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (saved["rescale_betas_zero_snr"], saved["prediction_type"]) == (True, "v_prediction")
    assert saved["timestep_spacing"] == "trailing"


def test_a_text_encoder_may_be_left_out_and_comes_from_the_base_then(
    go: Go, toy_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = go("dreambooth", "--skip_save_text_encoder", "--max_train_steps", 1)
    assert not (folder / "text_encoder").exists()
    base = StableDiffusionPipeline.from_pretrained(toy_sd, safety_checker=None)
    StableDiffusionPipeline.from_pretrained(folder, text_encoder=base.text_encoder, safety_checker=None)
    # It is no model of its own: no command is named that could not load it, and the card brings the other part.
    assert "eval.generate" not in capsys.readouterr().out
    assert "from_pretrained('.', text_encoder=text_encoder)" in (folder / "README.md").read_text()
    with pytest.raises(UsageError, match="has no text_encoder of its own; give it that of its base model"):
        load_models(str(folder))


def test_the_next_command_is_read_by_a_shell_as_it_is_meant(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = 'a "dry" $HOME slice'
    folder = go("dreambooth", "--instance_prompt", prompt, "--max_train_steps", 1, folder="a run")
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[words.index("--prompts") + 1] == prompt
    assert words[words.index("--pretrained_model_name_or_path") + 1] == str(folder)


def test_class_images_without_a_prior_are_mentioned(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    go("lora", "--class_prompt", "b", "--max_train_steps", 1)
    assert "no prior: --class_prompt and --class_data_dir wait for --with_prior" in capsys.readouterr().out


def test_a_model_of_somebody_is_never_taken_for_a_run(go: Go, toy_sd: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in toy_sd.rglob("*")}
    with pytest.raises(UsageError, match="and no run; name another folder"):
        go("full", "--output_dir", toy_sd, "--overwrite")
    assert {path: path.stat().st_mtime_ns for path in toy_sd.rglob("*")} == before


@pytest.mark.parametrize("source", ["flag", "launcher"])
@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_what_learns_is_float32_whatever_the_source_of_the_precision(
    go: Go, loaded: list[Models], monkeypatch: pytest.MonkeyPatch, recipe: str, source: str
) -> None:
    """Regression of others: diffusers lifts adapters for fp16 alone, and looks at the flag alone (issue 7330)."""
    if source == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    folder = go(recipe, "--max_train_steps", 2, *(["--mixed_precision", "bf16"] if source == "flag" else []))
    assert {value.dtype for value in learned(folder, 2).values()} == {torch.float32}
    frozen = next(value for name, value in tensors(loaded[0]).items() if name.endswith("to_q.weight"))
    assert frozen.dtype == (torch.bfloat16 if recipe == "lora" else torch.float32)
    name = LORA_FILE if recipe == "lora" else "unet/diffusion_pytorch_model.safetensors"
    with safe_open(folder / name, framework="pt") as reader:
        assert {reader.get_tensor(key).dtype for key in reader.keys()} == {torch.float32}  # noqa: SIM118


@pytest.mark.parametrize("case", ["full --train_text_encoder", "lora --train_text_encoder"])
def test_averages_follow_the_published_rule(go: Go, case: str) -> None:
    """By hand: after step n the decay is min(limit, (1 + n - 1) / (10 + n - 1)), and the first step is taken whole."""
    folder = go(case, "--use_ema", "--ema_decay", 0.2, "--checkpointing_steps", 1)
    average = {name: value.double() for name, value in learned(folder, 1).items()}
    for step in range(2, 7):
        decay = min(0.2, step / (9 + step))
        now = learned(folder, step)
        average = {name: decay * value + (1 - decay) * now[name].double() for name, value in average.items()}
    kept = load_file(folder / "checkpoint-6" / "averages.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(kept[name].double(), value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "file"), [("full", "unet/diffusion_pytorch_model.safetensors"), ("lora", LORA_FILE)]
)
def test_the_averages_are_what_users_get(go: Go, recipe: str, file: str) -> None:
    folder = go(recipe, "--use_ema")
    kept = load_file(folder / "checkpoint-6" / "averages.safetensors")
    values = {float(value.double().sum()) for value in load_file(folder / file).values()}
    assert values == {float(value.double().sum()) for value in kept.values()}
    assert values != {float(value.double().sum()) for value in learned(folder, 6).values()}


@pytest.mark.slow
def test_averages_change_nothing_of_what_learns(go: Go) -> None:
    plain = learned(go("lora", folder="a"), 6)
    averaged = learned(go("lora", "--use_ema", "--validation_prompt", "ab", "--validation_steps", 2, folder="b"), 6)
    assert all(torch.equal(plain[name], averaged[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--foreach_ema", "--offload_ema"])
def test_averages_are_the_same_wherever_they_are_kept(go: Go, option: str) -> None:
    plain = load_file(go("lora", "--use_ema", folder="a") / LORA_FILE)
    other = load_file(go("lora", "--use_ema", option, folder="b") / LORA_FILE)
    for name in plain:  # fused operations round otherwise
        torch.testing.assert_close(plain[name], other[name], atol=1e-7, rtol=1e-5)


@pytest.mark.slow
def test_previews_show_the_averages(go: Go) -> None:
    preview = ["--validation_prompt", "ab", "--num_validation_images", 1, "--max_train_steps", 2]
    plain = go("full", *preview, folder="a") / "previews" / "step-000002.png"
    averaged = go("full", "--use_ema", "--ema_decay", 0, *preview, folder="b") / "previews" / "step-000002.png"
    frozen = go("full", "--use_ema", "--ema_decay", 0.9999, *preview, folder="c") / "previews" / "step-000002.png"
    assert np.array_equal(np.asarray(Image.open(plain)), np.asarray(Image.open(averaged)))
    assert not np.array_equal(np.asarray(Image.open(plain)), np.asarray(Image.open(frozen)))


@pytest.mark.parametrize(
    "case", [f"lora {RESNET} --train_text_encoder", "lora --use_dora", "lora --train_text_encoder"]
)
def test_an_adapter_starts_from_another(go: Go, case: str) -> None:
    first = go(case, folder="first")
    again = go(case, "--init_adapter", first, "--max_train_steps", 1, "--learning_rate", 1e-30, folder="again")
    expected, found = load_file(first / LORA_FILE), load_file(again / LORA_FILE)
    assert sorted(expected) == sorted(found)
    for name in expected:
        torch.testing.assert_close(expected[name], found[name], atol=1e-20, rtol=1e-6)


@pytest.mark.parametrize(
    ("case", "other", "message"),
    [
        ("lora", "lora --rank 2", "has other parts or another rank; give its --rank"),
        ("lora", "lora --use_dora", "has other parts or another rank; give its --rank, --resnet_rank and --use_dora"),
        ("lora", "lora --lora_alpha 8", r"has the strength 1 \(alpha / rank\), and 2 by the settings"),
        ("lora", f"lora {RESNET} --lora_alpha 4", r"lies on other layers \(\d+ of \d+ in common\)"),
        ("lora --train_text_encoder", "lora", r"lies on other layers"),
        ("lora --prediction_type v_prediction", "lora", r"learned with --prediction_type v_prediction, the run has"),
    ],
)
def test_an_adapter_of_another_shape_is_no_start(go: Go, case: str, other: str, message: str) -> None:
    first = go(case, "--max_train_steps", 1, folder="first")
    with pytest.raises(InputError, match=f"--init_adapter {first}: .*{message}"):
        go(other, "--init_adapter", first)


@pytest.mark.slow
def test_dropout_is_drawn_by_the_step(go: Go) -> None:
    first = load_file(go("lora --lora_dropout 0.5", folder="a") / LORA_FILE)
    torch.randn(7)
    again = load_file(go("lora --lora_dropout 0.5", folder="b") / LORA_FILE)
    without = load_file(go("lora", folder="c") / LORA_FILE)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], without[name]) for name in first)


def test_each_group_has_its_own_rank_and_strength(go: Go, loaded: list[Models]) -> None:
    options = "--rank 4 --lora_alpha 2 --lora_targets attention+resnet --resnet_rank 3 --resnet_alpha 6"
    go(f"lora {options}", "--dry_run")
    layers = dict(loaded[0].unet.named_modules())
    attention = next(layer for name, layer in layers.items() if name.endswith("to_q"))
    resnet = next(layer for name, layer in layers.items() if name.endswith("conv1"))
    assert (attention.r["default"], attention.scaling["default"]) == (4, 0.5)
    assert (resnet.r["default"], resnet.scaling["default"]) == (3, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dreambooth", "lora"])
def test_the_text_encoder_has_its_own_rate(go: Go, recipe: str) -> None:
    slow = learned(go(recipe, "--train_text_encoder", "--text_encoder_lr", 1e-9, folder="a"), 6)
    base = learned(go(recipe, "--train_text_encoder", folder="b"), 6)
    start = learned(go(recipe, "--train_text_encoder", "--text_encoder_lr", 1e-9, folder="c"), 2)
    text = [name for name in slow if name.startswith("text_encoder.")]
    assert max(float((slow[name] - start[name]).abs().max()) for name in text) < 1e-7
    assert max(float((base[name] - start[name]).abs().max()) for name in text) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dreambooth --train_text_encoder", f"lora --train_text_encoder {BASE}"])
def test_gradient_checkpointing_changes_rounding_alone(go: Go, case: str) -> None:
    plain = learned(go(case, "--max_train_steps", 2, folder="a"), 2)
    recomputed = learned(go(case, "--max_train_steps", 2, "--gradient_checkpointing", folder="b"), 2)
    for name in plain:  # AdamW turns gradients of rounding size into steps of the rate, so few may differ more
        close = torch.isclose(plain[name], recomputed[name], atol=1e-4, rtol=1e-3)
        assert float(close.float().mean()) > 0.98


@pytest.mark.parametrize("recipe", ["full", "lora_dreambooth"])
def test_only_what_learns_is_in_training_mode(go: Go, loaded: list[Models], recipe: str) -> None:
    seen = []

    def look(module: torch.nn.Module, _: object) -> None:
        if isinstance(module, Denoiser):
            text = module.text_encoder  # not there where it is frozen
            seen.append((module.unet.training, text is not None and text.training))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        go(recipe, "--max_train_steps", 1, folder="a")
        go(recipe, "--max_train_steps", 1, "--train_text_encoder", folder="b")
    finally:
        handle.remove()
    assert set(seen[: len(seen) // 2]) == {(True, False)}
    assert set(seen[len(seen) // 2 :]) == {(True, True)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora --resnet_rank 2", "--resnet_rank 2: needs --lora_targets attention.resnet"),
        ("lora --lora_dropout 1", r"--lora_dropout 1.0: must be in \[0, 1\)"),
        ("lora --text_encoder_lr 1", "--text_encoder_lr 1.0: needs --train_text_encoder"),
        ("full --ema_decay 1", r"--ema_decay 1.0: must be in \[0, 1\)"),
        ("full --ema_decay 0.5", "--ema_decay 0.5: needs --use_ema"),
        ("lora --optimizer adafactor --adam_beta1 0.5", "--adam_beta1 0.5: is not for adafactor"),
        ("lora --prior_prompts_file a.yaml", "--prior_prompts_file a.yaml: needs --with_prior"),
        ("full --use_ema --offload_ema --foreach_ema", "--foreach_ema True: works on the device alone"),
        ("dreambooth --train_text_encoder --skip_save_text_encoder", "--skip_save_text_encoder: what"),
        ("dreambooth --prior_source base_prediction", "--prior_source base_prediction: needs --with_prior"),
    ],
)
def test_options_that_contradict_each_other_are_refused(go: Go, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        go(text)


@pytest.mark.parametrize("recipe", ["textual_inversion", "pivotal_tuning"])
def test_token_methods_leave_their_files(go: Go, recipe: str) -> None:
    folder = go(recipe)
    assert (folder / EMBEDDINGS_FILE).is_file()
    assert not (folder / PIPELINE_FILE).exists()
