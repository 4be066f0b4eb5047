"""The two models of a drift check, and what is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.folders.provenance import base_mismatch, bucket_size_of, pipeline_provenance
from finetune.diffusion.adapters import set_adapter_scale
from finetune.diffusion.config import SamplingConfig
from finetune.diffusion.hashes import model_hash
from finetune.diffusion.models import Models
from finetune.diffusion.tuned import load_tuned


@dataclass(frozen=True, kw_only=True)
class BaseAndTuned:
    """The base model and what was tuned from it.

    Attributes:
        base: the base; the same object as ``tuned`` where adapters make the difference.
        tuned: the tuned model.
        hashes: name -> hash of each model and adapter.
        provenances: what each adapter, and then the pipeline folder, says of its training.
        trained_on: name of the base the adapters were trained on, if it is another than this one; else empty.
    """

    base: Models
    tuned: Models
    hashes: Mapping[str, str]
    provenances: Sequence[Mapping[str, object]]
    trained_on: str

    def sized(self, sampling: SamplingConfig) -> SamplingConfig:
        """Return the settings with height and width: as typed, else of most training pictures, else the base's own.

        The shape of the training pictures counts where they were in buckets; without, all is as the base draws it.
        """
        height, width = bucket_size_of(self.provenances) or (self.base.size_px, self.base.size_px)
        return replace(sampling, height=sampling.height or height, width=sampling.width or width)

    def set_strength(self, strength: float) -> None:
        """Put the adapters on at a share of the strength asked for, 0 for none; nothing to do for two models."""
        if self.base is self.tuned:
            set_adapter_scale(self.tuned, strength)


def load_base_and_tuned(name: str, adapters: Sequence[Path], scales: Sequence[float], base: str | None) -> BaseAndTuned:
    """Load both models.

    Args:
        name: the base under the adapters, or a tuned pipeline.
        adapters: run folders or files.
        scales: strength of the adapters, one for all or one each.
        base: what a tuned pipeline came from; None with adapters.
    """
    tuned = load_tuned(name, adapters, scales)
    untuned = tuned.models if base is None else load_tuned(base).models
    provenances = [*tuned.provenances, pipeline_provenance(name)]
    hashes = {"base": model_hash(base or name)}
    hashes |= {f"adapter {index}": str(item["hash"]) for index, item in enumerate(tuned.adapters)}
    if base is not None:
        hashes["tuned"] = model_hash(name)
    # Adapters were trained on the model they sit on, a tuned pipeline on its base.
    other = base_mismatch(tuned.provenances, hashes.get("tuned", hashes["base"]))
    if base is not None:
        other = other or base_mismatch(provenances[-1:], hashes["base"])
    return BaseAndTuned(
        base=untuned,
        tuned=tuned.models,
        hashes=hashes,
        provenances=provenances,
        trained_on=other,
    )
