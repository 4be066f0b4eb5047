"""Settings of sampling and of the noise schedule, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.checks import need_not_negative, refuse

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


Sampler = Literal["dpmsolver++", "unipc", "ddim", "euler", "pndm", "ddpm", "model"]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a (prompt, seed) becomes pixels."""

    num_inference_steps: int = 25
    """Denoising steps per picture."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1 or less switches it off."""
    scheduler: Sampler = "dpmsolver++"
    """Sampler, set up from the model's own noise schedule; `model` keeps the one saved with the model."""
    height: int | None = None
    """Rows in pixels, a multiple of 8. Default: the training size of the adapter, else the model's own size."""
    width: int | None = None
    """Columns in pixels, a multiple of 8. Default as for the height."""
    batch_size: int = 16
    """Pictures denoised together. Another batch size may move single pixels by one grey level."""
    negative_prompt: str = ""
    """What guidance leads away from."""

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ValueError(f"--num_inference_steps {self.num_inference_steps}: at least 1")
        if not self.guidance_scale >= 0:
            raise ValueError(f"--guidance_scale {self.guidance_scale}: 0 or more")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size {self.batch_size}: at least 1")
        for flag, value in (("--height", self.height), ("--width", self.width)):
            if value is not None and (value < 8 or value % 8):
                below = max(8, value // 8 * 8)
                raise ValueError(f"{flag} {value}: a multiple of 8 is needed; nearest: {below} or {below + 8}")


def each_scale(adapters: Sequence[Path], scales: Sequence[float]) -> tuple[float, ...]:
    """Return the strength of each adapter: one for all, or one each, in the order they were given.

    Raises:
        ValueError: there are more or fewer strengths.
    """
    if len(scales) == 1:
        return tuple(scales) * len(adapters)
    if len(scales) != len(adapters):
        shown = " ".join(map(str, scales))
        raise ValueError(
            f"--adapter_scale {shown}: {len(scales)} for {len(adapters)} --adapter; one for all, or one each"
        )
    return tuple(scales)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where the parts of a model come from.

    Attributes:
        name: a folder in diffusers' format, or a model id of the hub.
        revision: of the hub model.
        variant: of its weight files, such as fp16; if absent, the only one that is there.
        unet_revision: of the hub model, for its U-Net alone.
        tokenizer_name: a folder or a model id, for the tokenizer alone.
        tokenizer_max_length: tokens of a prompt; the tokenizer's own if absent.
        cache_dir: where models of the hub are kept; the library's own place if absent.
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    unet_revision: str | None = None
    tokenizer_name: str | None = None
    tokenizer_max_length: int | None = None
    cache_dir: Path | None = None
