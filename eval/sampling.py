"""The one place that turns (prompt, seed) into pixels.

Each picture starts from its own CPU generator, so it depends on its prompt, its seed and the settings alone, not on
what else is in the batch or on the device. Letters: N pictures, B batch, H rows, W columns, h x w latents.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from configs.errors import TisserandError, UsageError
from eval.config import SamplingConfig, each_scale
from finetune.core.models import (
    Models,
    adapter_files,
    as_pipeline,
    encode_prompts,
    file_hash,
    load_adapter,
    load_models,
    together,
)

Request = tuple[str, int]

_DECODED_PIXELS = 2 * 256 * 256
"""Pixels decoded at once, or two pictures: the decoder takes far more memory than the U-Net, and more at once
are slower on a CPU."""
_SCHEDULERS = {
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "pndm": PNDMScheduler,
    "ddpm": DDPMScheduler,
}


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A model with its adapters on.

    Attributes:
        models: the parts.
        adapters: name, hash and scale of each adapter's file; a run that learned a word and a LoRA has two.
        provenances: what each adapter says of its training; empty dictionaries for foreign files.
    """

    models: Models
    adapters: list[dict[str, object]]
    provenances: list[dict[str, object]]


def load_tuned(name_or_path: str, adapters: Sequence[Path] = (), scales: Sequence[float] = (1.0,)) -> Tuned:
    """Load a model and put adapters on it, on the GPU if there is one."""
    models = load_models(name_or_path, device="cuda" if torch.cuda.is_available() else "cpu")
    return put_on(models, adapters, scales)


def put_on(models: Models, adapters: Sequence[Path], scales: Sequence[float] = (1.0,)) -> Tuned:
    """Put adapters on a loaded model, changing it in place; one scale for all, or one each."""
    provenances, described = [], []
    for adapter, scale in zip(adapters, each_scale(adapters, scales), strict=True):
        provenances.append(load_adapter(models, adapter, scale=scale))
        files = adapter_files(adapter)
        names = [adapter] if len(files) == 1 else files
        described += [
            {"name": str(name), "hash": file_hash(file), "scale": scale}
            for name, file in zip(names, files, strict=True)
        ]
    return Tuned(models=models, adapters=described, provenances=provenances)


def sample(
    models: Models,
    requests: Sequence[Request],
    settings: SamplingConfig,
    *,
    progress: str | None = None,
    known: dict[str, Tensor] | None = None,
) -> np.ndarray:
    """Generate one picture per (prompt, seed), batched across prompts.

    Args:
        models: the parts of the pipeline, with whatever adapter is active.
        requests: (prompt, seed) of each picture.
        settings: sampler, guidance, size and batch size.
        progress: name of the progress bar; None for no bar. It stays silent off a terminal.
        known: embeddings by prompt that an earlier call left here, used again and then replaced by those of this call:
            a list of requests in many calls, prompt after prompt, has each prompt encoded once.

    Returns:
        (N, H, W, 3) uint8.

    Raises:
        TisserandError: a picture is not finite, naming its prompt and seed.
    """
    latents = sample_latents(models, requests, settings, progress=progress, known=known)
    return decode(models, latents, requests, batch_size=settings.batch_size)


@torch.no_grad()
def sample_latents(
    models: Models,
    requests: Sequence[Request],
    settings: SamplingConfig,
    *,
    progress: str | None = None,
    known: dict[str, Tensor] | None = None,
    begin_with: Sequence[Image.Image] = (),
) -> Tensor:
    """Generate scaled latents, (N, 4, h, w), as ``sample`` does before decoding.

    Args:
        models: as in ``sample``.
        requests: as in ``sample``.
        settings: as in ``sample``.
        progress: as in ``sample``.
        known: as in ``sample``.
        begin_with: a picture for each request, in the size asked for, that sampling starts from after half the steps
            (SDEdit, Meng et al. 2021, arXiv:2108.01073); none: from noise.
    """
    if not requests:
        raise ValueError("no (prompt, seed) was requested")
    height, width = picture_size(models, settings)
    pipeline = as_pipeline(models)
    pipeline.scheduler = make_scheduler(models.scheduler, settings.scheduler)
    size: dict[str, object] = {"height": height, "width": width}
    if begin_with:
        pipeline = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    batches = []
    with evaluating(models), together(models), warnings.catch_warnings():
        # diffusers' samplers turn tensors into arrays in a way NumPy 2 still allows but comments on.
        warnings.filterwarnings("ignore", message="__array__ implementation doesn't accept a copy keyword")
        embeds = _embeddings(models, {prompt for prompt, _ in requests} | {settings.negative_prompt}, known)
        starts = range(0, len(requests), settings.batch_size)
        for start in tqdm(starts, desc=progress, unit="batch", disable=True if progress is None else None):
            batch = requests[start : start + settings.batch_size]
            output = pipeline(
                prompt_embeds=torch.stack([embeds[prompt] for prompt, _ in batch]),
                negative_prompt_embeds=torch.stack([embeds[settings.negative_prompt]] * len(batch)),
                generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in batch],
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                output_type="latent",
                **({"image": list(begin_with[start : start + len(batch)]), "strength": 0.5} if begin_with else size),
            )
            batches.append(output.images)
    return torch.cat(batches)


