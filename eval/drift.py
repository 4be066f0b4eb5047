r"""What did the model forget? The same probe prompts and seeds through the base and the tuned model.

    python -m eval.drift --pretrained_model_name_or_path assets/tiny-sd --adapter runs/lora \
        --probes tiny --output_dir out/drift

Needs no outside weights: how far the predictions moved, how much of the pictures looks like a training slice, how much
of their colour and brightness is left. Per prompt, per set, and the worst prompt, beside what the base shows against
itself with other seeds. --encoder clip=DIR adds whether the pictures still follow their prompts. --sweep 0.25 0.5 tries
weaker adapters. Writes results.jsonl, side_by_side.png, base/, tuned/, records.jsonl and config.yaml; sweep.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.errors import GateError, UsageError
from configs.load import Repeatable, command, save
from eval.forgetting.evidence import MAX_FALSE_ALARM, MIN_RECALL, Evidence, Latents, Views
from eval.tiles.config import check_encoders
from finetune.diffusion.config import SamplingConfig, each_scale

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from data_prep.folders.results import Result
    from eval.forgetting.leak import LeakNet
    from eval.forgetting.verdicts import Policy
    from eval.tiles.encoders import Encoder
    from finetune.diffusion.models import Models
    from prompts.probe_lists import Probe


SHEET_SEEDS = 3
SHEET_ROWS = 60
NUM_EMPTY = 16


@dataclass(frozen=True, kw_only=True)
class DriftConfig:
    """Settings of ``python -m eval.drift``."""

    pretrained_model_name_or_path: str
    """The base model under the adapters; or a tuned pipeline folder, with its --base."""
    base: str | None = None
    """What a tuned pipeline folder came from; not needed with --adapter."""
    adapter: Repeatable[tuple[Path, ...]] = ()
    """Run folder, LoRA file or embeddings file to judge; give it several times for several."""
    adapter_scale: tuple[float, ...] = (1.0,)
    """Strength of the adapters, one for all or one each in their order; 0 leaves an adapter out exactly."""
    probes: str = "tiny"
    """Built-in list (tiny, stable_diffusion), or a probe file (YAML, or text with a prompt per line)."""
    mode: Literal["pulse", "light", "full"] = "light"
    """pulse: only how far the predictions moved, no pictures; light: the list's short check; full: all its probes."""
    num_images: int = 4
    """Pictures per probe. Fewer than 4 are shown but not judged; how far the predictions moved needs none."""
    seed: int = 0
    """The pictures of a probe have the seeds seed, seed + 1, ...; the base against itself takes the next ones."""
    num_timesteps: int = 8
    """Noise levels at which predictions are compared."""
    captions: tuple[str, ...] = ()
    """Prompts of the trained domain, to compare the change with; those the adapter was trained on if absent."""
    real: Path | None = None
    """Dataset folder with the training slices, to recognise them in pictures; the adapter's own if still there."""
    num_slices: int = 192
    """Training slices to learn their texture from."""
    policy: str = "guard"
    """What counts as drift: guard, strict (half the margins; a stop exits with 5), report (judges nothing), a file."""
    sweep: tuple[float, ...] = ()
    """Weaker strengths of the adapters to try as well, as shares of --adapter_scale, such as 0.25 0.5 0.75."""
    encoder: dict[str, Path] = field(default_factory=dict)
    """Local encoders that also look at the pictures: clip=DIR, dinov2=DIR; folders with safetensors."""
    sampling: SamplingConfig = SamplingConfig(num_inference_steps=20, batch_size=32)
    output_dir: Path
    """Folder to write."""
    overwrite: bool = False
    """Replace the folder if it is there."""

    def __post_init__(self) -> None:
        """Refuse a comparison of nothing, and counts below one."""
        if not self.adapter and self.base is None:
            raise ValueError("--adapter: nothing to compare; give the adapter, or a tuned pipeline with its --base")
        for flag in ("num_images", "num_timesteps", "num_slices"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag} {getattr(self, flag)}: at least 1")
        each_scale(self.adapter, self.adapter_scale)
        if self.sweep and (self.base is not None or not self.adapter):
            raise ValueError(
                "--sweep: only adapters have a strength; leave it out for a tuned pipeline with its --base"
            )
        if self.sweep and self.mode == "pulse":
            raise ValueError("--sweep: compares pictures, which --mode pulse does not make; leave one out")
        if any(not 0 < strength < 1 for strength in self.sweep) or len(set(self.sweep)) < len(self.sweep):
            shown = " ".join(map(str, self.sweep))
            raise ValueError(f"--sweep {shown}: different strengths between 0 and 1; 1 is always there")
        check_encoders(self.encoder, ("clip", "dinov2"))
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"--seed {self.seed}: from 0 to 2^62")


