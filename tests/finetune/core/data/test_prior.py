"""Prior preservation: the loss is the formula, class images are the base model's, its predictions are targets."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig
from PIL import Image
from safetensors.torch import load_file, save_file

from configs.errors import InputError, UsageError
from configs.load import load
from finetune.core.data.batches import captioned_batches
from finetune.core.data.class_images import RECORD
from finetune.core.data.prior import WithPrior, with_prior
from finetune.core.learns.trainable import lora_adapters
from finetune.core.loss import denoising_loss, noisy_latents
from finetune.core.open import open_run
from finetune.core.pictures.images import read_folder
from finetune.core.run import OpenRun, Update
from finetune.core.settings.images import PictureConfig
from finetune.core.settings.methods import LoraConfig, PriorConfig
from finetune.core.settings.model import HubConfig, ModelConfig
from finetune.core.settings.training import TrainConfig
from finetune.diffusion.adapters import adapters_off
from finetune.diffusion.config import NoiseConfig, SamplingConfig
from finetune.diffusion.denoiser import Denoiser
from finetune.diffusion.models import load_models
from finetune.diffusion.noise import NoiseSchedule
from finetune.diffusion.objective import min_snr_weight, target
from finetune.diffusion.sampling import sample
from finetune.diffusion.text import encode_prompts
from finetune.lora_dreambooth import LoraDreamBoothRun, main

ROOT = Path(__file__).parents[4]
PICTURES, NOISE = PictureConfig(), NoiseConfig()
MakePrior = Callable[..., tuple[OpenRun, WithPrior]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a recipe's settings hold at least."""

    model: ModelConfig
    train: TrainConfig
    noise: NoiseConfig = NOISE
    pictures: PictureConfig = PICTURES
    hub: HubConfig = HubConfig()


@pytest.fixture
def make_prior(toy_sd: Path, captioned_images: Path, tmp_path: Path) -> Iterator[MakePrior]:
    """Open a run on the toy and put prior rows beside its ten images."""
    runs = []

    def make(*, learns_text: bool = False, adapts: bool = True, **options: Any) -> tuple[OpenRun, WithPrior]:
        prior: dict[str, Any] = {"class_data_dir": tmp_path / "class", "class_prompt": "ab", "num_class_images": 3}
        names = {field.name for field in dataclasses.fields(PriorConfig)}
        given: dict[str, Any] = {
            "train_batch_size": 4,
            "output_dir": tmp_path / "run",
            "report_to": "none",
            "seed": 0,
        } | options
        config = PriorConfig(
            with_prior_preservation=True, **(prior | {key: given.pop(key) for key in names & set(given)})
        )
        settings = Settings(
            model=ModelConfig(pretrained_model_name_or_path=str(toy_sd)),
            train=TrainConfig(max_train_steps=5, **given),
        )
        images = read_folder(captioned_images, "--train_data_dir")
        manager = open_run(settings, images, {}, weights_file="w", prior=config)
        opened = manager.__enter__()
        runs.append(manager)
        batches = captioned_batches(images, opened.models, PICTURES, NOISE, opened.run, learns_text=learns_text)
        joined = with_prior(batches, opened, config, adapts=adapts)
        assert isinstance(joined, WithPrior)
        return opened, joined

    yield make
    for manager in runs:  # left in the middle: there are no weights to write a card for
        manager.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def weighted_mean(update: Update, denoiser: torch.nn.Module, schedule: NoiseSchedule, gamma: float | None) -> float:
    """Return the loss of an update as the loop takes it."""
    with torch.no_grad():
        values = [
            (denoising_loss(denoiser, batch, schedule=schedule, snr_gamma=gamma) * batch.weights).sum()
            for batch in update.batches
        ]
    return float(torch.stack(values).sum() / update.weight)


def one_by_one(update: Update, denoiser: torch.nn.Module, schedule: NoiseSchedule, gamma: float | None) -> list[float]:
    """Return the loss of each image of an update, alone, by the papers' formulas in plain numbers."""
    losses = []
    for batch in update.batches:
        for row in range(len(batch.names)):
            step = int(batch.timesteps[row])
            alpha = float(schedule.alphas_cumprod[step])
            latents, noise = batch.latents[row : row + 1], batch.noise[row : row + 1]
            with torch.no_grad():
                noisy = alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise
                found = denoiser(noisy, batch.timesteps[row : row + 1], batch.conditions.prompts[row : row + 1])
            wanted = noise if batch.targets is None else batch.targets[row : row + 1]
            snr = alpha / (1 - alpha)
            weight = 1.0 if gamma is None else min(snr, gamma) / snr
            losses.append(weight * float((found - wanted).square().mean()))
    return losses


