"""Are the measurements right? Nothing changed reads nothing, copies are found, intervals cover, the page opens.

    python benchmarks/measurements.py

Four parts, after `make demo`. `zero`: a model against itself, and 100 repeats of the base against itself with other
seeds. `copies`: planted copies, a LoRA trained on nine slices for too long, one trained on all for a few hundred steps,
and the demo's. `statistics`: closed forms, simulations, porespy and torch-fidelity where they are installed or in the
folder that TISSERAND_EXTRA_PACKAGES names. `page`: three methods compared on one page, in a headless browser. What an
earlier call left in --output_dir is used again. Writes measurements.json, part by part.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import InputError, TisserandError
from configs.load import command
from demo import BASE
from prompts.captions import all_captions

if TYPE_CHECKING:
    import numpy as np

REPEATS, POOL, PICTURES, STEPS = 100, 24, 4, 12
"""Repeats, seeds a probe they are drawn from, pictures a probe in a check, and denoising steps."""
SCORES = ("leak", "retention", "colourfulness_ratio", "saturation_ratio", "luminance_ratio")
NINE = ("sf_dry sf_thickness", "sf_dry sf_warp", "sf_dry sf_weft")
SAMPLER = ("--num_inference_steps", "20", "--guidance_scale", "3", "--batch_size", "48")
FULL_STEPS = 100
STACKS, SLICES, LENGTH, BLOCK = 200, 700, 15, 60
"""Simulated stacks, slices in each, their correlation length, and slices in a block (four lengths)."""


@dataclass(frozen=True, kw_only=True)
class MeasurementsConfig:
    """Settings of ``benchmarks/measurements.py``."""

    demo: Path = Path("demo")
    """Folder of `make demo`."""
    output_dir: Path = Path("demo/measurements")
    """Folder of the runs, pictures and checks made here."""
    output: Path = Path("benchmarks/results/measurements.json")
    """Where the figures go."""
    only: tuple[str, ...] = ()
    """Parts to run, of zero, copies, statistics and page; all if absent."""
    seed: int = 0
    """Of every training, picture and simulation."""

    def __post_init__(self) -> None:
        """Refuse parts that do not exist."""
        if unknown := sorted(set(self.only) - set(PARTS)):
            raise ValueError(f"--only {unknown[0]}: not one of {', '.join(PARTS)}")


def main(config: MeasurementsConfig) -> None:
    """Run the parts asked for, and write the figures of each as it ends."""
    if not (config.demo / "lora" / "pytorch_lora_weights.safetensors").is_file():
        raise InputError(f"--demo {config.demo}: holds no lora/pytorch_lora_weights.safetensors; run `make demo` first")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    for name in config.only or tuple(PARTS):
        begun = time.monotonic()
        found = PARTS[name](config)
        known = json.loads(config.output.read_text(encoding="utf-8")) if config.output.is_file() else {}
        known[name] = {**found, "wall_s": round(time.monotonic() - begun, 1)}
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({name: known[name]}, indent=1))


def zero(config: MeasurementsConfig) -> dict[str, Any]:
    """Return the divergence of what did not change, and how often other seeds of the base raised a flag."""
    import numpy as np

    from eval.forgetting.divergence import divergence, divergence_parts
    from eval.forgetting.evidence import Evidence
    from eval.forgetting.leak import read_slices, round_trip, train_leak_net
    from eval.forgetting.scores import score_drift
    from finetune.diffusion.adapters import set_adapter_scale
    from finetune.diffusion.config import SamplingConfig
    from finetune.diffusion.fixed_noise import predictions
    from finetune.diffusion.models import load_models
    from finetune.diffusion.sampling import sample, sample_latents
    from finetune.diffusion.tuned import load_tuned
    from prompts.probe_lists import read_probes

    probes = [probe for probe in read_probes("tiny") if probe.is_light]
    prompts = [probe.prompt for probe in probes]
    base = load_models(BASE)
    settings = SamplingConfig(
        num_inference_steps=STEPS, batch_size=48, height=base.size_px, width=base.size_px, guidance_scale=7.5
    )
    latents = sample_latents(base, [(prompt, config.seed) for prompt in prompts], settings).unflatten(0, (-1, 1)).cpu()
    first = predictions(base, prompts, latents)
    tuned = load_tuned(BASE, [config.demo / "lora"]).models
    moved = divergence(*divergence_parts(predictions(tuned, prompts, latents), first))
    set_adapter_scale(tuned, 0.0)
    unchanged = {
        "base against itself": divergence(*divergence_parts(predictions(base, prompts, latents), first)),
        "adapter at strength 0": divergence(*divergence_parts(predictions(tuned, prompts, latents), first)),
        "the demo's adapter, for scale": moved,
    }

    start = config.seed + 1000
    asked = [(prompt, start + number) for prompt in prompts for number in range(POOL + PICTURES)]
    pool = sample(base, asked, settings, progress="base").reshape(
        len(probes), POOL + PICTURES, base.size_px, base.size_px, 3
    )
    size = (base.size_px, base.size_px)
    slices = read_slices(config.demo / "weave" / "train", size, limit=192, seed=config.seed)
    kept = read_slices(config.demo / "weave" / "validation", size, limit=64, seed=config.seed)
    detector = train_leak_net(
        [*slices, *round_trip(base, slices)], list(pool[:, POOL:].reshape(-1, *pool.shape[2:])), seed=config.seed
    ).calibrated(round_trip(base, kept))
    random = np.random.default_rng(config.seed)
    flagged: Counter[str] = Counter()
    for _ in range(REPEATS):
        one, again, other = (
            pool[:, part] for part in random.choice(POOL, (3, PICTURES), replace=False)
        )  # three sets of seeds; the third stands where the tuned model's pictures would
        evidence = Evidence(
            base=one,
            base_again=again,
            base_more=again[0, :0],
            tuned=other,
            base_predictions=first,
            tuned_predictions=first,
            captions=(),
            base_caption_predictions=None,
            tuned_caption_predictions=None,
        )
        rows, _ = score_drift(probes, evidence, detector, "")
        flagged.update({row.metric for row in rows if row.verdict in {"warn", "stop"} and row.metric in SCORES})
    return {
        "divergence": unchanged,
        "repeats": REPEATS,
        "repeats_with_a_flag": {score: flagged[score] for score in SCORES},
        "probes": len(probes),
        "pictures_a_probe": PICTURES,
        "seeds_a_probe_drawn_from": POOL,
        "met": not unchanged["base against itself"]
        and not unchanged["adapter at strength 0"]
        and max(flagged.values(), default=0) <= REPEATS // 20,
    }


def copies(config: MeasurementsConfig) -> dict[str, Any]:
    """Return what the memorisation check says of three models, with its controls."""
    demo, out = config.demo, config.output_dir
    weave = demo / "weave"
    module, seed = [sys.executable, "-m"], ["--seed", str(config.seed)]
    train = [sys.executable, "finetune/lora.py", "--config", "configs/demo_lora.yaml", *seed]
    model = ["--pretrained_model_name_or_path", BASE]
    over, short = out / "over9", out / "lora300"
    few = ["--states", "dry", "--num_per_axis", "3", "--output_dir", str(out / "few"), *seed]
    _make(out / "few", [*module, "data_prep.fewshot", str(weave), *few])
    words = ["--train_data_dir", str(out / "few" / "dry"), "--max_train_steps", "600", "--validation_steps", "600"]
    _make(over / WEIGHTS, [*train, *words, "--output_dir", str(over)])
    words = ["--train_data_dir", str(weave / "train"), "--max_train_steps", "300", "--validation_steps", "300"]
    words += ["--latent_cache_dir", str(out / "latents")]
    _make(short / WEIGHTS, [*train, *words, "--output_dir", str(short)])
    generate = [*module, "eval.generate", *model, *SAMPLER]
    nine = ["--adapter", str(over), "--prompts", *NINE, "--num_images", "24", *seed]
    _make(out / "over9_slices", [*generate, *nine, "--output_dir", str(out / "over9_slices")])
    asked = ["--adapter", str(short), "--prompts", *all_captions(), "--num_images", str(PICTURES), *seed]
    _make(out / "lora300_slices", [*generate, *asked, "--output_dir", str(out / "lora300_slices")])
    found: dict[str, Any] = {}
    for name, made, adapter, more in (
        ("the demo, 1,200 steps on all slices", demo / "slices", demo / "lora", []),
        ("300 steps on all slices", out / "lora300_slices", short, []),
        ("600 steps on nine slices", out / "over9_slices", over, ["--train_data_dir", str(out / "few" / "dry")]),
    ):
        folder = out / f"copies-{made.name if made.parent == out else 'demo'}"
        check = [*module, "eval.memorization", "--real", str(weave), "--generated", str(made), *model]
        _make(folder, [*check, "--adapter", str(adapter), *more, "--output_dir", str(folder), *seed])
        found[name] = _copies_of(folder)
    first, second, third = found.values()
    return {
        "models": found,
        "met": all(one["ncc_recall"]["value"] >= 0.9 for one in found.values())
        and "copies likely" in third["memorisation"]["reason"]
        and {first["memorisation"]["verdict"], second["memorisation"]["verdict"]} == {"ok"},
    }


def _copies_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a memorisation check over everything."""
    from data_prep.folders.results import read_results

    return {
        row.metric: {"value": row.value, "low": row.low, "high": row.high, "n": row.n, "verdict": row.verdict}
        | ({"reason": row.reason} if row.metric == "memorisation" else {})
        for row in read_results(folder / "results.jsonl")
        if not row.prompt
    }


