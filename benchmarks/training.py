"""Training speed against diffusers' example scripts: the same model, pictures, precision and steps, in turns.

    python benchmarks/training.py --diffusers ~/diffusers --size reduced

Arms: our recipe; the script with the flags it is started with in diffusers' documentation (B0), with its own best flags
(B1), and B1 with the inductor backend where asked for. All arms of a method are alive at once and take turns of a few
steps, the others stopped, so that whatever else the machine does hits all alike. Stages: ``steps`` (time of a step,
memory, parts), ``bounds`` (our step beside the bare forward and backward pass of the U-Net, and that of everything that
must run with the optimizer), ``parity`` (do both learn the same), ``end_to_end`` (a job, from command to weights).

``--diffusers`` is a checkout of a release that fits the installed one; without it, or without torchvision, which the
scripts import, their arms are left out with the reason. ``--dry_run`` prints what would be measured.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Literal

from configs.errors import TisserandError, UsageError
from configs.load import command
from random_sd import SIZES, write_model, write_pictures
from slicing import cpu_name, spread

HERE = Path(__file__).parent
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "V100": 112}
"""Dense bfloat16 (V100: float16) operations per second, in 10^12, by a part of the device's name."""
Stage = Literal["steps", "bounds", "parity", "end_to_end"]
MethodName = Literal["lora", "full", "textual_inversion", "dreambooth"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of ``benchmarks/training.py``."""

    diffusers: Path | None = None
    """A checkout of diffusers, of the release that is installed or one it still runs; without it only our arms run."""
    size: Literal["grain", "reduced", "sd15", "sd21"] = "reduced"
    """The model, made from its config with random weights: reduced for a CPU; grain only tries the path."""
    model: Path | None = None
    """A pipeline folder to use instead."""
    resolution: int | None = None
    """Side of a picture, px; that of the model's size if absent."""
    methods: tuple[MethodName, ...] = ("lora", "full", "textual_inversion", "dreambooth")
    """What to measure."""
    stages: tuple[Stage, ...] = ("steps", "bounds", "parity", "end_to_end")
    """Which parts of the measurement."""
    train_batch_size: tuple[int, ...] = (8, 1)
    """Micro-batches of ``steps`` and ``bounds``, one after another."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Of all arms."""
    arms: tuple[str, ...] = ("ours", "b0", "b1")
    """Of ``steps``: ours, b0, b1, b1_inductor, ours_compiled (with --compile yes)."""
    warmup_steps: int = 3
    """Steps before the first turn that counts."""
    turn_steps: int = 5
    """Steps of a turn."""
    turns: int = 4
    """Turns of each arm."""
    num_images: int = 64
    """Pictures of the training folder."""
    dataloader_num_workers: int = 0
    """Of B1: worker processes of the script's loader."""
    parity_model: str = "assets/tiny-sd"
    """Model of ``parity``: a trained one, so that there is something to learn and to lose."""
    parity_steps: int = 200
    """Steps of both arms in ``parity``."""
    parity_batch_size: int = 8
    """Micro-batch of ``parity``."""
    end_to_end_steps: int = 500
    """Steps of ``end_to_end``."""
    end_to_end_batch_size: int = 8
    """Micro-batch of ``end_to_end``."""
    end_to_end_methods: tuple[MethodName, ...] = ("lora",)
    """Methods of ``end_to_end``."""
    rounds: int = 1
    """Whole jobs of each arm in ``end_to_end``, in turn."""
    profile: bool = False
    """Also write the time by kind of operation of one more turn of each arm, beside ``--output``."""
    work_dir: Path | None = None
    """Folder for models, pictures and runs; a temporary one by default."""
    output: Path = Path("benchmarks/results/training.json")
    """Where the figures go; those of other settings stay in it."""
    dry_run: bool = False
    """Print what would be measured."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("warmup_steps", "turn_steps", "turns", "num_images", "parity_steps", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: at least 1")
        if wrong := set(self.arms) - set(ARMS):
            raise ValueError(f"--arms {' '.join(sorted(wrong))}: must be of {', '.join(ARMS)}")


ARMS = ("ours", "b0", "b1", "b1_inductor", "ours_compiled")
STOCK = ("b0", "b1", "b1_inductor")


@dataclass(frozen=True, kw_only=True)
class Method:
    """How one method is started here and there.

    Attributes:
        recipe: ours.
        script: diffusers', below ``examples/``.
        words: options of both; {captioned} and {plain} are folders of pictures.
        stock_words: of the script alone.
        our_words: of ours alone.
        learning_rate: of both.
        parity_rate: of both in ``parity``, high enough to learn something in 200 steps.
        clips: whether the script clips gradients; the one for LoRA asks for it, and clips an iterator already spent.
    """

    recipe: str
    script: str
    words: str
    stock_words: str = ""
    our_words: str = ""
    learning_rate: float
    parity_rate: float
    clips: bool = True


METHODS: dict[str, Method] = {
    "lora": Method(
        recipe="finetune/lora.py",
        script="text_to_image/train_text_to_image_lora.py",
        words="--train_data_dir {captioned} --rank 4",
        stock_words="--cache_dir {work}/datasets",
        learning_rate=1e-4,
        parity_rate=1e-3,
        clips=False,
    ),
    "full": Method(
        recipe="finetune/full.py",
        script="text_to_image/train_text_to_image.py",
        words="--train_data_dir {captioned}",
        stock_words="--cache_dir {work}/datasets",
        learning_rate=1e-5,
        parity_rate=1e-4,
    ),
    "textual_inversion": Method(
        recipe="finetune/textual_inversion.py",
        script="textual_inversion/textual_inversion.py",
        words="--train_data_dir {plain} --placeholder_token <weave> --initializer_token a "
        "--learnable_property object --repeats 100",
        learning_rate=5e-4,
        parity_rate=5e-3,
        clips=False,
    ),
    "dreambooth": Method(
        recipe="finetune/dreambooth.py",
        script="dreambooth/train_dreambooth.py",
        words="--instance_data_dir {plain} --train_text_encoder",
        stock_words="--instance_prompt=a_w17h3r_texture",
        our_words="--instance_prompt=a_w17h3r_texture",
        learning_rate=5e-6,
        parity_rate=2e-5,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where things are.

    Attributes:
        work: folder of everything that is made.
        model: pipeline folder.
        resolution: px.
    """

    work: Path
    model: Path
    resolution: int


def main(config: TrainingConfig) -> None:
    """Measure, stage by stage, and write the figures after each."""
    reason = why_no_script(config)
    if reason:
        print(f"the arms of diffusers' scripts are left out: {reason}")
    if config.dry_run:
        describe(config, reason)
        return
    with tempfile.TemporaryDirectory(dir=config.work_dir, prefix="training-") as name:
        place = prepare(config, Path(name))
        for method in config.methods:
            for batch_size in config.train_batch_size:
                if "steps" in config.stages:
                    keep(config, "steps", measure_steps(config, place, method, batch_size, reason))
                if "bounds" in config.stages:
                    keep(config, "bounds", measure_bounds(config, place, method, batch_size))
            if "parity" in config.stages and not reason:
                from parity import measure_parity

                keep(config, "parity", measure_parity(config, place, method))
            if "end_to_end" in config.stages and method in config.end_to_end_methods:
                keep(config, "end_to_end", measure_jobs(config, place, method, reason))
    if config.output.is_file():
        print("\n".join(["", *table(json.loads(config.output.read_text(encoding="utf-8"))["measured"])]))
    print(f"figures: {config.output}")


def table(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Return the figures as tables in Markdown: seconds a step, and how many times as fast ours is."""

    def times(values: dict[str, float] | None) -> str:
        return f"{values['median']:.2f}x ({values['min']:.2f} to {values['max']:.2f})" if values else "not measured"

    lines = [
        "| model, method, micro-batch | ours | over B0 | over B1 | over B1, inductor |",
        "|---|---:|---:|---:|---:|",
    ]
    for one in measured:
        if one["stage"] == "steps":
            ratio, arms = one["speedup_of_ours"], one["arms"]
            steps = {arm: values["step_s"]["median"] for arm, values in arms.items()}
            cells = [f"{one['model']} {one['mixed_precision']}, {one['method']}, {one['batch_size']}"]
            cells += [f"{steps['ours']:.3f} s" if "ours" in steps else "not measured"]
            cells += [times(ratio.get(arm)) for arm in STOCK]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| model, method, micro-batch | ours | bare | U-Net alone | ours over bare |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for one in measured:
        if one["stage"] == "bounds":
            cells = [f"{one['model']} {one['mixed_precision']}, {one['method']}, {one['batch_size']}"]
            cells += [f"{one['step_s'][kind]['median']:.3f} s" for kind in ("ours", "bare", "unet")]
            lines.append(f"| {' | '.join([*cells, times(one['ours_over_bare'])])} |")
    lines += [
        "",
        "| method | ours over theirs on the fixed list | at the start | fed their draws, largest difference |",
    ]
    lines += ["|---|---:|---:|---:|"]
    for one in measured:
        if one["stage"] == "parity":
            losses = one["loss_on_the_fixed_list"]
            lines.append(
                f"| {one['method']}, {one['steps']} steps of {one['batch_size']} | {losses['ours']:.4f} / "
                f"{losses['b1']:.4f} = {one['ours_over_theirs']:.4f} | {losses['base']:.4f} | "
                f"{one['largest_difference_in_replay']:.1e} |"
            )
    for one in measured:
        if one["stage"] == "end_to_end":
            shown = ", ".join(f"{arm} {values['wall_s']['median']:.0f} s" for arm, values in one["arms"].items())
            ratio = times(one.get("speedup_of_ours"))
            lines.append(
                f"\n{one['method']}, whole job of {one['steps']} steps of {one['batch_size']}: {shown}, {ratio}"
            )
    return lines


def why_no_script(config: TrainingConfig) -> str | None:
    """Return why diffusers' scripts cannot run here, or None."""
    if config.diffusers is None:
        return "no --diffusers"
    for method in config.methods:
        if not (config.diffusers / "examples" / METHODS[method].script).is_file():
            raise UsageError(f"--diffusers {config.diffusers}: holds no examples/{METHODS[method].script}")
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision, which they import, is not installed"
    return None


def describe(config: TrainingConfig, reason: str | None) -> None:
    """Print what would be measured."""
    place = Place(work=Path("WORK"), model=config.model or Path("WORK/model"), resolution=resolution_of(config))
    print(f"model: {config.model or config.size}, {place.resolution} px, precision {config.mixed_precision}")
    for method in config.methods:
        if config.model is None:
            tera = flops_per_image(config.size, method, place.resolution) / 1e12
            print(f"\n{method}: {tera:.4g} TFLOP per picture, latents cached")
        steps = config.warmup_steps + config.turns * config.turn_steps
        for batch_size in config.train_batch_size if "steps" in config.stages else ():
            print(f"  steps: micro-batch {batch_size}, {config.turns} turns of {config.turn_steps} steps in each arm")
            for arm in chosen_arms(config, reason):
                print(f"    {arm}: {shlex.join(arm_words(config, place, method, arm, batch_size, steps))}")
        if "bounds" in config.stages:
            sizes = ", ".join(map(str, config.train_batch_size))
            print(f"  bounds: micro-batches {sizes}, ours in turns with bare steps in one process")
        if "parity" in config.stages:
            print(f"  parity: {config.parity_model}, {config.parity_steps} steps" + (f"; not: {reason}" * bool(reason)))
        if "end_to_end" in config.stages and method in config.end_to_end_methods:
            print(f"  end to end: {config.end_to_end_steps} steps of {config.end_to_end_batch_size}")


def resolution_of(config: TrainingConfig) -> int:
    """Return the side of a picture, px."""
    return config.resolution or SIZES[config.size].resolution


def prepare(config: TrainingConfig, work: Path) -> Place:
    """Make the model and the pictures."""
    place = Place(work=work, model=config.model or work / "model", resolution=resolution_of(config))
    if config.model is None:
        write_model(place.model, config.size)
    write_pictures(work / "pictures", config.num_images, place.resolution)
    return place


def chosen_arms(config: TrainingConfig, reason: str | None) -> list[str]:
    """Return the arms that run."""
    return [arm for arm in config.arms if arm not in STOCK or not reason]


def arm_words(
    config: TrainingConfig, place: Place, method: str, arm: str, batch_size: int, steps: int, folder: str = "run"
) -> list[str]:
    """Return script and options of an arm."""
    chosen = METHODS[method]
    model = ["--pretrained_model_name_or_path", str(place.model)]
    words = [*model, "--resolution", str(place.resolution), "--train_batch_size", str(batch_size)]
    words += ["--max_train_steps", str(steps), "--mixed_precision", config.mixed_precision]
    pictures = place.work / "pictures"
    own = chosen.words.format(captioned=pictures / "captioned", plain=pictures / "plain").split()
    words += [*own, "--output_dir", str(place.work / f"{folder}-{method}-{arm}-{batch_size}")]
    words += ["--learning_rate", str(chosen.learning_rate), "--lr_scheduler", "constant", "--lr_warmup_steps", "0"]
    words += ["--seed", "0"]
    if arm in STOCK:
        assert config.diffusers is not None
        own = chosen.stock_words.format(work=place.work).split()
        if arm != "b0":
            own += ["--allow_tf32", "--dataloader_num_workers", str(config.dataloader_num_workers)]
        return [str(config.diffusers / "examples" / chosen.script), *words, *own]
    own = chosen.our_words.split() + ["--allow_tf32"] * (config.size in ("sd15", "sd21"))
    return [str(HERE.parent / chosen.recipe), *words, *own, *(["--compile", "yes"] if arm == "ours_compiled" else [])]


def environment_of(arm: str) -> dict[str, str]:
    """Return the environment of an arm; all take as many threads as there are cores."""
    cores = str(len(os.sched_getaffinity(0)))
    more = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"} if arm == "b1_inductor" else {}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", cores), **quiet, **more}