@pytest.mark.parametrize("gamma", [None, 0.5])
@pytest.mark.parametrize("loss_weight", [1.0, 0.3])
@pytest.mark.parametrize(("batch_size", "passes", "number"), [(4, 1, 0), (4, 1, 2), (1, 3, 3), (3, 2, 1)])
def test_the_loss_is_mean_of_images_plus_weight_times_mean_of_prior(
    make_prior: MakePrior, batch_size: int, passes: int, number: int, loss_weight: float, gamma: float | None
) -> None:
    """Regression of others: diffusers weighs one half of the batch with the other half's timesteps (issue 5791).

    Ten images and three class images: the updates named here are whole ones, and ones that end an epoch early.
    """
    opened, both = make_prior(
        train_batch_size=batch_size, gradient_accumulation_steps=passes, prior_loss_weight=loss_weight
    )
    denoiser = Denoiser(opened.models.text_encoder, opened.models.unet)
    images = both.images.update(number)
    prior = both.prior(number, images)
    own, others = (one_by_one(update, denoiser, opened.schedule, gamma) for update in (images, prior))
    assert len(others) in (1, 2, 3)
    expected = np.mean(own) + loss_weight * np.mean(others)
    assert weighted_mean(both.update(number), denoiser, opened.schedule, gamma) == pytest.approx(expected, rel=1e-5)


def test_prior_rows_weigh_what_the_rule_says_at_their_own_timestep(make_prior: MakePrior) -> None:
    """Regression of others: the prior half is never weighted by its signal-to-noise ratio (diffusers PR 13797)."""
    opened, both = make_prior()
    (batch,) = both.update(0).batches
    denoiser = Denoiser(opened.models.text_encoder, opened.models.unet)
    with torch.no_grad():
        plain, weighted = (
            denoising_loss(denoiser, batch, schedule=opened.schedule, snr_gamma=gamma) for gamma in (None, 0.01)
        )
    expected = min_snr_weight(opened.schedule, batch.timesteps, 0.01)
    torch.testing.assert_close((weighted / plain).double(), expected, atol=1e-6, rtol=1e-4)
    assert len(expected) == 7
    assert len(set(expected[4:].tolist())) == 3


@pytest.mark.parametrize("source", ["class_images", "base_prediction"])
def test_prior_rows_share_the_forward_pass(make_prior: MakePrior, source: str) -> None:
    _, both = make_prior(prior_source=source)
    assert [len(batch.names) for batch in both.update(0).batches] == [7 if source == "class_images" else 8]


def test_images_and_class_images_have_noise_of_their_own(make_prior: MakePrior) -> None:
    _, both = make_prior()
    noise = torch.cat([batch.noise for number in range(5) for batch in both.update(number).batches])
    assert len({tuple(row.flatten().tolist()) for row in noise}) == len(noise)


@pytest.mark.parametrize("source", ["class_images", "base_prediction"])
def test_an_update_is_a_function_of_its_number(make_prior: MakePrior, source: str) -> None:
    _, both = make_prior(prior_source=source, adapts=False)
    first, again = (both.update(3).batches[0] for _ in range(2))
    for field in ("latents", "noise", "timesteps", "weights"):
        assert torch.equal(getattr(first, field), getattr(again, field))
    assert torch.equal(first.conditions.prompts, again.conditions.prompts)
    assert first.names == again.names


