"""The drift check: zero where nothing changed, and numbers that mean what they say where something did."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2gray, rgb2hsv
from test_leak import stripes, weave, write_split

from configs.errors import GateError, UsageError
from data_prep.folders.results import Result, read_results
from eval.drift import DriftConfig, main
from eval.forgetting.colour import colourfulness, luminance, saturation
from eval.forgetting.divergence import divergence_parts
from eval.forgetting.evidence import Evidence
from eval.forgetting.leak import LeakNet, train_leak_net
from eval.forgetting.policy import FAR, GUARD, LIMITS, Limits, read_policy
from eval.forgetting.scores import score_drift
from eval.forgetting.verdicts import judge_prompt, judge_set
from eval.page.words import NUMBERS
from eval.stats.distances import Interval
from eval.stats.intervals import chance_of_hits, hierarchical, noise_band, ratio_of_means, share_interval
from finetune.diffusion.config import SamplingConfig
from finetune.diffusion.fixed_noise import predictions
from finetune.diffusion.models import load_models
from prompts.probe_lists import Probe

PROBES = """
version: 1
sets:
  G0: {probes: {squares: two squares, circles: three circles}}
  G2: {probes: {woven: a woven basket}}
  G4: {probes: {"null": ""}}
"""
IDEAL = Interval(value=1.0, low=1.0, high=1.0)


def write_lora(base: Path, folder: Path, captions: list[str], data: Path | None = None, **more: object) -> Path:
    """Write a run folder with random adapters on the attention of a toy model."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    unet = load_models(str(base)).unet
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(1)
    for name, weight in unet.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.5, generator=generator)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, safe_serialization=True)
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file, metadata={"provenance": json.dumps({"captions": captions, **more})})
    if data is not None:
        (folder / "config.yaml").write_text(f"train_data_dir: {data / 'train'}\n")
    return folder


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probes") / "probes.yaml"
    path.write_text(PROBES)
    return path