class Arm:
    """A training that runs when it is told to, and is stopped otherwise, its loader's processes included."""

    def __init__(self, name: str, words: Sequence[str], work: Path, **settings: Any) -> None:
        self.name = name
        self.log = work / f"{name}.log"
        self.report = work / f"{name}.json"
        go, self._go = os.pipe()
        self._told, tell = os.pipe()
        settings |= {"go": go, "tell": tell, "report": str(self.report)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "paced.py"), json.dumps(settings), *words],
                stdout=log,
                stderr=log,
                pass_fds=(go, tell),
                start_new_session=True,
                env=environment_of(name),
                cwd=HERE.parent,
            )
        os.close(go)
        os.close(tell)
        self.told = os.fdopen(self._told)
        self.turns: list[dict[str, Any]] = []

    def turn(self, steps: int, profile: Path | None = None) -> dict[str, Any]:
        """Let it do some steps and return what they took; with a file for the time by kind of operation."""
        os.killpg(self.process.pid, signal.SIGCONT)
        os.write(self._go, json.dumps({"steps": steps, "profile": profile and str(profile)}).encode() + b"\n")
        line = self.told.readline()
        if not line:
            tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise TisserandError(f"the arm {self.name} ended before its turn did:\n{tail}")
        os.killpg(self.process.pid, signal.SIGSTOP)
        return {**json.loads(line), "steps": steps}

    def end(self) -> dict[str, Any]:
        """Let it run to its end, and return its report."""
        os.killpg(self.process.pid, signal.SIGCONT)
        os.close(self._go)
        self.told.close()
        if self.process.wait() != 0:
            raise TisserandError(f"the arm {self.name} failed after its last turn: {self.log}")
        return json.loads(self.report.read_text(encoding="utf-8"))

    def kill(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def measure_steps(
    config: TrainingConfig, place: Place, method: str, batch_size: int, reason: str | None
) -> dict[str, Any]:
    """Let all arms take turns; return seconds a step, memory, and what our step is made of."""
    names = chosen_arms(config, reason)
    steps = config.warmup_steps + (config.turns + config.profile) * config.turn_steps
    print(f"\n{method}, micro-batch {batch_size}: {', '.join(names)}", flush=True)
    arms: list[Arm] = []
    try:
        for name in names:
            folder = place.work / f"run-{method}-{name}-{batch_size}"
            shutil.rmtree(folder, ignore_errors=True)
            settings: dict[str, Any] = {"parts": name.startswith("ours") and not has_gpu()}
            words = arm_words(config, place, method, name, batch_size, steps)
            arms.append(Arm(name, words, place.work, **settings))
            arms[-1].turn(config.warmup_steps)
        for number in range(config.turns):
            for arm in arms if number % 2 == 0 else reversed(arms):
                arm.turns.append(arm.turn(config.turn_steps))
            shown = ", ".join(f"{arm.name} {arm.turns[-1]['seconds'] / config.turn_steps:.3f}" for arm in arms)
            print(f"  turn {number + 1} of {config.turns}, seconds a step: {shown}", flush=True)
        for arm in arms:
            if config.profile:  # not counted: to look slows down
                stem = f"{config.output.stem}_profile_{config.size}_{method}_{batch_size}_{arm.name}.json"
                arm.turn(config.turn_steps, config.output.with_name(stem))
        reports = {arm.name: arm.end() for arm in arms}
    finally:
        for arm in arms:
            arm.kill()
    found = summary_of(config, place, method, batch_size, {arm.name: arm.turns for arm in arms}, reports)
    for line in lines_of(found):
        print(line)
    return found


def summary_of(
    config: TrainingConfig,
    place: Place,
    method: str,
    batch_size: int,
    turns: dict[str, list[dict[str, Any]]],
    reports: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Return the figures of one method at one micro-batch."""
    seconds = {arm: [turn["seconds"] / turn["steps"] for turn in taken] for arm, taken in turns.items()}
    found: dict[str, Any] = {"method": method, "batch_size": batch_size, "arms": {}}
    flops = None if config.model else flops_per_image(config.size, method, place.resolution)
    peak = peak_flops()
    for arm, values in seconds.items():
        images = batch_size / median(values)
        found["arms"][arm] = {"step_s": spread(values), "images_per_s": images, **reports[arm]}
        if flops is not None:
            found["arms"][arm]["tflops"] = images * flops / 1e12
            found["arms"][arm]["mfu"] = images * flops / peak if peak else None
    if flops is not None:
        found["tflop_per_image"] = flops / 1e12
    # Pair by pair: the arms of one turn had the same neighbours.
    found["speedup_of_ours"] = {
        arm: spread([theirs / ours for theirs, ours in zip(values, seconds["ours"], strict=True)])
        for arm, values in seconds.items()
        if "ours" in seconds and arm != "ours"
    }
    parts = [turn["parts"] for turn in turns.get("ours", []) if turn["parts"]]
    if parts:
        means = {part: sum(one.get(part, 0.0) for one in parts) / len(parts) / config.turn_steps for part in parts[0]}
        found["our_parts_s"] = means
    return found


def lines_of(found: dict[str, Any]) -> list[str]:
    """Return what is printed of one measurement."""
    lines = []
    for arm, values in found["arms"].items():
        step = values["step_s"]
        ratio = found["speedup_of_ours"].get(arm)
        times = f", ours is {ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
        mfu = f", MFU {100 * values['mfu']:.1f} %" if values.get("mfu") else ""
        lines.append(
            f"  {arm:12} {step['median']:.4f} s a step ({step['min']:.4f} to {step['max']:.4f}), "
            f"{values['images_per_s']:.2f} img/s{mfu}, peak {values['peak_resident_gb']:.2f} GB, first step after "
            f"{values['first_step_s']:.1f} s{times}"
        )
    if "our_parts_s" in found:
        lines.append(
            f"  our step: {', '.join(f'{part} {value:.4f}' for part, value in found['our_parts_s'].items())} s"
        )
    return lines


def measure_bounds(config: TrainingConfig, place: Place, method: str, batch_size: int) -> dict[str, Any]:
    """Return what our step takes beside the bare one and the U-Net alone, in turns within one process."""
    steps = config.warmup_steps + config.turns * config.turn_steps
    words = arm_words(config, place, method, "ours", batch_size, steps, folder="bounds")
    turns = {"warmup_steps": config.warmup_steps, "turn_steps": config.turn_steps}
    seconds = run_through("ours", words, place.work, bounds=turns)["bounds"]
    over = [ours / bare for ours, bare in zip(seconds["ours"], seconds["bare"], strict=True)]
    found = {
        "method": method,
        "batch_size": batch_size,
        "step_s": {kind: spread(values) for kind, values in seconds.items()},
        "ours_over_bare": spread(over),
    }
    shown = ", ".join(f"{kind} {values['median']:.4f} s" for kind, values in found["step_s"].items())
    ratio = found["ours_over_bare"]
    print(
        f"  {method}, {batch_size}, a step: {shown}; ours over bare {ratio['median']:.3f} "
        f"({ratio['min']:.3f} to {ratio['max']:.3f})",
        flush=True,
    )
    return found


def measure_jobs(config: TrainingConfig, place: Place, method: str, reason: str | None) -> dict[str, Any]:
    """Run whole jobs in turn, each from an empty folder, and return their times."""
    names = ["ours"] if reason else ["ours", "b1"]
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(config.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            size = config.end_to_end_batch_size
            words = arm_words(config, place, method, name, size, config.end_to_end_steps, folder=f"job{number}")
            shutil.rmtree(place.work / "datasets", ignore_errors=True)
            taken[name].append(run_through(name, words, place.work))
            print(f"  {method}, whole job, {name}: {taken[name][-1]['wall_s']:.1f} s", flush=True)
    found: dict[str, Any] = {
        "method": method,
        "batch_size": config.end_to_end_batch_size,
        "steps": config.end_to_end_steps,
        "num_images": config.num_images,
        "arms": {
            name: {"wall_s": spread([one["wall_s"] for one in jobs]), "jobs": jobs} for name, jobs in taken.items()
        },
    }
    if "b1" in taken:
        pairs = zip(taken["b1"], taken["ours"], strict=True)
        found["speedup_of_ours"] = spread([theirs["wall_s"] / ours["wall_s"] for theirs, ours in pairs])
    return found


def run_through(name: str, words: Sequence[str], work: Path, **settings: Any) -> dict[str, Any]:
    """Run an arm to its end without turns; return its report with the time of the whole process."""
    report, log = work / f"{name}-job.json", work / f"{name}-job.log"
    start = time.perf_counter()
    with log.open("w") as stream:
        code = subprocess.run(
            [sys.executable, str(HERE / "paced.py"), json.dumps({"report": str(report), **settings}), *words],
            stdout=stream,
            stderr=stream,
            check=False,
            env=environment_of(name),
            cwd=HERE.parent,
        ).returncode
    wall = time.perf_counter() - start
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise TisserandError(f"the arm {name} ended with exit code {code}:\n{tail}")
    return {"wall_s": wall, **json.loads(report.read_text(encoding="utf-8"))}


def flops_per_image(size: str, method: str, resolution: int) -> float:
    """Count the operations of one picture's forward and backward pass, latents cached; nothing is computed.

    What a method needs, and not what an implementation does: no VAE, nothing recomputed.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from bare import what_learns
    from finetune.diffusion.models import Models
    from random_sd import make_parts

    with torch.device("meta"):
        parts: dict[str, Any] = make_parts(size)
        for part in parts.values():
            part.requires_grad_(False)
        models = Models(base_tokenizer=None, base_scheduler=None, name=size, **parts)
        what_learns(models, method)
        side = resolution // models.vae_scale_factor
        latents, timesteps = torch.empty(1, 4, side, side), torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counted:
            if method in ("textual_inversion", "dreambooth"):
                text = models.text_encoder(torch.zeros(1, 77, dtype=torch.int64))[0]
            else:
                text = torch.empty(1, 77, models.unet.config.cross_attention_dim)
            models.unet(latents, timesteps, encoder_hidden_states=text, return_dict=False)[0].sum().backward()
    return float(counted.get_total_flops())


def has_gpu() -> bool:
    """Tell whether the arms train on a GPU."""
    import torch

    return torch.cuda.is_available()


def peak_flops() -> float | None:
    """Return what the device can do at best, in operations a second, or None if it is not known."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((1e12 * tera for part, tera in PEAK_TFLOPS.items() if part in name), None)


def keep(config: TrainingConfig, stage: str, found: dict[str, Any]) -> None:
    """Put a measurement into the file, in the place of an earlier one of the same kind."""
    content: dict[str, Any] = {"measured": []}
    if config.output.is_file():
        content = json.loads(config.output.read_text(encoding="utf-8"))
    import torch

    machine = torch.cuda.get_device_name() if has_gpu() else cpu_name()
    found = {
        "stage": stage,
        "model": str(config.model or config.size),
        "resolution": resolution_of(config),
        "mixed_precision": config.mixed_precision,
        "device": machine,
        **found,
        "cores": len(os.sched_getaffinity(0)),
        "load_at_the_end": os.getloadavg()[0],
        "versions": versions(),
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }
    same = ("stage", "model", "resolution", "mixed_precision", "device", "method", "batch_size")
    kept = [one for one in content["measured"] if any(one.get(key) != found.get(key) for key in same)]
    config.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"measured": [*kept, found]}, indent=2)
    config.output.write_text(text + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of what was measured; a torchvision that has none is a stand-in."""
    known = {"python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "accelerate", "peft", "torchvision"):
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            known[name] = "a stand-in" if importlib.util.find_spec(name) else "not installed"
    return known


if __name__ == "__main__":
    command(TrainingConfig, main)