def main(config: DriftConfig) -> None:
    """Make the pictures and predictions of both models, score them, and publish the folder when it is whole."""
    from data_prep.folders.hashes import sha256_of
    from data_prep.folders.manifest import METADATA_NAME
    from data_prep.folders.publish import check_free, publish
    from eval.forgetting.verdicts import read_policy
    from prompts.probe_lists import probes_hash, read_probes

    check_free(config.output_dir, overwrite=config.overwrite, mark="results.jsonl")
    policy = read_policy(config.policy)
    probes = [probe for probe in read_probes(config.probes) if config.mode == "full" or probe.is_light]
    if not probes:
        raise UsageError(f"--probes {config.probes}: marks no probe as light; pass --mode full")

    from data_prep.folders.provenance import base_mismatch, captions_of, dataset_of, pipeline_provenance
    from data_prep.folders.results import command_line, write_results
    from eval.forgetting.scores import score_drift, sweep_rows
    from eval.forgetting.table import drift_table, sweep_lines
    from finetune.diffusion.hashes import model_hash
    from finetune.diffusion.tuned import load_tuned

    encoders = _encoders(config)
    base_name = config.base or config.pretrained_model_name_or_path
    tuned = load_tuned(config.pretrained_model_name_or_path, config.adapter, config.adapter_scale)
    base = tuned.models if config.base is None else load_tuned(config.base).models
    provenances = [*tuned.provenances, pipeline_provenance(config.pretrained_model_name_or_path)]
    runs = [*config.adapter, Path(config.pretrained_model_name_or_path)]
    config = dataclasses.replace(
        config,
        captions=config.captions or tuple(captions_of(provenances)),
        real=config.real or dataset_of(runs),
        sampling=dataclasses.replace(
            config.sampling,
            height=config.sampling.height or base.size_px,
            width=config.sampling.width or base.size_px,
        ),
    )
    hashes = {"base": model_hash(base_name), "probes": probes_hash(probes)}
    hashes |= {f"adapter {index}": str(item["hash"]) for index, item in enumerate(tuned.adapters)}
    if config.base is not None:
        hashes["tuned"] = model_hash(config.pretrained_model_name_or_path)
    if config.real is not None and (metadata := _train_folder(config.real) / METADATA_NAME).is_file():
        hashes["train"] = sha256_of(metadata)
    hashes |= {f"encoder {one.kind}": one.hash for one in encoders}
    # Adapters were trained on the model they sit on, a tuned pipeline on its base.
    other = base_mismatch(tuned.provenances, hashes.get("tuned", hashes["base"]))
    if config.base is not None:
        other = other or base_mismatch(provenances[-1:], hashes["base"])
    if other:
        print(f"note: the adapter was trained on another base model ({other})", file=sys.stderr)
    evidence, latents = gather(config, probes, base, tuned.models)
    detector, why_blind, controls = _learn_slices(config, base, evidence)

    def judged(found: Evidence) -> tuple[list[Result], list[dict[str, float]]]:
        views = [view_with(encoder, [probe.prompt for probe in probes], found) for encoder in encoders]
        return score_drift(probes, found, detector, why_blind, policy, views)

    rows, per_picture = judged(evidence)
    repeat = command_line("eval.drift", config)
    rows = [dataclasses.replace(row, hashes=hashes, command=repeat) for row in (*rows, *controls)]
    weaker = {
        strength: at_strength(config, probes, evidence, latents, tuned.models, strength)
        for strength in sorted(config.sweep)
    }
    tried = [
        row for strength, found in weaker.items() for row in sweep_rows(judged(found)[0], found, evidence, strength)
    ]
    if tried:
        tried += sweep_rows(rows, evidence, evidence, 1.0)

    with publish(config.output_dir, overwrite=config.overwrite, mark="results.jsonl") as folder:
        write_results(folder / "results.jsonl", rows)
        if tried:
            swept = [dataclasses.replace(row, hashes=hashes, command=repeat) for row in tried]
            write_results(folder / "sweep.jsonl", swept)
        if config.mode != "pulse":
            _save_pictures(folder, config, probes, evidence, per_picture, weaker)
        save(config, folder / "config.yaml")
    print(drift_table(rows))
    for line in sweep_lines(tried):
        print(line)
    if config.mode != "pulse":
        print(f"look at {config.output_dir / 'side_by_side.png'}")
    print(f"next: {_next(config)}")
    _pass_gate(config, policy, rows)


