"""Does our training learn what diffusers' script learns? For ``benchmarks/training.py``, stage ``parity``.

Two questions. Fed the draws that the script made (latents, noise, timesteps, prompts, first weights), does our loop
give the script's losses within rounding? And after as many steps with draws of their own, do both end with the same
loss on one fixed list of (image, noise, timestep)?
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from random_sd import write_pictures

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.core.run import Batch, Update
    from finetune.core.settings.training import TrainConfig
    from finetune.diffusion.models import Models
    from training import Place, TrainingConfig

RECORDED_STEPS = 20
NUM_TIMESTEPS = 8
"""Of each picture in the fixed list, evenly spread."""
SCHEDULE = "linear"
"""Of the learning rate: at a constant one the last few draws move the loss by more than what is compared."""


def measure_parity(config: TrainingConfig, place: Place, method: str) -> dict[str, Any]:
    """Train both arms for as many steps, score both on the fixed list, and replay the script's first steps."""
    from finetune.diffusion.models import load_models
    from training import METHODS, arm_words, run_through

    models = load_models(config.parity_model)
    here = replace(place, work=place.work / "parity", model=Path(config.parity_model), resolution=models.size_px)
    if not (here.work / "pictures").is_dir():
        write_pictures(here.work / "pictures", config.num_images, here.resolution)
    record = here.work / f"{method}.safetensors"
    folders = {}
    for arm, more in (("ours", {}), ("b1", {"record": str(record), "record_steps": RECORDED_STEPS})):
        words = arm_words(config, here, method, arm, config.parity_batch_size, config.parity_steps)
        words[words.index("--learning_rate") + 1] = str(METHODS[method].parity_rate)
        words[words.index("--lr_scheduler") + 1] = SCHEDULE
        if arm == "ours" and not METHODS[method].clips:
            words += ["--max_grad_norm", "1e9"]  # the script does not clip here
        folders[arm] = Path(words[words.index("--output_dir") + 1])
        shutil.rmtree(folders[arm], ignore_errors=True)
        run_through(arm, words, here.work, **more)
    losses = {arm: fixed_losses(config, here, method, folder) for arm, folder in folders.items()}
    losses["base"] = fixed_losses(config, here, method, None)
    theirs, ours = replay(config, here, method, record)
    found = {
        "method": method,
        "batch_size": config.parity_batch_size,
        "parity_model": config.parity_model,
        "steps": config.parity_steps,
        "loss_on_the_fixed_list": losses,
        "ours_over_theirs": losses["ours"] / losses["b1"],
        "replayed_losses": {"theirs": theirs, "ours": ours},
        "largest_difference_in_replay": max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)),
    }
    print(
        f"  {method}, parity: loss {losses['base']:.4f} at the start, ours {losses['ours']:.4f}, theirs "
        f"{losses['b1']:.4f} after {config.parity_steps} steps ({100 * (found['ours_over_theirs'] - 1):+.2f} %); fed "
        f"their draws, our losses differ by {found['largest_difference_in_replay']:.1e} at most in "
        f"{len(theirs)} steps",
        flush=True,
    )
    return found