def statistics(config: MeasurementsConfig) -> dict[str, Any]:
    """Return how the distances, intervals and descriptors compare with closed forms, simulations and other packages."""
    import numpy as np

    from eval.stats.distances import Sample, block_bootstrap, blocked_kid

    extra = os.environ.get("TISSERAND_EXTRA_PACKAGES")
    if extra and extra not in sys.path:
        sys.path.append(extra)
    random = np.random.default_rng(config.seed)
    same = []
    for draw in range(STACKS):
        sides = [random.normal(size=(128, 64)) for _ in range(2)]
        number = np.arange(128)
        both = [Sample(features=side, strata=np.zeros_like(number), blocks=number) for side in sides]
        same.append(blocked_kid(*both, draws=100, seed=draw))
    values = np.array([one.value for one in same])
    error = float(values.std(ddof=1) / np.sqrt(len(values)))
    number, covered = np.arange(SLICES), Counter[str]()
    for draw in range(STACKS):
        values_of = _stack(np.random.default_rng([config.seed, draw]))
        for name, blocks in (("blocks", number // BLOCK), ("slices", number)):
            interval = block_bootstrap(
                lambda weights, values=values_of: float(weights @ values / weights.sum()),
                np.zeros_like(number),
                blocks,
                draws=200,
                seed=draw,
            )
            covered[name] += interval.low <= 0 <= interval.high
    found: dict[str, Any] = {
        "kid_of_equal_distributions": {
            "mean": float(values.mean()),
            "standard_error": error,
            "share_of_intervals_with_zero": float(np.mean([one.low <= 0 <= one.high for one in same])),
            "draws": STACKS,
            "pictures_a_side": 128,
        },
        "coverage_of_95_percent_intervals": {name: count / STACKS for name, count in covered.items()},
        "porespy": _against_porespy(),
        "torch_fidelity": _against_torch_fidelity(random),
    }
    found["met"] = (
        abs(float(values.mean())) < 2 * error
        and covered["blocks"] >= 0.80 * STACKS
        and covered["slices"] < 0.4 * STACKS
    )
    return found


def _stack(random: np.random.Generator) -> np.ndarray:
    """Return one number a slice of a smooth Gaussian process of variance 1 along a stack."""
    import numpy as np
    from scipy.ndimage import gaussian_filter1d

    white = random.normal(size=SLICES + 8 * LENGTH)
    smooth = gaussian_filter1d(white, LENGTH / np.sqrt(2), mode="wrap")[4 * LENGTH :][:SLICES]
    return np.asarray(smooth * np.sqrt(2 * np.sqrt(np.pi) * LENGTH / np.sqrt(2)))


def _against_porespy() -> dict[str, Any]:
    """Return how far two-point probability and chord lengths are from porespy's on random two-phase media."""
    import numpy as np
    from scipy import ndimage

    from eval.likeness.descriptors import chord_lengths, two_point

    try:
        import porespy
    except ImportError as error:
        return {"not_run": f"porespy cannot be imported ({error})"}

    def medium(seed: int) -> np.ndarray:
        field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(160, 160)), 4, mode="wrap")
        return field > np.median(field)

    masks = np.stack([medium(seed) for seed in range(6)])
    bins = np.arange(0.5, 20.5)
    theirs = np.mean(
        [porespy.metrics.two_point_correlation(mask, bins=bins).probability_scaled for mask in masks], axis=0
    )
    ours = two_point(masks).mean(axis=(0, 1))[1:20]
    lines = np.zeros_like(masks[:1])
    lines[:, 2:-2:2] = masks[:1, 2:-2:2]  # porespy draws on every other line and drops the outermost
    chords = porespy.filters.apply_chords(masks[0], axis=1, spacing=1, label=True)
    lengths = np.bincount(np.unique(chords[chords > 0], return_counts=True)[1])
    found = chord_lengths(lines)[0, 0, 1][: len(lengths)]
    return {
        "version": porespy.__version__,
        "two_point_largest_difference": float(np.abs(ours - theirs[:19]).max()),
        "chords_counted": int(lengths.sum()),
        "chords_that_differ": int(np.abs(found - lengths).sum()),
    }


