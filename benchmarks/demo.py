"""The whole path on the embedded base model, as the commands a user would type; `make demo` runs it.

    python benchmarks/demo.py

Three synthetic volumes -> captioned tiles -> LoRA -> generated slices -> drift -> fidelity -> one page. Every
command is printed before it runs. The times, the peak memory and a hash of every product go to demo/demo.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import TisserandError
from configs.load import command
from prompts.captions import all_captions

BASE = "assets/tiny-sd"
SHAPES = {"dry": (104, 224, 288), "dry_compacted": (72, 224, 288), "injected": (88, 224, 288)}
"""Volume of each state in voxels, Z Y X; compaction makes the fabric thinner."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo."""

    output_dir: Path = Path("demo")
    """Folder of everything the demo makes."""
    seed: int = 0
    """The same seed gives the same slices, weights and pictures."""


def commands(config: DemoConfig) -> dict[str, list[list[str]]]:
    """Return the commands of each stage, in order."""
    out, seed = config.output_dir, str(config.seed)
    volumes = {state: out / "volumes" / f"{state}.tif" for state in SHAPES}
    module = [sys.executable, "-m"]
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    launch += ["--config_file", "configs/accelerate/cpu.yaml"]
    model = ["--pretrained_model_name_or_path", BASE]
    phantoms = [
        [*module, "data_prep.phantom", "--state", state, "--shape", *map(str, shape), "--seed", seed]
        for state, shape in SHAPES.items()
    ]
    for words, path in zip(phantoms, volumes.values(), strict=True):
        words += ["--output", str(path), "--overwrite"]
    cut = ["--volumes", *(f"{state}={path}" for state, path in volumes.items()), "--split", "region", "--stride", "4"]
    cut += ["--fit", "tile", "--tile_size", "64", "--output_dir", str(out / "weave"), "--overwrite"]
    train = ["finetune/lora.py", "--config", "configs/demo_lora.yaml", "--train_data_dir", str(out / "weave" / "train")]
    train += ["--output_dir", str(out / "lora"), "--seed", seed, "--overwrite"]
    generate = [*model, "--adapter", str(out / "lora"), "--prompts", *all_captions(), "--num_images", "16"]
    # Guidance of 7.5 drives a model this small to black and white.
    generate += ["--guidance_scale", "3", "--num_inference_steps", "20", "--seed", seed, "--batch_size", "48"]
    generate += ["--output_dir", str(out / "slices"), "--overwrite"]
    drift = [*model, "--adapter", str(out / "lora"), "--probes", "tiny", "--real", str(out / "weave")]
    drift += ["--num_images", "4", "--num_inference_steps", "12", "--batch_size", "48"]
    drift += ["--output_dir", str(out / "drift"), "--overwrite"]
    fidelity = ["--real", str(out / "weave"), "--generated", str(out / "slices")]
    fidelity += ["--bootstrap_draws", "200", "--output_dir", str(out / "fidelity"), "--overwrite"]
    report = ["--run", str(out / "lora"), "--results", *(str(out / name) for name in ("slices", "drift", "fidelity"))]
    report += ["--output", str(out / "report.html"), "--overwrite"]
    return {
        "phantoms": phantoms,
        "slices": [[*module, "data_prep.slice", *cut]],
        "training": [[*launch, *train]],
        "generation": [[*module, "eval.generate", *generate]],
        "drift": [[*module, "eval.drift", *drift]],
        "fidelity": [[*module, "eval.fidelity", *fidelity]],
        "report": [[*module, "eval.report", *report]],
    }


def main(config: DemoConfig) -> None:
    """Run every command, then print ten lines: what was made, what was measured, where to look."""
    (config.output_dir / "volumes").mkdir(parents=True, exist_ok=True)
    times: dict[str, float] = {}
    for stage, lines in commands(config).items():
        start = time.monotonic()
        for words in lines:
            print(f"\n$ {shlex.join(_as_typed(words))}", flush=True)
            code = subprocess.run(words, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
            if code:
                raise TisserandError(f"{stage}: the command above ended with exit code {code}")
        times[stage] = round(time.monotonic() - start, 1)
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    products = {name: _hash_of(config.output_dir, pattern) for name, pattern in _PRODUCTS.items()}
    measured = _measured(config.output_dir)
    record = {"times_s": times, "peak_gb": round(peak_gb, 2), "hashes": products, "measured": measured}
    (config.output_dir / "demo.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _summarize(config.output_dir, times, peak_gb, measured)


_PRODUCTS = {
    "slices": "weave/*/*.png",
    "weights": "lora/pytorch_lora_weights.safetensors",
    "generated": "slices/*.png",
}


def _as_typed(words: list[str]) -> list[str]:
    """Show the interpreter and the launcher as a user types them."""
    return [Path(words[0]).name.replace("python3.11", "python"), *words[1:]]


def _hash_of(folder: Path, pattern: str) -> str:
    """SHA-256 over names and bytes of the files that match."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _measured(folder: Path) -> dict[str, float | str]:
    """Pick the headline numbers out of the results."""
    numbers: dict[str, float | str] = {}
    for row in _rows(folder / "fidelity"):
        if not row["prompt"] and row["metric"].startswith(("accuracy_", "agreement_", "kid_floor_ratio")):
            numbers[f"{row['metric']} {row['set']}"] = row["value"]
    for row in _rows(folder / "drift"):
        if row["metric"] == "worst_prompt":
            numbers |= {"worst prompt": row["prompt"], f"its {row['unit']}": row["value"], "drift": row["verdict"]}
    return numbers


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Read results.jsonl."""
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def _summarize(out: Path, times: dict[str, float], peak_gb: float, measured: dict[str, float | str]) -> None:
    """Print ten lines: what it cost, what was measured, where to look, and how to go on with one's own volume."""

    def shown(name: str) -> str:
        value = measured.get(name)
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    counts = {split: len(list((out / "weave" / split).glob("*.png"))) for split in ("train", "validation")}
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in times.items())
    real, alike, asked = "held_out", "held_out_matched", "generated"
    print(f"""
Done in {sum(times.values()) / 60:.1f} min ({spent}); the largest process took {peak_gb:.1f} GB.
Slices: {counts["train"]} tiles to learn from and {counts["validation"]} held out, {len(SHAPES)} volumes, 3 directions.
Classifier on held-out real tiles: state {shown(f"accuracy_state {real}")}, axis {shown(f"accuracy_axis {real}")}; \
state with one histogram for all {shown(f"accuracy_state {alike}")}.
Generated slices that show the state of their prompt {shown(f"agreement_state {asked}")}, \
its axis {shown(f"agreement_axis {asked}")}.
Distance to real slices over the distance among real ones: {shown(f"kid_floor_ratio {asked}")}.
Drift: {shown("drift")}; worst prompt '{shown("worst prompt")}'.
Look at       {out / "report.html"}
Pictures      {out / "slices" / "contact_sheet.png"}, {out / "drift" / "side_by_side.png"}
Your volume   python -m data_prep.slice --volumes dry=YOUR.tif --fit tile --tile_size 512 --output_dir data/mine
Then          accelerate launch finetune/lora.py --train_data_dir data/mine/train --output_dir runs/mine \
--pretrained_model_name_or_path FOLDER_OR_HUB_ID""")


if __name__ == "__main__":
    command(DemoConfig, main)
