"""Drift looked at while a run learns; it ends the run where the rules say so, and keeps the right weights.

A pulse (``eval.forgetting.light``) compares predictions for a few probes with those of the base model; a check makes
pictures of them as well, and looks at held-out losses where there are held-out images.
``eval.forgetting.selection`` decides.

    drift.jsonl                     a line per pulse and check
    drift/base.safetensors          what the base model makes of the probes, made once: a run goes on with it
    drift/step-000200.safetensors   weights that may be kept
    selection.json                  which were, and why

Training's own draws are not touched.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import InputError, TisserandError, UsageError
from data_prep.folders.publish import write_whole
from data_prep.folders.run_folder import DRIFT, DRIFT_FOLDER, SELECTION
from eval.forgetting.leak import LeakNet
from eval.forgetting.light import LightDrift, few_captions, few_probes
from eval.forgetting.policy import GUARD, read_policy
from eval.forgetting.selection import (
    Check,
    copying_interval,
    is_catastrophic,
    is_copying,
    select,
    why_selected,
    why_stop,
)
from eval.tiles.features import cover, read_grey
from finetune.core.learns.averages import Averages
from finetune.core.learns.trainable import Learns
from finetune.core.loop import checkpoints
from finetune.core.run import OpenRun
from finetune.core.settings.watching import DriftWatchConfig
from finetune.core.watch.losses import Watch
from finetune.diffusion.adapters import adapters_off
from finetune.diffusion.config import SamplingConfig
from prompts.probe_lists import read_probes

PULSE_SHARE, CHECK_SHARE = 0.01, 0.05
"""Of the time, what pulses and checks may take."""
FIRST_SHARE = 0.1
"""Of all steps, those before which no run is ended."""
SAMPLING_STEPS = 20
MOST_TOGETHER = 16
MOST_SLICES = 96
BASE = "base.safetensors"

Row = dict[str, Any]


@dataclass
class Clock:
    """How long looks have taken, against all the time since the run began or went on.

    Attributes:
        started_s: when that was.
        last_s: what the last look of each kind took.
        spent_s: what all of them took; those of step 0 are under ``start``, and held against nothing.
    """

    started_s: float = field(default_factory=time.monotonic)
    last_s: dict[str, float] = field(default_factory=lambda: {"pulse": 0.0, "check": 0.0})
    spent_s: dict[str, float] = field(default_factory=lambda: {"start": 0.0, "pulse": 0.0, "check": 0.0})

    @contextmanager
    def measures(self, kind: str, *, is_start: bool = False) -> Iterator[None]:
        """Add the time of a block."""
        begun = time.monotonic()
        yield
        self.last_s[kind] = time.monotonic() - begun
        self.spent_s["start" if is_start else kind] += self.last_s[kind]

    def allows(self, kind: str, share: float) -> bool:
        """Return whether another look of this kind, as long as the last, keeps to its share of the time."""
        return self.spent_s[kind] + self.last_s[kind] <= share * (time.monotonic() - self.started_s)


class DriftWatch:
    """Looks at probes as the run goes on; without ``--drift_probes`` it does nothing."""

    def __init__(
        self,
        config: DriftWatchConfig,
        opened: OpenRun,
        learns: Learns,
        averages: Averages,
        watch: Watch,
        *,
        shape: tuple[int, int],
    ) -> None:
        """Read probes and policy, and what an earlier part of the run found.

        Args:
            config: what to ask, how often, and what follows from it.
            opened: the run, with its models as they are trained.
            learns: what is kept of the best check.
            averages: of it; they are what is looked at and kept, where there are any.
            watch: knows the held-out images, if there are any.
            shape: (height, width) in px of the pictures: that of most training pictures.

        Raises:
            UsageError: no such probes or policy, or a run that cannot be compared with its base model.
            InputError: the run goes on, and what the base model made is gone.
        """
        self.config, self.opened, self.learns, self.averages, self.watch = config, opened, learns, averages, watch
        self.is_on = config.drift_probes is not None and not opened.run.train.dry_run
        if config.drift_probes is None or not self.is_on:
            return
        self._refuse_what_cannot_be_compared()
        run = opened.run
        probes = few_probes(read_probes(config.drift_probes, "--drift_probes"))
        if not probes:
            raise UsageError(f"--drift_probes {config.drift_probes}: marks no probe as light; name some in 'light:'")
        policy = read_policy(config.drift_policy, "--drift_policy")
        self.trips_at = GUARD.divergence_ratio if policy.divergence_ratio is None else policy.divergence_ratio
        self.light = LightDrift(
            models=opened.models,
            probes=probes,
            captions=few_captions([image.caption for image in opened.images]),
            sampling=SamplingConfig(
                num_inference_steps=SAMPLING_STEPS,
                height=shape[0],
                width=shape[1],
                batch_size=min(MOST_TOGETHER, run.train.micro_batch),
            ),
            policy=policy,
            precision=run.accelerator.autocast,
        )
        self.images = list({image.content: image for image in opened.images}.values())
        self.folder = run.folder / DRIFT_FOLDER
        self.clock = Clock()
        self.checks: list[Check] = []
        self.base: dict[str, Tensor] = {}
        self.first_losses: dict[str, list[float]] = {}
        self.detector: LeakNet | None = None
        self.why_blind = ""
        self.ended = ""
        self.last_step = checkpoints.step_of(run.checkpoint) if run.checkpoint else 0
        if run.checkpoint is not None and run.is_main:
            self._go_on(run.checkpoint)

    @property
    def judges(self) -> bool:
        """Whether the run may be ended, and weights be chosen."""
        return self.config.drift_policy != "report"

    def look(self, step: int, *, is_last: bool) -> bool:
        """Take the pulse, and check pictures and losses, if they are due after this step; return whether to end."""
        if not self.is_on:
            return False
        self.last_step = step
        run, every = self.opened.run, self.config.drift_steps
        is_end = is_last or step == 0
        is_checkpoint = step % run.train.checkpointing_steps == 0
        is_due = step % every == 0 if every else self.clock.allows("pulse", PULSE_SHARE)
        if not (is_end or is_checkpoint or is_due):
            return False
        if step == 0 and run.is_main:
            self._start()
        is_tripped = run.is_main and self._pulse(step)
        # With --drift_steps the user decided what it may cost.
        may_check = every is not None or self.clock.allows("check", CHECK_SHARE)
        if self._as_main_says(is_end or ((is_tripped or is_checkpoint) and may_check)):
            self._check(step)
        return self._as_main_says(bool(self.ended))

    def ended_before(self) -> bool:
        """Return whether the run that goes on was ended at its checkpoint, by what is asked of it now."""
        if self.is_on and self.opened.run.is_main:
            self.ended = self._why_end()
        return self.is_on and self._as_main_says(bool(self.ended))

    def finish(self, last_step: int) -> int:
        """Put the selected weights in the place of the last ones, and write ``selection.json``.

        Returns:
            The step whose weights are kept: the last one, if nothing was to be chosen.
        """
        run = self.opened.run
        if not self.is_on or not run.is_main:
            return last_step
        chosen, kept = select(self.checks), self.last_step
        reason = why_selected(self.checks, last_step=self.last_step)
        if not self.judges:
            reason = "the last weights are kept (--drift_policy report)"
        elif self.config.keep == "last":
            reason = f"the last weights are kept (--keep last), not those of step {chosen.step if chosen else 'none'}"
        elif chosen is not None and not self._path(chosen.step).is_file():
            reason = f"the last weights are kept: {self._path(chosen.step)} is gone"
        elif chosen is not None:
            kept = chosen.step
            self._put_back(self._path(kept))
        ended = self.ended if self.last_step < run.total_steps else ""
        content = {
            "selected_step": kept,
            "last_step": self.last_step,
            "planned_steps": run.total_steps,
            "saved_steps": run.total_steps - self.last_step,
            "ended": ended,
            "reason": reason,
            "policy": self.config.drift_policy,
            "keep": self.config.keep,
            "feasible_steps": [check.step for check in self.checks if check.is_feasible and check.step],
            "cost": self._cost(),
        }
        write_whole(run.folder / SELECTION, json.dumps(content, indent=1) + "\n")
        if ended:
            run.say(
                f"drift: {ended}: ended at step {self.last_step}, {content['saved_steps']} of {run.total_steps} "
                "steps saved (--drift_policy report goes on from there)"
            )
        run.say(f"drift: {reason} ({SELECTION})")
        run.say(f"drift: {self._cost_in_words()}")
        return kept

    @torch.no_grad()
    def _put_back(self, path: Path) -> None:
        """Give what learned, and its averages, the values of a file."""
        saved = load_file(path)
        for tensors in (self.learns.parameters, self.averages.tensors):
            for name, value in tensors.items():
                value.copy_(saved[name])

    def _refuse_what_cannot_be_compared(self) -> None:
        """Refuse runs that cannot look together, or whose predictions are not those of a base model trained on."""
        flag, accelerator = f"--drift_probes {self.config.drift_probes}", self.opened.run.accelerator
        if accelerator.num_processes > 1 and self.config.drift_steps is None:
            raise UsageError(f"{flag}: {accelerator.num_processes} processes need --drift_steps, to look together")
        base, trained = self.opened.base_scheduler.config, self.opened.models.scheduler.config
        for name in ("prediction_type", "rescale_betas_zero_snr"):
            before, after = base.get(name, False), trained.get(name, False)
            if before != after:
                raise UsageError(
                    f"{flag}: the base model has --{name} {before}, the run {after}: their predictions cannot be "
                    "compared; leave it out, and run eval.drift on the finished weights"
                )

    def _start(self) -> None:
        """Make and keep what the base model makes of the probes and captions, before anything is learned."""
        with self.clock.measures("check", is_start=True), adapters_off(self.opened.models):
            self.base = self.light.keep()
        with self.clock.measures("start"):
            self.folder.mkdir(exist_ok=True)
            save_file(self.base, self.folder / BASE)
            self._learn_slices()
        shown = ", ".join(f"'{probe.shown}'" for probe in self.light.probes)
        often = f"every {self.config.drift_steps} steps" if self.config.drift_steps else "as the time allows"
        self.opened.run.say(f"drift: {often}, against the base model, on {shown}")
        if self.why_blind:
            self.opened.run.say(f"drift: leak is not measured: {self.why_blind}")

    def _go_on(self, checkpoint: Path) -> None:
        """Take up what the run found up to its checkpoint."""
        run = self.opened.run
        path = next((one for one in (self.folder, checkpoint.parent / DRIFT_FOLDER) if (one / BASE).is_file()), None)
        if path is None:
            raise InputError(
                f"--drift_probes {self.config.drift_probes}: {self.folder / BASE} is gone, and what the base model "
                "makes cannot be made later; --overwrite starts anew"
            )
        self.base = load_file(path / BASE)
        if path != self.folder:
            self.folder.mkdir(exist_ok=True)
            save_file(self.base, self.folder / BASE)
        lines = (run.folder / DRIFT).read_text(encoding="utf-8").splitlines() if (run.folder / DRIFT).is_file() else []
        for row in map(json.loads, lines):
            self.clock.last_s[row["kind"]] = row["seconds"]
            if row["kind"] == "check":
                self._take(row)
        self._learn_slices()

    def _learn_slices(self) -> None:
        """Train the network that recognises training images; it comes out the same each time."""
        chosen = self.images[:: max(1, len(self.images) // MOST_SLICES)][:MOST_SLICES]
        sampling = self.light.sampling
        slices = [cover(read_grey(image.path), (sampling.height or 0, sampling.width or 0)) for image in chosen]
        self.detector, self.why_blind = self.light.learn_slices(self.base, slices)

    def _pulse(self, step: int) -> bool:
        """Write how far the predictions moved; return whether that calls for pictures."""
        with self.clock.measures("pulse", is_start=step == 0), self.averages.in_place():
            pulse = self.light.pulse(self.base)
        found = {"divergence": pulse.probes, "captions": pulse.captions, "ratio": pulse.ratio}
        self._write(step, "pulse", found | {"prompts": pulse.prompts}, shows=found)
        return pulse.ratio is not None and self.trips_at is not None and pulse.ratio > self.trips_at

    def _check(self, step: int) -> None:
        """Judge pictures and losses; every process takes part in the losses, the first one does the rest."""
        # A check of step 0 makes no pictures, nothing having changed; two sets were made of the base.
        more_s = 0.0 if step else self.clock.last_s["check"] / 2
        with self.clock.measures("check", is_start=step == 0):
            losses = {name: self.watch.losses(found).mean(axis=1).tolist() for name, found in self.watch.sets.items()}
            row = self._judged(step, losses) if self.opened.run.is_main else {}
        if not row:
            return
        self.clock.last_s["check"] += more_s
        shows = {"worst_prompt": row["value"], "copying": row["copying"]}
        shows |= {f"{name}_loss": sum(values) / len(values) for name, values in losses.items()}
        self._write(step, "check", row, shows=shows)
        self._take({"step": step, **row})
        self._keep(step)
        self.ended = self._why_end()
        if step:
            value = "" if row["value"] is None else f", {row['unit']} {row['value']:.2f}"
            reason = f" ({row['reason']})" if row["reason"] else ""
            self.opened.run.say(f"drift at step {step}: {row['verdict']}{reason}; worst: '{row['prompt']}'{value}")

    def _judged(self, step: int, losses: dict[str, list[float]]) -> Row:
        """Return the row of a check."""
        try:
            with self.averages.in_place():
                results = self.light.check(self.base, self.detector, self.why_blind)
        except TisserandError as error:  # weights that make no pictures are none to keep
            found: Row = {"verdict": "stop", "reason": str(error), "prompt": "", "unit": "", "value": None, "rows": []}
            found["is_catastrophic"] = False
        else:
            overall = results[-1]
            found = {name: getattr(overall, name) for name in ("verdict", "reason", "prompt", "unit", "value")}
            found["is_catastrophic"] = is_catastrophic(results)
            found["rows"] = [
                {name: value for name, value in dataclasses.asdict(one).items() if value not in (None, "", {})}
                for one in results[:-1]
                if not (one.prompt and one.metric.endswith("_aa"))  # of sets alone: what the page shows
            ]
        first = self.first_losses if step else losses
        falls = {
            name: [one - now for one, now in zip(first.get(name, []), now, strict=False)]
            for name, now in losses.items()
        }
        copying = copying_interval(falls.get("train", []), falls.get("validation", []))
        found["copying"] = None if copying is None else copying.value
        found["is_copying"] = is_copying(copying, num_trained=len(self.images))
        return {**found, "losses": losses}

    def _take(self, row: Row) -> None:
        """Add a check to those the decisions are made from."""
        if row["step"] == 0:
            self.first_losses = row["losses"]
        self.checks.append(
            Check(
                step=row["step"],
                verdict=row["verdict"],
                is_catastrophic=row["is_catastrophic"],
                is_copying=row["is_copying"],
                losses=tuple(row["losses"].get("validation", ())),
            )
        )

    def _why_end(self) -> str:
        """Return why the run ends here, or nothing."""
        fewest = int(FIRST_SHARE * self.opened.run.total_steps)
        return why_stop(self.checks, fewest_steps=fewest) if self.judges else ""

    def _keep(self, step: int) -> None:
        """Keep the weights of this check if they are the best so far; drop those that no checkpoint needs any more."""
        chosen = select(self.checks) if self.judges else None
        if chosen is None or chosen.step != step:
            return
        with self.averages.in_place():
            weights = {name: value.detach().cpu().contiguous() for name, value in self.learns.parameters.items()}
            partial = self._path(step).with_suffix(".partial")
            save_file(weights, partial)
            partial.replace(self._path(step))
        needed = {self._path(step)}
        for path in checkpoints.checkpoints(self.opened.run.folder):
            before = select([check for check in self.checks if check.step <= checkpoints.step_of(path)])
            needed |= {self._path(before.step)} if before else set()
        for path in set(self.folder.glob("step-*.safetensors")) - needed:
            path.unlink()

    def _path(self, step: int) -> Path:
        """Return where the weights of a check are kept."""
        return self.folder / f"step-{step:06d}.safetensors"

    def _write(self, step: int, kind: str, row: Row, *, shows: dict[str, float | None]) -> None:
        """Add a line to ``drift.jsonl``, and numbers to the trackers."""
        run = self.opened.run
        line = {"step": step, "kind": kind, **row, "seconds": round(self.clock.last_s[kind], 3)}
        with (run.folder / DRIFT).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")
        run.accelerator.log({f"drift/{name}": one for name, one in shows.items() if one is not None}, step=step)

    def _cost(self) -> dict[str, float]:
        """Return what looking took, in seconds and as a share of all time since the run began or went on."""
        total = time.monotonic() - self.clock.started_s
        spent = self.clock.spent_s
        seconds = {f"{kind}_s": round(value, 2) for kind, value in spent.items()}
        return {"total_s": round(total, 2), **seconds, "share": round(sum(spent.values()) / total, 4)}

    def _cost_in_words(self) -> str:
        """Say what looking took."""
        cost = self._cost()
        kinds = {"start": "at the start", "pulse": "pulses", "check": "checks"}
        said = [f"{words} {cost[f'{kind}_s']:.1f} s" for kind, words in kinds.items()]
        return f"{', '.join(said)}: {cost['share']:.1%} of {cost['total_s']:.0f} s"

    def _as_main_says(self, value: bool) -> bool:
        """Return the first process's value on all of them."""
        if self.opened.run.accelerator.num_processes == 1:
            return value
        return bool(broadcast_object_list([value])[0])
