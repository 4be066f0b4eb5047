"""kohya's layout of a LoRA, which A1111, Forge and ComfyUI read: names there and back, and what describes the file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig as PeftConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from finetune.diffusion.families import STABLE_DIFFUSION

PREFIXES = STABLE_DIFFUSION.kohya_prefixes
"""Parts of a Stable Diffusion 1.x or 2.x, in diffusers' layout and in kohya's."""
_TENSORS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
# Names in a U-Net or CLIP that have an underscore of their own; kohya turns dots into underscores, too.
_WORDS = (
    "down_blocks", "mid_block", "up_blocks", "transformer_blocks", "to_q", "to_k", "to_v", "to_out", "proj_in",
    "proj_out", "conv_shortcut", "time_emb_proj", "time_embedding", "linear_1", "linear_2", "conv_in", "conv_out",
    "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj",
)  # fmt: skip
_UNDERSCORES = re.compile(f"({'|'.join(_WORDS)})|_")
_KEPT = "tisserand_adapter"
"""Key of an exported file's metadata for peft's description; under diffusers' own key its reader would stumble."""
_VERSIONS = {768: ("False", "sd_v1"), 1024: ("True", "sd_v2")}
"""Width of the text embeddings -> ``ss_v2`` and ``ss_base_model_version`` as kohya writes them."""


def to_kohya(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename a LoRA from diffusers' layout to kohya's; the numbers stay, and each layer's alpha becomes a tensor.

    Args:
        tensors: ``unet.PATH.lora_A.weight``, ``...lora_B.weight``, and ``text_encoder.PATH...``.
        metadata: of the file; peft's description in it gives the alphas.

    Returns:
        ``lora_unet_PATH.lora_down.weight``, ``.lora_up.weight``, ``.alpha``, underscores in PATH; and the metadata.

    Raises:
        ValueError: the file is in another layout, or holds what kohya's layout has no name for (DoRA).
    """
    described = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    if any(".lora_magnitude_vector" in name for name in tensors):
        raise ValueError(
            "DoRA has no place in kohya's own layout, and diffusers' reader drops it there; use --to pipeline, which "
            "merges it"
        )
    written: dict[str, Tensor] = {}
    for name, value in tensors.items():
        path, kind = _split(name)
        prefix = next((prefix for prefix in PREFIXES if path.startswith(prefix)), None)
        if prefix is None or kind not in _TENSORS:
            raise ValueError(f"'{name}' is not in diffusers' layout as peft names it (unet.PATH.lora_A.weight)")
        layer = path.removeprefix(prefix)
        short = PREFIXES[prefix] + layer.replace(".", "_")
        written[f"{short}.{_TENSORS[kind]}"] = value
        if kind == "lora_A.weight":
            alpha = _alpha(described, prefix, layer, rank=len(value))
            written[f"{short}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    kept = {key: text for key, text in metadata.items() if key != LORA_ADAPTER_METADATA_KEY}
    return written, kept | ({_KEPT: json.dumps(described, sort_keys=True)} if described else {}) | _facts(written, kept)


def to_diffusers(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename a LoRA from kohya's layout to diffusers'; the way back of ``to_kohya``, bit for bit.

    Files of other programs are described to peft from their ranks and alphas.

    Raises:
        ValueError: it holds something else than ``lora_down``, ``lora_up`` and ``alpha`` of a U-Net and a text encoder.
    """
    kinds = {short: kind for kind, short in _TENSORS.items()} | {"alpha": "alpha"}
    written: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, value in tensors.items():
        short, _, rest = name.partition(".")
        part = next((part for part, prefix in PREFIXES.items() if short.startswith(prefix)), None)
        if part is None or rest not in kinds:
            raise ValueError(
                f"'{name}' is not in kohya's layout of a Stable Diffusion 1.x or 2.x LoRA "
                "(lora_unet_PATH.lora_down.weight, lora_te_PATH.lora_down.weight, .lora_up.weight, .alpha)"
            )
        path = part + _UNDERSCORES.sub(lambda match: match[1] or ".", short.removeprefix(PREFIXES[part]))
        if rest == "alpha":
            alphas[path] = float(value)
        else:
            written[f"{path}.{kinds[rest]}"] = value
    described = json.loads(metadata[_KEPT]) if _KEPT in metadata else _describe(written, alphas)
    kept = {key: text for key, text in metadata.items() if key != _KEPT and not key.startswith("ss_")}
    return written, kept | {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(described, sort_keys=True)}


def _split(name: str) -> tuple[str, str]:
    """Split a tensor's name in diffusers' layout into the layer's path and the kind of the tensor."""
    path, _, kind = name.removesuffix(".weight").rpartition(".")
    return path, f"{kind}.weight"


def _alpha(described: Mapping[str, Any], prefix: str, layer: str, *, rank: int) -> float:
    """Return the alpha of a layer, as peft finds it; without a description it is the rank, as diffusers takes it."""
    if described.get(f"{prefix}use_rslora"):
        raise ValueError("rank-stabilised LoRA divides alpha by the root of the rank, and kohya's layout by the rank")
    patterns = described.get(f"{prefix}alpha_pattern") or {}
    layer = layer.removeprefix("text_model.")
    fallback = described.get(f"{prefix}lora_alpha", rank)
    return float(patterns.get(get_pattern_key(patterns.keys(), layer), fallback))


def _describe(tensors: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Return peft's description of a LoRA of another program: the usual rank and alpha, and the layers that differ."""
    described: dict[str, Any] = {}
    for prefix in PREFIXES:
        ranks = {
            path.removeprefix(prefix): len(value)
            for name, value in tensors.items()
            for path, kind in [_split(name)]
            if path.startswith(prefix) and kind == "lora_A.weight"
        }
        if not ranks:
            continue
        scaled = {layer: alphas.get(prefix + layer, float(rank)) for layer, rank in ranks.items()}
        (rank, _), *_ = Counter(ranks.values()).most_common(1)
        (alpha, _), *_ = Counter(scaled.values()).most_common(1)
        config = PeftConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=sorted(layer.removeprefix("text_model.") for layer in ranks),
            rank_pattern={layer.removeprefix("text_model."): one for layer, one in ranks.items() if one != rank},
            alpha_pattern={layer.removeprefix("text_model."): one for layer, one in scaled.items() if one != alpha},
        )
        described |= {
            f"{prefix}{key}": sorted(value) if isinstance(value, set) else value
            for key, value in config.to_dict().items()
        }
    return described


def _facts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what kohya's tools and A1111 read from the metadata, as far as the file tells it."""
    ranks = Counter(len(value) for name, value in tensors.items() if name.endswith("lora_down.weight"))
    alphas = Counter(float(value) for name, value in tensors.items() if name.endswith(".alpha"))
    widths = {value.shape[1] for name, value in tensors.items() if name.endswith("attn2_to_k.lora_down.weight")}
    facts = {"ss_network_module": "networks.lora"}
    for key, counted in (("ss_network_dim", ranks), ("ss_network_alpha", alphas)):
        facts[key] = str(next(iter(counted))) if len(counted) == 1 else "Dynamic"
    if len(widths) == 1 and (version := _VERSIONS.get(widths.pop())):
        kind = json.loads(metadata.get("provenance", "{}")).get("scheduler", {}).get("prediction_type")
        facts |= {"ss_v2": version[0], "ss_base_model_version": version[1] + ("_v" if kind == "v_prediction" else "")}
    return facts
