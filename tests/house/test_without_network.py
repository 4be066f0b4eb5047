"""The path of docs/gpu.md for a machine with a GPU and no network, command by command, on a local folder."""

from __future__ import annotations

import contextlib
import importlib
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from configs.load import load

ROOT = Path(__file__).parents[2]
# What such a repository holds (stable-diffusion-2-1-base, 2023), beside what a training needs.
NEEDED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
LEFT_OUT = [
    "README.md",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "v2-1_512-ema-pruned.ckpt",
    "v2-1_512-ema-pruned.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
]
# The same commands, small: the toy is no use at 25 steps.
SMALLER = {
    "finetune.lora": "--max_train_steps 1 --train_batch_size 2 --report_to none --seed 0",
    "eval.generate": "--num_inference_steps 1",
    "eval.drift": "--num_inference_steps 1 --num_images 1 --num_timesteps 1 --num_slices 4",
}


# What the page does with the model, in this order; a line of each kind is run.
PATH = (
    r"^hf download ",
    r"sha256sum \{\} .*> SHA256SUMS",
    r"sha256sum --check",
    r"finetune/lora\.py .*--dry_run$",
    r"finetune/lora\.py (?!.*--dry_run)",
    r"-m eval\.generate ",
    r"-m eval\.drift ",
)


def commands() -> list[str]:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines() if "models/sd21" in line]
    return [next(line for line in lines if re.search(kind, line)) for kind in PATH]


def run(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command of ours in this process, any other in a shell; return what it printed."""
    found = re.match(r"(?:accelerate launch|python -m) (\S+)", line)
    if found is None:
        return subprocess.run(["bash", "-c", line], check=True, capture_output=True, text=True).stdout
    name = found[1].removesuffix(".py").replace("/", ".")
    module = importlib.import_module(name)
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    config = re.search(r"^    command\((\w+), main\)$", source, re.MULTILINE)
    assert config is not None
    words = shlex.split(f"{line[found.end() :]} {SMALLER[name]}")
    with contextlib.suppress(SystemExit):  # a dry run leaves early; errors are of other types here
        module.main(load(getattr(module, config[1]), words))
    return capsys.readouterr().out


def test_download_takes_what_is_needed_and_nothing_twice() -> None:
    words = shlex.split(next(line for line in commands() if line.startswith("hf download ")))
    patterns = {flag: [value for word, value in pairwise(words) if word == flag] for flag in ("--include", "--exclude")}
    taken = filter_repo_objects(
        [*NEEDED, *LEFT_OUT], allow_patterns=patterns["--include"], ignore_patterns=patterns["--exclude"]
    )
    assert list(taken) == NEEDED


@pytest.mark.parametrize("stored", ["float32", "fp16"])
def test_every_command_after_the_download_works_on_a_local_folder(
    stored: str,
    toy_sd: Path,
    captioned_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(toy_sd, tmp_path / "models" / "sd21")
    if stored == "fp16":
        for path in list(model.rglob("*.safetensors")):
            halved = {name: value.half() for name, value in load_file(path).items()}
            save_file(halved, path.with_name(f"{path.stem}.fp16.safetensors"), metadata={"format": "pt"})
            path.unlink()
    shutil.copytree(captioned_images, tmp_path / "data" / "weave" / "train")
    lines = commands()[1:]
    said = {line: run(line, capsys) for line in lines}
    dry = next(line for line in lines if line.endswith("--dry_run"))
    assert re.search(r"\d[\d.]* (GB|GiB|MB|MiB)", said[dry])
    assert (tmp_path / "runs" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert len(list((tmp_path / "out" / "slices").glob("*seed*.png"))) == 4
    assert (tmp_path / "out" / "drift" / "results.jsonl").is_file()


def test_changed_copy_is_noticed(toy_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(toy_sd, tmp_path / "models" / "sd21")
    write, check = [line for line in commands() if "SHA256SUMS" in line]
    subprocess.run(["bash", "-c", write], check=True)
    (model / "unet" / "config.json").write_text("{}")
    found = subprocess.run(["bash", "-c", check], check=False, capture_output=True, text=True)
    assert found.returncode
    assert "unet/config.json: FAILED" in found.stdout
