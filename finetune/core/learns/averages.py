"""Running averages of what learns (EMA): what previews show and users get, with ``--use_ema``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import Tensor

from finetune.core.learns.trainable import Learns
from finetune.core.settings.methods import EmaConfig


class Averages:
    """An exponential moving average of every parameter; diffusers' ``EMAModel``, by name.

    The decay rises as (1 + step) / (10 + step) to ``--ema_decay``, so that a short run is not an average of its start.
    Without ``--use_ema`` there are none, and nothing here does anything.
    """

    def __init__(self, learns: Learns, config: EmaConfig) -> None:
        """Start from the parameters as they are."""
        self._learns = learns
        self._config = config
        self._model: EMAModel | None = None
        self.begin()

    def begin(self) -> None:
        """Start anew from the parameters as they are now."""
        if self._config.use_ema:
            values = self._learns.parameters.values()
            self._model = EMAModel(values, decay=self._config.ema_decay, foreach=self._config.foreach_ema)
            if self._config.offload_ema:
                self._model.to("cpu")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The averages by name; none without ``--use_ema``."""
        return {} if self._model is None else dict(zip(self._learns.parameters, self._model.shadow_params, strict=True))

    def restore(self, steps: int) -> None:
        """Go on after this many updates, from the tensors that a checkpoint was read into."""
        if self._model is not None:
            self._model.optimization_step = steps

    def update(self) -> None:
        """Take the parameters into the averages, after an optimizer step."""
        if self._model is None:
            return
        values = list(self._learns.parameters.values())
        if self._config.offload_ema:
            self._model.to(values[0].device)
        self._model.step(values)
        if self._config.offload_ema:
            self._model.to("cpu")

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages in the place of the parameters, which come back bit for bit; for a ``with`` block."""
        if self._model is None:
            yield
            return
        values = list(self._learns.parameters.values())
        self._model.store(values)
        self._model.copy_to(values)
        try:
            yield
        finally:
            self._model.restore(values)