@pytest.fixture(scope="module")
def lora(toy_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    (folder / "data").mkdir()
    write_split(folder / "data" / "train", {"sf_dry sf_warp": 12, "sf_dry sf_weft": 12})
    return write_lora(toy_sd, folder / "run", ["sf_dry sf_warp", "sf_dry sf_weft"], folder / "data")


def settings(toy_sd: Path, probes: Path, output: Path, **changes: object) -> DriftConfig:
    config = DriftConfig(pretrained_model_name_or_path=str(toy_sd), adapter=(Path("none"),), probes=str(probes),
                         num_images=2, num_timesteps=3, sampling=SamplingConfig(num_inference_steps=2, batch_size=8),
                         output_dir=output)  # fmt: skip
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def drifted(toy_sd: Path, probes: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a check of the toy with its adapter on."""
    folder = tmp_path_factory.mktemp("drift") / "out"
    main(settings(toy_sd, probes, folder, adapter=(lora,), num_images=4))
    return folder


def of(rows: list[Result], metric: str, group: str | None = None) -> list[Result]:
    return [row for row in rows if row.metric == metric and group in {None, row.set}]


@pytest.mark.parametrize("way", ["adapter at scale 0", "base against itself"])
def test_a_model_that_did_not_change_scores_exactly_zero(
    way: str, toy_sd: Path, probes: Path, lora: Path, tmp_path: Path
) -> None:
    ways: dict[str, dict[str, object]] = {
        "adapter at scale 0": {"adapter": (lora,), "adapter_scale": (0.0,)},
        "base against itself": {"adapter": (), "base": str(toy_sd)},
    }
    main(settings(toy_sd, probes, tmp_path / "out", captions=("sf_dry",), **ways[way]))
    rows = read_results(tmp_path / "out" / "results.jsonl")
    assert {(row.value, row.low, row.high) for row in of(rows, "divergence")} == {(0.0, 0.0, 0.0)}
    assert {row.value for row in of(rows, "colourfulness_ratio")} == {1.0}
    assert {row.verdict for row in rows} <= {"ok", "grey"}


def test_a_model_that_changed_has_a_divergence_on_every_prompt(drifted: Path) -> None:
    rows = of(read_results(drifted / "results.jsonl"), "divergence")
    assert {row.prompt for row in rows} == {"", "two squares", "three circles", "a woven basket", "(empty prompt)"}
    assert all((row.value or 0.0) > 0 for row in rows)


def test_the_folder_holds_every_picture_with_its_record(drifted: Path) -> None:
    records = [json.loads(line) for line in (drifted / "records.jsonl").read_text().splitlines()]
    pictures = {path.relative_to(drifted).as_posix() for path in drifted.glob("*/*.png")}
    assert {record["file_name"] for record in records} == pictures
    assert len(records) == 2 * 4 * 4


def test_every_row_names_its_hashes_and_its_command(drifted: Path) -> None:
    for row in read_results(drifted / "results.jsonl"):
        assert row.hashes.keys() == {"base", "probes", "adapter 0", "train"}
        assert row.command.startswith("python -m eval.drift --pretrained_model_name_or_path ")


def test_the_training_slices_are_found_through_the_run(drifted: Path, lora: Path) -> None:
    assert f"real: {lora.parent / 'data'}" in (drifted / "config.yaml").read_text()
    assert len(of(read_results(drifted / "results.jsonl"), "leak_recall", "control")) == 1


def test_without_training_slices_the_leak_is_grey_and_says_why(
    toy_sd: Path, probes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_lora(toy_sd, tmp_path / "run", ["sf_dry"], base_model={"name": "another", "hash": "0"})
    main(settings(toy_sd, probes, tmp_path / "out", adapter=(run,)))
    rows = of(read_results(tmp_path / "out" / "results.jsonl"), "leak")
    assert [(row.value, row.verdict, row.reason) for row in rows] == [
        (None, "grey", "no training slices to compare with; give --real DATASET")
    ]
    said = capsys.readouterr()
    assert "leak not measured: no training slices" in said.out
    assert "note: the adapter was trained on another base model (another)" in said.err


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--adapter: nothing to compare"):
        DriftConfig(pretrained_model_name_or_path="x", output_dir=tmp_path)


def test_a_list_without_light_probes_asks_for_all(toy_sd: Path, tmp_path: Path) -> None:
    path = tmp_path / "probes.yaml"
    path.write_text("version: 1\nlight: []\nsets: {G0: {probes: {a: x}}}\n")
    with pytest.raises(UsageError, match="marks no probe as light; pass --mode full"):
        main(settings(toy_sd, path, tmp_path / "out"))


def test_the_divergence_of_a_scaled_prediction_is_the_square_of_the_change() -> None:
    base = torch.randn(2, 3, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    difference, scale = divergence_parts(base * 1.1, base)
    # float32 products carry about 1e-7, the difference of neighbours ten times that.
    np.testing.assert_allclose(difference / scale, 0.1**2, rtol=1e-5)


def test_predictions_for_a_prompt_do_not_depend_on_the_other_prompts(toy_sd: Path) -> None:
    models = load_models(str(toy_sd))
    latents = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    together = predictions(models, ["a", "b", "c"], latents, num_timesteps=2)
    alone = predictions(models, ["c"], latents[2:], num_timesteps=2)
    # Another batch size may sum in another order: float32 rounding of values near 1.
    torch.testing.assert_close(alone[0], together[2], atol=1e-5, rtol=0)


def test_colour_measures_agree_with_scikit_image() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 9, 7, 3), dtype=np.uint8)
    np.testing.assert_allclose(saturation(pictures), [rgb2hsv(p)[..., 1].mean() for p in pictures], rtol=1e-9)
    # rgb2gray uses the same weights with one digit less.
    np.testing.assert_allclose(luminance(pictures), [255 * rgb2gray(p).mean() for p in pictures], rtol=1e-3)


def test_colourfulness_is_that_of_the_paper() -> None:
    half_red_half_green = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    half_red_half_green[0, 0, :, 0] = 200
    half_red_half_green[0, 1, :, 1] = 200
    # rg = +-200: mean 0, sd 200; yb = 100 everywhere: mean 100, sd 0; M = 200 + 0.3 * 100.
    assert colourfulness(half_red_half_green)[0] == pytest.approx(230)
    assert colourfulness(np.full((1, 4, 4, 3), 90, dtype=np.uint8))[0] == 0


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for repeat in range(200):
        values = 1 + random.normal(0, 0.3, (12, 1)) + random.normal(0, 0.2, (12, 4))
        interval = hierarchical(lambda drawn: drawn.mean(axis=-1), values, draws=300, seed=repeat)
        hits += interval.low <= 1 <= interval.high
    # A percentile bootstrap of 12 prompts covers a little less than 95 %; a bootstrap of the 48 pictures covers 70 %.
    assert 0.85 <= hits / 200 <= 1.0


def test_no_hit_in_eight_pictures_does_not_promise_none() -> None:
    # Wilson for 0 of 8: z^2 / (n + z^2) = 3.84 / 11.84.
    assert share_interval(np.zeros((2, 4))).high == pytest.approx(0.3244, abs=1e-3)


def test_the_noise_band_holds_a_third_set_of_seeds() -> None:
    random = np.random.default_rng(0)
    spread = np.array([0.4, *[0.05] * 11])[:, None]  # one prompt leaves much more open than the others
    inside = 0
    for _ in range(500):
        again, base, third = np.exp(random.normal(0, spread, (3, 12, 4)))
        found = ratio_of_means(third, base)
        bands = [noise_band(again, base, np.array([prompt])) for prompt in range(12)]
        inside += all(band.low < ratio < band.high for band, ratio in zip(bands, found, strict=True))
        whole = noise_band(again, base, np.arange(12))
        assert whole.low < found.mean() < whole.high
    # 12 looks at 0.1 % each leave about 1 % of false alarms; one width for all prompts leaves 12 %.
    assert inside / 500 >= 0.96


def test_false_alarms_of_a_detector_are_foreseen() -> None:
    random = np.random.default_rng(0)
    alarms = [random.binomial(4, 0.02) / 4 > chance_of_hits(int(random.binomial(48, 0.02)), 48, 4) for _ in range(4000)]
    assert np.mean(alarms) < 0.01  # the band is for 995 of 1000; without it 8 % are
    assert chance_of_hits(0, 48, 4) == 0.25  # half of four pictures is no accident


@pytest.mark.parametrize(
    ("metric", "value", "pictures", "verdict"),
    [
        ("leak", 0.0, 8, "ok"),
        ("leak", 0.25, 8, "warn"),
        ("leak", 0.5, 8, "stop"),
        ("leak", 1.0, 3, "grey"),
        ("colourfulness_ratio", 0.95, 8, "ok"),
        ("colourfulness_ratio", 0.80, 8, "warn"),
        ("colourfulness_ratio", 0.55, 8, "stop"),
        ("colourfulness_ratio", 1.6, 8, "ok"),
        ("luminance_ratio", 1.6, 8, "warn"),
        ("luminance_ratio", 1.8, 8, "stop"),
        ("retention", 0.6, 8, "warn"),
        ("retention", 0.45, 8, "stop"),
        ("patch_leak", 1.0, 8, "grey"),
    ],
)
def test_a_prompt_far_from_the_domain_is_judged_by_the_limits(
    metric: str, value: float, pictures: int, verdict: str
) -> None:
    band = Interval(value=0.0, low=0.0, high=0.0) if "leak" in metric else IDEAL
    assert (
        judge_prompt(NUMBERS[metric], Interval(value=value, low=value, high=value), band, FAR, pictures)[0] == verdict
    )


def test_a_score_inside_the_noise_of_the_base_is_not_flagged() -> None:
    band = Interval(value=1.0, low=0.5, high=2.0)
    score = Interval(value=0.55, low=0.5, high=0.6)
    assert judge_prompt(NUMBERS["colourfulness_ratio"], score, band, FAR, 8)[0] == "ok"


def test_neighbours_of_the_domain_never_stop_a_run() -> None:
    lost = Interval(value=0.0, low=0.0, high=0.0)
    assert judge_set(NUMBERS["retention"], lost, IDEAL, LIMITS["G2"], 8, ["ok"])[0] == "warn"


def test_one_lost_prompt_stops_the_anchors_and_half_of_them_the_shared_tokens() -> None:
    kept = Interval(value=0.1, low=0.0, high=0.2)
    band = Interval(value=0.0, low=0.0, high=0.3)
    verdicts = [
        judge_set(NUMBERS["leak"], kept, band, LIMITS[name], 8, ["ok", "stop", "ok"])[0] for name in ("G0", "G1")
    ]
    assert verdicts == ["stop", "warn"]


def evidence_of(tuned: np.ndarray, base: np.ndarray, again: np.ndarray) -> Evidence:
    flat = torch.ones(len(base), 1, 1, 4, 2, 2)
    return Evidence(
        base=base,
        base_again=again,
        base_more=again[0, :0],
        tuned=tuned,
        base_predictions=flat,
        tuned_predictions=flat,
        captions=(),
        base_caption_predictions=None,
        tuned_caption_predictions=None,
    )


@pytest.fixture(scope="module")
def detector() -> LeakNet:
    return train_leak_net([weave(index) for index in range(24)], [stripes(index) for index in range(24)])


def pictures_of(first: int) -> np.ndarray:
    """Return 4 probes x 5 seeds of coloured stripes, (4, 5, H, W, 3)."""
    return np.stack([stripes(first + index) for index in range(20)]).reshape(4, 5, 32, 32, 3)


def test_half_of_the_tuned_pictures_replaced_by_slices_give_a_leak_of_a_half(detector: LeakNet) -> None:
    tuned = pictures_of(500).copy()
    tuned[::2] = np.stack([weave(600 + i) for i in range(10)]).reshape(2, 5, 32, 32, 1)
    listed = [Probe(id=str(index), prompt=f"probe {index}", set="G3") for index in range(4)]
    rows, _ = score_drift(listed, evidence_of(tuned, pictures_of(500), pictures_of(700)), detector, "")
    leak = next(row for row in of(rows, "leak", "G3") if not row.prompt)
    overall = next(row for row in rows if row.metric == "worst_prompt")
    assert leak.value == pytest.approx(0.5, abs=0.05)
    assert leak.verdict == "stop"
    assert (overall.verdict, overall.prompt) in {("stop", "probe 0"), ("stop", "probe 2")}


def test_faded_pictures_without_slices_retain_what_colour_they_kept(detector: LeakNet) -> None:
    base = pictures_of(500)
    grey = base.mean(axis=-1, keepdims=True)
    faded = (grey + 0.7 * (base - grey)).round().astype(np.uint8)
    rows, _ = score_drift([Probe(id=str(i), prompt=f"p{i}", set="G3") for i in range(4)],
                          evidence_of(faded, base, base), detector, "")  # fmt: skip
    retention = next(row for row in of(rows, "retention", "G3") if not row.prompt)
    # Colourfulness is linear in the distance from grey, but for rounding; no patch of these pictures is slice-like.
    assert retention.value == pytest.approx(0.7, abs=0.01)
    assert retention.verdict == "stop"


def test_more_colour_than_the_base_had_retains_no_more_than_all_of_it(detector: LeakNet) -> None:
    vivid = pictures_of(500)
    grey = vivid.mean(axis=-1, keepdims=True)
    base = (grey + 0.7 * (vivid - grey)).round().astype(np.uint8)
    rows, _ = score_drift([Probe(id=str(i), prompt=f"p{i}", set="G3") for i in range(4)],
                          evidence_of(vivid, base, base), detector, "")  # fmt: skip
    retention = next(row for row in of(rows, "retention", "G3") if not row.prompt)
    assert retention.value == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("first", range(1000, 1400, 100))
def test_other_seeds_of_the_base_raise_no_flag(detector: LeakNet, first: int) -> None:
    listed = [Probe(id=str(index), prompt=f"probe {index}", set="G3") for index in range(4)]
    evidence = evidence_of(pictures_of(first), pictures_of(first + 40), pictures_of(first + 70))
    rows, _ = score_drift(listed, evidence, detector, "")
    assert {row.verdict for row in rows} <= {"ok", "grey"}


def test_every_prompt_has_its_band_beside_its_score(detector: LeakNet) -> None:
    base, again = pictures_of(500), pictures_of(700)
    listed = [Probe(id=str(index), prompt=f"probe {index}", set="G3") for index in range(4)]
    rows, _ = score_drift(listed, evidence_of(base, base, again), detector, "")
    noise = np.log([row.floor for row in of(rows, "luminance_ratio") if row.prompt])
    bands = [row for row in of(rows, "luminance_ratio_aa") if row.prompt]
    # Student's t with 4 degrees of freedom leaves 0.05 % beyond 8.61.
    half = 8.610 * np.sqrt(np.mean(noise**2))
    assert [(row.prompt, row.low, row.high, row.verdict) for row in bands] == [
        (f"probe {index}", pytest.approx(np.exp(-half), rel=1e-3), pytest.approx(np.exp(half), rel=1e-3), "grey")
        for index in range(4)
    ]


def test_three_pictures_per_probe_are_not_judged_however_many_probes(detector: LeakNet) -> None:
    base = pictures_of(500)[:, :3]
    grey = base.mean(axis=-1, keepdims=True).repeat(3, axis=-1).astype(np.uint8)
    listed = [Probe(id=str(index), prompt=f"probe {index}", set="G3") for index in range(4)]
    rows, _ = score_drift(listed, evidence_of(grey, base, pictures_of(700)[:, :3]), detector, "")
    scored = of(rows, "colourfulness_ratio") + of(rows, "leak") + of(rows, "retention")
    assert {(row.verdict, row.reason) for row in scored} == {("grey", "3 pictures; 4 are needed to judge")}


def test_without_a_detector_the_prompt_that_lost_most_colour_is_the_worst() -> None:
    base = pictures_of(500)
    grey = base.mean(axis=-1, keepdims=True)
    kept = np.array([0.9, 0.5, 0.8, 1.0])[:, None, None, None, None]
    evidence = evidence_of((grey + kept * (base - grey)).round().astype(np.uint8), base, base)
    predictions = torch.arange(4.0).reshape(4, 1, 1, 1, 1, 1) + evidence.base_predictions
    rows, _ = score_drift([Probe(id=str(i), prompt=f"p{i}", set="G3") for i in range(4)],
                          dataclasses.replace(evidence, tuned_predictions=predictions), None, "no slices")  # fmt: skip
    overall = next(row for row in rows if row.metric == "worst_prompt")
    assert (overall.prompt, overall.unit) == ("p1", "colourfulness_ratio")


def test_prompts_without_colour_are_left_out_of_the_colour_ratio() -> None:
    grey = np.full((1, 4, 8, 8, 3), 100, dtype=np.uint8)
    rows, _ = score_drift([Probe(id="a", prompt="grey", set="G2")], evidence_of(grey, grey, grey), None, "no slices")
    assert {(row.value, row.verdict) for row in of(rows, "colourfulness_ratio")} == {(None, "grey")}
    assert [row.value for row in of(rows, "luminance_ratio")] == [1.0, 1.0]


def test_the_ratio_of_a_set_is_paired_by_seed() -> None:
    base = np.random.default_rng(0).uniform(1, 100, (6, 8))
    interval = hierarchical(ratio_of_means, 0.8 * base, base)
    # However much the pictures differ among themselves, each kept 80 %.
    assert (interval.low, interval.value, interval.high) == pytest.approx((0.8, 0.8, 0.8))


def test_a_word_alone_moves_its_caption_and_no_probe(toy_sd: Path, probes: Path, tmp_path: Path) -> None:
    """The base, which is the same object with the word switched off, reads it as letters."""
    from test_generate import write_word

    run = write_word(tmp_path / "word")
    main(settings(toy_sd, probes, tmp_path / "out", adapter=(run,), captions=("a <x>",)))
    rows = read_results(tmp_path / "out" / "results.jsonl")
    assert {row.value for row in of(rows, "divergence") if row.set in {"G0", "G2", "G4"}} == {0.0}
    assert all((row.value or 0.0) > 0 for row in of(rows, "divergence", "captions"))
    assert {"base", "probes", "adapter 0"} <= rows[0].hashes.keys()


def test_a_pipeline_with_an_adapter_on_top_is_compared_with_what_it_came_from(
    toy_sd: Path, probes: Path, lora: Path, tmp_path: Path
) -> None:
    import shutil

    tuned = shutil.copytree(toy_sd, tmp_path / "full")
    main(settings(toy_sd, probes, tmp_path / "out", pretrained_model_name_or_path=str(tuned), base=str(toy_sd),
                  adapter=(lora,), adapter_scale=(0.5,)))  # fmt: skip
    rows = read_results(tmp_path / "out" / "results.jsonl")
    assert {"base", "tuned", "adapter 0"} <= rows[0].hashes.keys()
    assert all((row.value or 0.0) > 0 for row in of(rows, "divergence"))


def test_a_strict_policy_halves_the_margins_and_report_judges_nothing() -> None:
    strict, report = read_policy("strict"), read_policy("report")
    assert strict.of("G0").retention_warn == pytest.approx(1 - (1 - 0.95) / 2)
    assert strict.of("G0").leak_stop == pytest.approx(0.25)
    assert strict.of("G1").stop_share == GUARD.of("G1").stop_share
    assert {report.of(name) for name in ("G0", "G3", "mine")} == {Limits()}


def test_a_set_of_ones_own_is_judged_like_those_far_away() -> None:
    assert GUARD.of("mine") == GUARD.of("G3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not readable as YAML"),
        ("sets: {}", "expected 'version: 1'"),
        ("version: 1\nsets: {G0: {leek_warn: 0.1}}", "set G0: expected limits among colour_stop"),
        ("version: 1\nsets: {G0: {leak_warn: 2}}", "set G0: leak_warn 2: a number from 0 to 1"),
        ("version: 1\ndivergence_ratio: yes\nsets: {}", "divergence_ratio True: a number from 0 to 1"),
        ("version: 1\ngates: true\nsets: {}", "unknown gates; known are version, gate, divergence_ratio, sets"),
    ],
)
def test_a_broken_policy_is_one_clear_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_policy(str(tmp_path / "mine.yaml"))


def test_an_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="--policy gaurd: neither guard, strict, report nor a readable file"):
        read_policy("gaurd")


def test_a_pulse_makes_no_pictures_and_reads_the_same_divergence(
    toy_sd: Path, probes: Path, lora: Path, drifted: Path, tmp_path: Path
) -> None:
    main(settings(toy_sd, probes, tmp_path / "out", adapter=(lora,), num_images=4, mode="pulse"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.yaml", "results.jsonl"]
    found, whole = (of(read_results(folder / "results.jsonl"), "divergence") for folder in (tmp_path / "out", drifted))
    # Both sample the base's latents, in batches of another size.
    assert [row.value for row in found] == pytest.approx([row.value for row in whole], rel=1e-4)


def test_a_sweep_moves_more_with_every_strength_and_ends_at_the_whole(
    toy_sd: Path, probes: Path, lora: Path, drifted: Path, tmp_path: Path
) -> None:
    main(settings(toy_sd, probes, tmp_path / "out", adapter=(lora,), num_images=4, sweep=(0.5, 0.25)))
    rows = read_results(tmp_path / "out" / "sweep.jsonl")
    moved = of(rows, "sweep_captions_moved")
    assert [row.set for row in moved] == ["strength 0.25", "strength 0.5", "strength 1"]
    assert 0 < (moved[0].value or 0) < (moved[1].value or 0) < (moved[2].value or 0) == 1
    whole, again = (read_results(folder / "results.jsonl") for folder in (drifted, tmp_path / "out"))
    assert [row.value for row in whole] == [row.value for row in again]
    assert (tmp_path / "out" / "strength-0.25" / "G0-squares-seed0000.png").is_file()


@pytest.mark.parametrize("sweep", [(0.0,), (1.0,), (0.5, 0.5)])
def test_a_strength_that_is_none_is_refused(
    sweep: tuple[float, ...], toy_sd: Path, probes: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"--sweep .*: different strengths between 0 and 1"):
        settings(toy_sd, probes, tmp_path, sweep=sweep)


def test_strict_ends_a_stop_with_the_code_of_a_gate_and_keeps_the_results(
    toy_sd: Path, probes: Path, tmp_path: Path
) -> None:
    """A decoder that makes everything grey loses all colour of every probe."""
    from safetensors.torch import load_file, save_file

    tuned = shutil.copytree(toy_sd, tmp_path / "grey")
    file = next((tuned / "vae").glob("*.safetensors"))
    weights = load_file(file)
    weights["decoder.conv_out.weight"] *= 0.01
    save_file(weights, file, metadata={"format": "pt"})
    config = settings(toy_sd, probes, tmp_path / "out", adapter=(), base=str(toy_sd), num_images=4, policy="strict")
    with pytest.raises(GateError, match=r"--policy strict: drift \(.*\); worst prompt") as raised:
        main(dataclasses.replace(config, pretrained_model_name_or_path=str(tuned)))
    assert raised.value.exit_code == 5
    assert (tmp_path / "out" / "results.jsonl").is_file()


def test_strict_is_a_gate_and_guard_is_none() -> None:
    assert read_policy("strict").is_gate
    assert not read_policy("guard").is_gate


@pytest.mark.parametrize(
    ("shapes", "typed", "size"),
    [
        ([(40, 24, 9), (24, 40, 3)], {}, (40, 24)),
        ([(24, 40, 5)], {}, (24, 40)),
        ([(40, 24, 9), (24, 40, 3)], {"height": 32, "width": 48}, (32, 48)),
        ([(48, 48, 9)], {}, (32, 32)),
        ([], {}, (32, 32)),
    ],
)
def test_probes_have_the_shape_of_most_training_pictures_where_these_were_in_buckets(
    shapes: list[tuple[int, int, int]], typed: dict[str, int], size: tuple[int, int], toy_sd: Path, probes: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    told = [{"height": rows, "width": columns, "captions": {"sf_dry": count}} for rows, columns, count in shapes]
    run = write_lora(toy_sd, tmp_path / "run", ["sf_dry"], shapes=told)
    sampling = SamplingConfig(num_inference_steps=2, batch_size=8, **typed)
    main(settings(toy_sd, probes, tmp_path / "out", adapter=(run,), num_images=1, sampling=sampling))
    files = sorted((tmp_path / "out").glob("*/G*.png"))
    assert len(files) == 8
    assert {np.asarray(Image.open(path)).shape[:2] for path in files} == {size}
