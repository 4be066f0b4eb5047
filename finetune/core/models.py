"""Load the parts of a Stable Diffusion, put adapters on them, and name them by their content.

Shapes: prompts N, token places L, embedding width D, latents (B, 4, h, w).
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from configs.errors import InputError, UsageError
from finetune.core.config import NoiseConfig
from finetune.core.noise import trained_scheduler

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The file name diffusers looks for."""
EMBEDDINGS_FILE = "learned_embeds.safetensors"
"""The file name diffusers looks for."""
PROVENANCE_KEY = "provenance"
"""Key of the safetensors metadata that holds what ``provenance.json`` holds."""
_DOWN = ("lora_A.", "lora.down.", "lora_down.", "lora_linear_layer.down.")  # one tensor per adapted layer, by dialect
_PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")


@dataclass(kw_only=True)
class Models:
    """The parts of one Stable Diffusion.

    Attributes:
        scheduler: diffusers', as loaded; with adapters on, its schedule and prediction type are those they learned.
        name: what the user typed.
        base_scheduler: as loaded.
        adapter_noise: schedule and prediction type of the adapters' training, or None if they do not tell.
        adapter_scales: strength each adapter was loaded with, by its name within peft, or by its new word.
        base_tokenizer: as loaded; ``tokenizer`` knows the words of the embeddings, too, while they are on.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    name: str
    base_scheduler: SchedulerMixin = field(init=False)
    adapter_noise: NoiseConfig | None = field(init=False, default=None)
    adapter_scales: dict[str, float] = field(init=False, default_factory=dict)
    base_tokenizer: CLIPTokenizer = field(init=False)
    tuned_tokenizer: CLIPTokenizer = field(init=False)

    def __post_init__(self) -> None:
        """Keep what the base was trained with, and which words it knows."""
        self.base_scheduler = self.scheduler
        self.base_tokenizer = self.tuned_tokenizer = self.tokenizer

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size_px(self) -> int:
        """Side of the square picture the U-Net was made for, in pixels."""
        return int(self.unet.config.sample_size) * self.vae_scale_factor


class Denoiser(nn.Module):
    """Text encoder and U-Net as the one module that is trained, whatever of it learns."""

    def __init__(self, text_encoder: nn.Module | None, unet: nn.Module) -> None:
        """Take the modules as they are; without a text encoder where prompts come as embeddings."""
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def train(self, mode: bool = True) -> Denoiser:
        """Put the parts that learn into training mode, and no other: dropout in a frozen one is noise for nothing."""
        self.training = mode
        for part in filter(None, (self.text_encoder, self.unet)):
            part.train(mode and any(parameter.requires_grad for parameter in part.parameters()))
        return self

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        distinct: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Predict epsilon or v, whichever the U-Net learned.

        Args:
            noisy_latents: (B, 4, h, w), scaled.
            timesteps: (B,) int64, in [0, number of training timesteps).
            prompt_embeds: (B, L, D) embeddings, or (B, L) int64 token ids for the text encoder to read first.
            distinct: of token ids, as in ``batches.Batch``: what is equal is read once, and gradients add up.

        Returns:
            (B, 4, h, w).
        """
        if not prompt_embeds.is_floating_point():
            if self.text_encoder is None:
                raise TypeError("token ids come without a text encoder to read them")
            if distinct is None:
                prompt_embeds = self.text_encoder(prompt_embeds)[0]
            else:
                first, which = distinct
                prompt_embeds = self.text_encoder(prompt_embeds[first])[0][which]
        return self.unet(noisy_latents, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]


