"""Settings shared by the recipes: frozen values, without torch, spelled as in diffusers' example scripts.

A recipe composes those it honours, and those of its method in ``method_config``; every field becomes a flag and a YAML
key of the same name. Defaults are those of diffusers' ``train_text_to_image_lora.py`` unless the field says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Literal


def refuse(flag: str, value: object, allowed: str) -> ValueError:
    """Say which setting is wrong, its value, and what is allowed."""
    return ValueError(f"--{flag} {value}: {allowed}")


def need_positive(**values: float | None) -> None:
    """Refuse the first given value that is not above zero."""
    for flag, value in values.items():
        if value is not None and not value > 0:
            raise refuse(flag, value, "must be above 0")


def need_not_negative(**values: float | None) -> None:
    """Refuse the first given value below zero."""
    for flag, value in values.items():
        if value is not None and not value >= 0:
            raise refuse(flag, value, "must be 0 or more")


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


@dataclass(frozen=True, kw_only=True)
class ImageFolderConfig:
    """Folders of captioned 8-bit images."""

    train_data_dir: tuple[Path, ...] = ()
    """Folder with images and metadata.jsonl (a line per image: file_name, text) or a .txt file beside each; or several
    folders. With dataset_name: the folder within it."""
    image_column: str = "image"
    """Column of the images: `image` reads file_name, any other name NAME reads NAME_file_name, as `datasets` does."""
    caption_column: str = "text"
    """Key of metadata.jsonl that holds the caption."""
    max_train_samples: int | None = None
    """Train on this many images, drawn at random and the same whatever the seed; all if absent."""
    balance: tuple[str, ...] = ()
    """Keys of metadata.jsonl, such as state,axis: every combination of their values is shown equally often. Ours."""
    dataset_name: str | None = None
    """Data set of the hub, or a folder that `datasets` reads; its split `train` is written out as a folder once."""
    dataset_config_name: str | None = None
    """Configuration of the data set; its only one if absent."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.dataset_name is None and not self.train_data_dir:
            raise ValueError(
                "missing --train_data_dir; give it on the command line or in a --config file (or --dataset_name)"
            )
        if self.dataset_name is None and self.dataset_config_name is not None:
            raise refuse("dataset_config_name", self.dataset_config_name, "needs --dataset_name")
        if self.dataset_name is not None and len(self.train_data_dir) > 1:
            raise refuse("dataset_name", self.dataset_name, "takes one --train_data_dir, the folder within it")
        need_positive(max_train_samples=self.max_train_samples)

    @property
    def balanced_keys(self) -> tuple[str, ...]:
        """The keys of --balance, given with commas or without."""
        return tuple(key for word in self.balance for key in word.split(",") if key)


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """How images become training pictures."""

    resolution: int | None = None
    """Side of the training pictures in px, a multiple of 8; the model's own size if absent."""
    center_crop: bool = True
    """Cut the centre out of an image that was resized to cover the picture. (diffusers: at random by default)"""
    random_crop: bool = False
    """Cut at a random place instead, as `--no_center_crop` does. Ours."""
    cache_crops: int = 0
    """Random cuts an image that are encoded once and kept; 0: cut and encode anew at each use. Ours."""
    buckets: bool = False
    """Pictures keep the aspect ratio of their images, about resolution x resolution px in all; a batch has one shape.
    Ours."""
    bucket_step: int | None = None
    """Step of the sides of buckets, px; 64, or an eighth of the resolution if that is less, if absent. Ours."""
    random_flip: bool = False
    """Show images mirrored half of the time (left to right). Refused for slices, whose `axis` gives the mirror a
    meaning: see --flips."""
    flips: dict[str, Literal["horizontal", "vertical", "both", "quarter_turn"]] = field(default_factory=dict)
    """Flips that leave captions true, by the axis of a slice, such as warp=horizontal; thickness=quarter_turn also
    exchanges the words warp and weft in the caption. Each is shown as often as the slice itself. Ours."""
    image_interpolation_mode: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "lanczos"
    """Filter that resizes images (Pillow's, antialiased)."""
    caption_dropout: float = 0.0
    """Share of draws in which an image comes with the empty caption, which guidance leans on. Ours."""
    latent_cache_dir: Path | None = None
    """Where encoded images are kept; OUTPUT_DIR/cache if absent. Runs may share one. Ours."""
    dataloader_num_workers: int = 0
    """Threads that read and decode images where they are encoded; 0: none beside the main one."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.resolution is not None and self.resolution % 8:
            raise refuse(
                "resolution", self.resolution, f"must be a multiple of 8, such as {self.resolution // 8 * 8 or 8}"
            )
        need_positive(resolution=self.resolution, bucket_step=self.bucket_step)
        need_not_negative(dataloader_num_workers=self.dataloader_num_workers, cache_crops=self.cache_crops)
        if self.cache_crops and not self.crops_at_random:
            raise refuse("cache_crops", self.cache_crops, "needs --random_crop")
        if self.bucket_step is not None and (self.bucket_step % 8 or not self.buckets):
            raise refuse("bucket_step", self.bucket_step, "must be a multiple of 8, beside --buckets")
        if not 0 <= self.caption_dropout < 1:
            raise refuse("caption_dropout", self.caption_dropout, "must be in [0, 1)")

    @property
    def crops_at_random(self) -> bool:
        """Whether pictures are cut at random places."""
        return self.random_crop or not self.center_crop


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Loss on held-out images, always at the same timesteps and with the same noise."""

    heldout_steps: int | None = None
    """Steps between looks at the loss on held-out and on training images (heldout.jsonl); none if absent. Ours."""
    validation_data_dir: Path | None = None
    """Folder of the held-out images; `validation` beside the training folder if absent. Ours."""
    heldout_images: int = 64
    """Held-out images, and training images, in a look; every caption about equally often. Ours."""
    heldout_timesteps: int = 4
    """Bands of timesteps; each image is seen once in each. Ours."""

    def __post_init__(self) -> None:
        """Check ranges."""
        need_positive(
            heldout_steps=self.heldout_steps,
            heldout_images=self.heldout_images,
            heldout_timesteps=self.heldout_timesteps,
        )
        if self.validation_data_dir is not None and self.heldout_steps is None:
            raise refuse("validation_data_dir", self.validation_data_dir, "needs --heldout_steps, how often to look")


