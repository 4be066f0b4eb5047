"""Fidelity in the feature space of local encoders (tier B), and by torch-fidelity's own code on the same features (C).

The features are used as the encoder gives them, so that numbers compare with those of papers. FID is biased upwards at
these numbers of pictures and is shown with N, never judged.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from configs.errors import UsageError
from data_prep.folders.results import Result
from eval.likeness.descriptor_rows import density_rows, mmd_row
from eval.likeness.rows import ClassifiedSets, Naming, as_sample, distance_rows, equal_numbers, pick
from eval.stats.arrays import Floats, Grey
from eval.tiles.encoders import Encoder


def encoder_rows(
    encoder: Encoder,
    sets: ClassifiedSets,
    pixels: Mapping[str, Grey],
    naming: Naming,
    *,
    with_torch_fidelity: bool,
    draws: int,
    seed: int,
) -> list[Result]:
    """Return KID with its reference lines, MMD, density and coverage in an encoder's features.

    Args:
        encoder: a CLIP or DINOv2.
        sets: the tiles that are compared; their own features are not used.
        pixels: tiles of ``held_out``, ``aside``, ``aside_vae`` (if there is a VAE) and ``generated_tiles``.
        naming: names of the states and axes, for the captions.
        with_torch_fidelity: add FID, KID, precision and recall by torch-fidelity.
        draws: number of resamples behind each interval.
        seed: seed of the resampling.
    """
    classified = {
        name: replace(getattr(sets, name), features=np.asarray(encoder.images(tiles), dtype=np.float64))
        for name, tiles in pixels.items()
    }
    own = replace(sets, **classified)
    grey = sets.leak_unchecked
    rows = distance_rows(own, naming, grey, draws, seed)
    number = equal_numbers([own.aside, own.held_out, own.generated_tiles])
    if number:
        held_out, aside, generated = (
            as_sample(pick(side, number)) for side in (own.held_out, own.aside, own.generated_tiles)
        )
        base = Result(metric="", set="generated", n=len(held_out), n_eff=pick(own.held_out, number).num_blocks)
        rows.append(mmd_row(base, held_out, aside, generated, grey, draws=draws, seed=seed))
        rows += density_rows(base, held_out, aside, generated, grey)
    rows = [replace(row, tier="B") for row in rows]
    if with_torch_fidelity and number:
        rows += _torch_fidelity_rows(held_out.features, generated.features, seed=seed)
    return [replace(row, metric=f"{row.metric}_{encoder.kind}") for row in rows]


def check_torch_fidelity() -> None:
    """Refuse ``--torch_fidelity`` where it cannot run.

    Raises:
        UsageError: saying what to install.
    """
    missing = [name for name in ("torch_fidelity", "torchvision") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--torch_fidelity: {' and '.join(missing)} not installed; pip install torch-fidelity")
    try:
        importlib.import_module("torch_fidelity")
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision built for another torch
        why = " ".join(str(error).split())
        raise UsageError(
            f"--torch_fidelity: it cannot be imported ({why}); install the torchvision made for this torch"
        ) from None


def _torch_fidelity_rows(real: Floats, generated: Floats, *, seed: int) -> list[Result]:
    """Return torch-fidelity's numbers for two equally large sets of features, (N, D) each.

    Its own Inception network comes as a pickle from the internet and is not used.
    """
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = (torch.from_numpy(features) for features in (generated, real))
    found = {
        **fid_statistics_to_metric(*(fid_features_to_statistics(side) for side in (a, b)), False),
        # One subset of all pictures: its spread over subsets is no interval.
        **kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=len(a), rng_seed=seed, verbose=False),
        **prc_features_to_metric(a, b, verbose=False),
    }
    names = {
        "frechet_inception_distance": "fid",
        "kernel_inception_distance_mean": "torch_fidelity_kid",
        "precision": "precision",
        "recall": "recall",
    }
    reason = f"by torch-fidelity, {len(real)} tiles a side; for comparison with papers, not judged"
    return [
        Result(metric=name, set="generated", value=float(found[key]), n=len(real), tier="C", reason=reason)
        for key, name in names.items()
        if key in found
    ]
