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
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from configs.errors import UsageError
from configs.load import Repeatable, command, save
from data_prep.folders.provenance import captions_of, dataset_of
from data_prep.folders.publish import check_free, publish
from data_prep.folders.results import command_line
from eval.forgetting.policy import read_policy
from eval.tiles.config import check_encoders
from finetune.diffusion.config import SamplingConfig, each_scale
from prompts.probe_lists import probes_hash, read_probes


@dataclass(frozen=True, kw_only=True)
class DriftConfig:
    """Settings of ``python -m eval.drift``."""

    pretrained_model_name_or_path: str
    """The base model under the adapters; or a tuned pipeline folder, with its --base."""
    base: str | None = None
    """What a tuned pipeline folder came from; not needed with --adapter."""
    adapter: Repeatable[tuple[Path, ...]] = ()
    """Run folder, a checkpoint in it, LoRA file or embeddings file to judge; give it several times for several."""
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
    """Ask both models, judge, and publish the folder when it is whole."""
    check_free(config.output_dir, overwrite=config.overwrite, mark="results.jsonl")
    policy = read_policy(config.policy)
    probes = [probe for probe in read_probes(config.probes) if config.mode == "full" or probe.is_light]
    if not probes:
        raise UsageError(f"--probes {config.probes}: marks no probe as light; pass --mode full")

    from eval.drift_check import check, controls, gather, models
    from eval.tiles.encoders import load_encoders

    encoders = load_encoders(config.encoder)
    name = config.pretrained_model_name_or_path
    both = models.load_base_and_tuned(name, config.adapter, config.adapter_scale, config.base)
    if both.trained_on:
        print(f"note: the adapter was trained on another base model ({both.trained_on})", file=sys.stderr)
    config = dataclasses.replace(
        config,
        captions=config.captions or tuple(captions_of(both.provenances)),
        real=config.real or dataset_of([*config.adapter, Path(name)]),
        sampling=both.sized(config.sampling),
    )
    request = gather.DriftRequest(
        probes=probes,
        captions=config.captions,
        num_images=config.num_images,
        seed=config.seed,
        num_timesteps=config.num_timesteps,
        sampling=config.sampling,
        has_pictures=config.mode != "pulse",
        real=config.real,
        num_slices=config.num_slices,
    )
    found = check.check_drift(request, both, policy, encoders, config.sweep)
    hashes = {"base": both.hashes["base"], "probes": probes_hash(probes), **both.hashes}
    hashes |= {**controls.slices_hash(config.real), **{f"encoder {one.kind}": one.hash for one in encoders}}
    with publish(config.output_dir, overwrite=config.overwrite, mark="results.jsonl") as folder:
        check.save_check(folder, request, found, hashes, command_line("eval.drift", config))
        save(config, folder / "config.yaml")
    print(*check.summary(found), sep="\n")
    if request.has_pictures:
        print(f"look at {config.output_dir / 'side_by_side.png'}")
    print(f"next: {_next(config)}")
    check.pass_gate(found, policy, config.policy)


def _next(config: DriftConfig) -> str:
    """Return the command that makes sense after this one."""
    run = config.adapter[0] if config.adapter else Path(config.pretrained_model_name_or_path)
    run = run.parent if run.is_file() else run
    report = config.output_dir.parent / "report.html"
    words = ["--run", str(run), "--results", str(config.output_dir), "--output", str(report)]
    return f"python -m eval.report {shlex.join(words)}"


if __name__ == "__main__":
    command(DriftConfig, main)
