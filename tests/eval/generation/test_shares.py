"""Several processes, several calls, several chunks: the same pictures, and nothing done twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_processes import torchrun
from transformers import CLIPTextModel

import finetune.diffusion.vae
from eval.generate import GenerateConfig, main
from eval.generation.shares import Team
from finetune.diffusion.config import SamplingConfig
from finetune.diffusion.models import load_models
from finetune.diffusion.sampling import sample_latents
from finetune.diffusion.vae import decode


def test_each_prompt_is_encoded_once_however_many_batches(
    toy_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[tuple[int, ...]] = []
    forward = CLIPTextModel.forward

    def counted(self: CLIPTextModel, input_ids: torch.Tensor, *args: object, **kwargs: object) -> object:
        encoded.append(tuple(input_ids.flatten().tolist()))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(CLIPTextModel, "forward", counted)
    main(
        GenerateConfig(
            pretrained_model_name_or_path=str(toy_sd),
            prompts=("sf_dry", "sf_injected"),
            num_images=3,
            sampling=SamplingConfig(num_inference_steps=1, batch_size=2),
            output_dir=tmp_path / "slices",
        )
    )
    assert len(encoded) == len(set(encoded)) == 3  # and the empty one


def test_pictures_are_decoded_a_few_at_a_time(toy_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, decoded = load_models(str(toy_sd)), []
    requests = [("ab", seed) for seed in range(5)]
    latents = sample_latents(models, requests, SamplingConfig(num_inference_steps=1))
    together = decode(models, latents, requests)
    monkeypatch.setattr(finetune.diffusion.vae, "_PIXELS_AT_ONCE", 1)  # two even so
    hook = models.vae.decoder.register_forward_pre_hook(lambda _, args: decoded.append(len(args[0])))
    apart = decode(models, latents, requests)
    hook.remove()
    assert decoded == [2, 2, 1]
    assert together.flags.c_contiguous
    assert apart.flags.c_contiguous
    assert decode(models, latents[:1], requests[:1]).flags.c_contiguous
    # Another number at once moves the last bits: at most one grey level, next to a rounding edge.
    assert np.abs(together.astype(int) - apart).max() <= 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_are_all_of_the_work_once(count: int) -> None:
    parts = [Team(rank, count).mine(list(range(7))) for rank in range(count)]
    assert sorted(part for share in parts for part in share) == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(toy_sd: Path, tmp_path: Path) -> None:
    words = f"--pretrained_model_name_or_path {toy_sd} --num_images 3 --num_inference_steps 2 --batch_size 2".split()
    words += ["--prompts", "sf_dry", "", "sf_injected"]
    process = torchrun("-m", "eval.generate", *words, "--output_dir", tmp_path / "two")
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert said.count("9 pictures of 32 x 32 px") == 1
    sampling = SamplingConfig(num_inference_steps=2, batch_size=2)
    prompts = ("sf_dry", "", "sf_injected")
    main(
        GenerateConfig(
            pretrained_model_name_or_path=str(toy_sd),
            prompts=prompts,
            num_images=3,
            sampling=sampling,
            output_dir=tmp_path / "one",
        )
    )
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        if name != "config.yaml":  # the folder's own name
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
