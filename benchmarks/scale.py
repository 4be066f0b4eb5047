"""What a slice costs as there are more of them, and what a second process brings.

    python benchmarks/scale.py

Trains LoRA on 100, 1,000, ... pictures of 32 px with a model so small that everything but it shows: reading and
checking the folder, building the cache, starting again with the cache, going on from a checkpoint, and the report. Per
slice, seconds and memory beyond what the smallest folder takes. Then the reduced model with one process of one thread
and with two, on one core each.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from configs.errors import TisserandError
from configs.load import command
from random_sd import SIZES, write_model, write_pictures
from slicing import cpu_name
from training import versions

HERE = Path(__file__).parent
SIDE = 32
STEPS = 40


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Settings of ``benchmarks/scale.py``."""

    counts: tuple[int, ...] = (100, 1000, 10_000, 100_000)
    """Pictures of the folder, one measurement each."""
    steps: int = 20
    """Steps that the two processes, and the one, are timed on."""
    train_batch_size: int = 4
    """Pictures of a step of one process in that comparison."""
    work_dir: Path | None = None
    """Folder for pictures and runs; a temporary one by default."""
    output: Path = Path("benchmarks/results/scale.json")
    """Where the figures go."""
    dry_run: bool = False
    """Print what would be measured."""


def main(config: ScaleConfig) -> None:
    """Measure, print and write."""
    print(f"folders of {', '.join(map(str, config.counts))} pictures; then one process against two")
    if config.dry_run:
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=config.work_dir, prefix="scale-") as name:
        work = Path(name)
        write_model(work / "model", "grain")
        for count in config.counts:
            rows.append(measure(work, count))
            print(f"  {count}: {', '.join(f'{key} {value:.4g}' for key, value in rows[-1].items())}", flush=True)
        processes = compare_processes(config, work)
    smallest = rows[0]
    per_slice = [
        {"num_images": row["num_images"]}
        | {
            key: (row[key] - smallest[key]) / (row["num_images"] - smallest["num_images"])
            for key in row
            if key != "num_images" and not key.startswith("step_")
        }
        for row in rows[1:]
    ]
    for row in per_slice:
        print(
            f"  per slice, up to {row['num_images']}: {', '.join(f'{key} {value:.3g}' for key, value in row.items())}"
        )
    content = {
        "command": "python benchmarks/scale.py",
        "device": cpu_name(),
        "folders": rows,
        "per_slice": per_slice,
        "processes": processes,
        "load_at_the_end": os.getloadavg()[0],
        "versions": versions(),
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def measure(work: Path, count: int) -> dict[str, Any]:
    """Return what the stages take with a number of pictures."""
    folder = work / str(count)
    write_pictures(folder, count, SIDE)
    words = ["--pretrained_model_name_or_path", str(work / "model"), "--resolution", str(SIDE), "--seed", "0"]
    words += ["--train_data_dir", str(folder / "captioned"), "--train_batch_size", "8", "--report_to", "none"]
    words += ["--checkpointing_steps", str(STEPS // 2), "--logging_steps", str(STEPS // 2)]
    words += ["--latent_cache_dir", str(folder / "cache"), "--output_dir", str(folder / "run")]
    train = [sys.executable, str(HERE.parent / "finetune" / "lora.py"), *words, "--max_train_steps"]
    build = run([*train, str(STEPS)])
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    again = run([*train, str(STEPS), "--overwrite"])
    resume = run([*train, str(STEPS + STEPS // 2)])
    words = ["--run", str(folder / "run"), "--output", str(folder / "report.html")]
    report = run([sys.executable, "-m", "eval.report", *words])
    shutil.rmtree(folder)
    return {
        "num_images": count,
        "first_start_s": build["wall_s"],
        "start_with_cache_s": again["wall_s"],
        "resume_s": resume["wall_s"],
        "report_s": report["wall_s"],
        "step_s": (lines[-1]["elapsed_s"] - lines[0]["elapsed_s"]) / (lines[-1]["step"] - lines[0]["step"]),
        "first_start_peak_mb": build["peak_mb"],
        "start_with_cache_peak_mb": again["peak_mb"],
    }


def run(words: Sequence[str], **more: str) -> dict[str, float]:
    """Run a command on one thread; return its time and the most memory of its own that it held."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}
    start = time.perf_counter()
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=HERE.parent
    )
    most = [0.0]
    watcher = threading.Thread(target=watch, args=(process.pid, most), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    wall = time.perf_counter() - start
    if process.returncode:
        tail = "\n".join(output.splitlines()[-10:])
        raise TisserandError(f"{' '.join(words)}: ended with exit code {process.returncode}:\n{tail}")
    return {"wall_s": wall, "peak_mb": most[0]}


def watch(pid: int, most: list[float]) -> None:
    """Keep the largest memory of a process, in 10^6 bytes, without pages of files, which the system may drop."""
    try:
        process = psutil.Process(pid)
        while True:
            memory = process.memory_info()
            most[0] = max(most[0], (memory.rss - memory.shared) / 1e6)
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        return


def compare_processes(config: ScaleConfig, work: Path) -> dict[str, float]:
    """Return pictures a second of one process and of two, on one thread and one core each, and their ratio."""
    write_model(work / "reduced", "reduced")
    write_pictures(work / "pictures", 16, SIZES["reduced"].resolution)
    words = ["--pretrained_model_name_or_path", str(work / "reduced"), "--seed", "0", "--report_to", "none"]
    words += ["--train_data_dir", str(work / "pictures" / "captioned"), "--logging_steps", "5"]
    words += ["--latent_cache_dir", str(work / "cache"), "--train_batch_size", str(config.train_batch_size)]
    words += ["--max_train_steps", str(config.steps), "--overwrite"]
    script = str(HERE.parent / "finetune" / "lora.py")
    one = [sys.executable, script, *words, "--output_dir", str(work / "one")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = [*launcher, script, *words, "--output_dir", str(work / "two")]
    run(one, ACCELERATE_USE_CPU="true")  # fills the cache
    rates: dict[str, list[float]] = {"one": [], "two": []}
    for _ in range(2):
        for name, line, number in (("one", one, 1), ("two", two, 2)):
            run(line, ACCELERATE_USE_CPU="true")
            text = (work / name / "metrics.jsonl").read_text(encoding="utf-8")
            rows = [json.loads(row) for row in text.splitlines()]
            seconds = rows[-1]["elapsed_s"] - rows[0]["elapsed_s"]
            images = (rows[-1]["step"] - rows[0]["step"]) * config.train_batch_size * number
            rates[name].append(images / seconds)
    found = {"one_images_per_s": max(rates["one"]), "two_images_per_s": max(rates["two"])}
    found["ratio"] = found["two_images_per_s"] / found["one_images_per_s"]
    print(f"  two processes of one thread: {found['ratio']:.2f}x one")
    return found


if __name__ == "__main__":
    command(ScaleConfig, main)
