"""Local encoders against the libraries that define them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from configs.errors import UsageError
from eval.copying.encoder_matches import matcher
from eval.forgetting.evidence import Views
from eval.forgetting.scores import score_drift
from eval.tiles.config import check_encoders
from eval.tiles.encoders import GEM_POWER, OF_IMAGENET, SSCD_PX, load_encoder, unit
from prompts.probe_lists import Probe

SIDE = 32


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip(toy_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of two layers, with the toy's tokenizer."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(toy_sd / "tokenizer")
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**layers, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text, vision_config={**layers, "image_size": SIDE, "patch_size": 8}, projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_gives_the_features_of_transformers(clip: Path, pictures: np.ndarray) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    model, encoder = CLIPModel.from_pretrained(clip).eval(), load_encoder("clip", clip)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
    pixels = processor(images=list(pictures), return_tensors="pt").pixel_values
    words = ["a horse", "sf_dry sf_warp"]
    tokens = AutoTokenizer.from_pretrained(clip)(words, padding=True, return_tensors="pt")
    with torch.no_grad():
        images = model.get_image_features(pixel_values=pixels).pooler_output.numpy()
        texts = model.get_text_features(**tokens).pooler_output.numpy()
    assert encoder.images(pictures) == pytest.approx(images, abs=1e-5)  # float32, in another order
    assert encoder.texts is not None
    assert encoder.texts(words) == pytest.approx(texts, abs=1e-5)


def test_a_vision_tower_alone_has_no_text_side(clip: Path, pictures: np.ndarray, tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    whole = CLIPModel.from_pretrained(clip)
    settings = {**whole.config.vision_config.to_dict(), "projection_dim": 8}
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**settings))
    tower.load_state_dict(
        {name: value for name, value in whole.state_dict().items() if name.startswith(("vision_model", "visual"))}
    )
    tower.save_pretrained(tmp_path / "vision")
    alone = load_encoder("clip", tmp_path / "vision")
    assert alone.texts is None
    assert alone.images(pictures) == pytest.approx(load_encoder("clip", clip).images(pictures), abs=1e-6)


def test_dinov2_reads_squares_of_whole_patches_as_they_are(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    tiles = np.random.default_rng(1).integers(0, 256, (2, 196, 196), dtype=np.uint8)
    mean, spread = (torch.tensor(values)[:, None, None] for values in OF_IMAGENET)
    pixels = (torch.from_numpy(np.repeat(tiles[:, None], 3, axis=1)).float() / 255 - mean) / spread
    with torch.no_grad():
        expected = model(pixel_values=pixels).pooler_output.numpy()
    assert load_encoder("dinov2", tmp_path).images(tiles) == pytest.approx(expected, abs=1e-5)


class Bottleneck(nn.Module):
    """A block of He et al. 2016 with the stride on the 3x3, written out with torchvision's names."""

    def __init__(self, inner: int, outer: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outer, 1, bias=False), nn.BatchNorm2d(outer)
        if stride > 1 or channels != outer:
            self.downsample = nn.Sequential(nn.Conv2d(channels, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn3(self.conv3(self.bn2(self.conv2(y)).relu()))
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class Sscd(nn.Module):
    """The network of Pizzi et al. 2022 at a small size: a ResNet, a generalised mean, a linear map, length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        sizes = [8, 16, 24, 32, 40]
        for stage in range(4):
            blocks = [
                Bottleneck(sizes[stage + 1] // 4, sizes[stage + 1], sizes[stage], 2 if stage else 1),
                Bottleneck(sizes[stage + 1] // 4, sizes[stage + 1], sizes[stage + 1], 1),
            ]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(40, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for stage in range(4):
            x = getattr(self, f"layer{stage + 1}")(x)
        pooled = x.clamp(min=1e-6).pow(GEM_POWER).mean((2, 3)).pow(1 / GEM_POWER)
        return nn.functional.normalize(self.fc(pooled))


@pytest.fixture(scope="module")
def sscd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    model = Sscd().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    folder = tmp_path_factory.mktemp("sscd")
    save_file({f"backbone.{name}": value for name, value in model.state_dict().items()}, folder / "model.safetensors")
    return folder, model


def test_sscd_is_the_network_of_the_paper(sscd: tuple[Path, nn.Module]) -> None:
    tiles = np.random.default_rng(2).integers(0, 256, (2, SSCD_PX, SSCD_PX, 3), dtype=np.uint8)
    mean, spread = (torch.tensor(values)[:, None, None] for values in OF_IMAGENET)
    with torch.no_grad():
        expected = sscd[1]((torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255 - mean) / spread).numpy()
    assert load_encoder("sscd", sscd[0]).images(tiles) == pytest.approx(expected, abs=1e-5)


def test_the_matcher_finds_the_reference_a_query_was_made_from(sscd: tuple[Path, nn.Module]) -> None:
    encoder = load_encoder("sscd", sscd[0])
    known = np.random.default_rng(3).integers(0, 256, (6, SIDE, SIDE), dtype=np.uint8)
    centre = unit(encoder.images(known)).mean(axis=0)
    noise = np.random.default_rng(4).integers(-6, 7, known.shape)
    found = matcher(encoder, centre)((known[::-1].astype(int) + noise[::-1]).clip(0, 255).astype(np.uint8), known)
    assert found.index.tolist() == [5, 4, 3, 2, 1, 0]


def test_a_hub_name_is_refused_with_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--encoder dinov2=facebook/dinov2-base: .* never from the hub: .*hf download"
    ):
        load_encoder("dinov2", Path("facebook/dinov2-base"))


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"pytorch_model\.bin is a pickle, which can run code"):
        load_encoder("clip", tmp_path)


def test_another_model_is_refused(clip: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json says model_type 'clip', needed is dinov2"):
        load_encoder("dinov2", clip)


def test_weights_with_holes_are_refused(clip: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file

    folder = shutil.copytree(clip, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks visual_projection\.weight"):
        load_encoder("clip", folder)


def test_code_of_the_folder_is_not_run(clip: Path, pictures: np.ndarray, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(clip, tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert load_encoder("clip", folder).images(pictures) == pytest.approx(load_encoder("clip", clip).images(pictures))


def test_an_encoder_a_command_has_no_use_for_is_refused() -> None:
    with pytest.raises(ValueError, match="--encoder sscd=x: sscd is not one of clip, dinov2"):
        check_encoders({"sscd": Path("x")}, ("clip", "dinov2"))


def views(tuned: np.ndarray, base: np.ndarray, again: np.ndarray, texts: np.ndarray) -> Views:
    return Views(kind="clip", texts=texts, tuned=tuned, base=base, base_again=again)


@pytest.mark.parametrize(("left", "expected"), [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
def test_clip_retention_is_the_share_of_the_agreement_that_is_left(left: float, expected: float) -> None:
    """Two prompts at right angles, pictures that lean to their own by 0.6 or by a share of it."""
    from test_drift import evidence_of

    grey = np.full((2, 8, 8, 8, 3), 100, dtype=np.uint8)
    texts = np.eye(4)[:2]

    def seen(cosine: float) -> np.ndarray:
        own = cosine * texts[:, None] + np.sqrt(1 - cosine**2) * np.eye(4)[2:][:, None]
        return np.repeat(own, 8, axis=1)

    probes = [Probe(id=name, prompt=name, set="G3") for name in ("a", "b")]
    view = views(seen(0.6 * left), seen(0.6), seen(0.6), texts)
    rows, _ = score_drift(probes, evidence_of(grey, grey, grey), None, "no slices", views=[view])
    whole = next(row for row in rows if row.metric == "clip_retention" and not row.prompt)
    assert whole.value == pytest.approx(expected)
    assert whole.tier == "B"
    assert whole.verdict == {1.0: "ok", 0.5: "stop", 0.0: "stop"}[left]


def test_a_prompt_the_base_does_not_follow_is_grey() -> None:
    from test_drift import evidence_of

    grey = np.full((2, 8, 8, 8, 3), 100, dtype=np.uint8)
    alike = np.repeat(np.eye(4)[2:][:, None], 8, axis=1)
    probes = [Probe(id=name, prompt=name, set="G3") for name in ("a", "b")]
    view = views(alike, alike, alike, np.eye(4)[:2])
    rows, _ = score_drift(probes, evidence_of(grey, grey, grey), None, "no slices", views=[view])
    assert {row.verdict for row in rows if row.metric == "clip_retention"} == {"grey"}
