"""Runs of the recipes that learn a new word, in this process, with the options that their tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.load import load

Train = Callable[..., Path]


def trainer(main: Callable[[Any], None], settings: type, toy_sd: Path, **values: object) -> Train:
    """Return a function that runs a recipe in a folder, takes more options and returns the folder.

    Options given again win: those of the call over ``values``, and these over what is common to the recipes.
    """
    values = {
        "pretrained_model_name_or_path": toy_sd,
        "placeholder_token": "<x>",
        "initializer_token": "a",
        "num_vectors": 2,
        "repeats": 1,
        "seed": 0,
        "max_train_steps": 6,
        "train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        **values,
    }
    arguments = [word for name, value in values.items() for word in (f"--{name}", str(value))]

    def run(folder: Path, *more: object) -> Path:
        main(load(settings, [*arguments, "--output_dir", str(folder), *(str(word) for word in more)]))
        return folder

    return run
