"""Settings of the methods: what learns, and from which images beside a captioned folder. Without torch.

Spelled as in diffusers' example scripts; defaults are theirs unless the field says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from configs.checks import need_not_negative, need_positive, refuse
from configs.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the U-Net."""

    rank: int = 4
    """Rank of the adapters."""
    lora_alpha: float | None = None
    """The adapters' output is scaled by lora_alpha / rank; equal to rank if absent."""
    lora_targets: Literal["attention", "attention+resnet"] = "attention"
    """Layers that get adapters: the attention projections, or the ResNet convolutions too. Ours."""
    resnet_rank: int | None = None
    """Rank on the ResNet convolutions; rank if absent. Ours."""
    resnet_alpha: float | None = None
    """Alpha on the ResNet convolutions; in the ratio that lora_alpha has to rank if absent. Ours."""
    lora_dropout: float = 0.0
    """Share of the adapters' inputs set to 0 while training."""
    use_dora: bool = False
    """Learn the length of each weight column apart from its direction (DoRA); a step takes longer."""
    init_adapter: Path | None = None
    """Start from this adapter, a run folder or a LoRA file with the same layers, ranks and alphas. Ours."""

    def __post_init__(self) -> None:
        """Check ranges, and options that need another one."""
        need_positive(
            rank=self.rank, lora_alpha=self.lora_alpha, resnet_rank=self.resnet_rank, resnet_alpha=self.resnet_alpha
        )
        if not 0 <= self.lora_dropout < 1:
            raise refuse("lora_dropout", self.lora_dropout, "must be in [0, 1)")
        for flag, value in (("resnet_rank", self.resnet_rank), ("resnet_alpha", self.resnet_alpha)):
            if value is not None and self.lora_targets == "attention":
                raise refuse(flag, value, "needs --lora_targets attention+resnet")

    @property
    def alpha(self) -> float:
        """The alpha in force."""
        return float(self.rank if self.lora_alpha is None else self.lora_alpha)

    @property
    def alpha_on_resnet(self) -> float:
        """The alpha in force on the ResNet convolutions."""
        rank = self.resnet_rank or self.rank
        return float(self.alpha * rank / self.rank if self.resnet_alpha is None else self.resnet_alpha)


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Whether the text encoder learns."""

    train_text_encoder: bool = False
    """The text encoder learns, too."""
    text_encoder_lr: float | None = None
    """Learning rate of the text encoder; learning_rate if absent."""
    pre_compute_text_embeddings: bool = False
    """Encode every prompt once, before training. Always so while the text encoder is frozen."""

    def __post_init__(self) -> None:
        """Check ranges, and options that exclude one another."""
        need_positive(text_encoder_lr=self.text_encoder_lr)
        if self.text_encoder_lr is not None and not self.train_text_encoder:
            raise refuse("text_encoder_lr", self.text_encoder_lr, "needs --train_text_encoder")
        if self.pre_compute_text_embeddings and self.train_text_encoder:
            raise refuse("pre_compute_text_embeddings", True, "leave it out: with --train_text_encoder they change")


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """A running average of what learns, which is what the user gets."""

    use_ema: bool = False
    """Keep an exponential moving average of what learns; previews and saved weights are the average."""
    ema_decay: float = 0.9999
    """Largest decay of the average; it rises to it as (1 + step) / (10 + step). Ours as an option."""
    offload_ema: bool = False
    """Keep the average in the memory of the host."""
    foreach_ema: bool = False
    """Update the average with fused operations: a little faster on GPUs."""

    def __post_init__(self) -> None:
        """Check ranges, and options that exclude one another."""
        if not 0 <= self.ema_decay < 1:
            raise refuse("ema_decay", self.ema_decay, "must be in [0, 1)")
        if self.ema_decay != EmaConfig.ema_decay and not self.use_ema:
            raise refuse("ema_decay", self.ema_decay, "needs --use_ema")
        if self.offload_ema and self.foreach_ema:
            raise refuse("foreach_ema", True, "works on the device alone; leave out --offload_ema")


@dataclass(frozen=True, kw_only=True)
class InstanceConfig:
    """A few images of one subject."""

    instance_data_dir: Path
    """Folder with images of the subject; metadata.jsonl or .txt files beside them may hold captions."""
    instance_prompt: str | None = None
    """Caption of all of them, such as "a photo of sks dog"; captions of their own are read if absent."""

    @property
    def captions(self) -> tuple[str, ...]:
        """The caption of all images; none where they have captions of their own."""
        return () if self.instance_prompt is None else (self.instance_prompt,)


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Prior preservation: what the base model made of a class should stay (Ruiz et al. 2022, arXiv:2208.12242)."""

    with_prior_preservation: bool = False
    """Add the loss on prior images, or on the base model's own predictions."""
    prior_source: Literal["class_images", "base_prediction"] = "class_images"
    """Where the prior comes from: class images generated by the base model, or its predictions while training. Ours."""
    class_data_dir: Path | None = None
    """Folder of the class images; missing ones are generated into it before training."""
    class_prompt: str | None = None
    """Prompt of the class images, such as "a photo of dog"."""
    num_class_images: int = 100
    """Class images to have."""
    prior_prompts_file: Path | None = None
    """Probe file with the prompts of base_prediction; class_prompt is the one prompt if absent. Ours."""
    prior_loss_weight: float = 1.0
    """Weight of the mean prior loss beside the mean loss of the other images."""
    sample_batch_size: int = 4
    """Class images generated together, per process."""
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = None
    """Precision of generating class images; if absent, fp16 on a GPU, bf16 on a CPU with AVX512-BF16, else fp32."""

    def __post_init__(self) -> None:
        """Check ranges, and what each source needs."""
        need_positive(num_class_images=self.num_class_images, sample_batch_size=self.sample_batch_size)
        need_not_negative(prior_loss_weight=self.prior_loss_weight)
        if not self.with_prior_preservation:
            if self.prior_source != "class_images":
                raise refuse("prior_source", self.prior_source, "needs --with_prior_preservation")
            if self.prior_prompts_file is not None:
                raise refuse("prior_prompts_file", self.prior_prompts_file, "needs --with_prior_preservation")
            return
        if self.prior_source == "class_images":
            for flag, value in (("class_data_dir", self.class_data_dir), ("class_prompt", self.class_prompt)):
                if value is None:
                    raise refuse("with_prior_preservation", True, f"needs --{flag} (or --prior_source base_prediction)")
            if self.prior_prompts_file is not None:
                raise refuse("prior_prompts_file", self.prior_prompts_file, "is for --prior_source base_prediction")
        elif self.prior_prompts_file is None and self.class_prompt is None:
            raise refuse("prior_source", self.prior_source, "needs --prior_prompts_file or --class_prompt")

    @property
    def provenance(self) -> dict[str, object]:
        """What the weights say about it; nothing without it."""
        if not self.with_prior_preservation:
            return {}
        said = {"source": self.prior_source, "class_prompt": self.class_prompt, "weight": self.prior_loss_weight}
        return {"prior": said}