def fixed_losses(config: TrainingConfig, place: Place, method: str, folder: Path | None) -> float:
    """Return the mean loss of what an arm saved, or of the base model, on the fixed list."""
    import torch

    from finetune.core.loss import denoising_loss
    from finetune.core.pictures.images import read_folder
    from finetune.core.pictures.pictures import CENTRE, TrainingPicture, load_pixels
    from finetune.core.run import Batch
    from finetune.diffusion.adapters import load_adapter
    from finetune.diffusion.denoiser import Denoiser
    from finetune.diffusion.models import load_models
    from finetune.diffusion.noise import from_scheduler
    from finetune.diffusion.text import Conditions, encode_prompts
    from finetune.diffusion.vae import encode, scaled_latents

    whole = folder is not None and method in ("full", "dreambooth")
    models = load_models(str(folder if whole else place.model))
    if folder is not None and not whole:
        load_adapter(models, folder)
    captioned = place.work / "pictures" / "captioned"
    images = read_folder(captioned, "--train_data_dir")
    shape = (place.resolution, place.resolution)
    pictures = [TrainingPicture(image=one, turn=None, captions=one.captions, shape=shape) for one in images]
    prompts = [prompt_of(method, folder, one.caption) for one in images]
    from finetune.core.settings.images import PictureConfig

    schedule = from_scheduler(models.scheduler.config)
    random = torch.Generator().manual_seed(0)
    total, values = schedule.num_timesteps, []
    with torch.no_grad():
        for start in range(0, len(images), 8):
            chosen = slice(start, start + 8)
            pixels = load_pixels(pictures[chosen], [CENTRE] * len(pictures[chosen]), PictureConfig())
            latents = scaled_latents(models.vae, encode(models.vae, pixels))
            embeds = encode_prompts(models, prompts[chosen])
            for band in range(NUM_TIMESTEPS):
                noise = torch.randn(latents.shape, generator=random)
                batch = Batch(
                    latents=latents,
                    noise=noise,
                    input_noise=noise,
                    timesteps=torch.full((len(latents),), (2 * band + 1) * total // (2 * NUM_TIMESTEPS)),
                    conditions=Conditions(prompts=embeds),
                    weights=torch.ones(len(latents)),
                    names=("",) * len(latents),
                    positions=tuple(range(len(latents))),
                )
                denoiser = Denoiser(models.text_encoder, models.unet)
                values += denoising_loss(denoiser, batch, schedule=schedule).tolist()
    return fmean(values)


def prompt_of(method: str, folder: Path | None, caption: str) -> str:
    """Return the prompt that a picture was learned with; the base model does not know the new word."""
    if method == "textual_inversion":
        return "a photo of a " + ("a" if folder is None else "<weave>")
    return "a_w17h3r_texture" if method == "dreambooth" else caption


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The script's draws as updates of ours."""

    batches: list[Batch]
    steps_per_epoch: int = 10**9

    def update(self, number: int) -> Update:
        """Return one of them."""
        from finetune.core.run import Update

        batch = self.batches[number]
        return Update(batches=[batch], weight=float(len(batch.names)), num_images=len(batch.names))

    def cut(self, train: TrainConfig) -> Recorded:
        """Return the same updates: they are as the script made them."""
        return self


def replay(config: TrainingConfig, place: Place, method: str, record: Path) -> tuple[list[float], list[float]]:
    """Feed our loop what the script drew; return the losses of the script and ours."""
    import torch
    from accelerate.state import AcceleratorState
    from safetensors.torch import load_file

    from bare import what_learns
    from finetune.core.loop.loop import train
    from finetune.core.loss import denoising_loss
    from finetune.core.settings.training import TrainConfig
    from finetune.core.start import start_run
    from finetune.diffusion.denoiser import Denoiser
    from finetune.diffusion.models import load_models
    from finetune.diffusion.noise import from_scheduler
    from training import METHODS

    recorded = load_file(record)
    models = load_models(str(place.model))
    learns = what_learns(models, method)
    rate = METHODS[method].parity_rate
    learns = replace(learns, groups=tuple(replace(group, learning_rate=rate) for group in learns.groups))
    begin_with(recorded, learns.parameters, models)
    folder = place.work / f"replay-{method}"
    shutil.rmtree(folder, ignore_errors=True)
    settings = TrainConfig(
        output_dir=folder,
        report_to="none",
        seed=0,
        max_train_steps=config.parity_steps,
        learning_rate=rate,
        lr_scheduler=SCHEDULE,
        lr_warmup_steps=0,
        max_grad_norm=1.0 if METHODS[method].clips else 1e9,
    )
    loss = partial(denoising_loss, schedule=from_scheduler(models.scheduler.config))
    batches = Recorded(batches=[batch_of(recorded, step) for step in range(RECORDED_STEPS)])
    denoiser = Denoiser(models.text_encoder, models.unet)
    with start_run(settings, settings, num_images=10**6, data_hash="", weights_file="none") as run:
        steps = islice(train(run, denoiser, learns, batches, loss), RECORDED_STEPS)
        ours = [float(step.loss) for step in steps]
    AcceleratorState._reset_state(reset_partial_state=True)
    return recorded["losses"][:RECORDED_STEPS].tolist(), torch.tensor(ours).tolist()


def begin_with(recorded: dict[str, Tensor], parameters: dict[str, Any], models: Models) -> None:
    """Give what learns the values that it began with in the script."""
    first = {name.removeprefix("weights/"): value for name, value in recorded.items() if name.startswith("weights/")}
    tables = [name for name in first if name.endswith("token_embedding.weight")]
    for name, parameter in parameters.items():
        if name == "token_rows":  # the script learns in the table; the new word is its last row
            parameter.data.copy_(first[tables[0]][-1:])
        else:
            parameter.data.copy_(first[name])


def batch_of(recorded: dict[str, Tensor], step: int) -> Batch:
    """Return one step of the script as a batch; its prompts are token ids where its text encoder has gradients."""
    import torch

    from finetune.core.run import Batch
    from finetune.diffusion.text import Conditions

    latents, noise = recorded[f"{step}/latents"], recorded[f"{step}/noise"]
    learns_text = any(name.startswith("weights/text_encoder") for name in recorded)
    return Batch(
        latents=latents,
        noise=noise,
        input_noise=noise,
        timesteps=recorded[f"{step}/timesteps"],
        conditions=Conditions(prompts=recorded[f"{step}/ids"] if learns_text else recorded[f"{step}/embeds"]),
        weights=torch.ones(len(latents)),
        names=("",) * len(latents),
        positions=tuple(range(len(latents))),
    )
