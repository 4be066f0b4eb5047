"""Drift on purpose: a DreamBooth run trained for too long on ten slices, watched, ended by rule, and with a prior.

    python benchmarks/drift.py

Asks whether the pulse flags an unrelated prompt before its pictures are ruined, what `guard` saves of the run and of
the model, what class images repair, and whether a leak of a half reads a half. Uses the slices of `make demo`. Writes
drift.json and drift.png.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods import read_agreement, train_reader

from configs.errors import InputError, TisserandError
from configs.load import command
from demo import BASE
from prompts.vocabulary import DEFAULT

STATE, AXIS, NUM_SLICES = "dry_compacted", "thickness", 10
INSTANCE_PROMPT, CLASS_PROMPT = "a w17h3r grey woven texture", "a grey woven texture"
CLASS_PROBE, UNRELATED_PROBE = "grey-woven", "blue-circle"
SHOWN = (
    INSTANCE_PROMPT,
    CLASS_PROMPT,
    "one blue circle on a yellow background",
    "two green squares on a white background",
)
PROBES = f"""version: 1
sets:
  G0: {{title: anchors, probes: {{green-squares: {SHOWN[3]}}}}}
  G2: {{title: the class, probes: {{{CLASS_PROBE}: {CLASS_PROMPT}}}}}
  G3: {{title: far from the slices, probes: {{{UNRELATED_PROBE}: {SHOWN[2]},
        red-circles: three red circles on a black background}}}}
