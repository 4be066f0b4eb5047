"""Several processes share one list of work; alone, a process does all of it.

    torchrun --nproc_per_node 2 -m eval.generate ...

Each takes every so-many-th part, and the first one writes what all have made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from configs.errors import UsageError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """This process's place among those that a launcher started together."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def mine(self, work: list[T]) -> list[T]:
        """Return this process's share of a list that is the same in all."""
        return work[self.rank :: self.count]

    def merged(self, found: dict[int, T]) -> dict[int, T]:
        """Return what all processes found, by its place; all must call it."""
        if self.count == 1:
            return found
        from accelerate.utils import gather_object

        return {place: value for part in gather_object([found]) for place, value in part.items()}

    @contextmanager
    def folder(self, made: AbstractContextManager[Path]) -> Iterator[Path]:
        """Enter the first process's folder in all of them; it appears, and goes, with that process's block."""
        if self.count == 1:
            with made as path:
                yield path
            return
        from accelerate.utils import broadcast_object_list

        if self.is_first:
            with made as path:
                broadcast_object_list([path])
                yield path
            return
        (path,) = broadcast_object_list([None])
        if not path.is_dir():
            raise UsageError(f"--output_dir: {path.parent.parent} is not the same folder for all processes")
        yield path


def join_team() -> Team:
    """Join the processes that torchrun or `accelerate launch` started beside this one, each on a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Team()
    import torch
    from accelerate import PartialState

    state: Any = PartialState(cpu=not torch.cuda.is_available())
    return Team(rank=state.process_index, count=state.num_processes)
