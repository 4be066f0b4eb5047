"""Run a training script step by step, in turns with others, and say what each turn took; training.py starts it.

    python benchmarks/paced.py '{"go": 4, "tell": 5}' SCRIPT ARGUMENTS ...

The script is any that trains with an optimizer of torch; it is run as it is, in this process. A turn is a number of
optimizer steps, from the end of one to the end of another, GPU work included. Settings, as JSON: ``go`` and ``tell``,
file descriptors to read the next turn from and to write to, or absent to run through; ``report``, a file for time to
the first step and peak memory; ``record``, a file for the draws, losses and first weights of the script's first
``record_steps`` steps; ``parts``, whether to time the parts of our own loop; ``bounds``, ``warmup_steps`` and
``turn_steps``: our steps are to take turns with bare ones, whose time goes into the report. A turn is a line of JSON:
``steps``, and ``profile``, a file for its time by kind of operation, or null.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = {
    "data": ("finetune.core.data.batches", "CaptionedBatches.update"),
    "forward and backward": ("finetune.core.loop.loop", "_backward"),
    "clipping": ("finetune.core.loop.loop", "clip"),
    "check of the loss": ("finetune.core.loop.loop", "_check_finite"),
}
KINDS = {
    "convolution": ("conv",),
    "attention": ("attention", "flash", "sdpa", "fmha"),
    "matrix product": ("gemm", "::mm", "addmm", "bmm", "linear", "matmul", "cutlass"),
    "normalisation": ("norm",),
    "optimizer": ("adam", "optimizer"),
    "copy": ("copy", "memcpy", "memset", "cat", "fill", "zero_"),
}


def peak_resident_gb() -> float:
    """Return the most this process has held, in 10^9 bytes; what getrusage says begins with the peak of its parent."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts bytes
    lines = status.read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 / 1e9


class Turns:
    """Counts optimizer steps and stops between turns."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.done = 0
        self.left: int | None = None
        self.profile: str | None = None
        self.began_s = 0.0
        self.first_step_s: float | None = None
        self.spent: dict[str, float] = defaultdict(float)
        self.profiler: Any = None
        if "go" in settings:
            self.go = os.fdopen(settings["go"])
            self.tell = os.fdopen(settings["tell"], "w")
            self.next_turn()

    def next_turn(self) -> None:
        """Wait for the next turn; after the last one the script runs to its end."""
        line = self.go.readline()
        turn = json.loads(line) if line else {"steps": None, "profile": None}
        self.left, self.profile = turn["steps"], turn["profile"]
        self.spent.clear()
        if self.profile:
            from torch.profiler import ProfilerActivity, profile

            self.profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + on_gpu()])
            self.profiler.__enter__()
        self.began_s = time.perf_counter()

    def stepped(self, *_: object) -> None:
        """Count a step; at the end of a turn say what it took, and wait."""
        self.done += 1
        if self.first_step_s is None:
            finish()
            self.first_step_s = time.time() - process_start()
            if self.settings.get("parts"):
                self.time_parts()
        if self.left is None:
            return
        self.left -= 1
        if self.left:
            return
        finish()
        took = time.perf_counter() - self.began_s
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            write_profile(self.profiler, Path(str(self.profile)))
            self.profiler = None
        print(json.dumps({"seconds": took, "parts": dict(self.spent)}), file=self.tell, flush=True)
        self.next_turn()

    def write_report(self, path: Path, **more: Any) -> None:
        """Write how soon the first step was done, how much memory was taken at most, and what is given."""
        peak = {"peak_resident_gb": peak_resident_gb()}
        if on_gpu():
            import torch

            peak["peak_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
            peak["peak_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        found = {"steps": self.done, "first_step_s": self.first_step_s, **peak, **more}
        path.write_text(json.dumps(found), encoding="utf-8")

    def time_parts(self) -> None:
        """Put a clock around the parts of our loop; on a CPU, where nothing runs on by itself."""
        for part, (module, path) in PARTS.items():
            owner: Any = sys.modules[module]
            *outer, name = path.split(".")
            for one in outer:
                owner = getattr(owner, one)
            setattr(owner, name, self.timed(part, getattr(owner, name)))

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that notes how long it takes."""

        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.spent[part] += time.perf_counter() - start

        return run