@dataclass(frozen=True, kw_only=True)
class DriftWatchConfig:
    """What training does to prompts of other things, looked at while it runs."""

    drift_probes: str | None = None
    """Probes to watch: a built-in list (tiny, stable_diffusion) or a file; none if absent (drift.jsonl). Ours."""
    drift_steps: int | None = None
    """Steps between looks; as often as 1 % of the time allows, and for pictures 5 %, if absent. Ours."""
    drift_policy: str = "guard"
    """guard, strict or a YAML file with limits: end the run on drift, copies, or no better held-out loss, and save the
    best weights; report: only write. Ours."""
    keep: Literal["selected", "last"] = "selected"
    """Weights that are saved: those selected (selection.json), or the last. Ours."""

    def __post_init__(self) -> None:
        """Refuse what would do nothing."""
        need_positive(drift_steps=self.drift_steps)
        for name in ("drift_steps", "drift_policy", "keep"):
            changed = getattr(self, name) != type(self).__dataclass_fields__[name].default
            if changed and self.drift_probes is None:
                raise refuse(name, getattr(self, name), "needs --drift_probes, what to look at")


EPSILON_OF_PURE_NOISE = (
    "the schedule ends in pure noise (zero-terminal SNR), where epsilon is read off the input and nothing is learned; "
    "--prediction_type v_prediction is needed"
)


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """How pictures are made noisy."""

    noise_offset: float = 0.0
    """Strength of noise shared by a whole channel, so that overall brightness can be learned; 0.05 to 0.1 is usual."""
    offset_noise: bool = False
    """Noise offset of 0.1, as train_dreambooth.py spells it."""
    input_perturbation: float = 0.0
    """Strength of further noise on the model's input alone, not on its target; 0.1 is the paper's."""
    rescale_betas_zero_snr: bool = False
    """Rescale the schedule so that it ends in pure noise (zero-terminal SNR); needs v_prediction."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the model predicts; read from the model's scheduler if absent."""

    def __post_init__(self) -> None:
        """Check ranges, and options that exclude one another."""
        need_not_negative(noise_offset=self.noise_offset, input_perturbation=self.input_perturbation)
        if self.offset_noise and self.noise_offset:
            raise refuse("noise_offset", self.noise_offset, "leave out --offset_noise, which means 0.1")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise refuse("prediction_type", "epsilon", EPSILON_OF_PURE_NOISE)

    @property
    def offset(self) -> float:
        """The noise offset in force."""
        return 0.1 if self.offset_noise else self.noise_offset


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised."""

    snr_gamma: float | None = None
    """Min-SNR weighting with this limit (5.0 is the paper's); none if absent."""

    def __post_init__(self) -> None:
        """Check ranges."""
        need_positive(snr_gamma=self.snr_gamma)


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Pictures rendered during training, always from the same prompts and seeds."""

    validation_prompt: tuple[str, ...] = ()
    """Prompts to render, one or several; none: no previews."""
    validation_prompts: tuple[str, ...] = ()
    """More of them, as train_text_to_image.py spells it."""
    num_validation_images: int = 4
    """Pictures a prompt."""
    validation_images: tuple[Path, ...] = ()
    """Pictures that previews start from, half forgotten, instead of from noise: one picture of each a prompt."""
    validation_epochs: int | None = 1
    """Epochs between previews."""
    validation_steps: int | None = None
    """Steps between previews; wins over validation_epochs. 100 if both are absent."""
    validation_scheduler: Literal["DPMSolverMultistepScheduler", "DDPMScheduler"] = "DPMSolverMultistepScheduler"
    """Sampler of the previews."""

    def __post_init__(self) -> None:
        """Check ranges."""
        need_positive(
            num_validation_images=self.num_validation_images,
            validation_epochs=self.validation_epochs,
            validation_steps=self.validation_steps,
        )

    @property
    def prompts(self) -> tuple[str, ...]:
        """What is rendered, each prompt once."""
        return tuple(dict.fromkeys((*self.validation_prompt, *self.validation_prompts)))


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
    """Checkpoints to keep; all if absent."""
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
            checkpoints_total_limit=self.checkpoints_total_limit,
            logging_steps=self.logging_steps,
            lr_num_cycles=self.lr_num_cycles,
            lr_power=self.lr_power,
        )
        need_not_negative(
            seed=self.seed,
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