def load_models(
    name_or_path: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    unet_revision: str | None = None,
    tokenizer_name: str | None = None,
    tokenizer_max_length: int | None = None,
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

    check_folder(name_or_path)
    variant = variant or _only_variant(Path(name_or_path))
    if unet_revision is not None and Path(name_or_path).is_dir():
        raise UsageError(f"--non_ema_revision {unet_revision}: {name_or_path} is a folder, which has no revisions")
    other: dict[str, Any] = {}
    try:
        if unet_revision is not None:
            other["unet"] = UNet2DConditionModel.from_pretrained(
                name_or_path,
                subfolder="unet",
                revision=unet_revision,
                variant=variant,
                cache_dir=cache_dir,
                torch_dtype=dtype,
                use_safetensors=True,
            )
        if tokenizer_name is not None:
            other["tokenizer"] = CLIPTokenizer.from_pretrained(tokenizer_name, cache_dir=cache_dir)
        pipeline = StableDiffusionPipeline.from_pretrained(
            name_or_path,
            **other,
            revision=revision,
            variant=variant,
            cache_dir=cache_dir,
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
            f"--pretrained_model_name_or_path {name_or_path}: cannot be loaded as a Stable Diffusion ({reason})"
        ) from error
    _check_tokenizer(pipeline.tokenizer, pipeline.text_encoder, tokenizer_name, tokenizer_max_length)
    models = Models(
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        vae=pipeline.vae,
        unet=pipeline.unet,
        scheduler=pipeline.scheduler,
        name=name_or_path,
    )
    for part in (models.text_encoder, models.vae, models.unet):
        part.requires_grad_(False).eval().to(device)
    return models


def _only_variant(folder: Path) -> str | None:
    """Return the variant, such as fp16, of a folder whose U-Net is stored in that one alone; else None."""
    names = [path.name.split(".") for path in (folder / "unet").glob("*.safetensors")]
    return names[0][1] if len(names) == 1 and len(names[0]) == 3 else None


def _check_tokenizer(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, name: str | None, max_length: int | None
) -> None:
    """Refuse another tokenizer, or another length, that the text encoder cannot read; put the length into force."""
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


def tokenize(models: Models, prompts: Sequence[str]) -> Tensor:
    """Return the token ids (N, L) of prompts, padded to the length of the text encoder.

    A learned word stands for all its rows, as in diffusers' own pipelines.

    Raises:
        UsageError: a prompt is longer than the text encoder reads; nothing is cut in silence.
    """
    from diffusers.loaders import TextualInversionLoaderMixin

    length = models.tokenizer.model_max_length
    texts = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), models.tokenizer)
    ids = models.tokenizer(texts, padding="max_length", max_length=length, truncation=False).input_ids
    for prompt, row in zip(prompts, ids, strict=True):
        if len(row) > length:
            raise UsageError(f"prompt '{prompt}' has {len(row)} tokens; the text encoder reads {length}: shorten it")
    return torch.tensor(ids, dtype=torch.int64)


@torch.no_grad()
def encode_prompts(models: Models, prompts: Sequence[str]) -> Tensor:
    """Return the embeddings (N, L, D) of prompts, each different one encoded once, on the U-Net's device.

    Raises:
        UsageError: a prompt is longer than the text encoder reads.
    """
    unique = list(dict.fromkeys(prompts))
    ids = tokenize(models, unique).to(models.text_encoder.device)
    # One at a time: what a prompt becomes must not depend on which others were asked for.
    embeds = torch.cat([models.text_encoder(row[None])[0] for row in ids])
    index = {prompt: place for place, prompt in enumerate(unique)}
    return embeds[[index[prompt] for prompt in prompts]].to(models.unet.device)


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
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
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


def load_adapter(models: Models, path: Path, *, scale: float = 1.0) -> dict[str, object]:
    """Put what a run learned on a model: a LoRA, the rows of a new word, or both; several may be loaded.

    Args:
        models: changed in place.
        path: a run folder, or a ``.safetensors`` file: a LoRA in diffusers' or kohya's layout, or an embedding (Textual
            Inversion), told apart by what is in it.
        scale: strength of a LoRA; an embedding is there unless it is 0. 0 gives the base model exactly.

    Returns:
        The provenance written by the training run; empty for files of other programs.

    Raises:
        InputError: no such file, not safetensors, or it does not fit this model or the adapters on it.
    """
    provenance: dict[str, object] = {}
    for file in adapter_files(path):
        provenance |= _load_file(models, path, file, scale)
    return provenance