def _encoders(config: DriftConfig) -> list[Encoder]:
    """Load the encoders asked for."""
    if not config.encoder:
        return []
    from eval.tiles.encoders import load_encoder

    return [load_encoder(kind, folder) for kind, folder in config.encoder.items()]


def view_with(encoder: Encoder, prompts: Sequence[str], evidence: Evidence) -> Views:
    """Look at the pictures, and read the prompts, with an encoder."""
    from eval.tiles.encoders import unit

    def seen(pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
        flat = unit(encoder.images(pictures.reshape(-1, *pictures.shape[2:])))
        return flat.reshape(*pictures.shape[:2], -1)

    return Views(
        kind=encoder.kind,
        texts=None if encoder.texts is None else unit(encoder.texts(prompts)),
        tuned=seen(evidence.tuned),
        base=seen(evidence.base),
        base_again=seen(evidence.base_again),
    )


def _pass_gate(config: DriftConfig, policy: Policy, rows: Sequence[Result]) -> None:
    """Raise if the policy is a gate and the verdict a stop.

    Raises:
        GateError: naming the policy, the worst prompt and what stopped it.
    """
    from eval.forgetting.reported import WORST_PROMPT

    overall = next(row for row in rows if row.metric == WORST_PROMPT.name)
    if policy.is_gate and overall.verdict == "stop":
        raise GateError(
            f"--policy {config.policy}: drift ({overall.reason}); worst prompt '{overall.prompt}', "
            f"{overall.unit} {overall.value:.2f}; an earlier checkpoint or a weaker adapter (--sweep) may pass"
        )


def gather(config: DriftConfig, probes: Sequence[Probe], base: Models, tuned: Models) -> tuple[Evidence, Latents]:
    """Run both models; they may be one object with adapters, which are then off for the base's part."""
    import numpy as np

    from finetune.diffusion.adapters import set_adapter_scale
    from finetune.diffusion.sampling import require_light, sample, sample_latents
    from finetune.diffusion.vae import decode

    settings, count = config.sampling, config.num_images
    seeds = range(config.seed, config.seed + count)
    num_latents = min(2, count)
    has_pictures = config.mode != "pulse"
    requests = [(probe.prompt, seed) for probe in probes for seed in (seeds if has_pictures else seeds[:num_latents])]
    others = [(prompt, seed + count) for prompt, seed in requests]

    if base is tuned:
        set_adapter_scale(base, 0.0)
    made = sample_latents(base, requests, settings, progress="base")
    latents = made.unflatten(0, (len(probes), -1))[:, :num_latents].cpu()
    # The base makes the most varied pictures of no prompt, and no slices of the captions yet: both show what is none.
    empty = [("", config.seed + 2 * count + index) for index in range(NUM_EMPTY if config.real and has_pictures else 0)]
    more = [sample(base, empty, settings, progress="base, empty prompt")] if empty else []
    base_in, caption_latents = None, None
    if config.captions:
        asked = [(text, seed) for text in config.captions for seed in seeds[:num_latents]]
        caption_latents = sample_latents(base, asked, settings, progress="base, captions")
        caption_latents = caption_latents.unflatten(0, (len(config.captions), num_latents)).cpu()
        base_in = _predict(config, base, config.captions, caption_latents)
        if has_pictures:
            more.append(decode(base, caption_latents.flatten(0, 1), asked, batch_size=settings.batch_size))
    base_predictions = _predict(config, base, [probe.prompt for probe in probes], latents)
    pictures = again = np.zeros((0, settings.height or 0, settings.width or 0, 3), dtype=np.uint8)
    if has_pictures:
        pictures = decode(base, made, requests, batch_size=settings.batch_size)
        again = sample(base, others, settings, progress="base, other seeds")
        require_light(pictures, requests)
    shape = (len(probes), count if has_pictures else 0, *pictures.shape[1:])
    evidence = Evidence(
        base=pictures.reshape(shape),
        base_again=again.reshape(shape),
        base_more=np.concatenate([*more, again[:0]]),
        tuned=pictures.reshape(shape),
        base_predictions=base_predictions,
        tuned_predictions=base_predictions,
        captions=config.captions,
        base_caption_predictions=base_in,
        tuned_caption_predictions=base_in,
    )
    both = Latents(probes=latents, captions=caption_latents)
    return at_strength(config, probes, evidence, both, tuned, 1.0), both


def at_strength(
    config: DriftConfig,
    probes: Sequence[Probe],
    evidence: Evidence,
    latents: Latents,
    tuned: Models,
    strength: float,
) -> Evidence:
    """Return the evidence with the tuned model's part made anew, its adapters at a share of the strength asked for."""
    from finetune.diffusion.adapters import set_adapter_scale
    from finetune.diffusion.sampling import require_light, sample

    if config.base is None:
        set_adapter_scale(tuned, strength)
    seeds = range(config.seed, config.seed + evidence.base.shape[1])
    requests = [(probe.prompt, seed) for probe in probes for seed in seeds]
    pictures = evidence.base
    if requests:
        progress = "tuned" if strength == 1 else f"tuned, strength {strength:g}"
        made = sample(tuned, requests, config.sampling, progress=progress)
        require_light(made, requests)
        pictures = made.reshape(evidence.base.shape)
    captions = latents.captions
    return dataclasses.replace(
        evidence,
        tuned=pictures,
        tuned_predictions=_predict(config, tuned, [probe.prompt for probe in probes], latents.probes),
        tuned_caption_predictions=None if captions is None else _predict(config, tuned, config.captions, captions),
    )


def _predict(config: DriftConfig, models: Models, prompts: Sequence[str], latents: Tensor) -> Tensor:
    """Predict at the noise levels and with the noise that both models share."""
    from finetune.diffusion.fixed_noise import predictions

    return predictions(
        models,
        prompts,
        latents,
        num_timesteps=config.num_timesteps,
        seed=config.seed,
        batch_size=config.sampling.batch_size,
    )


def _train_folder(real: Path) -> Path:
    return real / "train" if (real / "train").is_dir() else real


def _learn_slices(config: DriftConfig, base: Models, evidence: Evidence) -> tuple[LeakNet | None, str, list[Result]]:
    """Train the network that recognises training slices, and check it on slices and pictures it has not seen.

    Returns:
        The network, or None and the reason; and the rows of its two controls.
    """
    from data_prep.folders.results import Result
    from eval.forgetting.leak import is_leaked, read_slices, round_trip, train_leak_net

    if config.mode == "pulse":
        return None, "a pulse makes no pictures", []
    if config.real is None:
        return None, "no training slices to compare with; give --real DATASET", []
    size = (config.sampling.height or base.size_px, config.sampling.width or base.size_px)
    train = _train_folder(config.real)
    slices = read_slices(train, size, limit=config.num_slices, seed=config.seed)
    if (config.real / "validation" / "metadata.jsonl").is_file():
        kept = read_slices(config.real / "validation", size, limit=max(16, config.num_slices // 3), seed=config.seed)
    else:
        slices, kept = slices[::2], slices[1::2]
    if len(kept) < 2:
        return None, f"{train} holds {len(slices)} slices; too few to learn from", []
    negatives = [*evidence.base_again.reshape(-1, *evidence.base_again.shape[2:]), *evidence.base_more]
    kept = round_trip(base, kept)
    detector = train_leak_net([*slices, *round_trip(base, slices)], negatives, seed=config.seed).calibrated(kept[::2])
    found = is_leaked(detector.patch_shares(kept[1::2]))
    alarms = is_leaked(detector.patch_shares(evidence.base.reshape(-1, *evidence.base.shape[2:])))
    works = {
        "leak_recall": (found, found.mean() >= MIN_RECALL, f"at least {MIN_RECALL} of held-out slices must be found"),
        "leak_false_alarm": (alarms, alarms.mean() <= MAX_FALSE_ALARM, f"at most {MAX_FALSE_ALARM} of base pictures"),
    }
    controls = [
        Result(
            metric=name,
            set="control",
            value=float(hits.mean()),
            n=len(hits),
            unit="share",
            verdict="ok" if passed else "warn",
            reason="" if passed else f"detector blind: {rule}",
        )
        for name, (hits, passed, rule) in works.items()
    ]
    failed = [f"{row.metric} {row.value:.2f}, {row.reason}" for row in controls if row.verdict != "ok"]
    return (None if failed else detector), "; ".join(failed), controls


def _save_pictures(
    folder: Path,
    config: DriftConfig,
    probes: Sequence[Probe],
    evidence: Evidence,
    per_picture: Sequence[dict[str, float]],
    weaker: Mapping[float, Evidence],
) -> None:
    """Write all pictures, their records, and the sheet with base and tuned side by side."""
    from PIL import Image

    from eval.tiles.contact_sheet import contact_sheet

    seeds = range(config.seed, config.seed + config.num_images)
    records = []
    swept = {f"strength-{strength:g}": found.tuned for strength, found in weaker.items()}
    for role, pictures in {"base": evidence.base, **swept, "tuned": evidence.tuned}.items():
        (folder / role).mkdir()
        for p, probe in enumerate(probes):
            for s, seed in enumerate(seeds):
                name = f"{role}/{probe.set}-{probe.id}-seed{seed:04d}.png"
                Image.fromarray(pictures[p, s]).save(folder / name)
                numbers = per_picture[p * len(seeds) + s] if role == "tuned" else {}
                record = {"file_name": name, "model": role, "set": probe.set, "id": probe.id, "prompt": probe.prompt}
                records.append({**record, "seed": seed, **numbers})
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "records.jsonl").write_text(text, encoding="utf-8")

    columns, shown = min(len(seeds), SHEET_SEEDS), probes[:SHEET_ROWS]
    images = [
        pictures[p, s]
        for p in range(len(shown))
        for s in range(columns)
        for pictures in (evidence.base, evidence.tuned)
    ]
    headers = [f"{role}, seed {seed}" for seed in seeds[:columns] for role in ("base", "tuned")]
    labels = [f"{probe.set}  {probe.shown}" for probe in shown]
    contact_sheet(images, len(shown), 2 * columns, labels, headers).save(folder / "side_by_side.png")


def _next(config: DriftConfig) -> str:
    """Return the command that makes sense after this one."""
    run = config.adapter[0] if config.adapter else Path(config.pretrained_model_name_or_path)
    run = run.parent if run.is_file() else run
    report = config.output_dir.parent / "report.html"
    words = ["--run", str(run), "--results", str(config.output_dir), "--output", str(report)]
    return f"python -m eval.report {shlex.join(words)}"


if __name__ == "__main__":
    command(DriftConfig, main)
