"""Settings of the images that are trained on, and of how they become training pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from configs.checks import need_not_negative, need_positive, refuse


@dataclass(frozen=True, kw_only=True)
class ImageFolderConfig:
    """Folders of captioned 8-bit images."""

    train_data_dir: tuple[Path, ...] = ()
    """Folder with images and metadata.jsonl (a line per image: file_name, text) or a .txt file beside each; or several
    folders. With dataset_name: the folder within it."""
    image_column: str = "image"
    """Column of the images: `image` reads file_name, any other name NAME reads NAME_file_name, as `datasets` does."""
    caption_column: str = "text"
    """Key of metadata.jsonl that holds the caption."""
    max_train_samples: int | None = None
    """Train on this many images, drawn at random and the same whatever the seed; all if absent."""
    balance: tuple[str, ...] = ()
    """Keys of metadata.jsonl, such as state,axis: every combination of their values is shown equally often. Ours."""
    dataset_name: str | None = None
    """Data set of the hub, or a folder that `datasets` reads; its split `train` is written out as a folder once."""
    dataset_config_name: str | None = None
    """Configuration of the data set; its only one if absent."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.dataset_name is None and not self.train_data_dir:
            raise ValueError(
                "missing --train_data_dir; give it on the command line or in a --config file (or --dataset_name)"
            )
        if self.dataset_name is None and self.dataset_config_name is not None:
            raise refuse("dataset_config_name", self.dataset_config_name, "needs --dataset_name")
        if self.dataset_name is not None and len(self.train_data_dir) > 1:
            raise refuse("dataset_name", self.dataset_name, "takes one --train_data_dir, the folder within it")
        need_positive(max_train_samples=self.max_train_samples)

    @property
    def balanced_keys(self) -> tuple[str, ...]:
        """The keys of --balance, given with commas or without."""
        return tuple(key for word in self.balance for key in word.split(",") if key)


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """How images become training pictures."""

    resolution: int | None = None
    """Side of the training pictures in px, a multiple of 8; the model's own size if absent."""
    center_crop: bool = True
    """Cut the centre out of an image that was resized to cover the picture. (diffusers: at random by default)"""
    random_crop: bool = False
    """Cut at a random place instead, as `--no_center_crop` does. Ours."""
    cache_crops: int = 0
    """Random cuts an image that are encoded once and kept; 0: cut and encode anew at each use. Ours."""
    buckets: bool = False
    """Pictures keep the aspect ratio of their images, about resolution x resolution px in all; a batch has one shape.
    Ours."""
    bucket_step: int | None = None
    """Step of the sides of buckets, px; 64, or an eighth of the resolution if that is less, if absent. Ours."""
    random_flip: bool = False
    """Show images mirrored half of the time (left to right). Refused for slices, whose `axis` gives the mirror a
    meaning: see --flips."""
    flips: dict[str, Literal["horizontal", "vertical", "both", "quarter_turn"]] = field(default_factory=dict)
    """Flips that leave captions true, by the axis of a slice, such as warp=horizontal; thickness=quarter_turn also
    exchanges the words warp and weft in the caption. Each is shown as often as the slice itself. Ours."""
    image_interpolation_mode: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "lanczos"
    """Filter that resizes images (Pillow's, antialiased)."""
    caption_dropout: float = 0.0
    """Share of draws in which an image comes with the empty caption, which guidance leans on. Ours."""
    latent_cache_dir: Path | None = None
    """Where encoded images are kept; OUTPUT_DIR/cache if absent. Runs may share one. Ours."""
    dataloader_num_workers: int = 0
    """Threads that read and decode images where they are encoded; 0: none beside the main one."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.resolution is not None and self.resolution % 8:
            raise refuse(
                "resolution", self.resolution, f"must be a multiple of 8, such as {self.resolution // 8 * 8 or 8}"
            )
        need_positive(resolution=self.resolution, bucket_step=self.bucket_step)
        need_not_negative(dataloader_num_workers=self.dataloader_num_workers, cache_crops=self.cache_crops)
        if self.cache_crops and not self.crops_at_random:
            raise refuse("cache_crops", self.cache_crops, "needs --random_crop")
        if self.bucket_step is not None and (self.bucket_step % 8 or not self.buckets):
            raise refuse("bucket_step", self.bucket_step, "must be a multiple of 8, beside --buckets")
        if not 0 <= self.caption_dropout < 1:
            raise refuse("caption_dropout", self.caption_dropout, "must be in [0, 1)")

    @property
    def crops_at_random(self) -> bool:
        """Whether pictures are cut at random places."""
        return self.random_crop or not self.center_crop