def fold_adapters(models: Models) -> None:
    """Add the adapters in force to the weights they stand beside, and take them off; equal within rounding.

    A fifth of a LoRA's sampling time. Not for models whose adapters are switched or rescaled later.
    """
    pipeline = as_pipeline(models)
    if any(getattr(part, "peft_config", None) for part in (models.unet, models.text_encoder)):
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()


def adapter_files(path: Path) -> list[Path]:
    """Return the weights that ``--adapter PATH`` stands for: the file itself, or those of a run folder.

    Raises:
        InputError: there are none.
    """
    files = (
        [path / name for name in (EMBEDDINGS_FILE, LORA_FILE) if (path / name).is_file()] if path.is_dir() else [path]
    )
    if (path / "model_index.json").is_file() and not files:
        raise InputError(
            f"--adapter {path}: is a whole pipeline; give it as --pretrained_model_name_or_path {path}, and what "
            "it came from as --base where a comparison needs it"
        )
    if not files:
        raise InputError(f"--adapter {path}: there is no {LORA_FILE} or {EMBEDDINGS_FILE} in it")
    for file in files:
        if not file.is_file():
            raise InputError(f"--adapter {path}: there is no {file.name}")
        if file.suffix != ".safetensors":
            raise InputError(f"--adapter {path}: only .safetensors files are read, never pickles")
    return files


def _load_file(models: Models, path: Path, file: Path, scale: float) -> dict[str, object]:
    """Load one file by its content and return the provenance it carries."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as reader:
            metadata, keys = reader.metadata() or {}, list(reader.keys())
            if not any(mark in key for key in keys for mark in _DOWN):
                if len(keys) != 1:
                    raise InputError(f"--adapter {path}: {file.name} holds neither a LoRA nor the rows of one word")
                rows: Tensor | None = reader.get_tensor(keys[0])
            else:
                rows = None
        if rows is not None:
            # Other programs name the word by the file.
            _load_word(models, path, file.stem if keys[0] == "emb_params" else keys[0], rows, scale)
        else:
            _load_lora(models, path, file, keys, scale)
    except (SafetensorError, OSError, ValueError, RuntimeError, RuntimeWarning, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        # Diffusers' reader loses alphas that differ between attention layers; here that is an error.
        remedy = "; python finetune/export.py --to diffusers rewrites it" if "alpha_pattern" in reason else ""
        raise InputError(f"--adapter {path}: does not load into {models.name} ({reason}){remedy}") from error
    provenance = json.loads(metadata.get(PROVENANCE_KEY, "{}"))
    _keep_noise(models, path, provenance.get("scheduler", {}))
    _set_scheduler(models, is_on=any(models.adapter_scales.values()))
    return provenance


def _keep_noise(models: Models, path: Path, trained: dict[str, Any]) -> None:
    """Keep the schedule an adapter was trained with, from the scheduler's config in its provenance."""
    kind, before = trained.get("prediction_type"), models.adapter_noise
    if kind is None:
        return
    try:
        noise = NoiseConfig(prediction_type=kind, rescale_betas_zero_snr=trained.get("rescale_betas_zero_snr") is True)
    except ValueError as error:
        raise InputError(f"--adapter {path}: its scheduler makes no sense ({error})") from error
    if before is not None and before != noise:
        told = [f"{one.prediction_type}{', zero-terminal' * one.rescale_betas_zero_snr}" for one in (noise, before)]
        raise InputError(f"--adapter {path}: predicts {told[0]}, an adapter before it {told[1]}")
    models.adapter_noise = noise


def _load_lora(models: Models, path: Path, file: Path, keys: Sequence[str], scale: float) -> None:
    """Put a LoRA on the U-Net and the text encoder, whichever it has layers for."""
    name = f"adapter_{len(models.adapter_scales)}"
    with warnings.catch_warnings():
        # peft warns that an adapter is there already: here that is meant.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        # Layers of the file that found no place would be left out of the pictures without a word.
        warnings.filterwarnings("error", message="While injecting the PEFT adapters, an inconsistency")
        as_pipeline(models).load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    written = sum(any(mark in key for mark in _DOWN) for key in keys)
    placed = sum(name in layer.scaling for layer in _adapted_layers(models))
    if not placed or placed < written:
        raise InputError(f"--adapter {path}: {placed} of its {written} layers found a place in {models.name}")
    models.adapter_scales[name] = scale
    _scale_one(models, name, scale)


