"""The recipes that train, each once: cards, reports, tables and tests read this list."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RecipeEntry:
    """A recipe, ``finetune/NAME.py``.

    Attributes:
        method: what it does, as a model card says it after "fine-tuned by".
        settings: the class of its settings, in its module.
    """

    method: str
    settings: str


RECIPES = {
    "full": RecipeEntry(method="full fine-tuning", settings="FullRun"),
    "lora": RecipeEntry(method="low-rank adapters (LoRA)", settings="LoraRun"),
    "textual_inversion": RecipeEntry(method="Textual Inversion", settings="TextualInversionRun"),
    "dreambooth": RecipeEntry(method="DreamBooth", settings="DreamBoothRun"),
    "lora_dreambooth": RecipeEntry(method="DreamBooth with low-rank adapters (LoRA)", settings="LoraDreamBoothRun"),
    "pivotal_tuning": RecipeEntry(
        method="pivotal tuning: a new word, then adapters around it", settings="PivotalTuningRun"
    ),
}
"""By name, in the order of the tables."""
