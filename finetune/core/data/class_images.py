"""Class images: generated once by the base model, each with a record of how."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from configs.errors import InputError, UsageError
from data_prep.folders.manifest import METADATA_NAME
from finetune.core.pictures.images import SUFFIXES, CaptionedImage, read_folder
from finetune.core.run import OpenRun
from finetune.core.settings.methods import PriorConfig
from finetune.diffusion.config import SamplingConfig
from finetune.diffusion.sampling import require_light, sample_latents
from finetune.diffusion.vae import decode

RECORD = "tisserand"
"""Key of the PNG text that says how a class image was made; it travels with the image, whoever copies it."""
_PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def class_images(opened: OpenRun, config: PriorConfig, size: int) -> list[CaptionedImage]:
    """Return ``--num_class_images`` class images, after the base model has generated those that are missing.

    Every process generates its share; a picture depends on its prompt and its seed alone. Images of the user's own,
    which carry no record, count like generated ones.

    Raises:
        InputError: a generated image of another prompt, base model or sampler; the remedy is named.
    """
    run, folder = opened.run, Path(str(config.class_data_dir))
    settings = SamplingConfig(height=size, width=size, batch_size=config.sample_batch_size)
    wanted = _wanted(config, settings, opened.base["hash"])
    found = check_class_images(config, wanted)
    missing = config.num_class_images - len(found)
    if missing > 0:
        if (folder / METADATA_NAME).is_file():
            raise InputError(
                f"--class_data_dir {folder}: {METADATA_NAME} names {len(found)} images, and generated ones would not "
                f"be in it; give --num_class_images {len(found)}, or another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        free = (number for number in range(len(found) + config.num_class_images) if not _path(folder, number).exists())
        numbers = [number for number, _ in zip(free, range(missing), strict=False)]
        run.accelerator.wait_for_everyone()  # all have listed the folder before one changes it
        _generate(opened, config, settings, wanted, numbers)
        run.accelerator.wait_for_everyone()
    run.say(f"prior: {len(found)} class images found in {folder}, {max(missing, 0)} generated")
    images = read_folder(folder, "--class_data_dir", captions=(str(config.class_prompt),))
    return images[: config.num_class_images]


def check_class_images(config: PriorConfig, wanted: dict[str, object]) -> list[Path]:
    """Return the class images that are there, or refuse those that were generated otherwise.

    Args:
        config: names the folder.
        wanted: what the record of a generated image has to say, keys that are left out excepted.
    """
    folder = Path(str(config.class_data_dir))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--class_data_dir {folder}: is a file; name a folder")
    if not folder.is_dir():
        return []
    if (folder / METADATA_NAME).is_file():
        listed = read_folder(folder, "--class_data_dir", captions=(str(config.class_prompt),))
        paths = [image.path for image in listed]
    else:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    stale = [(path, said) for path in paths if (said := _difference(_record(path), wanted))]
    if stale:
        path, said = stale[0]
        raise InputError(
            f"--class_data_dir {folder}: {len(stale)} of its {len(paths)} images were generated otherwise "
            f"({path.name}: {said}); remove them, or name another folder, and they are generated anew"
        )
    return paths


def _wanted(config: PriorConfig, settings: SamplingConfig, base_hash: str) -> dict[str, object]:
    """Return what the record of a class image has to say."""
    return {
        "prompt": config.class_prompt,
        "base_model": base_hash,
        "steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "scheduler": settings.scheduler,
        "height": settings.height,
        "width": settings.width,
    }


def _record(path: Path) -> dict[str, object]:
    """Return what an image says of how it was made; nothing for one of the user's own."""
    try:
        with Image.open(path) as image:
            text = image.info.get(RECORD, "{}") if image.format == "PNG" else "{}"
        record = json.loads(str(text))
    except (OSError, UnidentifiedImageError, SyntaxError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as an image ({' '.join(str(error).split())})") from None
    return record if isinstance(record, dict) else {}


def _difference(record: dict[str, object], wanted: dict[str, object]) -> str:
    """Say in what a record differs, or nothing."""
    changed = [name for name in wanted if record and record.get(name) != wanted[name]]
    return ", ".join(f"{name} {record.get(name)} then, {wanted[name]} now" for name in changed)


def _path(folder: Path, number: int) -> Path:
    """Return the place of a generated class image."""
    return folder / f"class-{number:05d}.png"


def _generate(
    opened: OpenRun, config: PriorConfig, settings: SamplingConfig, wanted: dict[str, object], numbers: list[int]
) -> None:
    """Generate this process's share of class images, each from seed + number, each file whole or not there.

    An image shares its batch with the same numbers always, whichever are missing: its bits may depend on them.
    """
    accelerator = opened.run.accelerator
    precision = config.prior_generation_precision or _fast_precision(accelerator.device)
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("--prior_generation_precision fp16: needs a GPU; use bf16 or fp32")
    dtype = _PRECISIONS.get(precision)
    models = dataclasses.replace(opened.models, base_scheduler=opened.base_scheduler)
    size, missing = config.sample_batch_size, set(numbers)
    groups = sorted({number // size for number in numbers})[accelerator.process_index :: accelerator.num_processes]
    known: dict[str, Tensor] = {}
    with tqdm(total=len(groups) * size, desc="class images", disable=None if opened.run.is_main else True) as bar:
        for group in groups:
            batch = range(group * size, min((group + 1) * size, max(numbers) + 1))
            requests = [(str(config.class_prompt), opened.run.seed + number) for number in batch]
            with torch.autocast(accelerator.device.type, dtype=dtype) if dtype else nullcontext():
                latents = sample_latents(models, requests, settings, known=known)
            pictures = decode(models, latents, requests)  # in float32: half precision overflows in this VAE
            require_light(pictures, requests)
            for number, picture, (_, seed) in zip(batch, pictures, requests, strict=True):
                if number not in missing:
                    continue
                notes = PngImagePlugin.PngInfo()
                notes.add_text(RECORD, json.dumps({**wanted, "seed": seed, "precision": precision}))
                path = _path(Path(str(config.class_data_dir)), number)
                partial = path.with_suffix(".partial")
                Image.fromarray(picture).save(partial, format="PNG", pnginfo=notes)
                partial.replace(path)
            bar.update(len(batch))


def _fast_precision(device: torch.device) -> str:
    """Return the precision that a device samples fastest in; a CPU with AVX512-BF16 takes 0.6 of its time in bf16."""
    if device.type == "cpu":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    return "fp16" if device.type == "cuda" else "fp32"
