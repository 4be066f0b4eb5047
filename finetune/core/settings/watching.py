"""Settings of what is looked at while a run learns: held-out loss, drift probes, previews."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.checks import need_not_negative, need_positive, refuse
from finetune.diffusion.config import Sampler

PREVIEW_SAMPLERS: dict[str, Sampler] = {"DPMSolverMultistepScheduler": "dpmsolver++", "DDPMScheduler": "ddpm"}
"""Samplers of previews, named as diffusers' scripts name them, and what `eval.generate` calls them."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Loss on held-out images, always at the same timesteps and with the same noise."""

    heldout_steps: int | None = None
    """Steps between looks at the loss on held-out and on training images (heldout.jsonl); none if absent. Ours."""
    validation_data_dir: Path | None = None
    """Folder of the held-out images; `validation` beside the training folder if absent. Needs --heldout_steps or
    --drift_probes, which look at them. Ours."""
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


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Pictures rendered during training, always from the same prompts and seeds."""

    validation_prompt: tuple[str, ...] = ()
    """Prompts to render, one or several; none: no previews."""
    validation_prompts: tuple[str, ...] = ()
    """More of them, as train_text_to_image.py spells it."""
    num_validation_images: int = 4
    """Pictures a prompt; 0: no previews."""
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
        need_not_negative(num_validation_images=self.num_validation_images)
        need_positive(
            validation_epochs=self.validation_epochs,
            validation_steps=self.validation_steps,
        )

    @property
    def sampler(self) -> Sampler:
        """The sampler under the name it has elsewhere."""
        return PREVIEW_SAMPLERS[self.validation_scheduler]

    @property
    def prompts(self) -> tuple[str, ...]:
        """What is rendered, each prompt once."""
        return tuple(dict.fromkeys((*self.validation_prompt, *self.validation_prompts)))