"""
RECIPE = "lora_dreambooth"
LEARNS = ("--lora_targets", "attention+resnet", "--rank", "32", "--learning_rate", "1e-3", "--train_batch_size", "5")
STEPS, EVERY = 200, 20
TRIPS_AT, RUINED_BELOW = 0.1, 0.5
"""What eval/forgetting/drift_policy.yaml calls a change worth a look, and a prompt that is lost."""
NUM_PICTURES = 48
MOST_COLUMNS, HEADER = 6, 18


@dataclass(frozen=True, kw_only=True)
class DriftBenchmarkConfig:
    """Settings of ``benchmarks/drift.py``."""

    weave: Path = Path("demo/weave")
    """The slices of `make demo`."""
    output_dir: Path = Path("demo/drift-on-purpose")
    """Folder of the runs, the pictures and the checks."""
    output: Path = Path("benchmarks/results/drift.json")
    """Where the figures go; pictures go beside it."""
    only_figures: bool = False
    """Read what the runs of an earlier call left, without training again."""
    seed: int = 0
    """Of every training and every picture."""


def main(config: DriftBenchmarkConfig) -> None:
    """Train, check, and write the figures."""
    out = config.output_dir
    if not (config.weave / "train" / "metadata.jsonl").is_file():
        raise InputError(f"--weave {config.weave}: holds no train/metadata.jsonl; run `make demo` first")
    out.mkdir(parents=True, exist_ok=True)
    (out / "probes.yaml").write_text(PROBES, encoding="utf-8")
    if not config.only_figures:
        for words in commands(config):
            _call(words)
    results: dict[str, Any] = {
        "pulse": pulse_figures(out / "report"),
        "guard": guard_figures(config),
        "prior": prior_figures(out),
        "leak": leak_figures(config),
        "settings": {"steps": STEPS, "every": EVERY, "slices": NUM_SLICES, "recipe": RECIPE, "options": list(LEARNS)},
    }
    results["findings"] = findings(results)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    save_pictures(out, config.output.with_suffix(".png"))
    print("\n".join(results["findings"]))
    print(f"look at {config.output.with_suffix('.png')}")


def commands(config: DriftBenchmarkConfig) -> list[list[str]]:
    """Return the commands in their order: slices, three trainings, and what each model is asked afterwards."""
    out, seed, module = config.output_dir, str(config.seed), [sys.executable, "-m"]
    few = ["--states", STATE, "--axes", AXIS, "--num_per_axis", str(NUM_SLICES), "--output_dir", str(out / "ten")]
    train = [sys.executable, f"finetune/{RECIPE}.py", "--pretrained_model_name_or_path", BASE, *LEARNS]
    train += ["--instance_data_dir", str(out / "ten" / STATE.replace("_", "-")), "--instance_prompt", INSTANCE_PROMPT]
    train += ["--max_train_steps", str(STEPS), "--checkpointing_steps", str(STEPS // 2), "--seed", seed]
    train += ["--validation_prompt", *SHOWN, "--num_validation_images", "1", "--validation_steps", str(2 * EVERY)]
    train += ["--drift_probes", str(out / "probes.yaml"), "--drift_steps", str(EVERY), "--overwrite"]
    prior = ["--with_prior_preservation", "--class_prompt", CLASS_PROMPT, "--class_data_dir", str(out / "class")]
    prior += ["--num_class_images", "16", "--sample_batch_size", "16"]
    arms = {
        "report": ["--drift_policy", "report"],
        "guard": ["--drift_policy", "guard"],
        "prior": ["--drift_policy", "report", *prior],
    }
    words = [[*module, "data_prep.fewshot", str(config.weave), *few, "--seed", seed, "--overwrite"]]
    words += [[*train, *more, "--output_dir", str(out / name)] for name, more in arms.items()]
    for name in ("base", *arms):
        asked = ["--prompts", INSTANCE_PROMPT, "--num_images", str(NUM_PICTURES), "--seed", seed, "--batch_size", "24"]
        asked += ["--guidance_scale", "3", "--num_inference_steps", "20", "--overwrite"]
        model = ["--pretrained_model_name_or_path", BASE]
        model += ["--adapter", str(out / name)] if name in arms else []
        model += ["--output_dir", str(out / f"{name}-slices")]
        words.append([*module, "eval.generate", *model, *asked])
    return words


def pulse_figures(run: Path) -> dict[str, Any]:
    """Return when the pulse first called for a look, of all and of the unrelated probe, and when that one was lost."""
    rows = _lines(run / "drift.jsonl")
    pulses, checks = ([row for row in rows if row["kind"] == kind] for kind in ("pulse", "check"))
    curve = [
        {
            "step": row["step"],
            "ratio": row["ratio"],
            "unrelated": row["prompts"][UNRELATED_PROBE] / row["captions"] if row["captions"] else None,
            "class": row["prompts"][CLASS_PROBE] / row["captions"] if row["captions"] else None,
        }
        for row in pulses
    ]
    for row, check in ((row, check) for row in curve for check in checks if check["step"] == row["step"]):
        row["verdict"] = check["verdict"]
        row["worst"] = check["value"]
        for name, prompt in (("unrelated", SHOWN[2]), ("class", CLASS_PROMPT)):
            row[f"{name}_kept"] = _kept(check["rows"], prompt)
    return {
        "curve": curve,
        "unit_of_worst": checks[-1]["unit"],
        "pulse_trips_at_step": _first(curve, lambda row: (row["ratio"] or 0) > TRIPS_AT),
        "pulse_of_unrelated_trips_at_step": _first(curve, lambda row: (row["unrelated"] or 0) > TRIPS_AT),
        "unrelated_ruined_at_step": _first(curve, lambda row: row.get("unrelated_kept", 1.0) < RUINED_BELOW),
        "check_says_stop_at_step": _first(curve, lambda row: row.get("verdict") == "stop"),
        "seconds": {
            kind: round(sum(row["seconds"] for row in rows if row["kind"] == kind and row["step"]), 1)
            for kind in ("pulse", "check")
        },
    }


def guard_figures(config: DriftBenchmarkConfig) -> dict[str, Any]:
    """Return what `guard` kept, beside the run that went to its end."""
    reader, admission = train_reader(config.weave, config.seed, num_steps=600)
    selection = json.loads((config.output_dir / "guard" / "selection.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {"reader_on_held_out": admission, "selection": selection}
    for name, step in (("base", 0), ("report", STEPS), ("guard", selection["selected_step"]), ("prior", STEPS)):
        read = read_agreement(reader, config.output_dir / f"{name}-slices", DEFAULT, (STATE, AXIS))
        check = _check(config.output_dir / ("report" if name == "base" else name), step)
        found[name] = {**read, "step": step, "worst_prompt": check["prompt"], "worst": check["value"]}
        found[name] |= {"unit": check["unit"], "verdict": check["verdict"]}
    return found


def prior_figures(out: Path) -> dict[str, Any]:
    """Return what class images left of the change of the class probe, and of the others'."""
    found: dict[str, Any] = {}
    for name in ("report", "prior"):
        rows = _check(out / name, STEPS)["rows"]
        moved = {row["prompt"]: row["value"] for row in rows if row["metric"] == "divergence" and row.get("prompt")}
        others = [prompt for prompt in moved if "grey" not in prompt and prompt != "(empty prompt)"]
        found[name] = {
            "divergence": {"class": moved[CLASS_PROMPT], "unrelated": sum(moved[one] for one in others) / len(others)},
            "kept": {
                "class": _kept(rows, CLASS_PROMPT),
                "unrelated": sum(_kept(rows, one) for one in others) / len(others),
            },
        }
    found["share_of_the_change_undone"] = {
        kind: 1 - found["prior"]["divergence"][kind] / value for kind, value in found["report"]["divergence"].items()
    }
    return found