def on_gpu() -> bool:
    """Tell whether the script trains on a GPU."""
    import torch

    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())


def finish() -> None:
    """Wait for the GPU."""
    if on_gpu():
        import torch

        torch.cuda.synchronize()


def process_start() -> float:
    """Return when this process began, in seconds since 1970."""
    import psutil

    return float(psutil.Process().create_time())


def write_profile(profiler: Any, path: Path) -> None:
    """Write the time of a turn by kind of operation, in seconds, largest first."""
    times: dict[str, float] = defaultdict(float)
    gpu = on_gpu()
    for event in profiler.key_averages():
        micro = event.self_device_time_total if gpu else event.self_cpu_time_total
        name = event.key.lower()
        kind = next((kind for kind, marks in KINDS.items() if any(mark in name for mark in marks)), "other")
        times[kind] += micro / 1e6
    ordered = dict(sorted(times.items(), key=lambda item: -item[1]))
    path.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


class Recorder:
    """Keeps what diffusers' scripts draw: latents, noise, timesteps, prompts, losses, and the weights at the start."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps
        self.tensors: dict[str, Any] = {}
        self.losses: list[Any] = []
        self.written = False

    def install(self) -> None:
        """Put ears on the classes that every script uses."""
        import accelerate
        import diffusers
        import transformers
        from torch.nn.modules.module import register_module_forward_pre_hook

        recorder = self
        add_noise, backward = diffusers.DDPMScheduler.add_noise, accelerate.Accelerator.backward

        def noisy(scheduler: Any, latents: Any, noise: Any, timesteps: Any) -> Any:
            recorder.keep(latents=latents, noise=noise, timesteps=timesteps)
            return add_noise(scheduler, latents, noise, timesteps)

        def learn(accelerator: Any, loss: Any, **options: Any) -> None:
            recorder.losses.append(loss.detach().clone())
            backward(accelerator, loss, **options)

        def called(module: Any, arguments: Any) -> None:
            if isinstance(module, diffusers.UNet2DConditionModel):
                if len(recorder.losses) == 0:
                    recorder.keep_weights("unet", module)
                recorder.keep(embeds=arguments[2])
            if isinstance(module, transformers.CLIPTextModel):
                if len(recorder.losses) == 0:
                    recorder.keep_weights("text_encoder", module)
                recorder.keep(ids=arguments[0])

        diffusers.DDPMScheduler.add_noise = noisy
        accelerate.Accelerator.backward = learn
        register_module_forward_pre_hook(called)

    def keep(self, **values: Any) -> None:
        """Keep some tensors of the step that goes on."""
        step = len(self.losses)
        if step < self.steps:
            self.tensors |= {f"{step}/{name}": value.detach().clone().cpu() for name, value in values.items()}

    def keep_weights(self, part: str, module: Any) -> None:
        """Keep what learns, as it is before the first step."""
        for name, value in module.named_parameters():
            if value.requires_grad:
                self.tensors[f"weights/{part}.{name}"] = value.detach().clone().cpu().contiguous()

    def stepped(self, *_: object) -> None:
        """Write the file when there is enough."""
        if len(self.losses) < self.steps or self.written:
            return
        import torch
        from safetensors.torch import save_file

        self.written = True
        self.tensors["losses"] = torch.stack(self.losses).float().cpu()
        save_file({name: value.contiguous() for name, value in self.tensors.items()}, self.path)


def main() -> None:
    """Run the script."""
    settings, script = json.loads(sys.argv[1]), Path(sys.argv[2])
    from torch.optim.optimizer import register_optimizer_step_post_hook

    turns = Turns(settings)
    register_optimizer_step_post_hook(turns.stepped)
    if settings.get("record"):
        recorder = Recorder(Path(settings["record"]), settings["record_steps"])
        recorder.install()
        register_optimizer_step_post_hook(recorder.stepped)
    more = {}
    if settings.get("bounds"):
        from bare import Bounds

        bounds = Bounds(**settings["bounds"], finish=finish)
        register_optimizer_step_post_hook(bounds.stepped)
        more["bounds"] = bounds.seconds
    sys.argv = [str(script), *sys.argv[3:]]
    sys.path[0] = str(script.parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        if settings.get("report"):
            turns.write_report(Path(settings["report"]), **more)


if __name__ == "__main__":
    main()
