"""Sampling speed against the loops of diffusers' example scripts: class images, previews, and what drift asks.

    python benchmarks/sampling.py --size reduced

One process, one model, the two ways in turn. The scripts' ways: class images in batches of ``--stock_batch_size``
prompts through a pipeline (train_dreambooth.py), previews one picture a call (train_text_to_image_lora.py); those
loops are a few lines, written here again with the same calls, so that no checkout is needed. Ours:
``finetune.diffusion.sampling``, as class images, previews, eval.generate and eval.drift use it, with
DPM-Solver++ at half the steps and at equal steps.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.load import command
from random_sd import CAPTIONS, SIZES, write_model
from slicing import cpu_name, spread
from training import has_gpu, versions

if TYPE_CHECKING:
    from finetune.diffusion.models import Models


@dataclass(frozen=True, kw_only=True)
class SamplingBenchmark:
    """Settings of ``benchmarks/sampling.py``."""

    size: Literal["grain", "reduced", "sd15", "sd21"] = "reduced"
    """The model, made from its config with random weights."""
    num_images: int = 8
    """Pictures of one turn."""
    stock_batch_size: int = 4
    """Prompts of one call in the script's loop; 4 is its default."""
    batch_size: int = 8
    """Pictures of one batch in ours."""
    stock_steps: int = 50
    """Sampler steps of the script's way; 50 is its default."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of both ways."""
    turns: int = 3
    """How often each way runs."""
    work_dir: Path | None = None
    """Folder for the model; a temporary one by default."""
    output: Path = Path("benchmarks/results/sampling.json")
    """Where the figures go."""
    dry_run: bool = False
    """Print what would be measured."""


def main(config: SamplingBenchmark) -> None:
    """Let the ways take turns, print and write the figures."""
    side = SIZES[config.size].resolution
    half = config.stock_steps // 2
    names = {
        "class images, the script": f"{config.stock_steps} steps, batches of {config.stock_batch_size}",
        "class images, the script, bf16": "the same with its --prior_generation_precision bf16",
        "class images, equal steps": f"{config.stock_steps} steps, batches of {config.batch_size}",
        "class images, equal steps, bf16": "the same in bf16, the recipes' default where the processor has it",
        "class images, half the steps": f"{half} steps, batches of {config.batch_size}",
        "previews, the script": f"{config.stock_steps} steps, one by one",
        "previews": f"{half} steps, batches of {config.batch_size}",
        "drift by prediction": "8 timesteps of 2 latents a prompt, without pictures",
    }
    for name, text in names.items():
        print(f"{name}: {config.num_images} of {side} px, {text}")
    if config.dry_run:
        return
    with tempfile.TemporaryDirectory(dir=config.work_dir, prefix="sampling-") as folder:
        write_model(Path(folder) / "model", config.size)
        ways = ways_of(config, Path(folder) / "model", Path(folder))
        taken = take_turns(config, ways)
    images_per_s = {name: spread([config.num_images / seconds for seconds in values]) for name, values in taken.items()}
    against = {
        "class images, the script, bf16": "class images, the script",
        "class images, equal steps": "class images, the script",
        "class images, equal steps, bf16": "class images, the script",
        "class images, half the steps": "class images, the script",
        "previews": "previews, the script",
    }
    speedup = {
        name: spread([theirs / ours for theirs, ours in zip(taken[stock], taken[name], strict=True)])
        for name, stock in against.items()
    }
    for name, values in speedup.items():
        rates = images_per_s[name]["median"], images_per_s[against[name]]["median"]
        print(f"{name}: {rates[0]:.3f} img/s against {rates[1]:.3f}, {values['median']:.2f}x")
    import torch

    content = {
        "command": "python benchmarks/sampling.py",
        "settings": {**dataclasses.asdict(config), "work_dir": None, "output": str(config.output)},
        "device": torch.cuda.get_device_name() if has_gpu() else cpu_name(),
        "images_per_s": images_per_s,
        "speedup": speedup,
        "load_at_the_end": os.getloadavg()[0],
        "versions": versions(),
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def take_turns(config: SamplingBenchmark, ways: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Run every way, in turn and back, and return the seconds of each; a first turn warms up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, config.turns):
        for name in ways if number % 2 == 0 else reversed(ways):
            start = time.perf_counter()
            ways[name]()
            if has_gpu():
                import torch

                torch.cuda.synchronize()
            if number >= 0:
                taken[name].append(time.perf_counter() - start)
                print(f"  turn {number + 1} of {config.turns}, {name}: {taken[name][-1]:.2f} s", flush=True)
    return taken


def ways_of(config: SamplingBenchmark, model: Path, work: Path) -> dict[str, Callable[[], None]]:
    """Return each way as a function without arguments."""
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image

    from finetune.diffusion.config import SamplingConfig
    from finetune.diffusion.fixed_noise import predictions
    from finetune.diffusion.models import load_models
    from finetune.diffusion.sampling import sample_latents
    from finetune.diffusion.vae import decode

    device = "cuda" if has_gpu() else "cpu"
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.precision]
    pipeline, low_pipeline = (
        DiffusionPipeline.from_pretrained(model, dtype=one, safety_checker=None, requires_safety_checker=False).to(
            device
        )
        for one in (dtype, torch.bfloat16)
    )
    for one in (pipeline, low_pipeline):
        one.set_progress_bar_config(disable=True)
    models: Models = load_models(str(model), device=device, dtype=dtype)
    prompt, count = CAPTIONS[0], config.num_images
    requests = [(prompt, seed) for seed in range(count)]

    def theirs(pipeline: DiffusionPipeline, batch_size: int) -> None:
        for start in range(0, count, batch_size):
            prompts = [prompt] * min(batch_size, count - start)
            for number, picture in enumerate(pipeline(prompts, num_inference_steps=config.stock_steps).images):
                picture.save(work / f"{start + number}.jpg")

    def ours(steps: int, low: torch.dtype | None = None) -> None:
        settings = SamplingConfig(num_inference_steps=steps, batch_size=config.batch_size)
        with torch.autocast(device, dtype=low) if low else nullcontext():
            latents = sample_latents(models, requests, settings)
        for number, picture in enumerate(decode(models, latents, requests, batch_size=config.batch_size)):
            Image.fromarray(picture).save(work / f"{number}.png")

    first = sample_latents(models, requests[:2], SamplingConfig(num_inference_steps=2, batch_size=2)).cpu()

    def predict() -> None:
        prompts = [CAPTIONS[number % len(CAPTIONS)] for number in range(count)]
        latents = first[None].expand(count, -1, -1, -1, -1)
        predictions(models, prompts, latents, num_timesteps=8, seed=0, batch_size=config.batch_size)

    return {
        "class images, the script": lambda: theirs(pipeline, config.stock_batch_size),
        "class images, the script, bf16": lambda: theirs(low_pipeline, config.stock_batch_size),
        "class images, equal steps": lambda: ours(config.stock_steps),
        "class images, equal steps, bf16": lambda: ours(config.stock_steps, torch.bfloat16),
        "class images, half the steps": lambda: ours(config.stock_steps // 2),
        "previews, the script": lambda: theirs(pipeline, 1),
        "previews": lambda: ours(config.stock_steps // 2),
        "drift by prediction": predict,
    }


if __name__ == "__main__":
    command(SamplingBenchmark, main)
