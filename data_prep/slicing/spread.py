"""Shares of the work over threads of this process, processes of this machine, or the workers of a dask cluster."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from configs.errors import TisserandError, UsageError
from data_prep.slicing.cut import Found, Task, cut

if TYPE_CHECKING:
    from collections.abc import Iterator

# Seconds to find a scheduler in.
_PATIENCE_S = 20


def cut_here(tasks: Sequence[Task]) -> list[Found]:
    """Take one share after another in this process."""
    with _bar(tasks) as progress:
        return [cut(task, progress.update) for task in tasks]


def cut_in_processes(tasks: Sequence[Task], num_processes: int) -> list[Found]:
    """Take shares in several processes of this machine.

    Raises:
        TisserandError: a process was killed.
    """
    # Spawned, because a fork copies locks that other threads hold.
    context = multiprocessing.get_context("spawn")
    with _bar(tasks) as progress, ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        jobs = {pool.submit(cut, task): task for task in tasks}
        try:
            for job in as_completed(jobs):
                job.result()
                progress.update(len(jobs[job].pictures))
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if type(error).__name__ == "BrokenProcessPool":
                raise TisserandError("--processes: a process was killed, for memory perhaps; fewer need less") from None
            raise
        return [job.result() for job in jobs]


class Cluster:
    """A dask cluster that takes shares; for a ``with`` block.

    Raises:
        UsageError: the package is missing, no scheduler answers, or it has no workers.
    """

    def __init__(self, address: str) -> None:
        try:
            from distributed import Client
        except ImportError:
            raise UsageError(f"--scheduler {address}: needs the extra 'dask': pip install -e '.[dask]'") from None
        try:
            self.client: Any = Client(address, timeout=_PATIENCE_S, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise UsageError(f"--scheduler {address}: no dask scheduler answers there ({error})") from None
        self.num_workers = len(self.client.scheduler_info(n_workers=-1)["workers"])
        if not self.num_workers:
            self.client.close()
            raise UsageError(f"--scheduler {address}: it has no workers; start some with: dask worker {address}")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def cut(self, tasks: Sequence[Task]) -> list[Found]:
        """Take shares on the workers, which must see the volumes and the output folder under the same names."""
        with _bar(tasks) as progress:
            jobs = [self.client.submit(cut, task, pure=False, retries=0) for task in tasks]
            try:
                for job, number in self._done(jobs):
                    job.result()
                    progress.update(len(tasks[number].pictures))
                return [job.result() for job in jobs]
            except BaseException:
                self.client.cancel(jobs, force=True)
                raise

    def _done(self, jobs: Sequence[Any]) -> Iterator[tuple[Any, int]]:
        """Yield jobs as they end, with their numbers."""
        from distributed import as_completed as completed

        numbers = {job.key: number for number, job in enumerate(jobs)}
        for job in completed(jobs, loop=self.client.loop):
            yield job, numbers[job.key]


def _bar(tasks: Sequence[Task]) -> tqdm[Any]:
    """Return a progress bar over the slices of all shares, silent off a terminal."""
    return tqdm(total=sum(len(task.pictures) for task in tasks), desc="slicing", unit="slice", disable=None)
