"""The generate command: what it writes, what it refuses, and that it does the same thing twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import TisserandError, UsageError
from configs.load import load
from eval.config import SamplingConfig
from eval.generate import GenerateConfig, main, picture_name, resolve_size

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
    from eval.sampling import sample
    from finetune.core.models import load_models

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
