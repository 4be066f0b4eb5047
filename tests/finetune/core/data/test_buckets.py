"""Pictures of several shapes: which shapes, which pixels, which caption with which, and nothing lost on the way."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import InputError
from finetune.core.data.batches import CaptionedBatches, captioned_batches
from finetune.core.pictures.images import CaptionedImage, read_folder, read_images
from finetune.core.pictures.pictures import (
    CENTRE,
    TrainingPicture,
    bucket_of,
    bucket_step,
    bucket_table,
    cover,
    load_pixels,
    prepare_pixels,
)
from finetune.core.run import Batch
from finetune.core.settings.images import ImageFolderConfig, PictureConfig
from finetune.core.settings.training import TrainConfig
from finetune.diffusion.config import NoiseConfig
from finetune.diffusion.draws import draw
from finetune.diffusion.models import Models, load_models
from finetune.diffusion.text import encode_prompts, tokenize
from finetune.diffusion.vae import encode

Build = Callable[..., CaptionedBatches]


@pytest.fixture(scope="module")
def models(toy_sd: Path) -> Models:
    return load_models(str(toy_sd))


class Here:
    """A process among others, as far as batches look at it."""

    def __init__(self, folder: Path, process: int = 0, processes: int = 1, **train: object) -> None:
        self.folder = folder
        self.seed = 0
        self.train = TrainConfig(output_dir=folder, **train)
        self.said: list[str] = []
        self.accelerator = SimpleNamespace(
            device=torch.device("cpu"),
            process_index=process,
            num_processes=processes,
            wait_for_everyone=lambda: None,
        )

    def say(self, text: str) -> None:
        self.said.append(text)


def write_levels(folder: Path, shapes: list[tuple[int, int]]) -> Path:
    """Write flat grey images whose level stands in the caption; of the ten, each shape has its share."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(10):
        level = 10 + 24 * number
        Image.new("L", shapes[number % len(shapes)][::-1], level).save(folder / f"{number}.png")
        row = {"file_name": f"{number}.png", "text": f"level {level}", "state": "dark" if number < 3 else "light"}
        lines.append(json.dumps(row | {"um_per_px": [2.0, 4.0]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def build(models: Models, tmp_path: Path) -> Build:
    """Make batches of flat images, 16x64 and 64x16 and 32x32 unless told otherwise."""

    def make(
        shapes: tuple[tuple[int, int], ...] = ((16, 64), (64, 16), (32, 32)),
        *,
        images: list[CaptionedImage] | None = None,
        process: int = 0,
        processes: int = 1,
        balance: tuple[str, ...] = (),
        learns_text: bool = False,
        train: dict[str, object] | None = None,
        **options: object,
    ) -> CaptionedBatches:
        if images is None:
            folder = tmp_path / "data"
            if not folder.is_dir():
                write_levels(folder, list(shapes))
            images = read_folder(folder, "--train_data_dir")
        run = Here(tmp_path / "run", process, processes, **({"train_batch_size": 4} | (train or {})))
        return captioned_batches(
            images,
            models,
            PictureConfig(**({"buckets": True} | options)),
            NoiseConfig(),
            run,
            balance=balance,
            learns_text=learns_text,
        )

    return make


def batches_of(batches: CaptionedBatches, epochs: int = 1) -> list[Batch]:
    return [batch for number in range(epochs * batches.steps_per_epoch) for batch in batches.update(number).batches]


@pytest.mark.parametrize(
    ("image", "bucket", "kept"),
    [
        ((702, 970), (448, 576), 0.93),
        ((359, 970), (320, 768), 0.89),
        ((359, 702), (320, 704), 0.89),
        ((197, 773), (256, 1024), 0.98),
        ((197, 863), (256, 1024), 0.91),
        ((287, 633), (320, 704), 1.00),
        ((512, 512), (512, 512), 1.00),
        ((100, 3000), (256, 1024), 0.13),
    ],
)
def test_slices_get_the_buckets_of_the_usual_rule(image: tuple[int, int], bucket: tuple[int, int], kept: float) -> None:
    """Area at most 512 x 512, sides of 64 px from 256 to 1024: worked out by hand for the shapes of the study."""
    assert bucket_of(image, 512, 64) == bucket
    rows, columns = cover(image, bucket)
    assert bucket[0] * bucket[1] / (rows * columns) == pytest.approx(kept, abs=0.006)


@pytest.mark.parametrize("seed", range(20))
def test_a_bucket_obeys_its_rule_whatever_the_image(seed: int) -> None:
    random = np.random.default_rng(seed)
    height, width = (int(side) for side in random.integers(1, 4000, 2))
    resolution, step = int(random.integers(8, 129)) * 8, 8 * int(random.integers(1, 9))
    step = min(step, resolution)
    rows, columns = bucket_of((height, width), resolution, step)
    assert rows % step == columns % step == 0
    assert rows * columns <= resolution**2
    assert max(rows, columns) <= 2 * resolution
    covering = cover((height, width), (rows, columns))
    assert min(covering[0] - rows, covering[1] - columns) == 0
    assert max(covering[0] - rows, covering[1] - columns) >= 0


def test_an_image_and_its_quarter_turn_have_turned_buckets() -> None:
    assert bucket_of((702, 970), 512, 64) == bucket_of((970, 702), 512, 64)[::-1]


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (768, 64), (64, 8), (32, 8), (256, 32)])
def test_the_step_suits_the_resolution(resolution: int, step: int) -> None:
    assert bucket_step(resolution, 8) == step


def test_the_table_tells_buckets_shares_and_pixel_sizes() -> None:
    pictures = [
        TrainingPicture(
            image=CaptionedImage(
                path=Path("a"),
                captions=("x",),
                where="",
                content="",
                height=rows,
                width=columns,
                um_per_px=(10.0, 10.0),
            ),
            turn=None,
            captions=("x",),
            shape=bucket_of((rows, columns), 512, 64),
        )
        for rows, columns in [(702, 970)] * 3 + [(359, 970)]
    ]
    lines = [re.split(r"  +", line.strip()) for line in bucket_table(pictures).splitlines()]
    assert lines == [
        ["bucket", "pictures", "cut from", "keeps", "um/px"],
        ["320x768", "1", "359x970", "89 %", "11.2 x 11.2"],
        ["448x576", "3", "702x970", "93 %", "15.7 x 15.7"],
    ]


def test_a_square_keeps_the_share_that_the_table_says(build: Build, tmp_path: Path) -> None:
    """Slices cut to squares lose most of their width: nobody should find that out from the results."""
    batches = build(((32, 64),), buckets=False)
    assert {ways[0].kept for ways in batches.pictures} == {0.5}


def test_every_image_comes_once_an_epoch_in_forward_passes_of_one_shape(build: Build) -> None:
    """Three of ten images have a shape of their own, fewer than a batch: peers drop such buckets."""
    batches = build()
    shapes = {
        str(number): (4, 16) if number % 3 == 0 else (16, 4) if number % 3 == 1 else (8, 8) for number in range(10)
    }
    assert batches.steps_per_epoch == 3
    for epoch in range(2):
        names = []
        for number in range(3):
            for batch in batches.update(epoch * 3 + number).batches:
                assert {shapes[name[0]] for name in batch.names} == {tuple(batch.latents.shape[2:])}
                names += batch.names
        assert sorted(names) == [f"{number}.png" for number in range(10)]


def test_updates_are_as_many_and_as_large_as_without_buckets(build: Build) -> None:
    plain, buckets = build(buckets=False), build()
    assert plain.steps_per_epoch == buckets.steps_per_epoch
    for number in range(6):
        one, two = plain.update(number), buckets.update(number)
        assert (one.weight, one.num_images) == (two.weight, two.num_images)
        assert sorted(name for batch in one.batches for name in batch.names) == sorted(
            name for batch in two.batches for name in batch.names
        )


def rows_of(batches: list[Batch]) -> dict[int, tuple[object, ...]]:
    """Return every row that counts, by its position."""
    found = {}
    for batch in batches:
        for row, position in enumerate(batch.positions):
            if batch.weights[row]:
                fields = [batch.latents[row], batch.noise[row], batch.timesteps[row], batch.conditions.prompts[row]]
                found[position] = (*(field.numpy().tobytes() for field in fields), batch.names[row])
    return found


@pytest.mark.parametrize("options", [{}, {"random_flip": True}, {"random_crop": True, "cache_crops": 3}])
@pytest.mark.parametrize("balance", [(), ("state",)])
def test_it_does_not_matter_how_an_update_is_cut(build: Build, options: dict[str, object], balance: tuple[str]) -> None:
    whole = build(balance=balance, **options)
    apart = build(balance=balance, train={"train_batch_size": 1, "gradient_accumulation_steps": 4}, **options)
    pair = [
        build(balance=balance, process=rank, processes=2, train={"train_batch_size": 2}, **options) for rank in (0, 1)
    ]
    for number in range(6):
        expected = rows_of(whole.update(number).batches)
        assert rows_of(apart.update(number).batches) == expected
        shares = [one.update(number) for one in pair]
        assert rows_of([batch for share in shares for batch in share.batches]) == expected
        assert len(shares[0].batches) == len(shares[1].batches)
        assert {share.weight for share in shares} == {whole.update(number).weight}


@pytest.mark.parametrize("seed", range(6))
def test_every_position_is_taken_once_by_one_process_however_it_is_cut(build: Build, seed: int) -> None:
    random = np.random.default_rng(seed)
    size, steps, processes = (int(number) for number in random.integers(1, 5, 3))
    train = {"train_batch_size": size, "gradient_accumulation_steps": steps}
    balance = ("state",) if seed % 2 else ()
    ranks = [build(balance=balance, process=rank, processes=processes, train=train) for rank in range(processes)]
    taken: list[int] = []
    for number in range(2 * ranks[0].steps_per_epoch):
        shares = [rank.update(number) for rank in ranks]
        assert len({len(share.batches) for share in shares}) == 1
        batches = [batch for share in shares for batch in share.batches]
        counting = [
            position
            for batch in batches
            for position, weight in zip(batch.positions, batch.weights.tolist(), strict=True)
            if weight
        ]
        assert {share.weight for share in shares} == {float(len(counting))}
        assert max(len(batch.names) for batch in batches) <= size
        taken += counting
    assert sorted(taken) == list(range(20))


@pytest.mark.parametrize("options", [{}, {"buckets": False}, {"random_flip": True}, {"random_crop": True}])
@pytest.mark.parametrize("balance", [(), ("state",)])
def test_an_image_comes_with_its_own_caption(
    build: Build, models: Models, options: dict[str, object], balance: tuple[str]
) -> None:
    """The latents must be those of the grey level that the caption names.

    A script of diffusers pairs cached latents with the captions of other images.
    """
    batches = build(balance=balance, **options)
    captions = [f"level {10 + 24 * number}" for number in range(10)]
    embeds = encode_prompts(models, captions)
    for _ in range(2):  # the second time from the cache
        for batch in batches_of(batches, 2):
            channels, rows, columns = batch.latents.shape[1:]
            for row, position in enumerate(batch.positions):
                (which,) = [place for place in range(10) if torch.equal(batch.conditions.prompts[row], embeds[place])]
                flat = torch.full((1, 3, 4 * rows, 4 * columns), (10 + 24 * which) / 127.5 - 1)
                moments = encode(models.vae, flat)
                noise = draw(0, position, shape=(channels, rows, columns), num_timesteps=1000).latent_noise
                expected = (moments.mean[0] + moments.std[0] * noise) * models.vae.config.scaling_factor
                # The VAE sees other batches in training: rounding of its convolutions, well below a grey level.
                torch.testing.assert_close(batch.latents[row], expected, atol=2e-5, rtol=1e-4)
        batches = build(balance=balance, **options)


def test_one_of_several_captions_is_drawn_by_position(build: Build, models: Models) -> None:
    image = dataclasses.replace(build().pictures[0][0].image, captions=("one", "two", "three"))
    batches = build(images=[image] * 12)
    again = build(images=[image] * 12)
    embeds = encode_prompts(models, image.captions)
    rows = [row for batch in batches_of(batches, 5) for row in batch.conditions.prompts]
    counts = Counter(next(place for place in range(3) if torch.equal(row, embeds[place])) for row in rows)
    assert min(counts.values()) > 10  # of 60; a third each on average
    assert all(
        torch.equal(*pair)
        for pair in zip(rows, (r for b in batches_of(again, 5) for r in b.conditions.prompts), strict=True)
    )


def test_where_the_text_encoder_learns_prompts_are_token_ids(build: Build, models: Models) -> None:
    words, embeds = build(learns_text=True), build()
    for one, two in zip(batches_of(words), batches_of(embeds), strict=True):
        captions = [f"level {10 + 24 * int(name[0])}" for name in one.names]
        assert torch.equal(one.conditions.prompts, tokenize(models, captions))
        assert torch.equal(one.latents, two.latents)


def test_a_dropped_caption_comes_back_in_another_epoch(build: Build, models: Models) -> None:
    """A script that caches embeddings drops a caption for the whole run; here the draw is the position's."""
    batches = build(caption_dropout=0.5)
    (empty,) = encode_prompts(models, [""])
    kept = Counter()
    for batch in batches_of(batches, 12):
        for name, prompt in zip(batch.names, batch.conditions.prompts, strict=True):
            kept[name] += not torch.equal(prompt, empty)
    assert set(kept) == {f"{number}.png" for number in range(10)}
    assert all(0 < count < 12 for count in kept.values())


@pytest.mark.parametrize(
    ("turn", "by_hand"), [(Image.Transpose.FLIP_LEFT_RIGHT, np.fliplr), (Image.Transpose.ROTATE_90, np.rot90)]
)
def test_a_turned_picture_has_the_turned_pixels(turn: Image.Transpose, by_hand: Callable[..., np.ndarray]) -> None:
    levels = np.random.default_rng(0).integers(0, 255, (16, 24), dtype=np.uint8)
    turned = by_hand(levels)
    pixels = prepare_pixels(Image.fromarray(levels), turned.shape, "lanczos", CENTRE, turn)
    np.testing.assert_allclose(pixels[0], turned.astype(np.float32) / 127.5 - 1, atol=1e-6)


def test_an_image_taken_on_its_side_is_seen_upright(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 255, (16, 24), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: seen upright, the image is turned clockwise
    Image.fromarray(levels).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        pixels = prepare_pixels(opened, (24, 16), "lanczos")
    np.testing.assert_allclose(pixels[0], np.rot90(levels, -1).astype(np.float32) / 127.5 - 1, atol=1e-6)


def test_a_palette_is_read_as_its_colours() -> None:
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 4, (8, 8, 3), dtype=np.uint8) * 80)
    few = colours.convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(
        prepare_pixels(few, (8, 8), "lanczos"), prepare_pixels(few.convert("RGB"), (8, 8), "lanczos")
    )