def _against_torch_fidelity(random: np.random.Generator) -> dict[str, Any]:
    """Return how far KID is from torch-fidelity's formula on the same features."""
    from eval.stats.distances import kid

    try:
        import torch
        import torch_fidelity
        from torch_fidelity.metric_kid import kid_features_to_metric
    except (ImportError, RuntimeError) as error:  # torchvision of another torch raises the latter
        return {"not_run": f"torch-fidelity cannot be imported ({error})"}
    a, b = random.normal(size=(128, 64)), random.normal(size=(128, 64)) + 0.3
    both = [torch.from_numpy(side) for side in (a, b)]
    metric = kid_features_to_metric(*both, kid_subsets=1, kid_subset_size=len(a), verbose=False)
    ours, theirs = kid(a, b), float(metric["kernel_inception_distance_mean"])
    return {"version": torch_fidelity.__version__, "ours": ours, "theirs": theirs, "difference": abs(ours - theirs)}


def page(config: MeasurementsConfig) -> dict[str, Any]:
    """Return size and opening time of the page that compares three methods, from disk, with nothing asked outside."""
    demo, out = config.demo, config.output_dir
    weave, module, seed = demo / "weave", [sys.executable, "-m"], ["--seed", str(config.seed)]
    if not (out / "over9" / WEIGHTS).is_file() or not (out / "copies-demo").is_dir():
        raise InputError(f"--output_dir {out}: the part `copies` makes what this one needs; run it first")
    full = out / "full"
    words = ["--train_data_dir", str(weave / "train"), "--latent_cache_dir", str(out / "latents"), *seed]
    words += ["--max_train_steps", str(FULL_STEPS)]  # what is on the page does not hang on how good it is
    _make(
        full / "model_index.json",
        [sys.executable, "finetune/full.py", "--config", "configs/tiny_full.yaml", *words, "--output_dir", str(full)],
    )
    model = ["--pretrained_model_name_or_path"]
    methods = {
        "lora": [*model, BASE, "--adapter", str(demo / "lora")],
        "full": [*model, str(full)],
        "few": [*model, BASE, "--adapter", str(out / "over9")],
    }
    folders: list[Path] = []
    for name, loaded in methods.items():
        slices, fidelity, drift = (out / "compare" / name / part for part in ("slices", "fidelity", "drift"))
        asked = ["--prompts", *all_captions(), "--num_images", str(PICTURES), *seed, *SAMPLER]
        _make(slices, [*module, "eval.generate", *loaded, *asked, "--output_dir", str(slices)])
        check = ["--real", str(weave), "--generated", str(slices), "--output_dir", str(fidelity), *seed]
        _make(fidelity, [*module, "eval.fidelity", *check])
        asked = ["--probes", "tiny", "--real", str(weave), "--num_inference_steps", str(STEPS), *seed]
        asked += ["--batch_size", "48", "--output_dir", str(drift)] + (["--base", BASE] if name == "full" else [])
        _make(drift, [*module, "eval.drift", *loaded, *asked])
        folders += [slices, fidelity, drift]
    runs = [f"{name}={out / 'compare' / name}" for name in methods]
    _make(out / "table", [*module, "eval.compare", "--runs", *runs, "--output_dir", str(out / "table")])
    report = out / "three-methods.html"
    checks = [*map(str, folders), str(out / "table"), str(out / "copies-demo")]
    _run([*module, "eval.report", "--run", str(demo / "lora"), "--results", *checks, "--output", str(report),
          "--title", "Three methods", "--overwrite"])  # fmt: skip
    opened = [_open(report) for _ in range(5)]
    return {
        "bytes": report.stat().st_size,
        "load_ms": sorted(round(one["load_ms"]) for one in opened),
        "wall_s_with_browser": sorted(round(one["wall_s"], 2) for one in opened),
        "requests_to_outside": opened[0]["requests"],
        "met": report.stat().st_size < 10_000_000
        and max(one["load_ms"] for one in opened) < 2000
        and not any(one["requests"] for one in opened),
    }


