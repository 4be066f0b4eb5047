"""Settings shared by the recipes: frozen values, without torch, spelled as in diffusers' example scripts.

A recipe composes those it honours, and those of its method in ``method_config``; every field becomes a flag and a YAML
key of the same name. Defaults are those of diffusers' ``train_text_to_image_lora.py`` unless the field says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Literal

from configs.checks import need_not_negative, need_positive, refuse


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised."""

    snr_gamma: float | None = None
    """Min-SNR weighting with this limit (5.0 is the paper's); none if absent."""

    def __post_init__(self) -> None:
        """Check ranges."""
        need_positive(snr_gamma=self.snr_gamma)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: how long, how fast, where to, and how to go on."""

    output_dir: Path
    """Run folder. The same command continues a run that holds a checkpoint."""
    overwrite: bool = False
    """Start anew in a folder that holds a run; its checkpoints, pictures and weights go. Ours."""
    seed: int | None = None
    """Seed of every random draw; drawn once and written to config.yaml if absent."""
    train_batch_size: int | Literal["auto"] = 16
    """Images per process in one forward pass; auto: as many as memory holds, which needs --global_batch_size."""
    global_batch_size: int | None = None
    """Images per optimizer update, over all processes; how many forward passes that takes follows from it. Ours."""
    num_train_epochs: int = 100
    """Passes over the images; max_train_steps wins."""
    max_train_steps: int | None = None
    """Optimizer updates in all."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer update."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    learning_rate: float = 1e-4
    """Learning rate before the schedule's factor."""
    scale_lr: bool = False
    """Multiply the learning rate by the images per update (accumulation x batch x processes)."""
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = "constant"
    """Schedule of the learning rate, by diffusers' names."""
    lr_warmup_steps: int = 500
    """Steps over which the learning rate rises from 0; `constant` has no warm-up."""
    lr_num_cycles: int = 1
    """Restarts of `cosine_with_restarts`."""
    lr_power: float = 1.0
    """Power of `polynomial`."""
    optimizer: Literal["adamw", "adafactor", "prodigy"] = "adamw"
    """Optimizer: adafactor needs less memory, prodigy finds the learning rate (give --learning_rate 1). Ours."""
    use_8bit_adam: bool = False
    """Hold AdamW's moments in 8 bits; needs bitsandbytes and a GPU."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.999
    """Decay of AdamW's second moment."""
    adam_weight_decay: float = 1e-2
    """AdamW's weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: they are left as they are."""
    fused_backward: bool = False
    """Step each weight as soon as its gradient is there, and free it: less memory. For one forward pass an update, in
    one process, without clipping (--max_grad_norm 0). Ours."""
    compile: Literal["no", "auto", "yes"] = "no"
    """Compile the U-Net's repeated blocks within the first steps; auto: where it saves more than it costs. Ours."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the forward pass; what learns is float32 in any case. From `accelerate launch` if absent."""
    allow_tf32: bool = False
    """Let matrix products use TF32 on NVIDIA GPUs."""
    enable_xformers_memory_efficient_attention: bool = False
    """Compute attention with xformers, which must be there with a GPU; by default PyTorch's own is used, as frugal."""
    set_grads_to_none: bool = True
    """Free the gradients after each update, which takes less memory, instead of zeroing them."""
    dry_run: bool = False
    """Check everything, print the memory estimate, and stop before the first step. Ours."""
    checkpointing_steps: int = 500
    """Steps between checkpoints."""
    checkpoints_total_limit: int | None = None
    """Checkpoints to keep; all if absent. The newest is kept with 0, too."""
    resume_from_checkpoint: str | None = None
    """`latest` (what happens anyway), the name of a checkpoint in output_dir, or the path of one."""
    logging_steps: int = 10
    """Steps between lines of metrics.jsonl. Ours."""
    report_to: str = "tensorboard"
    """Tracker: tensorboard, wandb, comet_ml, all, or none."""
    tracker_project_name: str = "tisserand"
    """Name of the project in the trackers."""
    logging_dir: str = "logs"
    """Folder of the trackers, within output_dir."""
    local_rank: int | None = None
    """Place of this process on its machine; the launcher says so, and it wins."""

    def __post_init__(self) -> None:
        """Check ranges."""
        need_positive(
            train_batch_size=None if self.train_batch_size == "auto" else self.train_batch_size,
            global_batch_size=self.global_batch_size,
            num_train_epochs=self.num_train_epochs,
            max_train_steps=self.max_train_steps,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            learning_rate=self.learning_rate,
            adam_epsilon=self.adam_epsilon,
            checkpointing_steps=self.checkpointing_steps,
            logging_steps=self.logging_steps,
            lr_num_cycles=self.lr_num_cycles,
            lr_power=self.lr_power,
        )
        need_not_negative(
            seed=self.seed,
            checkpoints_total_limit=self.checkpoints_total_limit,
            lr_warmup_steps=self.lr_warmup_steps,
            adam_weight_decay=self.adam_weight_decay,
            max_grad_norm=self.max_grad_norm,
        )
        if self.train_batch_size == "auto" and self.global_batch_size is None:
            raise refuse("train_batch_size", "auto", "needs --global_batch_size, the images of an update")
        if self.global_batch_size is not None and self.gradient_accumulation_steps > 1:
            number = self.gradient_accumulation_steps
            raise refuse("gradient_accumulation_steps", number, "leave it out: it follows from --global_batch_size")
        logs = PurePath(self.logging_dir)
        if logs.is_absolute() or not logs.parts or ".." in logs.parts:
            raise refuse("logging_dir", self.logging_dir, "must be a folder within --output_dir, such as logs")
        if self.use_8bit_adam and self.optimizer != "adamw":
            raise refuse("use_8bit_adam", True, f"is AdamW; leave out --optimizer {self.optimizer}")
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            raise refuse("learning_rate", self.learning_rate, "prodigy multiplies the rate it finds by this: give 1")
        for flag in ("adam_beta1", "adam_beta2", "adam_epsilon") if self.optimizer == "adafactor" else ():
            if getattr(self, flag) != getattr(TrainConfig, flag):
                raise refuse(flag, getattr(self, flag), "is not for adafactor, which has none")
        if self.fused_backward:
            self._check_fused_backward()
        for flag, value in (("adam_beta1", self.adam_beta1), ("adam_beta2", self.adam_beta2)):
            if not 0 <= value < 1:
                raise refuse(flag, value, "must be in [0, 1)")

    def _check_fused_backward(self) -> None:
        """Refuse what needs all gradients at once, or adds up several."""
        if self.train_batch_size == "auto":
            raise refuse("train_batch_size", "auto", "not with --fused_backward, which takes one pass; give a number")
        if self.gradient_accumulation_steps > 1:
            number = self.gradient_accumulation_steps
            raise refuse("gradient_accumulation_steps", number, "not with --fused_backward, which steps in each pass")
        if self.max_grad_norm:
            reason = "not with --fused_backward, which never holds all gradients; give 0, no clipping"
            raise refuse("max_grad_norm", self.max_grad_norm, reason)
        if self.optimizer == "prodigy":
            raise refuse("optimizer", "prodigy", "not with --fused_backward: it looks at all gradients for one rate")
        if not self.set_grads_to_none:
            raise refuse("set_grads_to_none", False, "not with --fused_backward, which frees each gradient")

    def steps_per_epoch(self, num_images: int, num_processes: int = 1) -> int:
        """Return the optimizer updates of one pass over the images; the last may be short."""
        return -(-num_images // self.images_per_update(num_processes))

    def total_steps(self, num_images: int, num_processes: int = 1) -> int:
        """Return the optimizer updates of the whole run."""
        return self.max_train_steps or self.num_train_epochs * self.steps_per_epoch(num_images, num_processes)

    def images_per_update(self, num_processes: int = 1) -> int:
        """Return the images of one optimizer update, over all processes."""
        return self.global_batch_size or self.micro_batch * self.gradient_accumulation_steps * num_processes

    @property
    def micro_batch(self) -> int:
        """Images per process in one forward pass, once they are known."""
        if self.train_batch_size == "auto":
            raise ValueError("--train_batch_size auto: not chosen yet")
        return self.train_batch_size

    def with_micro_batch(self, size: int, num_processes: int = 1) -> TrainConfig:
        """Return the settings for the same updates, each in forward passes of this many images.

        Raises:
            ValueError: they do not divide the images of an update.
        """
        total = self.images_per_update(num_processes)
        if total % (size * num_processes):
            raise refuse(
                "global_batch_size", total, f"must be a multiple of {size} x {num_processes} (images x processes)"
            )
        return replace(
            self,
            train_batch_size=size,
            gradient_accumulation_steps=total // (size * num_processes),
            global_batch_size=None,
        )


CHANGEABLE = frozenset(
    {
        "train_data_dir",
        "instance_data_dir",
        "class_data_dir",
        "sample_batch_size",
        "prior_generation_precision",
        "offload_ema",
        "max_train_steps",
        "num_train_epochs",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "logging_steps",
        "logging_dir",
        "report_to",
        "tracker_project_name",
        "validation_prompt",
        "validation_prompts",
        "validation_scheduler",
        "num_validation_images",
        "validation_images",
        "validation_epochs",
        "validation_steps",
        "drift_steps",
        "drift_policy",
        "keep",
        "heldout_steps",
        "validation_data_dir",
        "heldout_images",
        "heldout_timesteps",
        "dataloader_num_workers",
        "latent_cache_dir",
        "cache_dir",
        "output_dir",
        "overwrite",
        "dry_run",
        "set_grads_to_none",
        "local_rank",
        "push_to_hub",
        "hub_model_id",
        "hub_token",
    }
)
"""Options in which a continued run may differ from how it began (the images themselves are compared by content)."""


@dataclass(frozen=True, kw_only=True)
class TextualInversionTrainConfig(TrainConfig):
    """The loop, with the defaults of diffusers' textual_inversion.py."""

    max_train_steps: int | None = 5000
    """Optimizer updates in all; `null` for num_train_epochs."""


@dataclass(frozen=True, kw_only=True)
class DreamBoothTrainConfig(TrainConfig):
    """The loop, with the defaults of diffusers' train_dreambooth.py."""

    train_batch_size: int | Literal["auto"] = 4
    """Images per process in one forward pass, with class images as many of them beside; auto: as many as fit."""
    num_train_epochs: int = 1
    """Passes over the images; max_train_steps wins."""
    learning_rate: float = 5e-6
    """Learning rate before the schedule's factor."""


@dataclass(frozen=True, kw_only=True)
class LoraDreamBoothTrainConfig(TrainConfig):
    """The loop, with the defaults of diffusers' train_dreambooth_lora.py."""

    train_batch_size: int | Literal["auto"] = 4
    """Images per process in one forward pass, with class images as many of them beside; auto: as many as fit."""
    num_train_epochs: int = 1
    """Passes over the images; max_train_steps wins."""
    learning_rate: float = 5e-4
    """Learning rate before the schedule's factor."""


@dataclass(frozen=True, kw_only=True)
class PivotalTuningTrainConfig(TrainConfig):
    """The loop; batch and rate as in LoRA + DreamBooth, length as in Textual Inversion."""

    train_batch_size: int | Literal["auto"] = 4
    """Images per process in one forward pass, with class images as many of them beside; auto: as many as fit."""
    max_train_steps: int | None = 2000
    """Optimizer updates in all; `null`: as many as num_train_epochs gives."""