def test_a_bucket_picture_is_the_image_resized_and_cut_by_hand() -> None:
    levels = np.random.default_rng(0).integers(0, 255, (50, 100), dtype=np.uint8)
    pixels = prepare_pixels(Image.fromarray(levels), (32, 48), "bilinear")
    resized = np.asarray(Image.fromarray(levels).resize((64, 32), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(pixels[0], resized[:, 8:56].astype(np.float32) / 127.5 - 1, atol=1e-6)


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "run" / "cache").rglob("*.safetensors"))


def encoded_now(build: Build, monkeypatch: pytest.MonkeyPatch, **options: object) -> int:
    """Return how many pictures were encoded to make these batches."""
    from finetune.core.data import latents

    seen = 0

    def counting(pictures: list[TrainingPicture], *rest: object) -> torch.Tensor:
        nonlocal seen
        seen += len(pictures)
        return load_pixels(pictures, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(latents, "load_pixels", counting)
        build(**options)
    return seen


def test_what_changes_a_picture_is_encoded_anew_and_nothing_else_is(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One script encodes all again for another learning rate; another keeps the old latents of an edited image."""
    encoded = [
        encoded_now(build, monkeypatch),
        encoded_now(build, monkeypatch, train={"learning_rate": 1e-6}, caption_dropout=0.1),
        encoded_now(build, monkeypatch, random_flip=True),
        encoded_now(build, monkeypatch, buckets=False),
        encoded_now(build, monkeypatch, image_interpolation_mode="bilinear"),
    ]
    Image.new("L", (64, 16), 99).save(tmp_path / "data" / "0.png")
    text = (tmp_path / "data" / "metadata.jsonl").read_text()
    (tmp_path / "data" / "metadata.jsonl").write_text(text.replace("level 34", "another caption"))
    encoded.append(encoded_now(build, monkeypatch))
    # Square pictures of the three square images are those of their bucket.
    assert encoded == [10, 0, 10, 7, 10, 1]


def test_cached_crops_are_as_many_as_asked_and_equal_encoding_them(
    build: Build, models: Models, tmp_path: Path
) -> None:
    rows, columns = np.mgrid[:32, :64]
    Image.fromarray((rows * 3 + columns * 2).astype(np.uint8)).save(tmp_path / "a.png")
    images = read_folder(tmp_path, "--train_data_dir", captions=("x",))
    options = {"images": images, "buckets": False, "random_crop": True, "train": {"train_batch_size": 1}}
    batches = build(cache_crops=3, **options)
    ((picture,),) = batches.pictures
    direct = [encode(models.vae, load_pixels([picture], [place], PictureConfig())) for place in picture.places(3)]
    factor, seen = models.vae.config.scaling_factor, Counter()
    for batch in batches_of(batches, 30):
        noise = draw(0, batch.positions[0], shape=(4, 8, 8), num_timesteps=1000).latent_noise
        distances = [
            float((batch.latents[0] / factor - one.mean[0] - one.std[0] * noise).abs().max()) for one in direct
        ]
        assert min(distances) < 1e-4
        seen[int(np.argmin(distances))] += 1
    assert len(seen) == 3


def test_flips_have_latents_of_their_own(build: Build, models: Models, tmp_path: Path) -> None:
    """The latents of a mirrored image are not the mirrored latents: each way is encoded by itself."""
    rows, columns = np.mgrid[:32, :32]
    Image.fromarray((rows * 3 + columns * 4).astype(np.uint8)).save(tmp_path / "a.png")
    images = read_folder(tmp_path, "--train_data_dir", captions=("x",))
    batches = build(images=images, random_flip=True)
    (ways,) = batches.pictures
    direct = [encode(models.vae, load_pixels([way], [CENTRE], PictureConfig())) for way in ways]
    factor, seen = models.vae.config.scaling_factor, Counter()
    for batch in batches_of(batches, 40):
        noise = draw(0, batch.positions[0], shape=(4, 8, 8), num_timesteps=1000).latent_noise
        errors = [float((batch.latents[0] / factor - one.mean[0] - one.std[0] * noise).abs().max()) for one in direct]
        assert min(errors) < 1e-4 < max(errors)
        seen[int(np.argmin(errors))] += 1
    assert min(seen[0], seen[1]) > 10


def test_uncached_crops_are_new_each_time(build: Build, tmp_path: Path) -> None:
    rows, columns = np.mgrid[:32, :64]
    Image.fromarray((rows * 3 + columns * 2).astype(np.uint8)).save(tmp_path / "a.png")
    images = read_folder(tmp_path, "--train_data_dir", captions=("x",))
    batches = build(images=images, buckets=False, random_crop=True)
    assert batches.latents is None
    assert len({float(batch.latents.mean()) for batch in batches_of(batches, 4)}) == 4


def test_processes_share_the_encoding(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two finds the first one's half; where it does not, it encodes that half, too."""
    assert encoded_now(build, monkeypatch, process=0, processes=2) == 10
    assert encoded_now(build, monkeypatch, process=1, processes=2) == 0


@pytest.mark.parametrize("options", [{}, {"random_crop": True}])
def test_images_that_do_not_decode_are_all_named(build: Build, tmp_path: Path, options: dict[str, object]) -> None:
    folder = write_levels(tmp_path / "data", [(32, 64)])
    for name in ("2.png", "7.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    with pytest.raises(InputError, match=r"2.png: cannot be decoded .*; .*7.png: cannot be decoded"):
        build(**options)


def test_captions_that_would_be_cut_are_all_named(build: Build) -> None:
    images = [
        dataclasses.replace(ways[0].image, captions=(f"{place % 2} " + "x" * 90,), where=f"line {place}")
        for place, ways in enumerate(build().pictures)
    ]
    with pytest.raises(InputError, match=r"line 0: the caption has 93 tokens, 77 are read; shorten it; line 1: the"):
        build(images=images)


def test_balanced_groups_come_equally_often_and_their_images_too(build: Build) -> None:
    """Three dark and seven light images, 21 blocks: every group once a block, every image once a round of its group."""
    batches = build(balance=("state",))
    shown = Counter(batches.shown_at(position).image.path.name for position in range(42))
    assert shown == {f"{number}.png": 7 if number < 3 else 3 for number in range(10)}
    first = [batches.shown_at(position).image.columns["state"] for position in range(42)]
    assert all(set(first[start : start + 2]) == {"dark", "light"} for start in range(0, 42, 2))
    assert len(set(first[::2])) == 2  # the order within a block changes


def test_groups_reach_over_several_folders(build: Build, tmp_path: Path) -> None:
    folders = tuple(write_levels(tmp_path / name, [(32, 32)]) for name in ("one", "two"))
    images = read_images(ImageFolderConfig(train_data_dir=folders, balance=("state",)))
    batches = build(images=images, balance=("state",))
    shown = Counter(batches.shown_at(position).image.path for position in range(84))
    assert shown == {image.path: 7 if image.columns["state"] == "dark" else 3 for image in images}


def test_a_balanced_run_says_how_often_each_caption_is_shown(build: Build, models: Models, tmp_path: Path) -> None:
    folder = write_levels(tmp_path / "data", [(32, 32)])
    text = re.sub(r"level \d+", "same", (folder / "metadata.jsonl").read_text()).replace("same", "rare", 3)
    (folder / "metadata.jsonl").write_text(text)
    images = read_images(ImageFolderConfig(train_data_dir=(folder,), balance=("state",)))
    run = Here(tmp_path / "run")
    captioned_batches(images, models, PictureConfig(), NoiseConfig(), run, balance=("state",))
    (table,) = [text for text in run.said if "caption" in text]
    rows = [re.split(r"  +", line.strip()) for line in table.splitlines()]
    assert rows == [["caption", "images", "shown an epoch"], ["rare", "3", "5.0"], ["same", "7", "5.0"]]


def test_orders_change_from_epoch_to_epoch_and_with_the_seed(build: Build) -> None:
    batches = build()
    orders = [
        tuple(one.shown_at(epoch * 10 + place).image.path.name for place in range(10))
        for one in (batches, dataclasses.replace(batches, seed=1))
        for epoch in range(3)
    ]
    assert len(set(orders)) == 6
