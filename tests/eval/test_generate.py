"""The generate command: what it writes, what it refuses, and that it does the same thing twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import TisserandError, UsageError
from configs.load import load
from eval.generate import GenerateConfig, main
from eval.generation.pictures import picture_name
from eval.generation.request import resolve_size
from finetune.diffusion.config import SamplingConfig

FAST = SamplingConfig(num_inference_steps=2, batch_size=4)


@pytest.fixture(scope="module")
def generated(toy_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 2 prompts x 3 seeds."""
    folder = tmp_path_factory.mktemp("generate") / "slices"
    prompts = ("sf_dry sf_warp", "")
    main(GenerateConfig(pretrained_model_name_or_path=str(toy_sd), prompts=prompts, num_images=3, seed=7,
                        sampling=FAST, output_dir=folder))  # fmt: skip
    return folder


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_every_prompt_has_every_seed_and_every_record_its_picture(generated: Path) -> None:
    asked = [(record["prompt"], record["seed"]) for record in records(generated)]
    assert asked == [(prompt, seed) for prompt in ("sf_dry sf_warp", "") for seed in (7, 8, 9)]
    assert {path.name for path in generated.glob("0*.png")} == {record["file_name"] for record in records(generated)}


def test_a_record_says_all_it_takes_to_make_the_picture_again(generated: Path) -> None:
    from finetune.diffusion.models import load_models
    from finetune.diffusion.sampling import sample

    record = records(generated)[4]
    base = record["base_model"]
    assert isinstance(base, dict)
    settings = SamplingConfig(
        num_inference_steps=record["steps"],
        guidance_scale=record["guidance_scale"],
        scheduler=record["scheduler"],
        height=record["height"],
        width=record["width"],
        negative_prompt=record["negative_prompt"],
        batch_size=1,
    )
    again = sample(load_models(base["name"]), [(record["prompt"], record["seed"])], settings)[0]
    written = np.asarray(Image.open(generated / str(record["file_name"])))
    # Alone instead of in a batch of four: at most one grey level, next to a rounding edge.
    assert np.abs(again.astype(int) - written).max() <= 1


def test_the_written_config_gives_the_same_pixels(generated: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(generated / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    main(load(GenerateConfig, arguments))
    for path in generated.glob("*.png"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_folder_with_files_is_left_alone(generated: Path, toy_sd: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in generated.iterdir()}
    with pytest.raises(UsageError, match=r"already holds files; name another folder or pass --overwrite"):
        main(GenerateConfig(pretrained_model_name_or_path=str(toy_sd), prompts=("x",), output_dir=generated))
    assert {path.name: path.stat().st_mtime_ns for path in generated.iterdir()} == before


def test_a_broken_model_leaves_no_folder_and_names_the_prompt(toy_sd: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(toy_sd, tmp_path / "broken")
    weights = tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"][:] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    config = GenerateConfig(pretrained_model_name_or_path=str(tmp_path / "broken"), prompts=("sf_dry",), num_images=1,
                            sampling=FAST, output_dir=tmp_path / "out" / "slices")  # fmt: skip
    with pytest.raises(TisserandError, match="the picture of 'sf_dry' with seed 0 is not finite"):
        main(config)
    assert list((tmp_path / "out").iterdir()) == []


def test_it_says_what_to_do_next(toy_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GenerateConfig(pretrained_model_name_or_path=str(toy_sd), prompts=("a",), num_images=1, sampling=FAST,
                            output_dir=tmp_path / "slices")  # fmt: skip
    main(config)
    assert capsys.readouterr().out.splitlines()[-1].startswith("next: accelerate launch finetune/lora.py ")


def test_the_size_is_the_one_asked_for_then_the_one_trained_then_the_models_own() -> None:
    asked = SamplingConfig(height=48)
    assert [(s.height, s.width) for s in (resolve_size(asked, (64, 32), 16), resolve_size(asked, None, 16))] == [
        (48, 32),
        (48, 16),
    ]


def test_a_training_size_that_cannot_be_generated_names_the_next_one() -> None:
    with pytest.raises(UsageError, match=r"trained at 359 x 704 px.*--height 360 --width 704"):
        resolve_size(SamplingConfig(), (359, 704), 512)


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "a\\b", "\u7e54\u7269", "", "x" * 500])
def test_a_file_name_stays_in_its_folder(prompt: str) -> None:
    name = picture_name(3, prompt, 12)
    assert Path(name).name == name
    assert name.isascii()
    assert len(name) < 80


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"prompts": ()}, "--prompts"), ({"num_images": 0}, "--num_images 0"), ({"seed": -1}, "--seed -1")],
)
def test_requests_for_nothing_are_refused_by_name(wrong: dict[str, object], message: str) -> None:
    settings = {"pretrained_model_name_or_path": "x", "prompts": ("a",), "output_dir": Path("out")} | wrong
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**settings)


