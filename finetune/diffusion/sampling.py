"""The one place that turns (prompt, seed) into pixels.

Each picture starts from its own CPU generator, so it depends on its prompt, its seed and the settings alone, not on
what else is in the batch or on the device. Shapes: N is the number of pictures, B that of a
batch, H x W their pixels, h x w their latents.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import diffusers
import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from configs.errors import TisserandError, UsageError
from finetune.diffusion.config import SamplingConfig
from finetune.diffusion.models import Models, as_pipeline, evaluating, together
from finetune.diffusion.text import encode_prompts
from finetune.diffusion.vae import Request, decode

_SCHEDULERS = {
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "pndm": PNDMScheduler,
    "ddpm": DDPMScheduler,
}


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
        pipeline = getattr(diffusers, models.family.img2img)(**pipeline.components, requires_safety_checker=False)
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
