"""Checkpoints: all of the state comes back, whole or not at all, and the newest is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from configs.errors import InputError, UsageError
from finetune.core.loop import checkpoints


def make_trained(seed: int, steps: int = 3) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(seed)
    parameters = {"b.weight": nn.Parameter(torch.randn(4, 3, generator=generator)), "a": nn.Parameter(torch.zeros(5))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters, optimizer


def test_a_read_checkpoint_goes_on_bitwise_as_before(tmp_path: Path) -> None:
    parameters, optimizer = make_trained(seed=0)
    path = checkpoints.write(tmp_path, 3, parameters=parameters, optimizer=optimizer, state={"elapsed_s": 1.5})
    copies, other = make_trained(seed=1, steps=0)
    state = checkpoints.read(path, parameters=copies, optimizer=other)
    for pair in (parameters, copies):
        for parameter in pair.values():
            parameter.grad = torch.full_like(parameter, 0.25)
    optimizer.step()
    other.step()
    assert (state["step"], state["elapsed_s"]) == (3, 1.5)
    assert all(torch.equal(parameters[name], copies[name]) for name in parameters)


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    parameters, optimizer = make_trained(seed=0)
    path = checkpoints.write(tmp_path, 3, parameters=parameters, optimizer=optimizer, state={})
    assert sorted(file.name for file in path.iterdir()) == [
        "learned.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_the_newest_is_found_by_number(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-200.partial").mkdir()
    assert checkpoints.find(tmp_path, "latest") == tmp_path / "checkpoint-100"
    assert checkpoints.find(tmp_path, None) == tmp_path / "checkpoint-100"


def test_one_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-5"
    path.mkdir()
    assert checkpoints.find(tmp_path, "checkpoint-5") == path
    assert checkpoints.find(Path("elsewhere"), str(path)) == path


def test_one_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(UsageError, match=r"checkpoint-7.*has checkpoint-5"):
        checkpoints.find(tmp_path, "checkpoint-7")


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    parameters, optimizer = make_trained(seed=0)
    for step in (1, 2, 3, 10):
        checkpoints.write(tmp_path, step, parameters=parameters, optimizer=optimizer, state={})
        checkpoints.prune(tmp_path, 2)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-10"]


def test_a_failed_write_leaves_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    parameters, optimizer = make_trained(seed=0)
    checkpoints.write(tmp_path, 1, parameters=parameters, optimizer=optimizer, state={})
    checkpoints.prune(tmp_path, 1)
    with pytest.raises(TypeError):
        checkpoints.write(tmp_path, 2, parameters=parameters, optimizer=optimizer, state={"bad": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_removal_cut_short_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters, optimizer = make_trained(seed=0)
    paths = [checkpoints.write(tmp_path, step, parameters=parameters, optimizer=optimizer, state={}) for step in (1, 2)]

    def killed(path: Path, *, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.remove(paths[1])
    monkeypatch.undo()
    assert checkpoints.checkpoints(tmp_path) == [paths[0]]
    checkpoints.clear_remains(tmp_path)
    assert list(tmp_path.iterdir()) == [paths[0]]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    parameters, optimizer = make_trained(seed=0)
    path = checkpoints.write(tmp_path, 1, parameters=parameters, optimizer=optimizer, state={})
    (path / "optimizer.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match="checkpoint-1"):
        checkpoints.read(path, parameters=parameters, optimizer=optimizer)


def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    parameters, optimizer = make_trained(seed=0)
    path = checkpoints.write(tmp_path, 1, parameters=parameters, optimizer=optimizer, state={})
    with pytest.raises(InputError, match="other weights"):
        checkpoints.read(path, parameters={"a": parameters["a"]}, optimizer=optimizer)
