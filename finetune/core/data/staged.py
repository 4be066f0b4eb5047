"""Two stages of training: updates of one kind before the pivot, and of another from there on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

from finetune.core.learns.trainable import Group, Learns
from finetune.core.run import Batches, Update
from finetune.core.settings.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Staged:
    """Updates of one ``Batches`` before the pivot, and of another from there on.

    Attributes:
        pivot: number of the first update of the second.
    """

    first: Batches
    then: Batches
    pivot: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates in one pass over the images, in either stage."""
        return self.first.steps_per_epoch

    def cut(self, train: TrainConfig) -> Staged:
        """Return the same updates, in forward passes of as many images as these settings say."""
        return dataclasses.replace(self, first=self.first.cut(train), then=self.then.cut(train))

    def update(self, number: int) -> Update:
        """Return this process's share of an update."""
        return (self.first if number < self.pivot else self.then).update(number)


def word_then_adapters(word: Learns, adapters: Learns, *, pivot: int, after: float) -> Learns:
    """Return what learns in two stages: the rows of a word, then adapters.

    Args:
        word: the rows; they keep the share ``after`` of their learning rate from the pivot on.
        adapters: they rest before the pivot.
        pivot: number of updates of the first stage.
        after: a share of the rows' learning rate; 0 lets them rest.
    """
    rows = [Group(one.parameters, one.learning_rate, partial(_before, pivot, after)) for one in word.groups]
    others = [Group(one.parameters, one.learning_rate, partial(_after, pivot)) for one in adapters.groups]
    return Learns((*rows, *others))


def _before(alone: int, after: float, done: int) -> float:
    """Return the share of their learning rate that the rows have after ``done`` updates."""
    return 1.0 if done < alone else after


def _after(alone: int, done: int) -> float:
    """Return the share of their learning rate that the adapters have after ``done`` updates."""
    return 0.0 if done < alone else 1.0
