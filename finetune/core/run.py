"""The values of a run: what it is, what goes into an update, and what comes out of one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import TisserandError
from data_prep.folders.publish import write_whole
from data_prep.folders.run_folder import ENVIRONMENT, LOCK, METRICS
from finetune.core.out_of_memory import advice, is_out_of_memory
from finetune.core.pictures.images import CaptionedImage
from finetune.core.pictures.pictures import Shape
from finetune.core.settings.methods import PriorConfig
from finetune.core.settings.training import TrainConfig
from finetune.diffusion.models import Models
from finetune.diffusion.noise import NoiseSchedule
from finetune.diffusion.text import Conditions

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run in progress, for a ``with`` block.

    Attributes:
        folder: the run folder, locked until the process ends.
        accelerator: devices, processes, autocast and trackers.
        train: the loop's settings.
        seed: the seed in force, drawn if none was given.
        total_steps: optimizer updates of the whole run, as planned; an observer may end it before.
        config_hash: SHA-256 over the settings that can change what is learned.
        checkpoint: to continue from, or None.
        is_sharded: what is trained is split over the processes.
        zero_stage: of DeepSpeed, which splits its moments (1) and gradients (2); 0 without it.
        began: environment.json of the run that is continued.
        inputs: hashes of what is read after the start, by option; a checkpoint goes on with the same ones alone.
    """

    folder: Path
    accelerator: Accelerator
    train: TrainConfig
    seed: int
    total_steps: int
    config_hash: str
    checkpoint: Path | None
    lock: TextIO | None
    is_sharded: bool = False
    zero_stage: int = 0
    began: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.accelerator.is_main_process

    @property
    def weight_dtype(self) -> torch.dtype:
        """What frozen weights are held in: the precision of the forward pass."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision, torch.float32)

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        self.accelerator.print(text, flush=True)

    def log(self, step: Step) -> None:
        """Add a line to metrics.jsonl and to the trackers, if the step carries one."""
        if step.metrics is None or not self.is_main:
            return
        with (self.folder / METRICS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(step.metrics) + "\n")
        values = {name: value for name, value in step.metrics.items() if name != "step"}
        self.accelerator.log(values, step=step.number)

    def note(self, **values: object) -> None:
        """Add what this run found out about its machine to environment.json."""
        if self.is_main and not self.train.dry_run:
            path = self.folder / ENVIRONMENT
            write_whole(path, json.dumps(read_json(path) | values, indent=2) + "\n")

    def show(self, picture: Image, step: int) -> None:
        """Keep a preview as previews/step-000200.png and hand it to the trackers."""
        path = self.folder / "previews" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"preview": np.asarray(picture)[None]}, step=step, **layout)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, _: object = None, error: BaseException | None = None, __: object = None) -> None:
        """Close the trackers and free the folder, however the run ended; say what to lower if memory ran out."""
        if error is None:  # who leaves first takes the connection away that another may still use
            self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        free_folder(self.folder, self.lock)
        if is_out_of_memory(error):
            raise TisserandError(f"out of memory; {advice(self.train)}") from error


def free_folder(folder: Path, lock: TextIO | None) -> None:
    """Give the folder back; one in which nothing was written goes."""
    if lock is not None:
        (folder / LOCK).unlink(missing_ok=True)
        lock.close()
        if not any(folder.iterdir()):
            folder.rmdir()


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, or an empty one if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A run in progress with its base model.

    Attributes:
        models: as loaded: float32, frozen, on the training device; the scheduler is the one that is trained.
        base_scheduler: as loaded; what the base model itself is sampled with.
        schedule: what is trained, on the training device.
        images: that passed the checks.
        data: what the weights file says about them.
        base: what the weights file says about the base model: its name as typed, and its hash.
    """

    run: Run
    models: Models
    base_scheduler: SchedulerMixin
    schedule: NoiseSchedule
    images: list[CaptionedImage]
    data: dict[str, object]
    base: dict[str, str]

    @property
    def device(self) -> torch.device:
        """Where the forward pass runs."""
        return self.run.accelerator.device

    def provenance(
        self,
        method: str,
        shapes: Mapping[Shape, Mapping[str, int]],
        prior: PriorConfig | None = None,
        steps: int | None = None,
    ) -> dict[str, Any]:
        """Return what the weights say about where they come from, and in which shapes pictures are made of them.

        Args:
            method: name of the recipe.
            shapes: of the pictures, that of most first, with how often each caption comes with it.
            prior: what was preserved, if anything.
            steps: updates that the weights have seen; all that were planned if absent.
        """
        height, width = next(iter(shapes))
        return {
            "method": method,
            "base_model": self.base,
            **self.data,
            "config_hash": self.run.config_hash,
            "height": height,
            "width": width,
            "shapes": [
                {"height": rows, "width": columns, "captions": dict(captions)}
                for (rows, columns), captions in shapes.items()
            ],
            "scheduler": dict(self.models.scheduler.config),
            "steps": self.run.total_steps if steps is None else steps,
            "planned_steps": self.run.total_steps,
            **(prior.provenance if prior else {}),
        }


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images of one forward pass, on the training device.

    Attributes:
        latents: (B, 4, h, w) float32, scaled.
        noise: (B, 4, h, w) float32, to predict.
        input_noise: (B, 4, h, w) float32, to add: the same, but for input perturbation.
        timesteps: (B,) int64.
        conditions: what the pictures are conditioned on.
        weights: (B,) float32, what each image counts in the mean.
        names: of the images' files, for messages.
        positions: in the stream, of each image.
        targets: (B, 4, h, w) float32, what to predict, where it is not the noise or v.
    """

    latents: Tensor
    noise: Tensor
    input_noise: Tensor
    timesteps: Tensor
    conditions: Conditions
    weights: Tensor
    names: tuple[str, ...]
    positions: tuple[int, ...]
    targets: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Update:
    """This process's share of one optimizer update, and what all processes together take into it."""

    batches: list[Batch]
    weight: float
    num_images: int


class Batches(Protocol):
    """What the loop asks of a recipe's data."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates in one pass over the images."""

    def update(self, number: int) -> Update:
        """Return the update with this number, counted from 0; the same number gives the same tensors."""

    def cut(self, train: TrainConfig) -> Batches:
        """Return the same updates, in forward passes of as many images as these settings say."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer update, just done.

    Attributes:
        number: updates done, from 1.
        total: updates of the whole run.
        loss: mean loss of the update's images on this process, a scalar on the device; reading it costs a wait.
        metrics: the line for metrics.jsonl, at every ``logging_steps``-th and at the last step, else None.
    """

    number: int
    total: int
    loss: Tensor
    metrics: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Where held-out images are, and what their captions are: as with the images that are trained on.

    Attributes:
        beside: a training folder; held-out images are in `validation` beside it, unless their folder is given.
        captions: as for ``images.read_folder``.
        image_column: likewise.
        caption_column: likewise.
    """

    beside: Path
    captions: Sequence[str] = ()
    image_column: str = "image"
    caption_column: str = "text"
