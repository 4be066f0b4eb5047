"""Batches: every image once an epoch with its own caption, and bad folders refused by file and line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import InputError
from finetune.core.data.batches import CaptionedBatches, captioned_batches
from finetune.core.pictures.images import data_hash, data_provenance, read_images
from finetune.core.pictures.pictures import prepare_pixels
from finetune.core.settings.images import ImageFolderConfig, PictureConfig
from finetune.core.settings.training import TrainConfig
from finetune.core.start import start_run
from finetune.diffusion.config import NoiseConfig
from finetune.diffusion.models import load_models
from finetune.diffusion.text import encode_prompts

MakeBatches = Callable[..., CaptionedBatches]


@pytest.fixture
def make_batches(toy_sd: Path, captioned_images: Path, tmp_path: Path) -> MakeBatches:
    def make(
        pictures: dict[str, object] | None = None, folder: Path = captioned_images, **train: object
    ) -> CaptionedBatches:
        config = PictureConfig(**(pictures or {}))
        settings = TrainConfig(output_dir=tmp_path / "run", seed=0, report_to="none", overwrite=True, **train)
        found = read_images(ImageFolderConfig(train_data_dir=(folder,)))
        run = start_run(settings, settings, num_images=len(found), data_hash="", weights_file="w")
        try:
            models = load_models(str(toy_sd))
            return captioned_batches(found, models, config, NoiseConfig(), run)
        finally:
            run.__exit__()

    return make


def names(batches: CaptionedBatches, number: int) -> list[str]:
    return [name for batch in batches.update(number).batches for name in batch.names]


def test_an_epoch_shows_every_image_once_and_ends_short(make_batches: MakeBatches) -> None:
    batches = make_batches(train_batch_size=4)
    epochs = [[names(batches, epoch * 3 + step) for step in range(3)] for epoch in range(2)]
    assert batches.steps_per_epoch == 3
    assert [len(update) for update in epochs[0]] == [4, 4, 2]
    shown = [[name for update in epoch for name in update] for epoch in epochs]
    assert sorted(shown[0]) == sorted(shown[1]) == [f"{index:02d}.png" for index in range(10)]
    assert shown[0] != shown[1]


def test_an_update_is_a_function_of_its_number(make_batches: MakeBatches) -> None:
    batches = make_batches(train_batch_size=4)
    first = batches.update(1).batches[0]
    batches.update(7)
    again = batches.update(1).batches[0]
    for field in dataclasses.fields(first):
        assert repr(getattr(first, field.name)) == repr(getattr(again, field.name))


def test_four_times_one_is_one_times_four(make_batches: MakeBatches) -> None:
    together = make_batches(train_batch_size=4).update(2).batches
    apart = make_batches(train_batch_size=1, gradient_accumulation_steps=4).update(2).batches
    assert (len(together), len(apart)) == (1, 2)  # the last update of an epoch of ten is short
    for name in ("latents", "noise", "timesteps", "conditions.prompts", "weights"):
        joined = torch.cat([attrgetter(name)(batch) for batch in apart])
        assert torch.equal(attrgetter(name)(together[0]), joined)


def test_two_processes_share_what_one_would_take(make_batches: MakeBatches) -> None:
    alone = make_batches(train_batch_size=4)
    settings = dataclasses.replace(alone.train, train_batch_size=2)
    pair = [dataclasses.replace(alone, train=settings, num_processes=2, process_index=rank) for rank in (0, 1)]
    for number in range(6):
        shares = [half.update(number) for half in pair]
        shown = [name for share in shares for batch in share.batches for name in batch.names]
        assert sorted(shown) == sorted(names(alone, number))
        assert [share.weight for share in shares] == [alone.update(number).weight] * 2


def test_a_process_without_an_image_takes_one_that_counts_nothing(make_batches: MakeBatches) -> None:
    settings = TrainConfig(output_dir=Path("unused"), train_batch_size=3)
    rank = dataclasses.replace(make_batches(train_batch_size=3), train=settings, num_processes=3, process_index=2)
    last = rank.update(1)  # one image is left for three processes
    assert [batch.weights.tolist() for batch in last.batches] == [[0.0]]
    assert last.weight == 1.0


def test_captions_stay_with_their_images(make_batches: MakeBatches, toy_sd: Path) -> None:
    """Brightness tells the caption: each image's mean latent must lie nearest those of its own caption."""
    batches = make_batches(train_batch_size=10)
    captions = ["sf_dry sf_warp", "sf_injected sf_weft", "sf_dry sf_compacted sf_thickness"]
    embeds = encode_prompts(load_models(str(toy_sd)), captions)
    for number in range(3):
        (batch,) = batches.update(number).batches
        for name, prompt in zip(batch.names, batch.conditions.prompts, strict=True):
            assert torch.equal(prompt, embeds[int(name[:2]) % 3])


