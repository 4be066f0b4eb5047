"""What a word does to the base model's predictions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eval.forgetting.influence import influence
from eval.identifiers import IdentifiersConfig, main
from finetune.diffusion.fixed_noise import predictions
from finetune.diffusion.models import load_models


def settings(toy_sd: Path, **changes: object) -> IdentifiersConfig:
    return IdentifiersConfig(pretrained_model_name_or_path=str(toy_sd), num_timesteps=2, num_latents=1, **changes)  # type: ignore[arg-type]


def test_the_influence_is_the_change_of_the_predictions_over_their_size(toy_sd: Path) -> None:
    from finetune.diffusion.config import SamplingConfig
    from finetune.diffusion.sampling import sample_latents

    models = load_models(str(toy_sd))
    prompts = {"sks": "a sks texture"}
    found = influence(models, prompts, "a texture", num_latents=1, num_timesteps=2, seed=0)["sks"]
    size = {"height": models.size_px, "width": models.size_px}
    latents = sample_latents(models, [("a texture", 0)], SamplingConfig(num_inference_steps=20, **size))
    both = predictions(models, ["a sks texture", "a texture"], torch.stack([latents, latents]).cpu(), num_timesteps=2)
    expected = ((both[0] - both[1]) ** 2).sum() / (both[1] ** 2).sum()
    assert found == pytest.approx(float(expected), rel=1e-4)  # another batch size
    assert found > 0


def test_the_command_lists_the_least_moving_word_first(toy_sd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(settings(toy_sd, words=("sks", "w17h3r")))
    lines = capsys.readouterr().out.splitlines()
    values = [float(line.split()[1]) for line in lines[1:3]]
    assert values == sorted(values)
    assert lines[3].startswith("for scale: red ")
    assert "finetune/lora_dreambooth.py" in lines[4]


def test_a_prompt_without_a_place_for_the_word_is_refused(toy_sd: Path) -> None:
    with pytest.raises(ValueError, match=r"--prompt 'a texture': holds no \{word\}"):
        settings(toy_sd, prompt="a texture")