def _load_word(models: Models, path: Path, word: str, rows: Tensor, scale: float) -> None:
    """Teach the tokenizer a word of one or several rows, (D,) or (N, D), through diffusers' own reader."""
    width = models.text_encoder.get_input_embeddings().weight.shape[1]
    if not rows.is_floating_point() or rows.ndim not in (1, 2) or rows.shape[-1] != width or not rows.numel():
        raise InputError(
            f"--adapter {path}: '{word}' has shape {tuple(rows.shape)}; rows of {width} numbers fit {models.name}"
        )
    if word in models.adapter_scales:
        raise InputError(f"--adapter {path}: an adapter before it holds '{word}', too")
    models.adapter_scales[word] = scale
    if not scale:
        return
    if models.tuned_tokenizer is models.base_tokenizer:
        models.tuned_tokenizer = copy.deepcopy(models.base_tokenizer)
    models.tokenizer = models.tuned_tokenizer
    as_pipeline(models).load_textual_inversion({word: rows})
    models.text_encoder.requires_grad_(False)


def set_adapter_scale(models: Models, scale: float) -> None:
    """Set the strength of all adapters, relative to the one each was loaded with, for sampling.

    0 gives the base model exactly, new words unknown again; 1 what was loaded.
    """
    names = {*getattr(models.unet, "peft_config", {}), *getattr(models.text_encoder, "peft_config", {})}
    for name in names:
        _scale_one(models, name, scale * models.adapter_scales.get(name, 1.0))
    models.tokenizer = models.tuned_tokenizer if scale else models.base_tokenizer
    _set_scheduler(models, is_on=bool(scale))


def _set_scheduler(models: Models, *, is_on: bool) -> None:
    """Let samplers read the U-Net's output as what it now is: the adapters' training decides, unless they are off."""
    noise = models.adapter_noise if is_on else None
    models.scheduler = trained_scheduler(models.base_scheduler, noise or NoiseConfig())


def _scale_one(models: Models, name: str, scale: float) -> None:
    """Set the strength of one adapter, relative to its alpha / rank, and leave out of the sum what has none."""
    for layer in _adapted_layers(models):
        if name in layer.scaling:
            layer.set_scale(name, scale)
            active = [other for other, strength in layer.scaling.items() if strength != 0]
            layer.enable_adapters(bool(active))
            layer.set_adapter(active, inference_mode=True)


def _adapted_layers(models: Models) -> list[Any]:
    """Return the layers that carry adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = (models.unet, models.text_encoder)
    return [module for part in parts for module in part.modules() if isinstance(module, BaseTunerLayer)]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_hash(name_or_path: str, *, revision: str | None = None, cache_dir: Path | None = None) -> str:
    """Return a SHA-256 over the names and contents of a model's parts: weights, configs, tokenizer files.

    A folder and its copy under another name have the same hash. A hub model is looked up among the downloaded ones.

    Raises:
        UsageError: the model is neither a folder nor a downloaded hub model.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=True)
            )
        except (OSError, ValueError) as error:
            raise UsageError(f"--pretrained_model_name_or_path {name_or_path}: there is no such folder") from error
    files = [
        path
        for part in _PARTS
        for path in (folder / part).glob("*")
        if path.suffix in {".safetensors", ".json", ".txt"}
    ]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{file_hash(path)}\n".encode())
    return digest.hexdigest()


def model_provenance(models: Models, revision: str | None = None, cache_dir: Path | None = None) -> dict[str, str]:
    """Return what a weights file says about its base model: the name as typed, and the hash."""
    return {"name": models.name, "hash": model_hash(models.name, revision=revision, cache_dir=cache_dir)}
