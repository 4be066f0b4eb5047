"""What is asked of a model: which prompts and seeds, at which size, and by which weights."""

from __future__ import annotations

import dataclasses
import difflib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UsageError
from data_prep.folders.provenance import base_mismatch, captions_of, pipeline_provenance, size_of
from eval.generation.tiff16 import Scale, scales_of
from finetune.diffusion.adapters import fold_adapters
from finetune.diffusion.config import SamplingConfig
from finetune.diffusion.hashes import model_hash
from finetune.diffusion.tuned import Tuned, load_tuned
from prompts.grids import Grid, make_grid, read_grid, read_prompts


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The model that draws, and where it comes from.

    Attributes:
        tuned: the model with its adapters folded into its weights.
        base: name and hash of the model as it was named.
        provenances: what the pipeline folder, and then each adapter, says of its training.
    """

    tuned: Tuned
    base: Mapping[str, str]
    provenances: Sequence[Mapping[str, object]]

    @property
    def came_from(self) -> str | None:
        """Name of the base model of a tuned pipeline; None if the pipeline does not say."""
        base_model = self.provenances[0].get("base_model")
        return str(base_model["name"]) if isinstance(base_model, dict) and "name" in base_model else None


@dataclass(frozen=True, kw_only=True)
class PictureRequest:
    """Everything that decides what is drawn.

    Attributes:
        grid: prompts and seeds.
        settings: the sampling settings of each prompt, with height and width filled in.
        origin: the model.
        scales: what turns the pictures of each prompt into counts of the scanner; empty without 16-bit slices.
    """

    grid: Grid
    settings: Mapping[str, SamplingConfig]
    origin: Origin
    scales: Mapping[str, Scale]

    @property
    def sizes(self) -> dict[tuple[int, int], SamplingConfig]:
        """The (height, width) in px that occur, with the settings of each."""
        return {(one.height or 0, one.width or 0): one for one in self.settings.values()}


def read_request(
    grid: Path | None,
    prompts: Sequence[str],
    prompts_file: Path | None,
    dataset: Path | None,
    *,
    count: int,
    seed: int,
) -> tuple[Grid, dict[str, Scale]]:
    """Return the prompts and seeds that are asked for, and what turns the pictures of each into counts of the scanner.

    Args:
        grid: file of an earlier request, instead of all others.
        prompts: as typed.
        prompts_file: file of more prompts.
        dataset: folder whose grey windows are turned round; without it there are no scales.
        count: pictures of a prompt.
        seed: the first seed.

    Raises:
        UsageError: a file cannot be read.
        InputError: a prompt is no caption of the dataset, as for ``scales_of``.
    """
    listed = [*prompts, *(read_prompts(prompts_file) if prompts_file else ())]
    asked = read_grid(grid) if grid else make_grid(listed, count, seed)
    return asked, scales_of(dataset, asked.prompts) if dataset else {}


def open_origin(name: str, adapters: Sequence[Path], scales: Sequence[float]) -> Origin:
    """Load a model and fold its adapters into its weights.

    Raises:
        UsageError, InputError: the model or an adapter cannot be loaded.
    """
    tuned = load_tuned(name, adapters, scales)
    fold_adapters(tuned.models)
    base = {"name": name, "hash": model_hash(name)}
    return Origin(tuned=tuned, base=base, provenances=[pipeline_provenance(name), *tuned.provenances])


def remarks(origin: Origin, prompts: Sequence[str]) -> Iterator[str]:
    """Say what does not fit together: an adapter of another model, and prompts that are most likely a slip."""
    if other := base_mismatch(origin.tuned.provenances, origin.base["hash"]):
        yield f"note: the adapter was trained on another base model ({other})"
    yield from _near_captions(prompts, captions_of(origin.provenances))


def sized_settings(origin: Origin, prompts: Sequence[str], settings: SamplingConfig) -> dict[str, SamplingConfig]:
    """Return the settings of each prompt, at the size it was trained at where no size is set.

    Raises:
        UsageError: as for ``resolve_size``.
    """
    own = origin.tuned.models.size_px
    return {prompt: resolve_size(settings, size_of(origin.provenances, prompt), own) for prompt in prompts}


def resolve_size(settings: SamplingConfig, trained: tuple[int, int] | None, own: int) -> SamplingConfig:
    """Fill in the height and width: as set, else the training size, else the model's own.

    Raises:
        UsageError: the training size is not a multiple of 8 and cannot be generated as it is.
    """
    height, width = trained or (own, own)
    height, width = settings.height or height, settings.width or width
    if height % 8 or width % 8:
        raise UsageError(
            f"the adapter was trained at {height} x {width} px, which is not a multiple of 8; pass --height "
            f"{-(-height // 8) * 8} --width {-(-width // 8) * 8}"
        )
    return dataclasses.replace(settings, height=height, width=width)


def batches(request: PictureRequest) -> Iterator[list[int]]:
    """Yield the places of pictures that are drawn together: of one size, in their order."""
    places, settings, asked = defaultdict(list), request.settings, request.grid.requests
    for place, (prompt, _) in enumerate(asked):
        places[settings[prompt].height, settings[prompt].width].append(place)
    for of_one_size in places.values():
        size = settings[asked[of_one_size[0]][0]].batch_size
        yield from (of_one_size[start : start + size] for start in range(0, len(of_one_size), size))


def _near_captions(prompts: Sequence[str], captions: Sequence[str]) -> list[str]:
    """Say which prompts are a letter or two away from a training caption: most likely a slip."""
    notes = []
    for prompt in prompts:
        near = [] if prompt in captions else difflib.get_close_matches(prompt, captions, n=1, cutoff=0.9)
        notes += [f"note: '{prompt}' is not a training caption; did you mean '{text}'?" for text in near]
    return notes
