"""The file names of a run folder."""

from __future__ import annotations

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The file name diffusers looks for."""
EMBEDDINGS_FILE = "learned_embeds.safetensors"
"""The file name diffusers looks for."""
PROVENANCE_KEY = "provenance"
"""Key of the safetensors metadata that holds what ``provenance.json`` holds."""

CARD, CONFIG, ENVIRONMENT, METRICS, HELDOUT, DRIFT, DRIFT_FOLDER, SELECTION, PROVENANCE, LOCK = (
    "README.md",
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "heldout.jsonl",
    "drift.jsonl",
    "drift",
    "selection.json",
    "provenance.json",
    "run.lock",
)

PIPELINE_FILE = "model_index.json"
"""The file that makes a folder a pipeline; written last."""
PIPELINE_PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
"""Folders of a pipeline."""
