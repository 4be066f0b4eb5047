"""The parts that recipes are made of, under one name: a recipe imports them when it runs, so that --help stays fast."""

from __future__ import annotations

from data_prep.folders.run_folder import EMBEDDINGS_FILE, LORA_FILE, PIPELINE_FILE, PIPELINE_PARTS
from finetune.core.data.prior import with_prior
from finetune.core.data.staged import Staged, word_then_adapters
from finetune.core.learns import trainable
from finetune.core.learns.averages import Averages
from finetune.core.learns.optimizer import base_learning_rate, learning_rates
from finetune.core.learns.words import add_word, heldout_images, into_table, word_images
from finetune.core.pictures.hub_dataset import local_images
from finetune.core.pictures.images import data_provenance, read_images, read_instance_images
from finetune.core.recipe import Method, Provenance, image_batches, run_method
from finetune.core.run import HeldOut, OpenRun
from finetune.core.save.weights import WordCopies, copies_of, save_embeddings, save_lora, save_pipeline

__all__ = [
    "EMBEDDINGS_FILE",
    "LORA_FILE",
    "PIPELINE_FILE",
    "PIPELINE_PARTS",
    "Averages",
    "HeldOut",
    "Method",
    "OpenRun",
    "Provenance",
    "Staged",
    "WordCopies",
    "add_word",
    "base_learning_rate",
    "copies_of",
    "data_provenance",
    "heldout_images",
    "image_batches",
    "into_table",
    "learning_rates",
    "local_images",
    "read_images",
    "read_instance_images",
    "run_method",
    "save_embeddings",
    "save_lora",
    "save_pipeline",
    "trainable",
    "with_prior",
    "word_images",
    "word_then_adapters",
]
