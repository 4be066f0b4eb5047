"""The model behind generated slices, with the base that it was tuned from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from configs.errors import TisserandError
from eval.tiles.config import SlicesConfig
from eval.tiles.sets import Generated
from finetune.diffusion.adapters import set_adapter_scale
from finetune.diffusion.hashes import model_hash
from finetune.diffusion.models import Models
from finetune.diffusion.tuned import load_tuned


@dataclass(frozen=True, kw_only=True)
class TunedAndBase:
    """The model behind the slices; ``base`` is the same object where adapters can be switched off, None if unknown."""

    tuned: Models
    base: Models | None

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Switch the adapters off until the end, where the base is the tuned model without them."""
        if self.base is not self.tuned:
            yield
            return
        set_adapter_scale(self.tuned, 0.0)
        try:
            yield
        finally:
            set_adapter_scale(self.tuned, 1.0)


def load_tuned_and_base(
    slices: SlicesConfig, generated: Generated, adapters: Sequence[Path], base: str | None
) -> tuple[TunedAndBase | None, str]:
    """Load the model that made the slices, or say why not.

    Args:
        slices: what is compared; it may name the model.
        generated: the generated slices, whose records name the model and its adapters.
        adapters: the adapters as typed; those of the records if empty.
        base: the model that a tuned pipeline came from, as typed.

    Raises:
        UsageError, InputError: a model or adapter was named on the command line and cannot be loaded.
    """
    name = slices.pretrained_model_name_or_path or generated.base_model
    if not name:
        return None, "the records name no model; pass --pretrained_model_name_or_path"
    typed = bool(slices.pretrained_model_name_or_path or adapters or base)
    used = [(path, 1.0) for path in adapters] or list(generated.adapters)
    paths, scales = [path for path, _ in used], [scale for _, scale in used]
    try:
        loaded = load_tuned(name, paths, scales or [1.0])
        untuned = load_tuned(base).models if base else loaded.models if used else None
    except TisserandError as error:
        if typed:
            raise
        return None, f"the model of the records cannot be loaded ({error})"
    known = [str(adapter["hash"]) for adapter in loaded.adapters]
    if not typed and (known != list(generated.adapter_hashes) or model_hash(name) != generated.base_hash):
        return None, "the model of the records has changed since they were made; name the right one with --adapter"
    return TunedAndBase(tuned=loaded.models, base=untuned), ""
