"""Measure what the embedded base model knows; its model card quotes the result.

    python benchmarks/tiny_sd.py --slices demo/weave --truths demo/volumes

Does the picture show what the prompt asked? 512 pictures over 32 prompts, 8 of them combinations never drawn for
training, are read by a small classifier that was trained on freshly drawn pictures alone, and checked on others of
them first.
What does the VAE lose? Round trip of slices of each state, peak signal-to-noise ratio against the noisy slice itself,
beside the noise that the phantom was given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.load import command

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from data_prep.worlds.shapes import Scene
    from finetune.diffusion.models import Models

SEEDS_PER_PROMPT = 16


@dataclass(frozen=True, kw_only=True)
class TinySdConfig:
    """Settings of ``benchmarks/tiny_sd.py``."""

    pretrained_model_name_or_path: str = "assets/tiny-sd"
    """Model to measure."""
    slices: Path | None = None
    """Dataset of slices for the VAE round trip; None leaves it out."""
    truths: Path | None = None
    """Folder with the .truth.json files of the phantoms, for the noise in them; None leaves it out."""
    num_drawn: int = 16000
    """Pictures the classifier is trained on."""
    output: Path = Path("benchmarks/results/tiny_sd.json")
    """Where the figures go; a picture of the samples goes beside it."""


def main(config: TinySdConfig) -> None:
    """Train the classifier, generate, read, and write the figures."""
    import json
    import platform
    import time

    import torch

    from data_prep.worlds.shapes import picture
    from eval.tiles.contact_sheet import contact_sheet
    from finetune.diffusion.config import SamplingConfig
    from finetune.diffusion.hashes import model_hash
    from finetune.diffusion.models import load_models
    from finetune.diffusion.sampling import sample

    start = time.monotonic()
    torch.manual_seed(0)
    classifier = _train_classifier(config.num_drawn)
    checked = [picture(2, index) for index in range(2000)]
    admission = _agreement(classifier, [scene for scene, _ in checked], _stack([pixels for _, pixels in checked]))

    models = load_models(config.pretrained_model_name_or_path)
    scenes = _prompts()
    requests = [(scene.caption, seed) for scene in scenes for seed in range(SEEDS_PER_PROMPT)]
    pictures = sample(models, requests, SamplingConfig(batch_size=32), progress="generating")
    asked = [scene for scene in scenes for _ in range(SEEDS_PER_PROMPT)]
    unseen = [index for index, scene in enumerate(asked) if scene.is_held_out]
    result = {
        "model": {
            "name": config.pretrained_model_name_or_path,
            "hash": model_hash(config.pretrained_model_name_or_path),
        },
        "classifier_on_drawn": admission,
        "generated": _agreement(classifier, asked, pictures),
        "generated_unseen_combinations": _agreement(classifier, [asked[index] for index in unseen], pictures[unseen]),
        "prompts": {
            scene.caption: _agreement(
                classifier, [scene] * SEEDS_PER_PROMPT, pictures[first : first + SEEDS_PER_PROMPT]
            )
            for scene, first in zip(scenes, range(0, len(asked), SEEDS_PER_PROMPT), strict=True)
        },
        "vae_round_trip": _round_trip(models, config.slices) if config.slices else None,
        "noise_sigma_windowed": _noise(config.truths) if config.truths else None,
        "hardware": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "elapsed_s": round(time.monotonic() - start, 1),
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    shown = [pictures[SEEDS_PER_PROMPT * row + column] for row in range(len(scenes)) for column in range(8)]
    contact_sheet(shown, len(scenes), 8, [scene.caption for scene in scenes]).save(config.output.with_suffix(".png"))
    for key in ("classifier_on_drawn", "generated", "generated_unseen_combinations"):
        print(f"{key}: {result[key]}")
    print(f"vae_round_trip: {result['vae_round_trip']}, noise_sigma_windowed: {result['noise_sigma_windowed']}")
    print(f"written: {config.output} and {config.output.with_suffix('.png')}")


def _prompts() -> list[Scene]:
    """Return 24 scenes of the kind seen in training, every kind among them, and the 8 combinations kept out of it."""
    import numpy as np

    from data_prep.worlds.shapes import HELD_OUT, SHAPES, TEXTURES, Scene, draw_scene

    random = np.random.default_rng(32)
    scenes: dict[str, Scene] = {}
    kinds = [*SHAPES, *TEXTURES, *SHAPES, *SHAPES[:4]]
    while kinds:
        scene = draw_scene(random)
        if scene.kind == kinds[0] and scene.caption not in scenes:
            scenes[scene.caption] = scene
            kinds.pop(0)
    for kind, pair in sorted(HELD_OUT, key=lambda item: item[0]):
        first, second = sorted(pair)
        scene = Scene(kind=kind, colours=(first, second), count=int(random.integers(1, 4)) if kind in SHAPES else 0)
        scenes[scene.caption] = scene
    return list(scenes.values())


def _labels(scene: Scene) -> tuple[int, int, int, int]:
    """Kind, first colour, second colour, count; a texture's colours are sorted: its words come in any order."""
    from data_prep.worlds.shapes import COLOURS, SHAPES, TEXTURES

    names = [*COLOURS, "grey"]
    colours = scene.colours or ("grey", "grey")
    first, second = colours if scene.count else sorted(colours)
    return (*SHAPES, *TEXTURES).index(scene.kind), names.index(first), names.index(second), scene.count


