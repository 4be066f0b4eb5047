"""Pictures, and for CLIP texts, as the vectors of an encoder in a local folder: CLIP, DINOv2 or SSCD.

Safetensors from disk only: nothing is downloaded, and no code of the folder runs. Pictures go through our own resize,
since the fast image processors of transformers need torchvision. Shapes: N is the number of pictures, D the
length of a vector.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from configs.errors import UsageError
from data_prep.folders.hashes import sha256_of
from eval.stats.arrays import Floats
from eval.tiles.features import resize

Pixels = NDArray[np.uint8]
Colours = tuple[tuple[float, float, float], tuple[float, float, float]]

WEIGHTS = "model.safetensors"
OF_CLIP: Colours = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and spread of the channels in CLIP's training (Radford et al. 2021, its preprocessor_config.json)."""
OF_IMAGENET: Colours = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_PATCHES = 16
"""Patches along a side, as DINOv2 was evaluated: 224 px of patches of 14."""
SSCD_PX = 288
GEM_POWER = 3.0
"""Power of the generalised mean over places in SSCD (Pizzi et al. 2022, section 4.1)."""
BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """One encoder.

    Attributes:
        kind: ``clip``, ``dinov2`` or ``sscd``.
        hash: SHA-256 of its weights.
        images: (N, H, W) or (N, H, W, 3) uint8 -> (N, D), as the encoder gives them.
        texts: N texts -> (N, D), comparable with the pictures by their angle; None where there is no text side.
    """

    kind: str
    hash: str
    images: Callable[[Pixels], Floats]
    texts: Callable[[Sequence[str]], Floats] | None = None


def load_encoder(kind: str, folder: Path) -> Encoder:
    """Load an encoder from a folder.

    Raises:
        UsageError: the folder is not there, its weights are no safetensors, or they are of something else.
    """
    weights = _weights_of(kind, folder)
    load = {"clip": _clip, "dinov2": _dinov2, "sscd": _sscd}[kind]
    try:
        images, texts = load(folder)
    except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise UsageError(f"--encoder {kind}={folder}: not readable as {kind} ({why})") from None
    return Encoder(kind=kind, hash=sha256_of(weights), images=images, texts=texts)


def load_encoders(folders: Mapping[str, Path]) -> list[Encoder]:
    """Load the encoders of several folders, by their kind.

    Raises:
        UsageError: as for ``load_encoder``.
    """
    return [load_encoder(kind, folder) for kind, folder in folders.items()]


