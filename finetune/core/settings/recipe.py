"""Settings that all recipes share, declared once; a recipe adds those of its method."""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune.core.settings.images import PictureConfig
from finetune.core.settings.methods import EmaConfig
from finetune.core.settings.model import HubConfig, ModelConfig, RefusedConfig
from finetune.core.settings.training import ObjectiveConfig, TrainConfig
from finetune.core.settings.watching import DriftWatchConfig, PreviewConfig, WatchConfig
from finetune.diffusion.config import NoiseConfig


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """The settings of every recipe; data, without behaviour."""

    model: ModelConfig
    train: TrainConfig
    pictures: PictureConfig = field(default_factory=PictureConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    previews: PreviewConfig = field(default_factory=PreviewConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    drift: DriftWatchConfig = field(default_factory=DriftWatchConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    refused: RefusedConfig = field(default_factory=RefusedConfig)
