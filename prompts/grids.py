"""Prompts x seeds: the frozen list that a generation or a check runs on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from configs.errors import UsageError
from prompts.probe_lists import checked_prompts, prompt_lines


@dataclass(frozen=True)
class Grid:
    """Every prompt with every seed, prompts first.

    Attributes:
        prompts: in the order of the rows; each once.
        seeds: the same for every prompt, so that prompts can be compared picture by picture.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def requests(self) -> list[tuple[str, int]]:
        """Return (prompt, seed) pairs, all seeds of the first prompt first."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]

    @property
    def hash(self) -> str:
        """Return a SHA-256 of the list; equal hashes mean the same pictures were asked for."""
        return hashlib.sha256(json.dumps(self.requests).encode()).hexdigest()


def make_grid(prompts: Sequence[str], num_images: int, seed: int) -> Grid:
    """Return the prompts, repeated ones once, with seeds ``seed`` to ``seed + num_images - 1``."""
    return Grid(tuple(dict.fromkeys(prompts)), tuple(range(seed, seed + num_images)))


def write_grid(path: Path, grid: Grid) -> None:
    """Freeze a grid: its prompts, seeds and hash as JSON."""
    content = {"version": 1, "hash": grid.hash, "prompts": grid.prompts, "seeds": grid.seeds}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_grid(path: Path) -> Grid:
    """Read a frozen grid.

    Raises:
        UsageError: the file is missing, is no grid, or was changed since it was frozen.
    """
    where = f"--grid {path}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: not a readable grid ({type(error).__name__})") from None
    if not isinstance(content, dict) or not isinstance(content.get("prompts"), list):
        raise UsageError(f"{where}: expected version, hash, prompts and seeds")
    seeds = content.get("seeds")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UsageError(f"{where}: seeds must be whole numbers from 0 on")
    grid = Grid(tuple(checked_prompts(content["prompts"], where)), tuple(seeds))
    if grid.hash != content.get("hash"):
        raise UsageError(f"{where}: was changed since it was frozen; make a new one instead")
    return grid


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a text file (one per line, blank lines left out) or a YAML list.

    Raises:
        UsageError: the file is missing, not text, or not such a list.
    """
    where = f"--prompts_file {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: not a readable text file ({type(error).__name__})") from None
    if path.suffix.lower() not in {".yaml", ".yml"}:
        return prompt_lines(text, where)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, list):
        raise UsageError(f"{where}: expected a YAML list of prompts, such as '- sf_dry sf_warp'")
    return checked_prompts(content, where)