@torch.no_grad()
def decode(models: Models, latents: Tensor, requests: Sequence[Request], *, batch_size: int = 16) -> np.ndarray:
    """Turn scaled latents (N, 4, h, w) into pictures (N, H, W, 3) uint8, few at a time; raise if one is not finite."""
    pictures = []
    pixels_each = latents.shape[-2] * latents.shape[-1] * models.vae_scale_factor**2
    batch_size = min(batch_size, max(2, _DECODED_PIXELS // pixels_each))
    with evaluating(models), together(models):
        for start in range(0, len(latents), batch_size):
            batch = (
                latents[start : start + batch_size].to(models.vae.device, models.vae.dtype)
                / models.vae.config.scaling_factor
            )
            pixels = models.vae.decode(batch).sample.float()  # (B, 3, H, W) in about [-1, 1]
            finite = pixels.isfinite().flatten(1).all(1).tolist()
            if not all(finite):
                prompt, seed = requests[start + finite.index(False)]
                raise TisserandError(
                    f"the picture of '{prompt}' with seed {seed} is not finite; the weights have diverged, or the "
                    "number format is too small for this model: try float32, or an earlier checkpoint"
                )
            levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            pictures.append(levels.permute(0, 2, 3, 1).contiguous().cpu().numpy())  # or whoever saves them must copy
    return np.concatenate(pictures)


def _embeddings(models: Models, prompts: set[str], known: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the embeddings (L, D) of prompts, taking those that are known from there, and leaving these there."""
    known = {} if known is None else known
    if missing := sorted(prompts - known.keys()):
        known |= zip(missing, encode_prompts(models, missing), strict=True)
    for prompt in known.keys() - prompts:
        del known[prompt]
    return known


def require_light(pictures: np.ndarray, requests: Sequence[Request]) -> None:
    """Refuse a picture whose every pixel is 0: a blanked or broken result, never a slice.

    Raises:
        TisserandError: naming the prompt and seed of the first one.
    """
    dark = np.flatnonzero(~pictures.reshape(len(pictures), -1).any(axis=1))
    if dark.size:
        prompt, seed = requests[dark[0]]
        raise TisserandError(
            f"the picture of '{prompt}' with seed {seed} is all black ({dark.size} of {len(pictures)} are); the model "
            "or its number format is broken for this prompt: try float32, or a lower --guidance_scale"
        )


def make_scheduler(trained: SchedulerMixin, name: str) -> SchedulerMixin:
    """Set up a sampler by name on the noise schedule and prediction type the model was trained with.

    Raises:
        UsageError: the schedule ends in pure noise, and the sampler does not know such schedules.
    """
    if name == "model":
        return type(trained).from_config(trained.config)
    if name == "pndm" and trained.config.get("rescale_betas_zero_snr"):
        raise UsageError("--scheduler pndm: does not know the model's zero-terminal schedule; use dpmsolver++ or ddim")
    # As in the folders of Stable Diffusion itself: the warm-up of PNDM costs steps and needs at least four.
    extra = {"skip_prk_steps": True} if name == "pndm" else {}
    return _SCHEDULERS[name].from_config(trained.config, **extra)


def picture_size(models: Models, settings: SamplingConfig) -> tuple[int, int]:
    """Return (height, width) in pixels: as set, else the model's own size."""
    return settings.height or models.size_px, settings.width or models.size_px


def contact_sheet(
    images: np.ndarray | Sequence[np.ndarray],
    rows: int,
    columns: int,
    labels: Sequence[str] = (),
    headers: Sequence[str] = (),
) -> Image.Image:
    """Lay pictures out in a grid, row by row, with captions.

    Args:
        images: ``rows * columns`` pictures of one shape, (H, W, 3) or (H, W), uint8.
        rows: pictures from top to bottom.
        columns: pictures from left to right.
        labels: one per row, written above it, or one per picture, written above each; or none.
        headers: one per column, written once at the top; or none.

    Small pictures are enlarged by whole pixels, large ones reduced, so that a cell is about 128 to 384 px.
    """
    if len(images) != rows * columns:
        raise ValueError(f"{len(images)} pictures do not fill {rows} x {columns} cells")
    if len(labels) not in {0, rows, rows * columns} or len(headers) not in {0, columns}:
        raise ValueError(f"labels: 0, {rows} or {rows * columns}, not {len(labels)}; headers: 0 or {columns}")
    cells = [_cell(image) for image in images]
    width, height = cells[0].size
    gap, size = 6, 13
    font = ImageFont.load_default(size=size)
    line = size + 5
    top = gap + (line if headers else 0)
    pitch_y = height + gap + (line if labels else 0)
    sheet = Image.new("RGB", (gap + columns * (width + gap), top + rows * pitch_y), "white")
    draw = ImageDraw.Draw(sheet)
    for column, header in enumerate(headers):
        draw.text((gap + column * (width + gap), gap), _fit(header, font, width), fill="black", font=font)
    for index, cell in enumerate(cells):
        row, column = divmod(index, columns)
        x, y = gap + column * (width + gap), top + row * pitch_y
        if len(labels) == len(cells) or (labels and column == 0):
            one_each = len(labels) == len(cells)
            room = width if one_each else columns * (width + gap) - gap
            draw.text((x, y), _fit(labels[index if one_each else row], font, room), fill="black", font=font)
        sheet.paste(cell, (x, y + (line if labels else 0)))
    return sheet


def _cell(image: np.ndarray) -> Image.Image:
    """Bring one picture to the size of a cell."""
    picture = Image.fromarray(image).convert("RGB")
    longest = max(picture.size)
    if longest <= 96:
        return picture.resize([side * (128 // longest) for side in picture.size], Image.Resampling.NEAREST)
    if longest > 384:
        return picture.resize([max(1, round(side * 384 / longest)) for side in picture.size], Image.Resampling.LANCZOS)
    return picture


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cut a caption to the width it has, marking the cut."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


@contextmanager
def evaluating(models: Models) -> Iterator[None]:
    """Switch dropout and the like off, and put each module back as it was: training may go on afterwards."""
    modules = [models.text_encoder, models.vae, models.unet]
    before = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, was_training in zip(modules, before, strict=True):
            module.train(was_training)