@pytest.mark.parametrize("adapts", [True, False])
@pytest.mark.parametrize("learns_text", [True, False])
def test_the_target_beside_the_images_is_what_the_base_model_predicts(
    make_prior: MakePrior, toy_sd: Path, tmp_path: Path, learns_text: bool, adapts: bool
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb b\nccc\n")
    opened, both = make_prior(
        prior_source="base_prediction", prior_prompts_file=prompts, learns_text=learns_text, adapts=adapts
    )
    models = opened.models
    learned = lora_adapters(models, LoraConfig(), learning_rate=1.0, seed=0, text_encoder_rate=1.0).parameters
    with torch.no_grad():
        for parameter in [*learned.values(), *(() if adapts else models.unet.parameters())]:
            parameter.add_(0.1)
    (batch,) = both.update(1).batches
    assert batch.targets is not None
    base = load_models(str(toy_sd))
    with torch.no_grad():
        expected = Denoiser(base.text_encoder, base.unet)(
            noisy_latents(opened.schedule, batch), batch.timesteps, batch.conditions.prompts
        )
    torch.testing.assert_close(batch.targets[4:], expected[4:], atol=1e-6, rtol=1e-5)
    images = target(opened.schedule, batch.latents, batch.noise, batch.timesteps)[:4]
    assert torch.equal(batch.targets[:4], images)
    rows = {
        tuple(row.flatten().tolist())
        for number in range(5)
        for row in both.update(number).batches[0].conditions.prompts[4:]
    }
    assert len(rows) == 3


def test_the_base_model_is_at_no_distance_from_itself(make_prior: MakePrior) -> None:
    opened, both = make_prior(prior_source="base_prediction")
    lora_adapters(opened.models, LoraConfig(), learning_rate=1.0, seed=0)
    (batch,) = both.update(0).batches
    denoiser = Denoiser(opened.models.text_encoder, opened.models.unet)
    with torch.no_grad():
        losses = denoising_loss(denoiser, batch, schedule=opened.schedule)
    assert float(losses[4:].max()) < 1e-12
    assert float(losses[:4].min()) > 1e-3


def test_the_prompt_of_a_prior_row_depends_on_its_place_in_the_stream_alone(
    make_prior: MakePrior, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\n")
    options = {"prior_source": "base_prediction", "prior_prompts_file": prompts}
    _, together = make_prior(**options)
    _, apart = make_prior(**options, train_batch_size=1, gradient_accumulation_steps=4, output_dir=tmp_path / "apart")
    (batch,) = together.update(1).batches
    rows = torch.cat([one.conditions.prompts for one in apart.update(1).batches])
    assert torch.equal(batch.conditions.prompts, torch.cat([rows[0::2], rows[1::2]]))


def test_switching_adapters_off_leaves_them_as_they_were(make_prior: MakePrior) -> None:
    opened, _ = make_prior(prior_source="base_prediction")
    models = opened.models
    lora_adapters(models, LoraConfig(use_dora=True), learning_rate=1.0, seed=0, text_encoder_rate=1.0)
    models.unet.train()
    parts = [*models.unet.named_parameters(), *models.text_encoder.named_parameters()]
    before = [(name, parameter.requires_grad) for name, parameter in parts]
    modes = [module.training for module in models.unet.modules()]
    with adapters_off(models):
        assert not any(module.training for module in models.unet.modules())
    assert [(name, parameter.requires_grad) for name, parameter in parts] == before
    assert [module.training for module in models.unet.modules()] == modes


@pytest.mark.parametrize("kind", [LoKrConfig, LoHaConfig, IA3Config])
def test_without_adapters_of_any_kind_the_model_is_the_base(toy_sd: Path, kind: Any) -> None:
    models = load_models(str(toy_sd))
    given = (torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), encode_prompts(models, ["a", "b"]))
    with torch.no_grad():
        base = Denoiser(None, models.unet)(*given)
    options = {"feedforward_modules": [], "init_ia3_weights": False} if kind is IA3Config else {"init_weights": False}
    models.unet.add_adapter(kind(target_modules=["to_k", "to_v"], **options))
    learning = [parameter.requires_grad for parameter in models.unet.parameters()]
    denoiser = Denoiser(None, models.unet)
    with torch.no_grad():
        tuned = denoiser(*given)
        with adapters_off(models):
            assert torch.equal(denoiser(*given), base)
        assert torch.equal(denoiser(*given), tuned)
    assert not torch.equal(tuned, base)
    assert [parameter.requires_grad for parameter in models.unet.parameters()] == learning


def run_words(toy: Path, images: Path, root: Path, *more: object) -> list[str]:
    words = (
        f"--pretrained_model_name_or_path {toy} --instance_data_dir {images} --instance_prompt sks --seed 5 "
        f"--output_dir {root}/run --max_train_steps 1 --report_to none --with_prior_preservation --class_prompt ab "
        f"--class_data_dir {root}/class --num_class_images 3 --sample_batch_size 2"
    )
    return [*words.split(), *map(str, more)]


@pytest.fixture
def go(toy_sd: Path, captioned_images: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the recipe with class images; return their folder."""

    def run(*more: object) -> Path:
        main(load(LoraDreamBoothRun, run_words(toy_sd, captioned_images, tmp_path, *more)))
        return tmp_path / "class"

    return run


def said(path: Path) -> dict[str, object]:
    with Image.open(path) as image:
        return json.loads(str(image.info[RECORD]))


def test_class_images_are_what_the_base_model_makes_of_prompt_and_seed(go: Callable[..., Path], toy_sd: Path) -> None:
    """Regression of others: diffusers writes JPEG without a generator of its own; no image can be made again."""
    folder = go("--prior_generation_precision", "fp32")
    paths = sorted(folder.iterdir())
    assert [path.name for path in paths] == [f"class-0000{number}.png" for number in range(3)]
    records = [said(path) for path in paths]
    assert [record["seed"] for record in records] == [5, 6, 7]
    assert {record["prompt"] for record in records} == {"ab"}
    settings = SamplingConfig(height=32, width=32)
    expected = sample(load_models(str(toy_sd)), [("ab", seed) for seed in (5, 6, 7)], settings)
    for path, pixels in zip(paths, expected, strict=True):
        # Another batch size moves single pixels by a grey level.
        assert np.abs(np.asarray(Image.open(path), dtype=int) - pixels).max() <= 1


def test_class_images_that_are_there_are_not_made_again(go: Callable[..., Path]) -> None:
    folder = go()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    go("--overwrite", "--num_class_images", 5)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert [said(folder / name)["seed"] for name in sorted(set(after) - set(before))] == [8, 9]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_class_image_that_was_lost_is_made_again_to_the_same_bytes(
    go: Callable[..., Path], tmp_path: Path, precision: str
) -> None:
    folder = tmp_path / "class"
    words = ["--class_data_dir", str(folder), "--prior_generation_precision", precision, "--sample_batch_size", "3"]
    go(*words)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "class-00001.png").unlink()
    go(*words, "--overwrite")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_images_of_the_users_own_count(go: Callable[..., Path], captioned_images: Path, tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    for name in ("00.png", "01.png"):
        shutil.copy(captioned_images / name, tmp_path / "class" / name)
    assert sorted(path.name for path in go().iterdir()) == ["00.png", "01.png", "class-00000.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--class_prompt", "ba"], r"3 of its 3 images were generated otherwise .*prompt ab then, ba now.*remove them"),
        (["--resolution", "24"], r"height 32 then, 24 now"),
        (["--pretrained_model_name_or_path", "{other}"], r"base_model [0-9a-f]{64} then, [0-9a-f]{64} now"),
    ],
)
def test_stale_class_images_are_refused_with_the_remedy(
    go: Callable[..., Path], toy_sd: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    """Regression of others: diffusers counts files, and takes those of another prompt or model for its own."""
    folder = go()
    other = shutil.copytree(toy_sd, tmp_path / "other")
    (path,) = (other / "unet").glob("*.safetensors")
    save_file({name: 0.9 * value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(InputError, match=f"--class_data_dir {folder}: .*{message}"):
        go("--overwrite", *(word.format(other=other) for word in words))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_stale_class_images_are_seen_before_anything_is_written(go: Callable[..., Path], tmp_path: Path) -> None:
    go()
    with pytest.raises(InputError, match="generated otherwise"):
        go("--class_prompt", "ba", "--output_dir", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_run_does_not_continue_on_other_class_images(go: Callable[..., Path], captioned_images: Path) -> None:
    folder = go("--checkpointing_steps", 1)
    shutil.copy(captioned_images / "00.png", folder / "class-00001.png")
    with pytest.raises(UsageError, match=r"--class_data_dir: differs from what .*checkpoint-1 began with"):
        go("--checkpointing_steps", 1, "--max_train_steps", 2)


def test_images_that_a_list_names_are_not_added_to(
    go: Callable[..., Path], captioned_images: Path, tmp_path: Path
) -> None:
    listed = shutil.copytree(captioned_images, tmp_path / "listed")
    with pytest.raises(InputError, match="names 10 images, and generated ones would not be in it"):
        go("--class_data_dir", listed, "--num_class_images", 11)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--class_data_dir", "{images}", "--instance_data_dir", "{images}"], "is --instance_data_dir, too"),
        (["--class_data_dir", "null"], "--with_prior_preservation True: needs --class_data_dir"),
        (["--prior_generation_precision", "fp16"], "--prior_generation_precision fp16: needs a GPU"),
        (["--prior_prompts_file", "a.txt"], "--prior_prompts_file a.txt: is for --prior_source base_prediction"),
        (["--prior_source", "base_prediction", "--prior_prompts_file", "absent.txt"], "--prior_prompts_file absent"),
        (
            ["--prior_source", "base_prediction", "--prediction_type", "v_prediction"],
            "the base model predicts epsilon, and v_prediction is trained",
        ),
    ],
)
def test_a_mistake_about_the_prior_is_named(
    go: Callable[..., Path], captioned_images: Path, words: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        go(*(word.format(images=captioned_images) for word in words))


def test_base_predictions_are_no_target_under_another_noise_schedule(go: Callable[..., Path], toy_sd_v: Path) -> None:
    words = ["--prior_source", "base_prediction", "--pretrained_model_name_or_path", toy_sd_v]
    with pytest.raises(UsageError, match="never saw the noise schedule of --rescale_betas_zero_snr"):
        go(*words, "--rescale_betas_zero_snr")


@pytest.mark.slow
def test_two_processes_share_the_class_images(toy_sd: Path, captioned_images: Path, tmp_path: Path) -> None:
    """Regression of others: with a seed, every process of diffusers' script generates the same images."""
    words = run_words(toy_sd, captioned_images, tmp_path, "--num_class_images", 5)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]
    subprocess.run(
        [*command, str(ROOT / "finetune" / "lora_dreambooth.py"), *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=600,
    )
    paths = sorted((tmp_path / "class").iterdir())
    assert [said(path)["seed"] for path in paths] == [5, 6, 7, 8, 9]
    assert len({path.read_bytes() for path in paths}) == 5
