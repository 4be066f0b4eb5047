"""The commands of the pages, run one after another on small volumes: what one leaves, the next takes.

Each is found on its page by how it begins, so a page that changes is run as it changed; words are added that make it
small. No number that comes out means anything: two steps teach nothing.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from pages import ROOT, Command, commands_of

from configs.load import load
from configs.reference import commands


@dataclass(frozen=True)
class Step:
    """A command of a page, known by some of its words; the words that make it small; and a file that it leaves."""

    page: str
    known_by: str
    smaller: str
    leaves: str


VOLUME = "--shape 48 176 200"
TRAINING = "--max_train_steps 2 --train_batch_size 2 --max_train_samples 8 --checkpointing_steps 1"
PICTURES = "--num_images 2 --num_inference_steps 1"
PULSE = "--mode pulse --num_timesteps 1 --num_inference_steps 2 --num_slices 8"
TILES = "--train_tiles 8 --held_out_tiles 4 --classifier_steps 10 --bootstrap_draws 100"
PAIRS = "--reference_tiles 8 --held_out_tiles 4 --generated_tiles 4 --copy_net_steps 0 --loss_slices 0"
PAIRS += " --bootstrap_draws 100"
OURS = ("data_prep", "prompts", "eval", "finetune/")
WALK = (
    Step("slice.md", "data_prep.phantom dry", VOLUME, "dry.tif"),
    Step("slice.md", "data_prep.phantom dry_compacted", VOLUME, "dry_compacted.tif"),
    Step("slice.md", "data_prep.phantom injected", VOLUME, "injected.tif"),
    Step("slice.md", "data_prep.inspect_volume --output", "", "dry.png"),
    Step("slice.md", "data_prep.slice data/weave", "--stride 8", "data/weave/report.html"),
    Step("slice.md", "data_prep.verify", "", "data/weave/train/metadata.jsonl"),
    Step("slice.md", "data_prep.report", "", "weave.html"),
    Step("slice.md", "data_prep.fewshot data/few", "", "data/few/dry/metadata.jsonl"),
    Step("slice.md", "data_prep.export kohya", "", "data/weave-kohya"),
    Step("fine_tune.md", "finetune/lora.py runs/lora", TRAINING, "runs/lora/pytorch_lora_weights.safetensors"),
    Step("generate.md", "eval.generate runs/lora --prompts_file", PICTURES, "out/lora/slices/records.jsonl"),
    Step("generate.md", "prompts.tokens", "", ""),
    Step("generate.md", "finetune/export.py kohya", "", "lora.safetensors"),
    Step("generate.md", "finetune/export.py diffusers", "", "back.safetensors"),
    Step(
        "check.md",
        "eval.drift runs/lora out/lora/drift",
        PULSE,
        "out/lora/drift/results.jsonl",
    ),
    Step("check.md", "eval.fidelity out/lora/slices", TILES, "out/lora/fidelity/results.jsonl"),
    Step("check.md", "eval.memorization out/lora/slices", PAIRS, "out/lora/memorization/results.jsonl"),
    Step("check.md", "eval.compare", "--runs lora=out/lora again=out/lora", "out/compare/results.jsonl"),
    Step("check.md", "eval.report runs/lora", "", "out/report.html"),
)


def on_page(step: Step) -> Command:
    """Return the first whole command of a page that has these words."""
    whole = [command for command in commands_of(ROOT / "docs" / step.page) if command.is_whole]
    found = [command for command in whole if set(step.known_by.split()) <= set(command.words)]
    assert found, f"docs/{step.page} has no command with the words {step.known_by}"
    return found[0]


def run(command: Command, more: str) -> None:
    """Run a command of ours in this process, with words added."""
    place = next(place for place, word in enumerate(command.words) if word.startswith(OURS))
    name = command.words[place].removesuffix(".py").replace("/", ".")
    config = load(commands()[name], [*command.words[place + 1 :], *more.split()])
    try:
        importlib.import_module(name).main(config)
    except Exception as error:
        error.add_note(str(command))
        raise


def test_commands_of_the_pages_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("assets", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    prompts = re.search(r"```text\n((?:sf_.*\n)+)```", (ROOT / "docs" / "generate.md").read_text(encoding="utf-8"))
    assert prompts is not None
    (tmp_path / "prompts.txt").write_text(prompts[1], encoding="utf-8")
    for step in WALK:
        command = on_page(step)
        run(command, step.smaller)
        assert not step.leaves or (tmp_path / step.leaves).exists(), f"{command} left no {step.leaves}"
