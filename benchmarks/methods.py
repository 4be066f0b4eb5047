"""Every method on the demo's slices, as the commands a user would type; `make methods` runs it.

    python benchmarks/methods.py

Trains each method on the embedded model, generates from its prompts, reads the pictures with one classifier of real
slices, and asks probes what was forgotten. Full fine-tuning goes on in legs, so that it can be compared with LoRA where
both agree equally well with their prompts; DreamBooth is trained without a prior, with class images and with the base
model's own predictions. Writes methods.json and methods.png, and prints the table of docs/fine_tune.md.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from configs.errors import TisserandError, UsageError
from configs.load import command
from demo import BASE, DemoConfig
from demo import commands as demo_commands
from prompts.captions import all_captions, parse_caption
from prompts.vocabulary import DEFAULT, Vocabulary

if TYPE_CHECKING:
    from eval.likeness.classifier import SliceClassifier

CONCEPT = ("injected", "thickness")
"""The one kind of slice that the methods for few pictures learn, from nine of them."""
CLASS_PROMPT = "a grey woven texture"
INSTANCE_PROMPT = "a w17h3r grey woven texture"
WORD_PROMPT = "a grey <weave> texture"
PLAIN = Vocabulary(prefix="")
PROBES = f"""version: 1
sets:
  G0: {{title: anchors, probes: {{green-squares: two green squares on a white background,
        red-circles: three red circles on a black background}}}}
  G2: {{title: neighbours of the slices, probes: {{class: {CLASS_PROMPT}, grey-banded: a grey banded texture}}}}
  G3: {{title: far from the slices, probes: {{blue-circle: one blue circle on a yellow background,
        purple-green-chequered: a purple and green chequered texture}}}}
"""
COLUMNS = 9


@dataclass(frozen=True, kw_only=True)
class MethodsConfig:
    """Settings of ``benchmarks/methods.py``."""

    demo: Path = Path("demo")
    """Folder of `make demo`; its volumes and slices are made if they are not there."""
    output_dir: Path = Path("demo/methods")
    """Folder of the runs, the pictures and the checks."""
    output: Path = Path("benchmarks/results/methods.json")
    """Where the figures go; a picture of all methods goes beside it."""
    only: tuple[str, ...] = ()
    """Arms to run, by name; all if absent."""
    trial: bool = False
    """Two steps of training and one of sampling, to try the path; the figures mean nothing."""
    seed: int = 0
    """Of every training and every picture."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training with what is asked of it.

    Attributes:
        name: of its folders.
        title: in the table.
        recipe: module below ``finetune/``.
        preset: below ``configs/``, without its ending.
        words: further options.
        prompt: what pictures of the concept are asked for with; None if the captions of all nine kinds were learned.
        vocabulary: the words of the captions.
        legs: optimizer steps after which pictures are made; () for those of the preset.
        saves_pipeline: whether a pipeline folder comes out, and not files to put on the base model.
    """

    name: str
    title: str
    recipe: str
    preset: str
    words: tuple[str, ...] = ()
    prompt: str | None = None
    vocabulary: Vocabulary = field(default=DEFAULT)
    legs: tuple[int, ...] = ()
    saves_pipeline: bool = False


def arms(out: Path) -> tuple[Arm, ...]:
    """Return the trainings, in the order of the table."""
    prior = ("--with_prior_preservation", "--class_data_dir", str(out / "class"))
    base = ("--with_prior_preservation", "--prior_source", "base_prediction")
    shared = ("--latent_cache_dir", str(out / "cache"))
    nine, few = ("--train_data_dir", str(out / "nine")), ("--instance_data_dir", str(out / "nine"))
    slices = ("--train_data_dir", "{weave}/train", *shared)
    plain = ("--train_data_dir", str(out / "weave-plain" / "train"), *shared)
    dreambooth = {
        "recipe": "dreambooth",
        "preset": "tiny_dreambooth",
        "saves_pipeline": True,
        "prompt": INSTANCE_PROMPT,
    }
    return (
        Arm(name="lora", title="LoRA", recipe="lora", preset="tiny_lora", words=slices),
        Arm(
            name="full",
            title="full fine-tuning",
            recipe="full",
            preset="tiny_full",
            words=slices,
            legs=(150, 300, 600),
            saves_pipeline=True,
        ),
        Arm(
            name="lora_plain",
            title="LoRA, captions without `sf_`",
            recipe="lora",
            preset="tiny_lora",
            words=plain,
            vocabulary=PLAIN,
        ),
        Arm(
            name="textual_inversion",
            title="Textual Inversion",
            recipe="textual_inversion",
            preset="tiny_ti",
            words=nine,
            prompt=WORD_PROMPT,
        ),
        Arm(name="dreambooth", title="DreamBooth, no prior", words=few, **dreambooth),
        Arm(name="dreambooth_class", title="DreamBooth, class images", words=(*few, *prior), **dreambooth),
        Arm(name="dreambooth_base", title="DreamBooth, base prediction", words=(*few, *base), **dreambooth),
        Arm(
            name="lora_dreambooth",
            title="LoRA + DreamBooth",
            recipe="lora_dreambooth",
            preset="tiny_lora_dreambooth",
            words=few,
            prompt=INSTANCE_PROMPT,
        ),
        Arm(
            name="pivotal_tuning",
            title="pivotal tuning",
            recipe="pivotal_tuning",
            preset="tiny_pivotal",
            words=few,
            prompt=WORD_PROMPT,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        seconds: of the training so far, without loading and saving.
        num_weights: numbers that learn.
        megabytes: of the file or folder that a user gets.
        state, axis: shares of the pictures that show what was asked for, of ``num_pictures``.
        worst_probe: the probe that changed most, and how much of it is kept (0 to 1).
        class_kept: how much of the class prompt's pictures is kept.
        class_moved, probes_moved: how far the predictions moved, relative mean square: of the class prompt, and the
            mean over the probes.
    """

    name: str
    title: str
    steps: int
    seconds: float
    num_weights: int
    megabytes: float
    state: float
    axis: float
    num_pictures: int
    worst_probe: str | None = None
    kept: float | None = None
    class_kept: float | None = None
    class_moved: float | None = None
    probes_moved: float | None = None


