"""Wrong results that well-known trainers give, or gave, without a word; and the tests that they are not given here.

A line a fault, with the tests that would fail if it came in. Tests that belong to no other file are here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
from test_methods import run_recipe, words_of

ROOT = Path(__file__).parents[1]
FAULTS = {
    "gradients are never clipped: the list of parameters is an iterator, spent by the optimizer": {
        "loop": ["gradients_are_clipped_in_length_and_not_in_direction"],
        "guards": ["the_optimizer_holds_what_learns_and_nothing_else"],
    },
    "min-SNR weights of images and class images are mixed up": {
        "prior": ["prior_rows_weigh_what_the_rule_says_at_their_own_timestep"],
        "matrix": ["combinations_train_or_are_refused"],
    },
    "the prior is not weighted by its timestep, and so has another scale than the images": {
        "prior": [
            "the_loss_is_mean_of_images_plus_weight_times_mean_of_prior",
            "prior_rows_weigh_what_the_rule_says_at_their_own_timestep",
        ],
    },
    "min-SNR adds one to the finished weight where a model predicts v": {
        "objective": ["min_snr_weight_is_the_papers"],
    },
    "cached latents come with other images' captions, and some images never": {
        "batches": [
            "captions_stay_with_their_images",
            "latents_are_those_of_the_named_image",
            "an_epoch_shows_every_image_once_and_ends_short",
            "two_processes_share_what_one_would_take",
        ],
    },
    "training leaves out the tokens of start and end": {
        "textual_inversion": ["sampling_sees_the_embeddings_that_training_saw"],
    },
    "the pivot does not hold: the rows of the word learn on after it": {
        "pivotal_tuning": [
            "before_the_pivot_the_rows_learn_and_after_it_the_adapters",
            "resumed_is_uninterrupted_bit_for_bit",
            "a_run_that_goes_on_for_longer_keeps_its_pivot",
            "a_pivot_beyond_the_end_is_refused",
        ],
    },
    "the rows of a word do not learn in half precision": {
        "textual_inversion": ["rows_learn_in_half_precision"],
        "pivotal_tuning": ["both_stages_learn_in_half_precision"],
    },
    "a run that goes on has lost the rows it learned": {
        "textual_inversion": ["resumed_is_uninterrupted_bit_for_bit"],
        "pivotal_tuning": ["resumed_is_uninterrupted_bit_for_bit"],
        "kill": ["killed_ten_times_at_random_ends_bitwise_as_uninterrupted"],
    },
    "a nested output folder ends a run, after training, with an error": {
        "known_faults": ["a_run_may_lie_in_folders_that_are_not_there_yet"],
    },
    "the exported text encoder has a prefix that programs for Stable Diffusion 1.x do not read": {
        "export": ["text_encoder_has_the_prefix_of_a_single_one", "names_are_those_kohya_gives_to_the_same_layers"],
    },
    "with a seed, all processes draw the same noise, and generate the same class images": {
        "processes": ["a_seed_does_not_give_every_process_the_same_noise"],
        "prior": ["two_processes_share_the_class_images"],
    },
    "images are mirrored unasked, stretched to squares, and have no captions but fixed templates": {
        "flips": ["nothing_is_flipped_unless_asked", "a_slice_is_mirrored_only_where_that_is_declared"],
        "batches": ["the_shorter_side_is_resized"],
        "textual_inversion": ["an_own_sentence_takes_the_place_of_the_templates"],
    },
    "every process writes the file of the word": {
        "processes": ["two_processes_leave_one_set_of_files", "with_every_method_two_processes_end_where_one_does"],
    },
    "a run that goes on shows images of its epoch again, and takes no checkpoint of another folder": {
        "invariance": ["an_interrupted_run_ends_bitwise_as_the_uninterrupted_one"],
        "recipes": ["a_checkpoint_elsewhere_is_taken_up"],
        "known_faults": ["latest_where_there_is_none_is_said"],
    },
    "what learns is half precision, by the source of the precision": {
        "methods": ["what_learns_is_float32_whatever_the_source_of_the_precision"],
        "loop": ["what_learns_is_float32_on_a_bfloat16_model"],
    },
    "16-bit images turn white": {
        "images": [
            "an_image_that_would_come_out_wrong_is_refused",
            "16_bit_colour_is_refused_although_pillow_calls_it_rgb",
        ],
    },
    "all pictures are squares, whatever a long image loses": {
        "buckets": [
            "slices_get_the_buckets_of_the_usual_rule",
            "every_image_comes_once_an_epoch_in_forward_passes_of_one_shape",
        ],
    },
    "a file that is no image ends the run in an epoch's middle; thousands of images stay open": {
        "images": ["files_that_are_no_images_are_left_alone", "thousands_of_images_leave_no_file_open"],
    },
    "class images of another prompt or base model are used again": {
        "prior": [
            "stale_class_images_are_refused_with_the_remedy",
            "class_images_are_what_the_base_model_makes_of_prompt_and_seed",
            "a_run_does_not_continue_on_other_class_images",
        ],
    },
    "all images of a subject have one caption": {
        "known_faults": ["images_of_a_subject_may_have_captions_of_their_own"],
    },
    "crops, samples and dropped captions are frozen in the cache, which another learning rate makes void": {
        "batches": ["dropped_captions_become_the_empty_one", "the_posterior_is_sampled_anew_each_epoch"],
        "known_faults": ["another_learning_rate_finds_its_images_encoded"],
    },
    "a caption that is too long is cut": {
        "batches": ["a_caption_that_would_be_cut_is_refused"],
    },
    "the first process alone saves, and waits for ever where weights are split": {
        "sharding": ["a_split_run_leaves_what_one_process_does"],
    },
    "the logged loss is that of the last pass of one process": {
        "loop": [
            "the_logged_loss_is_the_mean_since_the_line_before",
            "the_loss_of_an_update_is_the_mean_over_its_images",
        ],
        "processes": ["two_processes_end_where_one_does"],
    },
    "no picture of the base model, none on the disk, and no loss on held-out images": {
        "recipes": ["a_run_leaves_exactly_these_files"],
        "watch": ["a_look_says_the_loss_of_both_sets_by_band_and_caption"],
    },
    "a running average for one method alone, its decay hidden": {
        "methods": ["averages_follow_the_published_rule", "the_averages_are_what_users_get"],
    },
    "the model card needs a tracker and a prompt": {
        "recipes": ["a_run_leaves_exactly_these_files"],
        "known_faults": ["the_card_needs_neither_tracker_nor_prompt"],
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_others_has_its_tests(fault: str) -> None:
    for module, names in FAULTS[fault].items():
        tree = ast.parse((next(ROOT.rglob(f"test_{module}.py"))).read_text(encoding="utf-8"))
        have = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {f"test_{name}" for name in names} - have == set()


@pytest.fixture
def lora(toy_sd: Path, captioned_images: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train an adapter for two steps; options given again win. Returns the run folder."""

    def run(*more: object) -> Path:
        words = words_of("lora", toy_sd, captioned_images, tmp_path)
        run_recipe("lora", [*words, "--max_train_steps", "2", *map(str, more)])
        return tmp_path / "run"

    return run


