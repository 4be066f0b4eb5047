"""What learns: which parameters, in which precision, at which rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import InputError
from data_prep.folders.run_folder import LORA_FILE
from finetune.core.settings.methods import LoraConfig
from finetune.diffusion.adapters import load_adapter
from finetune.diffusion.draws import counter_seed
from finetune.diffusion.models import Models

ADAPTER = "default"
"""Name of the trained adapter within peft."""
# As in diffusers' own scripts: the four projections of every self- and cross-attention.
_ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
# Every convolution of the ResNet blocks, also the 1x1 that widens the shortcut, and the projection of the timestep.
_RESNET = ["conv1", "conv2", "conv_shortcut", "time_emb_proj"]


def always(done: int) -> float:
    """Return 1: the whole learning rate, however many updates are done."""
    return 1.0


@dataclass(frozen=True)
class Group:
    """Parameters by name that share a learning rate (before the schedule's factor).

    ``share(done)`` of that rate is in force after ``done`` updates. Where it is 0 the parameters rest: they get no
    gradient, and the optimizer leaves them and its state of them as they are.
    """

    parameters: dict[str, nn.Parameter]
    learning_rate: float
    share: Callable[[int], float] = always


@dataclass(frozen=True)
class Learns:
    """Everything that learns; all else is frozen. Held as dicts: an iterator would be spent by its first reader."""

    groups: tuple[Group, ...]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by name, that of their module first: ``unet.``, ``text_encoder.``."""
        return {name: parameter for group in self.groups for name, parameter in group.parameters.items()}

    @property
    def num_weights(self) -> int:
        """Number of numbers that learn."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def all_weights(models: Models, *, learning_rate: float, text_encoder_rate: float | None = None) -> Learns:
    """Let every weight of the U-Net learn, in float32, and of the text encoder if it has a rate."""
    parts = {"unet": (models.unet, learning_rate)}
    if text_encoder_rate is not None:
        parts["text_encoder"] = (models.text_encoder, text_encoder_rate)
    for module, _ in parts.values():
        module.float().requires_grad_(True)
    return Learns(tuple(Group(_learning(name, module), rate) for name, (module, rate) in parts.items()))


def lora_adapters(
    models: Models, config: LoraConfig, *, learning_rate: float, seed: int, text_encoder_rate: float | None = None
) -> Learns:
    """Put adapters on the U-Net, and on the text encoder if it has a rate, and return them as what learns.

    At first they change nothing, or what ``--init_adapter`` changes. A is drawn from N(0, 1 / rank), B is zero (Hu et
    al. 2021, arXiv:2106.09685, section 4.1; peft's ``gaussian``). With DoRA the length of each column of the weight is
    a parameter of its own, at first what it is (Liu et al. 2024, arXiv:2402.09353). All are float32, whatever the model
    is held in.

    Raises:
        InputError: ``--init_adapter`` is no LoRA, or does not have the shape the settings give.
    """
    from peft import LoraConfig as PeftConfig

    options: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.lora_dropout,
        "use_dora": config.use_dora,
        "init_lora_weights": "gaussian",
    }
    targets = list(_ATTENTION)
    resnet: dict[str, Any] = {}
    if config.lora_targets == "attention+resnet":
        targets += _RESNET
        resnet = {
            "rank_pattern": dict.fromkeys(_RESNET, config.resnet_rank or config.rank),
            "alpha_pattern": dict.fromkeys(_RESNET, config.alpha_on_resnet),
        }
    groups = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(counter_seed(seed, "adapter", 0))
        models.unet.add_adapter(PeftConfig(target_modules=targets, **options, **resnet), adapter_name=ADAPTER)
        groups.append(Group(_learning("unet", models.unet), learning_rate))
        if text_encoder_rate is not None:
            models.text_encoder.add_adapter(
                PeftConfig(target_modules=list(models.family.text_encoder_layers), **options), adapter_name=ADAPTER
            )
            groups.append(Group(_learning("text_encoder", models.text_encoder, "lora_"), text_encoder_rate))
    learns = Learns(tuple(groups))
    for parameter in learns.parameters.values():
        parameter.data = parameter.data.float()
    if config.init_adapter is not None:
        _start_from(models, learns.parameters, config.init_adapter)
    return learns


def checkpoint_gradients(models: Models) -> None:
    """Compute activations again in the backward pass, in the U-Net and, if it learns, in the text encoder."""
    models.unet.enable_gradient_checkpointing()
    if any(parameter.requires_grad for parameter in models.text_encoder.parameters()):
        models.text_encoder.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def _learning(name: str, module: nn.Module, mark: str = "") -> dict[str, nn.Parameter]:
    """Return the parameters of a module that have gradients, with the module's name before theirs."""
    found = {f"{name}.{key}": value for key, value in module.named_parameters() if value.requires_grad}
    return {key: value for key, value in found.items() if mark in key}


def _start_from(models: Models, parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Give new adapters the values of a trained one; diffusers reads it, so that every layout it knows is taken.

    The trained one must lie on the same layers, with the same rank and strength: otherwise the run would not begin
    where the other ended, or not learn what its settings say.
    """
    before, loaded = models.base_scheduler, models.adapters
    try:
        load_adapter(models, path / LORA_FILE if path.is_dir() else path)
    except InputError as error:
        raise InputError(str(error).replace("--adapter", "--init_adapter", 1)) from None
    for flag in ("prediction_type", "rescale_betas_zero_snr"):
        told = {getattr(loaded.noise, flag, None), before.config.get(flag, False)}
        if loaded.noise is not None and len(told) > 1:
            raise InputError(
                f"--init_adapter {path}: learned with --{flag} {getattr(loaded.noise, flag)}, the run has "
                f"{before.config.get(flag, False)}; give the same"
            )
    loaded.clear()
    layers = {name: layer for name, layer in _layers(models).items() if len(layer.scaling) > 1}
    wanted = {name for name, layer in _layers(models).items() if ADAPTER in layer.scaling}
    other = next((name for layer in layers.values() for name in layer.scaling if name != ADAPTER), None)
    if other is None or set(layers) != wanted or len(_layers(models)) != len(wanted):
        raise InputError(
            f"--init_adapter {path}: lies on other layers ({len(layers)} of {len(wanted)} in common); give its "
            "--lora_targets, and --train_text_encoder if it holds adapters on the text encoder"
        )
    with torch.no_grad():
        for name, layer in layers.items():
            ours, theirs = (_values(layer, adapter) for adapter in (ADAPTER, other))
            shapes = [{key: tuple(value.shape) for key, value in values.items()} for values in (ours, theirs)]
            if shapes[0] != shapes[1]:
                raise InputError(
                    f"--init_adapter {path}: {name} has other parts or another rank; give its --rank, --resnet_rank "
                    f"and --use_dora ({shapes[1]} in the file, {shapes[0]} by the settings)"
                )
            if abs(layer.scaling[ADAPTER] - layer.scaling[other]) > 1e-6 * layer.scaling[other]:
                raise InputError(
                    f"--init_adapter {path}: {name} has the strength {layer.scaling[other]:g} (alpha / rank), and "
                    f"{layer.scaling[ADAPTER]:g} by the settings; give its --lora_alpha and --resnet_alpha"
                )
            for key, value in ours.items():
                value.copy_(theirs[key])
    for part in (models.unet, models.text_encoder):
        if other in getattr(part, "peft_config", {}):
            part.delete_adapters(other) if part is models.unet else part.delete_adapter(other)
            part.set_adapter(ADAPTER)
    for parameter in parameters.values():
        parameter.requires_grad_(True)


def _layers(models: Models) -> dict[str, Any]:
    """Return the layers that carry LoRA, by name."""
    from peft.tuners.lora import LoraLayer

    parts = {"unet": models.unet, "text_encoder": models.text_encoder}
    return {
        f"{part}.{name}": layer
        for part, module in parts.items()
        for name, layer in module.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _values(layer: Any, adapter: str) -> dict[str, Tensor]:
    """Return the tensors of one adapter in a layer."""
    parts = {kind: getattr(layer, kind) for kind in layer.adapter_layer_names}
    return {
        f"{kind}.{name}": value
        for kind, modules in parts.items()
        if adapter in modules
        for name, value in modules[adapter].named_parameters()
    }