def _stack(pictures: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    import numpy as np

    return np.stack(pictures)


def _train_classifier(num_drawn: int) -> torch.nn.Module:
    """Train a small convolutional network on freshly drawn pictures, held-out combinations among them."""
    import numpy as np
    import torch
    from torch import nn
    from tqdm import trange

    from data_prep.worlds.shapes import COLOURS, SHAPES, TEXTURES, Scene, render

    random = np.random.default_rng(1)
    scenes = []
    for _ in range(num_drawn):
        kind = str(random.choice([*SHAPES, *TEXTURES]))
        colours: tuple[str, ...] = tuple(map(str, random.choice(list(COLOURS), size=2, replace=False)))
        count = int(random.integers(1, 4)) if kind in SHAPES else 0
        scenes.append(Scene(kind=kind, colours=() if not count and random.random() < 0.3 else colours, count=count))
    pictures = torch.from_numpy(np.stack([render(scene, random) for scene in scenes]))
    labels = torch.tensor([_labels(scene) for scene in scenes])

    def block(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(),
        )  # fmt: skip

    heads = [len(SHAPES) + len(TEXTURES), len(COLOURS) + 1, len(COLOURS) + 1, 4]
    network = nn.Sequential(
        block(3, 32), block(32, 64), block(64, 96), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(96 * 16, 192), nn.ReLU(), nn.Dropout(0.2), nn.Linear(192, sum(heads)),
    )  # fmt: skip
    epochs, batch = 8, 64
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    steps = epochs * (num_drawn // batch)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in trange(steps, desc="classifier", disable=None):
        chosen = torch.randint(num_drawn, (batch,))
        scores = network(_pixels(pictures[chosen], augment=True)).split(heads, dim=1)
        loss = sum(nn.functional.cross_entropy(score, labels[chosen, i]) for i, score in enumerate(scores))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return network.eval()


def _pixels(pictures: torch.Tensor, *, augment: bool = False) -> torch.Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) in [-1, 1]; blur and noise keep it from reading the drawing's exact edges."""
    import torch

    pixels = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
    if augment:
        blurred = torch.nn.functional.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
        share = torch.rand(len(pixels), 1, 1, 1)
        pixels = (
            pixels + share * (blurred - pixels) + 0.08 * torch.rand(len(pixels), 1, 1, 1) * torch.randn_like(pixels)
        )
    return pixels


def _agreement(network: torch.nn.Module, scenes: list[Scene], pictures: NDArray[np.uint8]) -> dict[str, float | int]:
    """Share of pictures read as asked: the kind, both colours in their roles, the count (shapes only)."""
    import torch

    from data_prep.worlds.shapes import COLOURS, SHAPES, TEXTURES

    heads = [len(SHAPES) + len(TEXTURES), len(COLOURS) + 1, len(COLOURS) + 1, 4]
    with torch.inference_mode():
        scores = torch.cat([network(_pixels(part)) for part in torch.from_numpy(pictures).split(256)]).split(
            heads, dim=1
        )
    right = torch.stack([score.argmax(1) for score in scores], dim=1) == torch.tensor(
        [_labels(scene) for scene in scenes]
    )
    is_shape = torch.tensor([scene.count > 0 for scene in scenes])
    result: dict[str, float | int] = {
        "n": len(scenes),
        "kind": round(right[:, 0].float().mean().item(), 4),
        "colours": round(right[:, 1:3].all(1).float().mean().item(), 4),
    }
    if is_shape.any():
        result["count"] = round(right[is_shape, 3].float().mean().item(), 4)
    return result


def _round_trip(models: Models, dataset: Path) -> dict[str, float]:
    """PSNR in dB of held-out tiles through the VAE (posterior mean), by state.

    Of the squared error over all tiles of a state: the RGB that comes back against the grey, three times.
    """
    import numpy as np
    import torch
    from PIL import Image

    from data_prep.folders.manifest import read_rows

    errors: dict[str, list[float]] = {}
    for row in read_rows(dataset / "validation"):
        grey = np.asarray(Image.open(dataset / "validation" / row.file_name))
        pixels = torch.from_numpy(grey.astype(np.float32) / 127.5 - 1).expand(1, 3, -1, -1)
        with torch.inference_mode():
            decoded = models.vae.decode(models.vae.encode(pixels).latent_dist.mean).sample
        back = ((decoded[0].clamp(-1, 1) + 1) * 127.5).round().numpy()
        errors.setdefault(row.state, []).append(float(np.square(back - grey.astype(np.float32)).mean()))
    # Tiles of one dataset have one size, so that the mean of their errors is that over all pixels.
    return {state: round(float(10 * np.log10(255**2 / np.mean(found))), 2) for state, found in sorted(errors.items())}


def _noise(folder: Path) -> dict[str, float]:
    """Return the standard deviation of the phantoms' noise in grey levels of the slices' window, by state."""
    import json

    truths = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.truth.json"))]
    return {truth["state"]: round(truth["noise_sigma_windowed"], 2) for truth in truths}


if __name__ == "__main__":
    command(TinySdConfig, main)