def test_latents_are_those_of_the_named_image(make_batches: MakeBatches, captioned_images: Path) -> None:
    batches = make_batches(train_batch_size=10)
    (batch,) = batches.update(0).batches
    vae = batches.models.vae
    for name, latent in zip(batch.names, batch.latents, strict=True):
        pixels = torch.from_numpy(prepare_pixels(Image.open(captioned_images / name), (32, 32), "lanczos"))[None]
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        z = (latent / vae.config.scaling_factor - posterior.mean[0]) / posterior.std[0]
        assert abs(float(z.mean())) < 0.4  # 256 standard normal numbers: six standard errors
        assert 0.7 < float(z.std()) < 1.3


def test_the_posterior_is_sampled_anew_each_epoch(make_batches: MakeBatches) -> None:
    batches = make_batches(train_batch_size=10)
    (first,), (second,) = batches.update(0).batches, batches.update(1).batches
    place = second.names.index(first.names[0])
    assert not torch.equal(first.latents[0], second.latents[place])


def test_dropped_captions_become_the_empty_one(make_batches: MakeBatches, toy_sd: Path) -> None:
    batches = make_batches({"caption_dropout": 0.5}, train_batch_size=10)
    empty = encode_prompts(load_models(str(toy_sd)), [""])[0]
    prompts = torch.cat([batches.update(number).batches[0].conditions.prompts for number in range(10)])
    dropped = sum(torch.equal(prompt, empty) for prompt in prompts)
    assert 30 < dropped < 70


@pytest.mark.parametrize("size", [(40, 32), (32, 40)])
def test_random_crops_move_and_equal_cutting_by_hand(
    make_batches: MakeBatches, tmp_path: Path, size: tuple[int, int]
) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    levels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(levels).save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
    batches = make_batches({"center_crop": False}, folder, train_batch_size=1)
    means = {float(batches.update(number).batches[0].latents.mean()) for number in range(4)}
    assert batches.latents is None
    assert len(means) == 4


@pytest.mark.parametrize(("crop", "start"), [((0.0, 0.0), 0), ((0.5, 0.5), 8), ((1.0, 1.0), 16)])
def test_a_crop_takes_the_pixels_it_says(crop: tuple[float, float], start: int) -> None:
    levels = np.random.default_rng(0).integers(0, 255, (32, 48), dtype=np.uint8)
    pixels = prepare_pixels(Image.fromarray(levels), (32, 32), "lanczos", crop)
    expected = levels[:, start : start + 32].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(pixels, np.stack([expected] * 3), atol=1e-6)


def test_the_shorter_side_is_resized(make_batches: MakeBatches) -> None:
    levels = np.full((20, 50), 100, dtype=np.uint8)
    pixels = prepare_pixels(Image.fromarray(levels), (32, 32), "bilinear")
    assert pixels.shape == (3, 32, 32)
    np.testing.assert_allclose(pixels, 100 / 127.5 - 1, atol=1e-6)


def test_max_train_samples_draws_that_many_from_anywhere(captioned_images: Path) -> None:
    images = read_images(ImageFolderConfig(train_data_dir=(captioned_images,)))
    drawn = read_images(ImageFolderConfig(train_data_dir=(captioned_images,), max_train_samples=4))
    assert len(drawn) == 4
    assert drawn != images[:4]
    assert set(image.path for image in drawn) < set(image.path for image in images)


def test_a_resolution_the_vae_cannot_give_is_refused(make_batches: MakeBatches) -> None:
    with pytest.raises(ValueError, match=r"--resolution 28: must be a multiple of 8, such as 24"):
        make_batches({"resolution": 28})


