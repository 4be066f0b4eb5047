"""The same dataset, byte for byte, whoever cuts it; and what is left when a run dies."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import distributed
import numpy as np
import pytest
import tifffile

from configs.errors import InputError, UsageError
from data_prep.slice import main
from data_prep.slicing import spread
from data_prep.slicing.config import SliceConfig
from data_prep.slicing.cut import cut, tasks_of
from data_prep.slicing.filters import FilterConfig
from data_prep.slicing.plan import make_plans
from prompts.vocabulary import DEFAULT

SHAPE = (20, 60, 100)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A folder with two volumes of different depth in it; one has voxels that are not finite."""
    rng = np.random.default_rng(0)
    tifffile.imwrite(tmp_path / "a.tif", rng.integers(0, 60000, SHAPE, dtype=np.uint16), photometric="minisblack")
    volume = rng.normal(0, 1, (9, 50, 40)).astype(np.float32)
    volume[:, :3] = np.nan
    tifffile.imwrite(tmp_path / "b.tif", volume, photometric="minisblack", compression="deflate")
    return tmp_path


def settings(folder: Path, out: str, **more: object) -> SliceConfig:
    volumes = (f"dry={folder}/a.tif", f"injected={folder}/b.tif")
    return SliceConfig(volumes=volumes, output_dir=folder / out, **more)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file but the settings, which say who cut."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    ("num_processes", "more"),
    [
        (2, {}),
        (3, {"split": "none", "stride": 3}),
        # No share reads all planes then, so that what they saw has to be put together.
        (3, {"slice_axes": ("thickness",), "split": "none"}),
    ],
)
def test_several_processes_make_the_same_dataset(scan: Path, num_processes: int, more: dict[str, object]) -> None:
    main(settings(scan, "one", **more))
    main(settings(scan, "several", processes=num_processes, **more))
    one, several = contents(scan / "one"), contents(scan / "several")
    assert one == several
    assert len(one) > 20


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
def test_shares_divide_every_slice_once(scan: Path, num_parts: int) -> None:
    plans = make_plans(settings(scan, "out"), DEFAULT)
    tasks = tasks_of(
        plans, scan, roles=(0, 1, 2), num_parts=num_parts, num_threads=1, filters=FilterConfig()
    )  # fmt: skip
    assert len(tasks) >= num_parts
    for number, plan in enumerate(plans):
        shares = [key for task in tasks if task.volume == number for key in task.pictures]
        assert sorted(shares) == sorted(plan.pictures)
        assert sum(task.is_first for task in tasks if task.volume == number) == 1


def test_an_error_in_another_process_is_the_users_one_line(scan: Path) -> None:
    with (scan / "b.tif").open("r+b") as raw, tifffile.TiffFile(scan / "b.tif") as file:
        # Planes that the window is sampled from are read first: here all are, so the file is spoilt at the cut.
        offset = file.pages[4].dataoffsets[0]
        raw.seek(offset + 4)
        raw.write(b"\xff" * 40)
    with pytest.raises(InputError, match="plane 4"):
        main(settings(scan, "out", processes=2))
    assert not (scan / "out").exists()


def test_a_machine_that_does_not_see_the_folder_says_so(scan: Path) -> None:
    plans = make_plans(settings(scan, "out"), DEFAULT)
    tasks = tasks_of(plans, scan / "gone", roles=(0, 1, 2), num_parts=1, num_threads=1, filters=FilterConfig())
    with pytest.raises(InputError, match="is not there on the machine that should cut"):
        cut(tasks[0])


def test_a_run_that_is_killed_leaves_no_dataset_and_the_next_one_is_whole(scan: Path) -> None:
    words = [sys.executable, "-m", "data_prep.slice", "--volumes", f"dry={scan}/a.tif", f"injected={scan}/b.tif"]
    words += ["--output_dir", str(scan / "out"), "--split", "none"]
    running = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not list(scan.glob("out.partial-*/new/train/*.png")) and running.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    if not (scan / "out").exists():  # it may have been quicker than the signal
        assert len(list(scan.glob("out.partial-*"))) == 1
        subprocess.run(words, check=True, capture_output=True)
    assert sorted(path.name for path in scan.iterdir()) == ["a.tif", "b.tif", "out"]
    main(settings(scan, "again", split="none"))
    assert contents(scan / "out") == contents(scan / "again")


def test_a_scheduler_that_is_not_there_is_named(scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "_PATIENCE_S", 1)
    with pytest.raises(UsageError, match=r"--scheduler tcp://127.0.0.1:9: no dask scheduler answers"):
        main(settings(scan, "out", scheduler="tcp://127.0.0.1:9"))
    assert not (scan / "out").exists()


@pytest.fixture
def cluster() -> Iterator[str]:
    """Two dask workers on this machine, each a process of its own."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as local:
        yield local.scheduler_address


@pytest.mark.filterwarnings("default")  # those of dask are not ours
def test_two_dask_workers_make_the_same_dataset(scan: Path, cluster: str) -> None:
    main(settings(scan, "one"))
    main(settings(scan, "cluster", scheduler=cluster))
    assert contents(scan / "cluster") == contents(scan / "one")
