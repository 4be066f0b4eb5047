"""The parts of a Stable Diffusion: loaded, checked, moved between devices, put into a stock pipeline."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.errors import UsageError
from finetune.diffusion.config import ModelSource, NoiseConfig
from finetune.diffusion.families import STABLE_DIFFUSION, Family, check_family

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(kw_only=True)
class LoadedAdapters:
    """What adapters on a model change beside its weights; the one part of ``Models`` that changes.

    Attributes:
        scales: strength each was loaded with, by its name within peft, or by its new word.
        noise: schedule and prediction type of their training, or None if they do not tell.
        tokenizer: knows the words of the embeddings, too; None without any.
        scheduler: the model's, with the noise of their training; None if they do not tell.
        is_on: the tokenizer and the scheduler are in force.
    """

    scales: dict[str, float] = field(default_factory=dict)
    noise: NoiseConfig | None = None
    tokenizer: CLIPTokenizer | None = None
    scheduler: SchedulerMixin | None = None
    is_on: bool = False

    def clear(self) -> None:
        """Forget all of them; what they are in the weights stays."""
        self.scales.clear()
        self.noise, self.tokenizer, self.scheduler, self.is_on = None, None, None, False


@dataclass(frozen=True, kw_only=True)
class Models:
    """The parts of one Stable Diffusion.

    Attributes:
        base_tokenizer: as loaded.
        base_scheduler: diffusers', as loaded, or as it is trained.
        name: what the user typed.
        family: what its family has of its own.
        adapters: those on the model; shared with what ``dataclasses.replace`` makes of it, as the modules are.
    """

    base_tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    base_scheduler: SchedulerMixin
    name: str
    adapters: LoadedAdapters = field(default_factory=LoadedAdapters)
    family: Family = STABLE_DIFFUSION

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """What splits prompts; it knows the words of the adapters while they are on."""
        loaded = self.adapters
        return loaded.tokenizer if loaded.is_on and loaded.tokenizer is not None else self.base_tokenizer

    @property
    def scheduler(self) -> SchedulerMixin:
        """The noise schedule and prediction type in force; those the adapters learned while they are on."""
        loaded = self.adapters
        return loaded.scheduler if loaded.is_on and loaded.scheduler is not None else self.base_scheduler

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size_px(self) -> int:
        """Side of the square picture the U-Net was made for, in pixels."""
        return int(self.unet.config.sample_size) * self.vae_scale_factor


def load_models(
    source: str | ModelSource, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Models:
    """Load a Stable Diffusion 1.x or 2.x from a folder in diffusers' format or the hub, frozen, in eval mode.

    Only safetensors are read and no remote code is run. The scheduler, and with it the prediction type, is the model's.
    U-Net and tokenizer may come from elsewhere (``--non_ema_revision``, ``--tokenizer_name``).

    Raises:
        UsageError: there is no such model, it is not in this format, its weights are pickled, or the tokenizer does not
            fit its text encoder.
    """
    quiet_libraries()
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

    source = ModelSource(name=source) if isinstance(source, str) else source
    name = source.name
    check_folder(name)
    variant, revision = source.variant or _only_variant(Path(name)), source.unet_revision
    if revision is not None and Path(name).is_dir():
        raise UsageError(f"--non_ema_revision {revision}: {name} is a folder, which has no revisions")
    other: dict[str, Any] = {}
    try:
        if revision is not None:
            other["unet"] = UNet2DConditionModel.from_pretrained(
                name,
                subfolder="unet",
                revision=revision,
                variant=variant,
                cache_dir=source.cache_dir,
                torch_dtype=dtype,
                use_safetensors=True,
            )
        if source.tokenizer_name is not None:
            other["tokenizer"] = CLIPTokenizer.from_pretrained(source.tokenizer_name, cache_dir=source.cache_dir)
        pipeline = StableDiffusionPipeline.from_pretrained(
            name,
            **other,
            revision=source.revision,
            variant=variant,
            cache_dir=source.cache_dir,
            dtype=dtype,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"--pretrained_model_name_or_path {name}: cannot be loaded as a Stable Diffusion ({reason})"
        ) from error
    _check_tokenizer(pipeline.tokenizer, pipeline.text_encoder, source)
    models = Models(
        base_tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        vae=pipeline.vae,
        unet=pipeline.unet,
        base_scheduler=pipeline.scheduler,
        name=name,
    )
    for part in (models.text_encoder, models.vae, models.unet):
        part.requires_grad_(False).eval().to(device)
    return models


def _only_variant(folder: Path) -> str | None:
    """Return the variant, such as fp16, of a folder whose U-Net is stored in that one alone; else None."""
    names = [path.name.split(".") for path in (folder / "unet").glob("*.safetensors")]
    return names[0][1] if len(names) == 1 and len(names[0]) == 3 else None


def _check_tokenizer(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, source: ModelSource) -> None:
    """Refuse another tokenizer, or another length, that the text encoder cannot read; put the length into force."""
    name, max_length = source.tokenizer_name, source.tokenizer_max_length
    rows, places = text_encoder.get_input_embeddings().weight.shape[0], text_encoder.config.max_position_embeddings
    if name is not None and len(tokenizer) > rows:
        raise UsageError(f"--tokenizer_name {name}: has {len(tokenizer)} pieces, the text encoder knows {rows}")
    if max_length is not None:
        if max_length > places:
            raise UsageError(f"--tokenizer_max_length {max_length}: the text encoder reads {places} at most")
        tokenizer.model_max_length = max_length


def check_folder(name_or_path: str) -> None:
    """Refuse a path that is no folder in diffusers' format, before a library looks for it on the hub.

    Raises:
        UsageError: what is missing there.
    """
    path = Path(name_or_path)
    if path.is_file():
        raise UsageError(
            f"--pretrained_model_name_or_path {name_or_path}: is a file; a folder in diffusers' format is needed "
            "(convert with diffusers' scripts/convert_original_stable_diffusion_to_diffusers.py --to_safetensors)"
        )
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UsageError(f"--pretrained_model_name_or_path {name_or_path}: holds no model_index.json")
        check_family(path)
        if not list((path / "unet").glob("*.safetensors")):
            raise UsageError(
                f"--pretrained_model_name_or_path {name_or_path}: unet/ holds no safetensors file; pickled weights are "
                "not read (convert: load in diffusers, save_pretrained(..., safe_serialization=True))"
            )
        # As --skip_save_text_encoder saves it.
        if re.search(r'"text_encoder":\s*\[\s*null', (path / "model_index.json").read_text(encoding="utf-8")):
            raise UsageError(
                f"--pretrained_model_name_or_path {name_or_path}: has no text_encoder of its own; give it that of its "
                "base model, as its README.md does, and save_pretrained(...) the whole"
            )
    elif name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise UsageError(f"--pretrained_model_name_or_path {name_or_path}: there is no such folder")


def quiet_libraries() -> None:
    """Keep diffusers and transformers from writing bars and notices where nobody watches a terminal."""
    import transformers

    transformers.logging.set_verbosity_error()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        diffusers.utils.logging.disable_progress_bar()


def park(models: Models, *, keeps_text_encoder: bool, keeps_vae: bool, where: str | torch.device = "cpu") -> None:
    """Move what training does not read off its device; sampling brings it back for as long as it takes."""
    if not keeps_text_encoder:
        models.text_encoder.to(where)
    if not keeps_vae:
        models.vae.to(where)


@contextmanager
def together(models: Models) -> Iterator[None]:
    """Have all parts on the U-Net's device for a ``with`` block, and each back where it was."""
    parts = [(part, part.device) for part in (models.text_encoder, models.vae)]
    for part, _ in parts:
        part.to(models.unet.device)
    try:
        yield
    finally:
        for part, device in parts:
            part.to(device)


def as_pipeline(models: Models) -> StableDiffusionPipeline:
    """Return a stock pipeline that shares the modules; the safety checker is never run (it blacks out grey slices)."""
    quiet_libraries()
    import diffusers

    pipeline: StableDiffusionPipeline = getattr(diffusers, models.family.pipeline)(
        vae=models.vae,
        text_encoder=models.text_encoder,
        tokenizer=models.tokenizer,
        unet=models.unet,
        scheduler=models.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=None)
    return pipeline


@contextmanager
def evaluating(models: Models) -> Iterator[None]:
    """Switch dropout and the like off, and put each module back as it was: training may go on afterwards."""
    parts = [models.text_encoder, models.vae, models.unet]
    before = [(module, module.training) for part in parts for module in part.modules()]
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training