def test_threads_read_what_one_reads_with_random_crops(
    make_batches: MakeBatches, captioned_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from threading import current_thread

    from finetune.core.pictures import pictures

    folder = shutil.copytree(captioned_images, tmp_path / "wide")
    for path in folder.glob("*.png"):
        Image.open(path).resize((48, 32)).save(path)
    options = {"center_crop": False}
    alone = make_batches(options, folder).update(0)
    threads, prepare = set(), pictures.prepare_pixels

    def watched(*arguments: object) -> np.ndarray:
        threads.add(current_thread().name)
        return prepare(*arguments)

    monkeypatch.setattr(pictures, "prepare_pixels", watched)
    pooled = make_batches(options | {"dataloader_num_workers": 2}, folder).update(0)
    assert threads
    assert all(name.startswith("ThreadPool") for name in threads)
    assert torch.equal(alone.batches[0].latents, pooled.batches[0].latents)


def test_a_caption_that_would_be_cut_is_refused(
    make_batches: MakeBatches, captioned_images: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(captioned_images, tmp_path / "long")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "00.png", "text": "x" * 90}) + "\n")
    with pytest.raises(InputError, match=r"metadata.jsonl:1: the caption has 92 tokens, 77 are read"):
        make_batches(folder=folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"file_name": "00.png"}',
            r"metadata.jsonl:2: no text under 'text' \(--caption_column\); the keys are file_name",
        ),
        ('{"file_name": "00.png", "text": 3}', "no text under 'text'"),
        ('{"text": "sf_dry"}', "no text under 'file_name'"),
        ('{"file_name": "00.png", "text": "  "}', "metadata.jsonl:2: the caption of 00.png is empty"),
        ('{"file_name": "absent.png", "text": "a"}', "metadata.jsonl:2: there is no .*absent.png"),
        ('{"file_name": "../out.png", "text": "a"}', "outside the folder"),
        ('{"file_name": "deep.png", "text": "a"}', "deep.png: has mode I;16, not 8-bit"),
        ('{"file_name": "junk.png", "text": "a"}', "junk.png: cannot be read as an image"),
        ("{not json", "metadata.jsonl:2: not JSON"),
    ],
)
def test_a_bad_row_is_named(captioned_images: Path, tmp_path: Path, line: str, message: str) -> None:
    folder = shutil.copytree(captioned_images, tmp_path / "images")
    Image.fromarray(np.full((32, 32), 4000, dtype=np.uint16)).save(folder / "deep.png")
    (folder / "junk.png").write_bytes(b"no image")
    (folder / "metadata.jsonl").write_text('{"file_name": "01.png", "text": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read_images(ImageFolderConfig(train_data_dir=(folder,)))


def test_a_truncated_image_is_named(make_batches: MakeBatches, captioned_images: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(captioned_images, tmp_path / "images")
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:300])
    with pytest.raises(InputError, match=r"03.png: cannot be decoded"):
        make_batches(folder=folder)


@pytest.mark.parametrize("what", ["folder", "metadata"])
def test_what_is_missing_is_named(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "absent" if what == "folder" else tmp_path
    with pytest.raises(
        InputError, match="no such folder" if what == "folder" else "neither images nor a metadata.jsonl"
    ):
        read_images(ImageFolderConfig(train_data_dir=(folder,)))


def test_data_hash_sees_a_caption_and_a_pixel(captioned_images: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(captioned_images, tmp_path / "images")
    config = ImageFolderConfig(train_data_dir=(folder,))
    before = data_hash(read_images(config))
    rows = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(rows.replace("sf_weft", "sf_warp", 1))
    assert data_hash(read_images(config)) != before
    (folder / "metadata.jsonl").write_text(rows)
    assert data_hash(read_images(config)) == before
    Image.fromarray(np.zeros((32, 32), dtype=np.uint8)).save(folder / "05.png")
    assert data_hash(read_images(config)) != before


def test_provenance_tells_images_and_captions(captioned_images: Path) -> None:
    config = ImageFolderConfig(train_data_dir=(captioned_images,))
    told = data_provenance(read_images(config), config.train_data_dir)
    assert told["captions"] == ["sf_dry sf_compacted sf_thickness", "sf_dry sf_warp", "sf_injected sf_weft"]
    assert told["data"]["n_images"] == 10