def _open(report: Path) -> dict[str, Any]:
    """Open a page in a headless browser: time to its load event, wall time with the browser, requests to outside."""
    browser = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
    )
    if not browser:
        raise TisserandError("page: no chromium found; install it, for instance with: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update"]
    flags += ["--disable-features=OptimizationHints,OptimizationHintsFetching,OptimizationGuideModelDownloading"]
    text = report.read_text(encoding="utf-8")
    # The page's own policy lets no other script run, so the clock goes into a copy without it.
    clock = "<script>onload = () => { document.title = performance.now() }</script></body>"
    with tempfile.TemporaryDirectory() as folder:
        timed, log = Path(folder) / "timed.html", Path(folder) / "net.json"
        timed.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", clock), encoding="utf-8")
        words = [browser, *flags, f"--user-data-dir={folder}/profile", "--dump-dom"]
        dom = subprocess.run([*words, timed.as_uri()], capture_output=True, text=True, check=True).stdout
        begun = time.monotonic()
        subprocess.run([*words, f"--log-net-log={log}", report.resolve().as_uri()], capture_output=True, check=True)
        wall_s = time.monotonic() - begun
        empty, own = Path(folder) / "empty.html", Path(folder) / "own.json"
        empty.write_text("<title>nothing</title>", encoding="utf-8")
        subprocess.run([*words, f"--log-net-log={own}", empty.as_uri()], capture_output=True, check=True)
        hosts = [set(re.findall(r'"url":"https?://([^/"]+)', path.read_text())) for path in (log, own)]
    found = re.search(r"<title>([\d.]+)</title>", dom)
    if found is None:
        raise TisserandError(f"{report}: the browser did not say when it was loaded")
    return {"load_ms": float(found.group(1)), "wall_s": wall_s, "requests": sorted(hosts[0] - hosts[1])}


WEIGHTS = "pytorch_lora_weights.safetensors"
PARTS: dict[str, Callable[[MeasurementsConfig], dict[str, Any]]] = {
    "zero": zero,
    "copies": copies,
    "statistics": statistics,
    "page": page,
}


def _make(product: Path, words: Sequence[str]) -> None:
    """Run a command unless what it makes is there."""
    if not product.exists():
        _run(words)


def _run(words: Sequence[str]) -> None:
    """Print and run one command; raise with its exit code if it fails."""
    print("$", shlex.join(["python", *words[1:]]), flush=True)
    code = subprocess.run(words).returncode
    if code:
        raise TisserandError(f"this command ended with code {code}: {shlex.join(words)}")


if __name__ == "__main__":
    command(MeasurementsConfig, main)
