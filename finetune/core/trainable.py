"""What learns: which parameters, in which precision, at which rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from finetune.core.method_config import LoraConfig
from finetune.core.models import Models
from finetune.core.noise import counter_seed

ADAPTER = "default"
"""Name of the trained adapter within peft."""
_TARGETS = {
    # As in diffusers' own script: the four projections of every self- and cross-attention.
    "attention": ["to_k", "to_q", "to_v", "to_out.0"],
    # Every convolution of the ResNet blocks, also the 1x1 that widens the shortcut, and the projection of the timestep.
    "attention+resnet": ["to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "time_emb_proj"],
}


@dataclass(frozen=True)
class Group:
    """Parameters by name that share a learning rate (before the schedule's factor)."""

    parameters: dict[str, nn.Parameter]
    learning_rate: float


@dataclass(frozen=True)
class Learns:
    """Everything that learns; all else is frozen. Held as dicts: an iterator would be spent by its first reader."""

    groups: tuple[Group, ...]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by name."""
        return {name: parameter for group in self.groups for name, parameter in group.parameters.items()}

    @property
    def num_weights(self) -> int:
        """Number of numbers that learn."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def lora_adapters(models: Models, config: LoraConfig, *, learning_rate: float, seed: int) -> Learns:
    """Put adapters on the U-Net and return them as what learns; at first they change nothing.

    A is drawn from N(0, 1 / rank), B is zero (Hu et al. 2021, arXiv:2106.09685, section 4.1; peft's ``gaussian``).
    The adapters are float32, whatever the U-Net is held in.
    """
    from peft import LoraConfig as PeftConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(counter_seed(seed, "adapter", 0))
        models.unet.add_adapter(
            PeftConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                init_lora_weights="gaussian",
                target_modules=_TARGETS[config.lora_targets],
            ),
            adapter_name=ADAPTER,
        )
    learned = {name: parameter for name, parameter in models.unet.named_parameters() if parameter.requires_grad}
    for parameter in learned.values():
        parameter.data = parameter.data.float()
    return Learns((Group(learned, learning_rate),))