def main(config: MethodsConfig) -> None:
    """Run every arm, then write the figures and print the table."""
    began = time.monotonic()
    out, weave = config.output_dir, config.demo / "weave"
    chosen = [arm for arm in arms(out) if not config.only or arm.name in config.only]
    if not chosen:
        raise UsageError(f"--only {' '.join(config.only)}: must be of {', '.join(arm.name for arm in arms(out))}")
    out.mkdir(parents=True, exist_ok=True)
    _prepare(config, weave)
    classifier, admission = train_reader(weave, config.seed, num_steps=20 if config.trial else 600)
    print(f"classifier on held-out slices: state {admission['state']:.3f}, axis {admission['axis']:.3f}")

    rows: list[Row] = []
    pictures: dict[str, list[Path]] = {"held-out slices": _real_pictures(weave)}
    base = {"captions": all_captions(), "concept": [CLASS_PROMPT]}
    for name, prompts in base.items():
        folder = _generate(config, f"base-{name}", ["--pretrained_model_name_or_path", BASE], prompts)
        pictures[f"embedded model, {name}"] = _shown(folder, prompts)
        reading = read_agreement(classifier, folder, DEFAULT, None if name == "captions" else CONCEPT)
        rows.append(
            Row(name=f"base_{name}", title=f"no training, {name}", steps=0, seconds=0, num_weights=0, megabytes=0,
                **reading)
        )  # fmt: skip
    for arm in chosen:
        legs: list[Row] = []
        for leg in range(max(1, len(arm.legs))):
            row, shown = _run(config, arm, leg, classifier)
            legs.append(row)
            pictures[row.title] = shown
        rows += _with_drift(config, arm, legs, rows)

    result = {
        "rows": [asdict(row) for row in rows],
        "classifier_on_held_out": admission,
        "findings": findings(rows),
        "elapsed_s": round(time.monotonic() - began, 1),
        "threads": os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)),
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _sheet(pictures).save(config.output.with_suffix(".png"))
    print("\n".join(["", *table(rows), "", *findings(rows)]))
    print(f"\n{result['elapsed_s'] / 60:.0f} min; look at {config.output.with_suffix('.png')}")


