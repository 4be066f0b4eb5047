"""--compile: when it pays, what is compiled, and what stays as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_methods import run_recipe, words_of
from torch import nn

import finetune.core.loop.loop
from configs.errors import UsageError
from data_prep.folders.run_folder import LORA_FILE
from finetune.core.loop.compilation import compile_blocks, estimate_gain, repeated_blocks
from finetune.diffusion.models import load_models

Go = Callable[..., Path]


@pytest.fixture
def go(toy_sd: Path, captioned_images: Path, tmp_path: Path) -> Go:
    """Train with more options; return the run folder."""

    def run(recipe: str, *words: object, folder: str = "run") -> Path:
        more = ["--output_dir", str(tmp_path / folder), *(str(word) for word in words)]
        run_recipe(recipe, [*words_of(recipe, toy_sd, captioned_images, tmp_path), *more])
        return tmp_path / folder

    return run


@pytest.fixture
def quick_backend(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compile without generating code, which takes minutes, and count the graphs of a forward pass."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(len(inputs))
        return aot_eager(module, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(finetune.core.loop.loop, "compile_blocks", partial(compile_blocks, backend=backend))
    return graphs


PREVIEW = ("--validation_prompt", "ab", "--num_validation_images", "1", "--validation_steps", "3")


@pytest.mark.parametrize("recipe", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_compiled_run_learns_the_same_under_the_same_names(go: Go, quick_backend: list[int], recipe: str) -> None:
    """Adam divides by the length of small gradients, which rounding turns round: 2e-3 of a rate of 1e-2 in 2 steps."""
    words = ("--max_train_steps", "2", "--gradient_checkpointing")
    plain = go(recipe, *words, folder="plain")
    compiled = go(recipe, *words, *PREVIEW, "--compile", "yes", folder="compiled")
    assert quick_backend
    files = sorted(path.relative_to(plain) for path in plain.rglob("*.safetensors") if "cache" not in path.parts)
    assert files == sorted(
        path.relative_to(compiled) for path in compiled.rglob("*.safetensors") if "cache" not in path.parts
    )
    for file in files:
        one, other = load_file(compiled / file), load_file(plain / file)
        assert one.keys() == other.keys()
        if file.name != "optimizer.safetensors":
            for name, value in other.items():
                torch.testing.assert_close(one[name], value, atol=2e-3, rtol=0)


@pytest.mark.slow
def test_looks_compile_nothing_and_no_batch_is_compiled_twice(go: Go, quick_backend: list[int]) -> None:
    """Ten pictures in fours make two shapes; previews have a third."""
    blocks = 4  # the toy's ResNet and transformer blocks that differ at all are fewer than its nine
    go("lora", *PREVIEW, "--compile", "yes")
    first = len(quick_backend)
    assert first >= 2 * blocks
    quick_backend.clear()
    torch._dynamo.reset()
    go("lora", "--compile", "yes", folder="without previews")
    assert len(quick_backend) == first


@pytest.mark.slow
def test_a_compiled_run_goes_on_to_the_same_bits(go: Go, quick_backend: list[int]) -> None:
    whole = go("lora", "--compile", "yes", folder="whole")
    cut = go("lora", "--compile", "yes", "--max_train_steps", 4, folder="cut")
    (cut / LORA_FILE).unlink()
    go("lora", "--compile", "yes", folder="cut")
    one, other = (load_file(folder / LORA_FILE) for folder in (cut, whole))
    assert quick_backend
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_auto_says_no_on_a_cpu_and_why(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    folder = go("lora", "--compile", "auto", "--max_train_steps", 2)
    assert "--compile auto: no, on a CPU compiled blocks" in capsys.readouterr().out
    assert json.loads((folder / "environment.json").read_text())["compiled"] is False


@pytest.mark.slow
def test_auto_goes_on_as_the_run_began(go: Go, quick_backend: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """As if it had begun where it pays: the steps that are left may be too few to say so again."""
    folder = go("lora", "--compile", "auto", "--max_train_steps", 4)
    (folder / LORA_FILE).unlink()
    told = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps({**told, "compiled": True}))
    assert not quick_backend
    go("lora", "--compile", "auto")
    assert "--compile auto: yes, as the run began" in capsys.readouterr().out
    assert quick_backend


@pytest.mark.parametrize(("passes", "pays"), [(10, False), (100_000, True)])
def test_it_pays_when_there_are_steps_enough(passes: int, pays: bool) -> None:
    does, why = estimate_gain(variants=20, pass_s=0.3, passes=passes)
    assert does is pays
    assert f"{passes} passes of 0.3 s may save" in why
    assert "20 different blocks take about 120 s" in why


def test_a_missing_compiler_is_refused_or_said(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(UsageError, match="--compile yes: PyTorch's compiler needs a C\\+\\+ compiler"):
        go("lora", "--compile", "yes")
    go("lora", "--compile", "auto", "--max_train_steps", 2, folder="auto")
    assert "--compile auto: no, PyTorch's compiler needs a C++ compiler" in capsys.readouterr().out


def test_nearly_all_weights_are_in_the_blocks(toy_sd: Path) -> None:
    unet = load_models(str(toy_sd)).unet
    inside = {id(parameter) for block in repeated_blocks(unet) for parameter in block.parameters()}
    assert sum(p.numel() for p in unet.parameters() if id(p) in inside) > 0.6 * sum(
        p.numel() for p in unet.parameters()
    )
    assert all(isinstance(block, nn.Module) for block in repeated_blocks(unet))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_generated_code_learns_the_same_and_goes_on_to_the_same_bits(go: Go) -> None:
    torch._dynamo.reset()
    plain = load_file(go("lora", folder="plain") / LORA_FILE)
    whole = load_file(go("lora", "--compile", "yes", folder="whole") / LORA_FILE)
    cut = go("lora", "--compile", "yes", "--max_train_steps", 4, folder="cut")
    (cut / LORA_FILE).unlink()
    resumed = load_file(go("lora", "--compile", "yes", folder="cut") / LORA_FILE)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    for name, value in plain.items():
        torch.testing.assert_close(whole[name], value, atol=4e-3, rtol=0)