@dataclass(frozen=True, kw_only=True)
class NoPriorConfig:
    """Options of prior preservation, refused where nothing but the rows of a new word learns."""

    with_prior_preservation: bool = False
    """Refused: a prompt without the new word gives its rows no gradient."""
    prior_source: str | None = None
    """Refused."""
    class_data_dir: Path | None = None
    """Refused."""
    class_prompt: str | None = None
    """Refused."""
    num_class_images: int | None = None
    """Refused."""
    prior_prompts_file: Path | None = None
    """Refused."""
    prior_loss_weight: float | None = None
    """Refused."""
    sample_batch_size: int | None = None
    """Refused."""
    prior_generation_precision: str | None = None
    """Refused."""

    def __post_init__(self) -> None:
        """Say why."""
        for option in fields(self):
            if getattr(self, option.name) != option.default:
                raise ValueError(
                    f"--{option.name}: a class prompt does not hold the new word: its rows get no gradient from it, "
                    "and nothing else learns here that could be forgotten; leave it out (finetune/pivotal_tuning.py "
                    "takes a prior beside its adapters)"
                )


def check_folders(instance: InstanceConfig, prior: PriorConfig) -> None:
    """Refuse one folder for the subject and its class: generated images would be learned as the subject."""
    folder = prior.class_data_dir
    if folder is not None and folder.resolve() == instance.instance_data_dir.resolve():
        raise refuse("class_data_dir", folder, "is --instance_data_dir, too; class images need a folder of their own")


