"""The latent cache: what it gives equals encoding, and nothing stale ever comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from finetune.core.data.latents import (
    CachedLatents,
    StoredLatents,
    cache_folder,
    cached_moments,
    fill_cache,
    module_hash,
    read_moments,
)
from finetune.diffusion.vae import encode, scaled_latents

KEYS = ["a", "b", "c"]
SETTINGS = {"size": 32, "crop": "center"}


@pytest.fixture
def vae(toy_sd: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(toy_sd / "vae").eval()


def pixels(places: Sequence[int]) -> Tensor:
    drawn = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return drawn[list(places)]


def never(places: Sequence[int]) -> Tensor:
    raise AssertionError(f"{places} were encoded again")


def test_cached_moments_equal_encoding(tmp_path: Path, vae: AutoencoderKL) -> None:
    fresh, encoded = cached_moments(tmp_path, KEYS, pixels, vae)
    cached, again = cached_moments(tmp_path, KEYS, never, vae)
    direct = encode(vae, pixels([0, 1, 2]))
    assert (encoded, again) == (3, 0)
    assert torch.equal(cached.mean, direct.mean)
    assert torch.equal(cached.std, direct.std)
    assert torch.equal(cached.mean, fresh.mean)


def test_moments_equal_the_posterior_of_diffusers(vae: AutoencoderKL) -> None:
    images = pixels([0, 1])
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
    moments = encode(vae, images)
    ours = scaled_latents(vae, moments, noise)
    theirs = posterior.sample(generator=torch.Generator().manual_seed(5)) * 0.18215
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_moments_come_in_the_order_of_the_keys(tmp_path: Path, vae: AutoencoderKL) -> None:
    forward, _ = cached_moments(tmp_path, KEYS, pixels, vae)
    backward, _ = cached_moments(tmp_path, KEYS[::-1], never, vae)
    assert torch.equal(forward.mean, backward.mean.flip(0))


def test_a_changed_image_is_encoded_and_the_others_are_not(tmp_path: Path, vae: AutoencoderKL) -> None:
    cached_moments(tmp_path, KEYS, pixels, vae)
    asked: list[int] = []

    def changed(places: Sequence[int]) -> Tensor:
        asked.extend(places)
        return pixels(places) * 0.5

    moments, encoded = cached_moments(tmp_path, ["a", "b2", "c"], changed, vae)
    assert (encoded, asked) == (1, [1])
    torch.testing.assert_close(moments.mean[1], encode(vae, pixels([1]) * 0.5).mean[0], atol=1e-6, rtol=1e-5)


def test_a_damaged_file_counts_as_absent(tmp_path: Path, vae: AutoencoderKL) -> None:
    cached_moments(tmp_path, KEYS, pixels, vae)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:200])
    _, encoded = cached_moments(tmp_path, KEYS, pixels, vae)
    assert encoded == 3


def test_another_vae_has_another_place_in_the_cache(tmp_path: Path, vae: AutoencoderKL) -> None:
    before = cache_folder(tmp_path, module_hash(vae), SETTINGS)
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert cache_folder(tmp_path, module_hash(vae), SETTINGS) != before


def test_another_preparation_has_another_place_in_the_cache(tmp_path: Path) -> None:
    assert cache_folder(tmp_path, "hash", SETTINGS) != cache_folder(tmp_path, "hash", {**SETTINGS, "size": 64})


def test_no_partial_file_is_left(tmp_path: Path, vae: AutoencoderKL) -> None:
    cached_moments(tmp_path, KEYS, pixels, vae)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_latents_left_in_the_files_are_those_in_memory(tmp_path: Path, vae: AutoencoderKL) -> None:
    files, _ = fill_cache(tmp_path, KEYS, pixels, vae)
    moments, shape, cpu = read_moments(files, KEYS), (16, 16), torch.device("cpu")
    resident = CachedLatents(moments={shape: moments}, rows={shape: {key: row for row, key in enumerate(KEYS)}})
    found, expected = (one.of(shape, KEYS[::-1], cpu) for one in (StoredLatents(files={shape: files}), resident))
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.std, expected.std)


def test_few_pictures_are_in_the_encoder_at_once(vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, seen = encode(vae, pixels([0, 1, 2])), []
    vae.encoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    monkeypatch.setattr("finetune.diffusion.vae._PIXELS_AT_ONCE", 2 * 32 * 32)
    moments = encode(vae, pixels([0, 1, 2]))
    assert seen == [2, 1]
    torch.testing.assert_close(moments.mean, whole.mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(moments.std, whole.std, atol=1e-6, rtol=1e-5)