def leak_figures(config: DriftBenchmarkConfig) -> dict[str, Any]:
    """Replace half of the base model's probe pictures by held-out slices, and return the leak that is read."""
    import numpy as np

    from eval.forgetting.leak import read_slices
    from eval.forgetting.light import LightDrift, few_probes
    from eval.forgetting.picture_scores import is_leaked
    from eval.forgetting.policy import GUARD
    from finetune.diffusion.config import SamplingConfig
    from finetune.diffusion.models import load_models
    from prompts.probe_lists import read_probes

    models = load_models(BASE)
    light = LightDrift(
        models=models,
        probes=few_probes(read_probes("tiny")),
        captions=(INSTANCE_PROMPT,),
        sampling=SamplingConfig(num_inference_steps=20, batch_size=24),
        policy=GUARD,
    )
    kept = light.keep()
    size = (models.size_px, models.size_px)
    detector, why_blind = light.learn_slices(
        kept, read_slices(config.weave / "train", size, limit=96, seed=config.seed)
    )
    if detector is None:
        raise TisserandError(why_blind)
    pictures = kept["pictures"].flatten(0, 1).numpy().copy()
    slices = read_slices(config.weave / "validation", size, limit=len(pictures), seed=config.seed)[: len(pictures) // 2]
    pictures[: 2 * len(slices) : 2] = np.stack(slices)[..., None]
    found = is_leaked(detector.patch_shares(pictures))
    replaced = np.arange(len(pictures)) < 2 * len(slices)
    replaced &= np.arange(len(pictures)) % 2 == 0
    return {
        "leak": float(found.mean()),
        "pictures": len(pictures),
        "replaced": len(slices),
        "of_slices": float(found[replaced].mean()),
        "of_the_base": float(found[~replaced].mean()),
    }


def findings(results: dict[str, Any]) -> list[str]:
    """Say what was found, against what was asked."""
    pulse, guard, prior, leak = (results[name] for name in ("pulse", "guard", "prior", "leak"))
    selection, last, chosen = guard["selection"], guard["report"], guard["guard"]
    gone = prior["share_of_the_change_undone"]
    agree = {name: (guard[name]["state"] + guard[name]["axis"]) / 2 for name in ("report", "guard")}
    return [
        f"pulse of the unrelated probe above {TRIPS_AT} at step {pulse['pulse_of_unrelated_trips_at_step']}; "
        f"its pictures below {RUINED_BELOW} at step {pulse['unrelated_ruined_at_step']}",
        f"guard: {selection['ended'] or 'went to the end'} at step {selection['last_step']} of "
        f"{selection['planned_steps']}: {selection['saved_steps']} steps saved; "
        f"weights of step {selection['selected_step']}",
        f"agreement (mean of state and axis): {agree['guard']:.2f} against {agree['report']:.2f} of the last weights",
        f"worst prompt: {chosen['unit']} {chosen['worst']:.2f} against {last['worst']:.2f} of the last weights",
        f"class images undo {gone['class']:.0%} of the change of the class probe, {gone['unrelated']:.0%} of others",
        f"leak with half of the pictures replaced: {leak['leak']:.3f}",
    ]


def save_pictures(out: Path, path: Path) -> None:
    """Put previews of the run without and with a prior side by side, a column a step, a row a prompt."""
    from PIL import Image, ImageDraw

    strips = []
    for name in ("report", "prior"):
        files = sorted((out / name / "previews").glob("step-*.png"))
        sheets = []
        for file in files[:: max(1, len(files) // MOST_COLUMNS)]:
            with Image.open(file) as opened:
                sheets.append((int(file.stem.removeprefix("step-")), opened.convert("RGB")))
        strips.append((name, sheets))
    width = max(sum(sheet.width for _, sheet in sheets) for _, sheets in strips)
    height = sum(sheets[0][1].height + HEADER for _, sheets in strips)
    whole = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(whole), 0
    for name, sheets in strips:
        left = 0
        for step, sheet in sheets:
            draw.text((left + 6, top + 4), f"{'no prior' if name == 'report' else 'prior'}, step {step}", fill="black")
            whole.paste(sheet, (left, top + HEADER))
            left += sheet.width
        top += sheets[0][1].height + HEADER
    whole.save(path)


def _first(curve: Sequence[dict[str, Any]], holds: Callable[[dict[str, Any]], bool]) -> int | None:
    """Return the first step at which something holds."""
    return next((int(row["step"]) for row in curve if holds(row)), None)


def _kept(rows: Sequence[dict[str, Any]], prompt: str) -> float:
    """Return what is left of a prompt: its retention, or of its colour where no leak could be measured."""
    by_metric = {row["metric"]: row.get("value") for row in rows if row.get("prompt") == prompt}
    found = by_metric.get("retention")
    found = by_metric.get("colourfulness_ratio") if found is None else found
    return 1.0 if found is None else float(found)


def _check(run: Path, step: int) -> dict[str, Any]:
    """Return the check that a run made of a step."""
    return next(row for row in _lines(run / "drift.jsonl") if row["kind"] == "check" and row["step"] == step)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _call(words: Sequence[str]) -> None:
    """Run a command, printed as it is typed."""
    print(f"\n$ {shlex.join(words)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, check=False)
    if done.returncode:
        raise TisserandError(f"{words[1]}: exit code {done.returncode}")


if __name__ == "__main__":
    command(DriftBenchmarkConfig, main)