def write_word(folder: Path, word: str = "<x>", seed: int = 0) -> Path:
    """Save two rows of a new word for the toy, as a run of its own would."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    rows = torch.randn(2, 16, generator=torch.Generator().manual_seed(seed))
    save_file({word: rows}, folder / "learned_embeds.safetensors", metadata={"provenance": json.dumps({"steps": 1})})
    return folder


def test_several_adapters_have_each_its_strength_and_its_record(toy_sd: Path, tmp_path: Path) -> None:
    from test_drift import write_lora

    from data_prep.folders.hashes import sha256_of
    from finetune.diffusion.sampling import sample
    from finetune.diffusion.tuned import load_tuned

    runs = (write_lora(toy_sd, tmp_path / "a", []), write_lora(toy_sd, tmp_path / "b", []), write_word(tmp_path / "w"))
    words = [word for run in runs for word in ("--adapter", str(run))]
    words += f"--pretrained_model_name_or_path {toy_sd} --num_images 1 --num_inference_steps 2".split()
    words += ["--adapter_scale", "0.7", "0", "1", "--prompts", "a <x>", "--output_dir", str(tmp_path / "out")]
    main(load(GenerateConfig, words))
    (record,) = records(tmp_path / "out")
    files = [run / name for run, name in zip(runs, ["pytorch_lora_weights.safetensors"] * 2
                                             + ["learned_embeds.safetensors"], strict=True)]  # fmt: skip
    assert record["adapters"] == [
        {"name": str(run), "hash": sha256_of(file), "scale": scale}
        for run, file, scale in zip(runs, files, (0.7, 0.0, 1.0), strict=True)
    ]
    # The second lies on the same layers and is out altogether.
    without = load_tuned(str(toy_sd), [runs[0], runs[2]], (0.7, 1.0)).models
    again = sample(without, [("a <x>", 0)], SamplingConfig(num_inference_steps=2, height=32, width=32))
    # The command folds adapters into the weights, which rounds otherwise: a grey level at most.
    drawn = np.asarray(Image.open(tmp_path / "out" / str(record["file_name"]))).astype(int)
    assert np.abs(drawn - again[0]).max() <= 1


def test_a_run_that_learned_a_word_and_a_lora_is_two_files(toy_sd: Path, tmp_path: Path) -> None:
    from test_drift import write_lora

    from finetune.diffusion.tuned import load_tuned

    run = write_lora(toy_sd, tmp_path / "run", [])
    (write_word(tmp_path / "w") / "learned_embeds.safetensors").rename(run / "learned_embeds.safetensors")
    tuned = load_tuned(str(toy_sd), [run])
    assert [Path(str(adapter["name"])).name for adapter in tuned.adapters] == [
        "learned_embeds.safetensors",
        "pytorch_lora_weights.safetensors",
    ]
    assert "<x>" in tuned.models.tokenizer.get_vocab()


def test_a_tuned_pipeline_is_generated_at_the_size_it_was_trained_at(
    toy_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from finetune.diffusion.hashes import model_hash

    tuned = shutil.copytree(toy_sd, tmp_path / "full")
    told = {"height": 24, "width": 40, "captions": ["sf_dry"], "base_model": {"name": "assets/tiny-sd"}}
    (tuned / "provenance.json").write_text(json.dumps(told))
    main(GenerateConfig(pretrained_model_name_or_path=str(tuned), prompts=("a",), num_images=1, sampling=FAST,
                        output_dir=tmp_path / "out"))  # fmt: skip
    (record,) = records(tmp_path / "out")
    assert (record["height"], record["width"]) == (24, 40)
    assert record["base_model"] == {"name": str(tuned), "hash": model_hash(str(toy_sd))}
    words = f"next: python -m eval.drift --pretrained_model_name_or_path {tuned} --base assets/tiny-sd "
    assert capsys.readouterr().out.splitlines()[-1].startswith(words)


def test_a_caption_has_the_shape_it_came_with_most_often_and_other_prompts_that_of_the_last_adapter() -> None:
    from data_prep.folders.provenance import size_of

    first = {"height": 8, "width": 16, "shapes": [{"height": 8, "width": 16, "captions": {"a": 1, "b": 2}},
                                                  {"height": 16, "width": 8, "captions": {"a": 3}}]}  # fmt: skip
    last = {"height": 24, "width": 24}
    asked = [size_of([first, last, {}], prompt) for prompt in ("a", "b", "c", None)]
    assert asked == [(16, 8), (8, 16), (24, 24), (24, 24)]
    assert size_of([{}], "a") is None


def test_each_caption_is_generated_in_the_shape_it_was_trained_in(toy_sd: Path, tmp_path: Path) -> None:
    """Pictures of one request do not depend on the shapes of the others."""
    from test_methods import run_recipe, words_of

    images = tmp_path / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    rows = []
    for number, (shape, text) in enumerate([((24, 40), "wide"), ((40, 24), "high"), ((24, 40), "wide")]):
        Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)).save(images / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": text}) + "\n")
    (images / "metadata.jsonl").write_text("".join(rows))
    more = ["--buckets", "--max_train_steps", "1", "--validation_prompt", "high", "--num_validation_images", "1"]
    run_recipe("lora", [*words_of("lora", toy_sd, images, tmp_path), *more])
    from eval.tiles.contact_sheet import contact_sheet

    sheet = contact_sheet([np.zeros((24, 40, 3), np.uint8)], 1, 1, labels=["high"])
    with Image.open(tmp_path / "run" / "previews" / "step-000001.png") as preview:
        assert preview.size == sheet.size

    def generate(*prompts: str) -> list[np.ndarray]:
        out = tmp_path / "-".join(prompts)
        main(GenerateConfig(pretrained_model_name_or_path=str(toy_sd), adapter=(tmp_path / "run",), prompts=prompts,
                            num_images=2, sampling=FAST, output_dir=out))  # fmt: skip
        assert [record["prompt"] for record in records(out)] == [prompt for prompt in prompts for _ in range(2)]
        return [np.asarray(Image.open(out / str(record["file_name"]))) for record in records(out)]

    together, alone = generate("high", "wide", "other"), generate("high")
    assert [picture.shape[:2] for picture in together] == [(40, 24)] * 2 + [(24, 40)] * 4
    assert np.array_equal(together[:2], alone)


@pytest.mark.parametrize("scales", [("0.5", "1"), ("1", "1", "1", "1")])
def test_strengths_that_nobody_gets_are_refused(scales: tuple[str, ...]) -> None:
    words = ["--adapter", "a", "--adapter", "b", "--adapter", "c", "--adapter_scale", *scales]
    with pytest.raises(UsageError, match=f"{len(scales)} for 3 --adapter; one for all, or one each"):
        load(GenerateConfig, [*words, "--pretrained_model_name_or_path", "x", "--prompts", "a", "--output_dir", "o"])