def unit(vectors: Floats) -> Floats:
    """Return vectors (N, D) at length 1, so that products are cosines."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


def _weights_of(kind: str, folder: Path) -> Path:
    """Return the weights file of an encoder folder, or refuse it with what to do."""
    typed = f"--encoder {kind}={folder}"
    if not folder.is_dir():
        raise UsageError(
            f"{typed}: there is no such folder; encoders are read from disk, never from the hub: "
            f"fetch one once with 'hf download NAME --local-dir DIR' and give {kind}=DIR"
        )
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        raise UsageError(
            f"{typed}: {pickles[0]} is a pickle, which can run code; only {WEIGHTS} is read: fetch the safetensors "
            "of the same model, or save the tensors of a file you trust with safetensors.torch.save_file"
        )
    raise UsageError(f"{typed}: holds no {WEIGHTS}")


def _clip(folder: Path) -> tuple[Callable[[Pixels], Floats], Callable[[Sequence[str]], Floats] | None]:
    """Load CLIP, or its vision tower alone, which then has no text side."""
    from transformers import AutoTokenizer, CLIPModel, CLIPVisionModelWithProjection

    is_whole = _model_type(folder, {"clip", "clip_vision_model"}) == "clip"
    model = _loaded(CLIPModel if is_whole else CLIPVisionModelWithProjection, folder)
    side = model.vision_model.config.image_size

    def images(pictures: Pixels) -> Floats:
        return _in_batches(
            lambda pixels: model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output),
            _prepared(pictures, side, OF_CLIP),
        )

    if not is_whole:
        return images, None
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    @torch.no_grad()
    def texts(words: Sequence[str]) -> Floats:
        tokens = tokenizer(list(words), padding=True, truncation=True, return_tensors="pt")
        pooled = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return np.asarray(model.text_projection(pooled).double().numpy())

    return images, texts


def _dinov2(folder: Path) -> tuple[Callable[[Pixels], Floats], None]:
    """Load DINOv2; a vector is its class token. Squares of whole patches are read as they are, others at 16 patches."""
    from transformers import Dinov2Model

    _model_type(folder, {"dinov2"})
    model = _loaded(Dinov2Model, folder)
    patch = model.config.patch_size

    def images(pictures: Pixels) -> Floats:
        height, width = pictures.shape[1:3]
        is_whole = height == width and height % patch == 0 and height >= DINOV2_PATCHES // 2 * patch
        side = height if is_whole else DINOV2_PATCHES * patch
        return _in_batches(
            lambda pixels: model(pixel_values=pixels).pooler_output, _prepared(pictures, side, OF_IMAGENET)
        )

    return images, None


def _sscd(folder: Path) -> tuple[Callable[[Pixels], Floats], None]:
    """Load SSCD: a ResNet with torchvision's names below ``backbone.``, pooled by a generalised mean; length 1.

    Transformers has the network; its names differ, and the published weights know no config, so the sizes are read
    off the tensors.
    """
    from transformers import ResNetConfig, ResNetModel

    tensors = {name.removeprefix("backbone."): value for name, value in load_file(folder / WEIGHTS).items()}
    stages = [
        [name for name in tensors if re.fullmatch(rf"layer{stage}\.\d+\.conv3\.weight", name)] for stage in range(1, 5)
    ]
    config = ResNetConfig(
        embedding_size=tensors["conv1.weight"].shape[0],
        hidden_sizes=[tensors[names[0]].shape[0] if names else 0 for names in stages],
        depths=[len(names) for names in stages],
        layer_type="bottleneck",
    )
    model = ResNetModel(config).eval()
    model.load_state_dict({_resnet_name(name): value for name, value in tensors.items() if not name.startswith("fc.")})
    head = nn.Linear(tensors["fc.weight"].shape[1], tensors["fc.weight"].shape[0])
    head.load_state_dict({"weight": tensors["fc.weight"], "bias": tensors["fc.bias"]})

    def embed(pixels: Tensor) -> Tensor:
        places = model(pixel_values=pixels).last_hidden_state.clamp(min=1e-6)  # (B, C, h, w)
        pooled = places.pow(GEM_POWER).mean(dim=(2, 3)).pow(1 / GEM_POWER)
        return nn.functional.normalize(head(pooled))

    return lambda pictures: _in_batches(embed, _prepared(pictures, SSCD_PX, OF_IMAGENET)), None


def _resnet_name(name: str) -> str:
    """Return the name that transformers gives a tensor of torchvision's ResNet."""
    name = re.sub(r"^conv1\.", "embedder.embedder.convolution.", name)
    name = re.sub(r"^bn1\.", "embedder.embedder.normalization.", name)
    inner = re.match(r"layer(\d)\.(\d+)\.(.*)", name)
    if inner is None:
        return name
    stage, layer, rest = int(inner.group(1)) - 1, inner.group(2), inner.group(3)
    rest = re.sub(r"^conv(\d)\.", lambda found: f"layer.{int(found.group(1)) - 1}.convolution.", rest)
    rest = re.sub(r"^bn(\d)\.", lambda found: f"layer.{int(found.group(1)) - 1}.normalization.", rest)
    rest = rest.replace("downsample.0.", "shortcut.convolution.").replace("downsample.1.", "shortcut.normalization.")
    return f"encoder.stages.{stage}.layers.{layer}.{rest}"


def _loaded(model_class: Any, folder: Path) -> Any:
    """Load a model of transformers, whole.

    Raises:
        ValueError: a weight is missing, which transformers would fill with random numbers.
    """
    model, found = model_class.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    if found["missing_keys"]:
        raise ValueError(f"{WEIGHTS} lacks {sorted(found['missing_keys'])[0]}")
    return model.eval()


def _model_type(folder: Path, allowed: set[str]) -> str:
    """Return what the folder's config says it is.

    Raises:
        ValueError: something else, or there is no config.
    """
    path = folder / "config.json"
    content: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = content.get("model_type") if isinstance(content, dict) else None
    if found not in allowed:
        raise ValueError(f"config.json says model_type {found!r}, needed is {' or '.join(sorted(allowed))}")
    return str(found)


def _prepared(pictures: Pixels, side: int, colours: Colours) -> Iterator[Tensor]:
    """Yield batches (B, 3, side, side): the shorter side resized, the centre kept, grey on all three channels."""
    mean, spread = (torch.tensor(values)[:, None, None] for values in colours)
    for start in range(0, len(pictures), BATCH):
        batch = []
        for picture in pictures[start : start + BATCH]:
            colour = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)
            height, width = colour.shape[:2]
            scale = side / min(height, width)
            rows, columns = max(side, round(height * scale)), max(side, round(width * scale))
            resized = resize(colour, rows, columns).clip(0, 255)
            top, left = (rows - side) // 2, (columns - side) // 2
            batch.append(torch.from_numpy(resized[top : top + side, left : left + side]).permute(2, 0, 1) / 255)
        yield (torch.stack(batch) - mean) / spread


@torch.no_grad()
def _in_batches(embed: Callable[[Tensor], Tensor], batches: Iterator[Tensor]) -> Floats:
    """Return the vectors of all batches, (N, D)."""
    return np.concatenate([embed(batch).double().numpy() for batch in batches])
