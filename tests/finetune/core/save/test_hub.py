"""Uploading: refused early where it cannot be done, and what is sent otherwise."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from configs.errors import TisserandError, UsageError
from finetune.core.save.hub import check_hub, find_repository, push
from finetune.core.settings.model import HubConfig


class Hub:
    """Stands for the hub, which tests must not reach: keeps a copy of what it is sent, by its own rules."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, name: str, *, exist_ok: bool) -> huggingface_hub.RepoUrl:
        if self.token != "right":
            raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required")
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name if '/' in name else f'me/{name}'}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, ignore_patterns: list[str], commit_message: str) -> str:
        if repo_id == "me/full":
            raise OSError("storage is full")
        files = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        kept = huggingface_hub.utils.filter_repo_objects(files, ignore_patterns=ignore_patterns)
        return " ".join(sorted(kept))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)


def test_offline_is_refused_and_silence_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check_hub(HubConfig())
    with pytest.raises(UsageError, match=r"--push_to_hub: HF_HUB_OFFLINE is set; unset it, or leave it out"):
        check_hub(HubConfig(push_to_hub=True))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    check_hub(HubConfig(push_to_hub=True))


@pytest.mark.parametrize(("asked", "name"), [(None, "me/run"), ("lab/weave", "lab/weave")])
def test_the_repository_is_the_one_asked_for_or_named_like_the_folder(asked: str | None, name: str) -> None:
    config = HubConfig(push_to_hub=True, hub_model_id=asked, hub_token="right")
    assert find_repository(config, Path("somewhere/run")) == name


def test_a_refusal_of_the_hub_names_the_remedy_and_not_the_token() -> None:
    with pytest.raises(UsageError, match=r"--push_to_hub run: the hub refuses it \(Token is required\)") as caught:
        find_repository(HubConfig(push_to_hub=True, hub_token="secret"), Path("run"))
    assert "secret" not in str(caught.value)


def test_checkpoints_caches_and_logs_stay_here(tmp_path: Path) -> None:
    names = ["README.md", "config.yaml", "previews/step-000000.png", "unet/config.json"]
    left = ["checkpoint-2/state.json", "cache/a/b.safetensors", "logs/x/events", "run.lock", "environment.json"]
    for name in (*names, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    sent = push(HubConfig(push_to_hub=True, hub_token="right"), "me/run", tmp_path)
    assert sent.split() == sorted(names)


def test_a_failed_upload_says_that_the_run_is_whole(tmp_path: Path) -> None:
    with pytest.raises(
        TisserandError, match=r"upload failed \(storage is full\); the run is whole: `hf upload me/full"
    ):
        push(HubConfig(push_to_hub=True, hub_token="right"), "me/full", tmp_path)