def _prepare(config: MethodsConfig, weave: Path) -> None:
    """Make the demo's slices if they are not there, the same with plain captions, nine of a kind, and the probes."""
    out, stages = config.output_dir, demo_commands(DemoConfig(output_dir=config.demo, seed=config.seed))
    if not (weave / "manifest.json").is_file():
        (config.demo / "volumes").mkdir(parents=True, exist_ok=True)
        for words in (*stages["phantoms"], *stages["slices"]):
            _call(words)
    (out / "plain.yaml").write_text('prefix: ""\n', encoding="utf-8")
    (out / "probes.yaml").write_text(PROBES, encoding="utf-8")
    words = stages["slices"][0]
    place = words.index("--output_dir") + 1
    _call([*words[:place], str(out / "weave-plain"), *words[place + 1 :], "--vocabulary", str(out / "plain.yaml")])

    from data_prep.folders.manifest import read_rows

    rows = [row for row in read_rows(weave / "train") if (row.state, row.axis) == CONCEPT]
    shutil.rmtree(out / "class", ignore_errors=True)  # images of another base model would be refused
    shutil.rmtree(out / "nine", ignore_errors=True)
    (out / "nine").mkdir()
    for place in range(COLUMNS):  # far apart in the volume
        row = rows[(2 * place + 1) * len(rows) // (2 * COLUMNS)]
        shutil.copy(weave / "train" / row.file_name, out / "nine" / f"{place}.png")


def training(config: MethodsConfig, arm: Arm, leg: int) -> list[str]:
    """Return the command that trains an arm; the legs after the first continue it."""
    run = config.output_dir / arm.name
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    launch += ["--config_file", "configs/accelerate/cpu.yaml", f"finetune/{arm.recipe}.py"]
    words = [word.replace("{weave}", str(config.demo / "weave")) for word in arm.words]
    words = ["--config", f"configs/{arm.preset}.yaml", *words, "--output_dir", str(run), "--seed", str(config.seed)]
    steps = 2 * (leg + 1) if config.trial else arm.legs[leg] if arm.legs else None
    words += ["--max_train_steps", str(steps)] if steps else []
    words += ["--checkpointing_steps", str(steps)] if arm.legs else []
    words += ["--max_train_samples", "32"] if config.trial and "{weave}/train" in arm.words else []
    words += ["--token_steps", "1"] if config.trial and arm.recipe == "pivotal_tuning" else []
    return [*launch, *words, *(["--overwrite"] if leg == 0 else [])]


def generation(config: MethodsConfig, name: str, model: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """Return the command that generates 72 pictures in all, as many of each prompt, or 24 of a single one."""
    count = (8, 24) if not config.trial else (1, COLUMNS)
    words = [*model, "--prompts", *prompts, "--num_images", str(count[len(prompts) == 1]), "--seed", str(config.seed)]
    # Guidance of 7.5 drives a model this small to black and white.
    words += ["--guidance_scale", "3", "--num_inference_steps", "1" if config.trial else "20", "--batch_size", "36"]
    words += ["--output_dir", str(config.output_dir / "pictures" / name), "--overwrite"]
    return [sys.executable, "-m", "eval.generate", *words]


def drift(config: MethodsConfig, arm: Arm, run: Path) -> list[str]:
    """Return the command that asks the probes of a trained arm."""
    words = [*_model_of(arm, run), *(["--base", BASE] if arm.saves_pipeline else [])]
    words += [
        "--probes",
        str(config.output_dir / "probes.yaml"),
        "--real",
        str(config.demo / "weave"),
        "--mode",
        "full",
    ]
    words += ["--num_inference_steps", "1" if config.trial else "12", "--batch_size", "36"]
    words += ["--num_timesteps", "2", "--num_images", "1"] if config.trial else ["--num_images", "3"]
    words += ["--output_dir", str(config.output_dir / "drift" / run.name), "--overwrite"]
    return [sys.executable, "-m", "eval.drift", *words]


def _run(config: MethodsConfig, arm: Arm, leg: int, classifier: SliceClassifier) -> tuple[Row, list[Path]]:
    """Train an arm, or a leg of it, generate, and read what came out."""
    run = config.output_dir / arm.name
    _call(training(config, arm, leg))
    logged = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    prompts = all_captions(arm.vocabulary) if arm.prompt is None else [arm.prompt]
    folder = _generate(config, f"{arm.name}-{logged['step']}", _model_of(arm, run), prompts)
    row = Row(
        name=arm.name,
        title=f"{arm.title}, {logged['step']} steps" if arm.legs else arm.title,
        steps=logged["step"],
        seconds=round(logged["elapsed_s"], 1),
        num_weights=_num_learned(run),
        megabytes=round(sum(path.stat().st_size for path in _weights(run)) / 1e6, 2),
        **read_agreement(classifier, folder, arm.vocabulary, None if arm.prompt is None else CONCEPT),
    )
    if arm.legs:  # the next leg writes over it
        shutil.copytree(run, _leg(run, row.steps), dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*"))
    return row, _shown(folder, prompts)


def _leg(run: Path, steps: int) -> Path:
    return run.with_name(f"{run.name}-after-{steps}")


def _model_of(arm: Arm, run: Path) -> list[str]:
    """Return the words that name a trained model to the programs of ``eval``."""
    if arm.saves_pipeline:
        return ["--pretrained_model_name_or_path", str(run)]
    return ["--pretrained_model_name_or_path", BASE, "--adapter", str(run)]


def _weights(run: Path) -> list[Path]:
    """Return what a user takes away: safetensors, without those of checkpoints and caches."""
    found = [path.relative_to(run) for path in run.rglob("*.safetensors")]
    return [run / path for path in found if not path.parts[0].startswith(("checkpoint-", "cache", "learned_embeds-"))]


def _num_learned(run: Path) -> int:
    """Count the numbers that learned: those of the files, and of a pipeline those of its parts that were not frozen."""
    from safetensors import safe_open

    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    frozen = {"vae"} if settings.get("train_text_encoder") else {"vae", "text_encoder"}
    count = 0
    for path in _weights(run):
        if path.parent.name in frozen:
            continue
        with safe_open(path, framework="pt") as reader:
            count += sum(math.prod(reader.get_slice(name).get_shape()) for name in reader.keys())  # noqa: SIM118
    return count


def _generate(config: MethodsConfig, name: str, model: Sequence[str], prompts: Sequence[str]) -> Path:
    """Generate pictures and return their folder."""
    _call(generation(config, name, model, prompts))
    return config.output_dir / "pictures" / name


def _with_drift(config: MethodsConfig, arm: Arm, legs: list[Row], rows: list[Row]) -> list[Row]:
    """Ask the probes: of every arm, and of the leg that agrees with its prompts as well as the LoRA does."""
    lora = next((row for row in rows if row.name == "lora"), None)
    alike = min(legs, key=lambda row: abs(_total(row) - _total(lora))) if lora and len(legs) > 1 else legs[-1]
    return [_drift(config, arm, row) if row in (alike, legs[-1]) else row for row in legs]


def _drift(config: MethodsConfig, arm: Arm, row: Row) -> Row:
    """Return the row with what the probes say."""
    run = config.output_dir / arm.name
    run = _leg(run, row.steps) if arm.legs else run
    _call(drift(config, arm, run))
    lines = (config.output_dir / "drift" / run.name / "results.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[tuple[str, str], Any] = {}
    for item in map(json.loads, lines):
        found.setdefault((item["metric"], item["prompt"]), item)
    moved = [item["value"] for (metric, prompt), item in found.items() if metric == "divergence" and prompt]
    worst: dict[str, Any] = next((item for (metric, _), item in found.items() if metric == "worst_prompt"), {})
    return replace(
        row,
        worst_probe=worst.get("prompt"),
        kept=worst.get("value"),
        class_kept=found.get(("retention", CLASS_PROMPT), {}).get("value"),  # none where no slice could be recognised
        class_moved=found["divergence", CLASS_PROMPT]["value"],
        probes_moved=sum(moved) / len(moved),
    )


def train_reader(weave: Path, seed: int, num_steps: int) -> tuple[SliceClassifier, dict[str, float]]:
    """Train the reader of state and axis once, and check it on held-out slices."""
    from eval.likeness.classifier import read_slices, train_classifier
    from eval.tiles.features import draw_cuts, read_tiles
    from eval.tiles.sets import read_real, real_cuts

    real = read_real(weave, DEFAULT)
    cuts = real_cuts(real, 64)
    learning = read_tiles(draw_cuts(cuts.learning, 400, seed), 64)
    held_out = read_tiles(draw_cuts(cuts.held_out, 80, seed), 64)
    truth = _numbers([cut.label for cut in learning.cuts])
    model = train_classifier(learning.pixels, truth["state"], truth["axis"], num_steps=num_steps, seed=seed)
    seen = read_slices(model, held_out.pixels)
    asked = _numbers([cut.label for cut in held_out.cuts])
    return model, {
        "state": float((seen.states.argmax(1) == asked["state"]).mean()),
        "axis": float((seen.axes.argmax(1) == asked["axis"]).mean()),
    }


def read_agreement(
    classifier: SliceClassifier, folder: Path, vocabulary: Vocabulary, concept: tuple[str, str] | None
) -> dict[str, Any]:
    """Return the shares of pictures that show the state and axis asked for."""
    import numpy as np

    from eval.likeness.classifier import read_slices
    from eval.tiles.features import read_grey

    records = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = [concept or parse_caption(record["prompt"], vocabulary) for record in records]
    if None in labels:
        raise TisserandError(f"{folder}: a prompt is no caption of the vocabulary")
    seen = read_slices(classifier, np.stack([read_grey(folder / record["file_name"]) for record in records]))
    asked = _numbers([label for label in labels if label])
    return {
        "state": float((seen.states.argmax(1) == asked["state"]).mean()),
        "axis": float((seen.axes.argmax(1) == asked["axis"]).mean()),
        "num_pictures": len(records),
    }


def _numbers(labels: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return class numbers of states and axes."""
    import numpy as np

    states, axes = list(DEFAULT.states), list(DEFAULT.axes)
    return {
        "state": np.array([states.index(state) for state, _ in labels], dtype=np.int64),
        "axis": np.array([axes.index(axis) for _, axis in labels], dtype=np.int64),
    }


def _total(row: Row) -> float:
    """State and axis together: how well pictures agree with their prompts."""
    return (row.state + row.axis) / 2


def findings(rows: Sequence[Row]) -> list[str]:
    """Say what was found of the three things that the study reports."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    found = []
    priors = {name: by_name.get(name, [None])[-1] for name in ("dreambooth", "dreambooth_class", "dreambooth_base")}
    if all(row is not None and row.class_moved is not None for row in priors.values()):
        shown = ", ".join(f"{row.title.partition(', ')[2]} {row.class_moved:.4f}" for row in priors.values() if row)
        found.append(f"DreamBooth on the class prompt, how far predictions moved: {shown}.")
    full = [row for row in by_name.get("full", []) if row.probes_moved is not None]
    if full and "lora" in by_name:
        lora = by_name["lora"][-1]
        alike = min(full, key=lambda row: abs(_total(row) - _total(lora)))
        found.append(
            f"At like agreement (LoRA {_total(lora):.2f}, {alike.title} {_total(alike):.2f}) the probes' predictions "
            f"moved by {lora.probes_moved:.4f} with LoRA and {alike.probes_moved:.4f} with full fine-tuning."
        )
    if "lora" in by_name and "lora_plain" in by_name:
        with_prefix, without = by_name["lora"][-1], by_name["lora_plain"][-1]
        found.append(
            f"Agreement with the prefix: state {with_prefix.state:.2f}, axis {with_prefix.axis:.2f}; "
            f"without: state {without.state:.2f}, axis {without.axis:.2f}."
        )
    return found


def table(rows: Sequence[Row]) -> list[str]:
    """Write the table of docs/fine_tune.md."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    columns = ("method", "steps", "seconds", "weights that learn", "MB", "state", "axis")
    columns += ("worst probe keeps", "class prompt moved", "probes moved")
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for row in rows:
        numbers = (
            (f"{row.steps}", f"{row.seconds:.0f}", f"{row.num_weights:,}", f"{row.megabytes:.2f}")
            if row.steps
            else [""] * 4
        )
        drift = (cell(row.kept, ".2f"), cell(row.class_moved, ".4f"), cell(row.probes_moved, ".4f"))
        lines.append(f"| {' | '.join([row.title, *numbers, f'{row.state:.2f}', f'{row.axis:.2f}', *drift])} |")
    return lines


def _real_pictures(weave: Path) -> list[Path]:
    """Return one held-out slice of each caption."""
    from data_prep.folders.manifest import read_rows

    rows = read_rows(weave / "validation")
    found = []
    for caption in all_captions():
        alike = [row for row in rows if row.text == caption]
        found.append(weave / "validation" / alike[len(alike) // 2].file_name)
    return found


def _shown(folder: Path, prompts: Sequence[str]) -> list[Path]:
    """Return the pictures of the sheet: one of each prompt, or the first of the only one."""
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    if len(prompts) == 1:
        return [folder / record["file_name"] for record in records[:COLUMNS]]
    return [folder / next(r["file_name"] for r in records if r["prompt"] == prompt) for prompt in prompts]


def _sheet(pictures: dict[str, list[Path]]) -> Any:
    """Lay the pictures out, a method a row."""
    import numpy as np
    from PIL import Image

    from eval.tiles.contact_sheet import contact_sheet

    images = [np.asarray(Image.open(path).convert("RGB")) for paths in pictures.values() for path in paths]
    return contact_sheet(images, len(pictures), COLUMNS, list(pictures))


def _call(words: Sequence[str]) -> str:
    """Print a command, run it and return what it printed."""
    print(f"\n$ {shlex.join([Path(words[0]).name.replace('python3.11', 'python'), *words[1:]])}", flush=True)
    said = []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            said.append(line)
    if process.returncode:
        raise TisserandError(f"the command above ended with exit code {process.returncode}")
    return "".join(said)


if __name__ == "__main__":
    command(MethodsConfig, main)