def test_a_run_may_lie_in_folders_that_are_not_there_yet(
    lora: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lora("--output_dir", "some/where/run")
    assert (tmp_path / "some" / "where" / "run" / "pytorch_lora_weights.safetensors").is_file()


def test_latest_where_there_is_none_is_said(lora: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    lora("--resume_from_checkpoint", "latest")
    assert "--resume_from_checkpoint latest: " in capsys.readouterr().out


def test_images_of_a_subject_may_have_captions_of_their_own(
    toy_sd: Path, captioned_images: Path, tmp_path: Path
) -> None:
    words = words_of("lora_dreambooth", toy_sd, captioned_images, tmp_path)
    place = words.index("--instance_prompt")
    run_recipe("lora_dreambooth", [*words[:place], *words[place + 2 :], "--max_train_steps", "1"])
    told = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "sf_dry sf_compacted sf_thickness\nsf_dry sf_warp\nsf_injected sf_weft" in told


def test_another_learning_rate_finds_its_images_encoded(
    lora: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ("--latent_cache_dir", tmp_path / "cache")
    lora(*shared)
    assert "latents: 10 pictures encoded here" in capsys.readouterr().out
    lora(*shared, "--output_dir", tmp_path / "other", "--learning_rate", 1e-3, "--caption_dropout", 0.5)
    assert "latents: 0 pictures encoded here, 10 from" in capsys.readouterr().out


def test_the_card_needs_neither_tracker_nor_prompt(lora: Callable[..., Path]) -> None:
    card = (lora("--report_to", "none") / "README.md").read_text(encoding="utf-8")
    assert "load_lora_weights" in card
    assert "## Samples" not in card
