"""Settings of the model to start from, of uploading, and those that are refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from configs.checks import need_positive
from finetune.diffusion.config import ModelSource


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The Stable Diffusion to start from."""

    pretrained_model_name_or_path: str
    """Folder in diffusers' format (safetensors), or a model id of the Hugging Face hub."""
    revision: str | None = None
    """Revision of the hub model."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    non_ema_revision: str | None = None
    """Revision of the hub model whose U-Net learns, where another one than `revision` holds weights not averaged."""
    tokenizer_name: str | None = None
    """Tokenizer, a folder or a model id, if it is not that of the model."""
    tokenizer_max_length: int | None = None
    """Tokens of a prompt, at most those the text encoder reads; the tokenizer's own if absent."""
    cache_dir: Path | None = None
    """Where models of the hub are kept; the library's own place if absent."""

    def __post_init__(self) -> None:
        """Check ranges."""
        need_positive(tokenizer_max_length=self.tokenizer_max_length)

    @property
    def source(self) -> ModelSource:
        """The same, as the model is loaded."""
        return ModelSource(
            name=self.pretrained_model_name_or_path,
            revision=self.revision,
            variant=self.variant,
            unet_revision=self.non_ema_revision,
            tokenizer_name=self.tokenizer_name,
            tokenizer_max_length=self.tokenizer_max_length,
            cache_dir=self.cache_dir,
        )


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Uploading what a run leaves to the Hugging Face hub."""

    push_to_hub: bool = False
    """Upload weights, card and pictures when the run is finished."""
    hub_model_id: str | None = None
    """Repository to upload to, USER/NAME; your own one named like output_dir if absent."""
    hub_token: str | None = None
    """Access token; that of `hf auth login` if absent. It is not written to any file."""


_REFUSED = {
    "no_safe_serialization": "weights are written as safetensors alone, never as pickles, which can run code",
    "dream_training": "not in this version: DREAM doubles the cost of a step for a gain shown on other data",
    "dream_detail_preservation": "not in this version: it belongs to --dream_training",
    "class_labels_conditioning": "a Stable Diffusion 1.x or 2.x U-Net has no class labels",
    "text_encoder_use_attention_mask": "Stable Diffusion's text encoder was trained without; sampling uses none either",
}


@dataclass(frozen=True, kw_only=True)
class RefusedConfig:
    """Options of diffusers' example scripts that are refused, each with its reason."""

    no_safe_serialization: bool = False
    """Refused."""
    dream_training: bool = False
    """Refused."""
    dream_detail_preservation: float | None = None
    """Refused."""
    class_labels_conditioning: str | None = None
    """Refused."""
    text_encoder_use_attention_mask: bool = False
    """Refused."""

    def __post_init__(self) -> None:
        """Refuse what is given."""
        for flag, reason in _REFUSED.items():
            value = getattr(self, flag)
            if value is not None and value is not False:
                raise ValueError(f"--{flag}: {reason}")
