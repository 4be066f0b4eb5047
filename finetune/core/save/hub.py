"""Uploading a finished run to the Hugging Face hub: what would stop it is found before training."""

from __future__ import annotations

from pathlib import Path

from configs.errors import TisserandError, UsageError
from finetune.core.settings.model import HubConfig

_LEFT_OUT = ["checkpoint-*/**", "cache/**", "logs/**", "*.partial", "run.lock", "environment.json"]


_LATER = "leave it out, and upload the run folder with `hf upload` afterwards"


def check_hub(config: HubConfig) -> None:
    """Refuse ``--push_to_hub`` where the hub is switched off.

    Raises:
        UsageError: it is.
    """
    if config.push_to_hub:
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise UsageError(f"--push_to_hub: HF_HUB_OFFLINE is set; unset it, or {_LATER}")


def find_repository(config: HubConfig, folder: Path) -> str:
    """Create the repository that ``folder`` will be uploaded to, or find it there; return its name.

    Raises:
        UsageError: the hub is not reached, or does not let this user write there.
    """
    from huggingface_hub import HfApi

    name = config.hub_model_id or folder.resolve().name
    try:
        return str(HfApi(token=config.hub_token).create_repo(name, exist_ok=True).repo_id)
    except (OSError, ValueError) as error:  # huggingface_hub's errors of the network, of rights and of names
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"--push_to_hub {name}: the hub refuses it ({reason}); log in with `hf auth login`, or {_LATER}"
        ) from None


def push(config: HubConfig, repository: str, folder: Path) -> str:
    """Upload weights, card, settings, metrics and previews; return the address of the commit.

    Raises:
        TisserandError: the upload failed; the run itself is whole.
    """
    from huggingface_hub import HfApi

    try:
        done = HfApi(token=config.hub_token).upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=_LEFT_OUT, commit_message="Add a finished run"
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TisserandError(
            f"--push_to_hub {repository}: the upload failed ({reason}); the run is whole: "
            f"`hf upload {repository} {folder}` does it again"
        ) from error
    return str(done)