@dataclass(frozen=True, kw_only=True)
class SentenceConfig:
    """The sentences a new word is learned in; the templates of --learnable_property if neither is given."""

    instance_prompt: str | None = None
    """Caption of all images, with the new word in it, such as "A <dry-slice> of a carbon composite material". Ours."""
    caption_column: str | None = None
    """Key of metadata.jsonl that holds captions with the new word in them; `text` reads .txt files, too. Ours."""

    def __post_init__(self) -> None:
        """Refuse two sources of captions."""
        if self.instance_prompt is not None and self.caption_column is not None:
            raise refuse("caption_column", self.caption_column, "leave it out, or --instance_prompt")


@dataclass(frozen=True, kw_only=True)
class TokenConfig:
    """New words for the text encoder, and how they are learned (Gal et al. 2022, arXiv:2208.01618)."""

    placeholder_token: str
    """The new word, such as "<dry-slice>"; the tokenizer must not know it."""
    initializer_token: str
    """Known word whose rows the new ones start from."""
    num_vectors: int = 1
    """Rows the new word has."""
    learnable_property: Literal["object", "style"] = "object"
    """Templates around the new word: of an object, or of a style."""
    repeats: int = 100
    """How often an epoch shows each image."""
    save_steps: int = 500
    """Steps between copies of the rows, learned_embeds-steps-N.safetensors."""
    save_as_full_pipeline: bool = False
    """Save a pipeline folder that knows the word, too."""

    def __post_init__(self) -> None:
        """Check ranges."""
        need_positive(num_vectors=self.num_vectors, repeats=self.repeats, save_steps=self.save_steps)
        for flag in ("placeholder_token", "initializer_token"):
            if not getattr(self, flag).strip():
                raise refuse(flag, repr(getattr(self, flag)), "must be a word")


@dataclass(frozen=True, kw_only=True)
class PivotConfig:
    """When the word is done and the adapters begin."""

    token_steps: int | None = None
    """Steps in which the rows of the word learn alone; half of all if absent. The adapters learn after them."""
    token_lr: float | None = None
    """Learning rate of the rows; learning_rate if absent."""
    token_lr_after: float = 0.0
    """Their learning rate beside the adapters; 0: they rest."""

    def __post_init__(self) -> None:
        """Check ranges."""
        need_positive(token_steps=self.token_steps, token_lr=self.token_lr)
        need_not_negative(token_lr_after=self.token_lr_after)

    def steps_alone(self, total: int) -> int:
        """Return the updates before the pivot.

        Raises:
            UsageError: the adapters would never learn.
        """
        steps = self.token_steps or total // 2
        if not 0 < steps < total:
            raise UsageError(f"--token_steps {steps}: must be above 0 and below the {total} steps of the whole run")
        return steps


def check_pivotal(
    instance_data_dir: Path, tokens: TokenConfig, text_encoder: TextEncoderConfig, prior: PriorConfig
) -> None:
    """Refuse what does not fit a word that moves, or two files.

    Raises:
        ValueError: naming the option.
    """
    word = tokens.placeholder_token
    if tokens.save_as_full_pipeline:
        raise refuse("save_as_full_pipeline", True, "use finetune/export.py --to pipeline on the finished run")
    if text_encoder.pre_compute_text_embeddings:
        raise refuse("pre_compute_text_embeddings", True, "leave it out: they change with the rows of the word")
    if prior.class_prompt is not None and word in prior.class_prompt:
        raise refuse("class_prompt", prior.class_prompt, f"the base model does not know {word}; leave it out")
    folder = prior.class_data_dir
    if folder is not None and folder.resolve() == instance_data_dir.resolve():
        raise refuse("class_data_dir", folder, "is --instance_data_dir, too; class images need a folder of their own")
