"""The numbers of ``eval.fidelity``: are generated slices like real ones, and do they show what was asked for?"""

from __future__ import annotations

from eval.stats.number import Number

DESCRIPTOR_FLOOR_RATIO = Number(
    name="descriptor_floor_ratio",
    label="all descriptors / real to real",
    unit="ratio",
    bad="high",
    compared="distance / real to real",
    answers="Fidelity",
    finding="Descriptors are {value:.1f} times as far from real slices as real ones are",
)
NUMBERS = (
    DESCRIPTOR_FLOOR_RATIO,
    Number(
        name="kid_floor_ratio",
        label="distance / real to real",
        unit="ratio",
        bad="high",
        compared="KID / real to real",
        answers="Fidelity",
        finding="{value:.1f} times the distance between real slices",
    ),
    Number(
        name="agreement_state",
        label="state as asked for",
        unit="share",
        bad="low",
        compared="state as asked",
        answers="Prompt",
        finding="{value:.0%} show the state asked for",
    ),
    Number(
        name="agreement_axis",
        label="axis as asked for",
        unit="share",
        bad="low",
        compared="axis as asked",
        answers="Prompt",
        finding="{value:.0%} show the axis asked for",
    ),
    Number(
        name="two_sample_auc",
        label="told apart by a classifier (AUC)",
        unit="share",
        bad="high",
        answers="Fidelity",
        finding="A classifier tells {value:.0%} of pairs apart",
    ),
    Number(name="swap_state", label="state follows its word", unit="share", bad="low", answers="Prompt"),
    Number(name="swap_axis", label="axis follows its word", unit="share", bad="low", answers="Prompt"),
    Number(name="swap_state_alone", label="axis stays when the state is swapped", unit="share", bad="low"),
    Number(name="swap_axis_alone", label="state stays when the axis is swapped", unit="share", bad="low"),
    Number(name="accuracy_state", label="state read correctly", unit="share", bad="low"),
    Number(name="accuracy_axis", label="axis read correctly", unit="share", bad="low"),
    Number(name="own_classifier_state", label="state by the model's own loss", unit="share", bad="low"),
    Number(name="own_classifier_axis", label="axis by the model's own loss", unit="share", bad="low"),
    Number(name="coloured", label="slices that are not grey", unit="share", bad="high"),
    Number(name="kid", label="distance (KID)", unit="squared MMD", bad="high"),
    Number(name="mmd", label="distance of descriptors (MMD)", unit="squared MMD", bad="high"),
    Number(name="chords", label="chord length", unit="ratio", bad="high"),
    Number(name="two_point", label="two-point probability", unit="ratio", bad="high"),
)
