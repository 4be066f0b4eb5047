"""Train a small Stable Diffusion from scratch; made assets/tiny-sd.

    python -m data_prep.shapes --num_images 48000 --output_dir data/shapes
    python finetune/pretrain.py --config configs/pretrain_tiny.yaml

Learns  the VAE first; then, with its latents, text encoder and U-Net together from random weights.
Batch   captioned square pictures of one size.
Saves   a pipeline folder (averaged weights), loaded by StableDiffusionPipeline.from_pretrained.

The tokenizer is a byte-level BPE in CLIP's layout, learned from the captions: it spells any text with known pieces. A
share of the captions is split at random into smaller pieces (BPE dropout, Provilkov et al. 2020), so that the encoder
also learns to read letters, which is all it will see of a new word.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.load import command

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTokenizer

CONTEXT_LENGTH = 77
SPELLINGS = 8
SPELLING_DROPOUT = 0.3


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Settings of ``finetune/pretrain.py``."""

    train_data_dir: Path
    """Folder with metadata.jsonl (file_name, text) and square pictures of one size."""
    output_dir: Path
    """Pipeline folder to write; it must not exist. `<output_dir>.partial` keeps finished stages."""
    start_from: Path | None = None
    """Pipeline folder to go on from: all its weights learn on; the tokenizer and the VAE's scaling factor stay."""
    max_train_samples: int | None = None
    """Use the first so many pictures; None for all."""
    seed: int = 0
    """Seed of weights and draws."""
    vae_channels: tuple[int, ...] = (32, 64, 96)
    """Channels per VAE level; every level but the last halves the size."""
    vae_steps: int = 2400
    """Updates of the VAE; the first 3/4 on random quarter crops, which cost a quarter and hold the same detail. 0 keeps
    the VAE of `start_from` as it is."""
    vae_batch_size: int = 32
    """Crops per VAE update; a quarter of it once the pictures are whole."""
    vae_learning_rate: float = 2e-3
    """Peak of the VAE's one-cycle rate."""
    kl_weight: float = 3e-4
    """Weight of the mean KL term against the mean smooth L1 reconstruction error."""
    unet_channels: tuple[int, ...] = (64, 128, 128)
    """Channels per U-Net level; cross-attention on all but the deepest."""
    text_width: int = 128
    """Width of the text encoder."""
    text_layers: int = 3
    """Layers of the text encoder."""
    vocab_size: int = 1024
    """Pieces of the tokenizer, 514 of them bytes and markers."""
    max_train_steps: int = 5000
    """Updates of text encoder and U-Net."""
    train_batch_size: int = 32
    """Pictures per update."""
    learning_rate: float = 1e-3
    """Peak of the one-cycle rate."""
    snr_gamma: float = 5.0
    """Largest weight on the error of the clean latents (min-SNR, Hang et al. 2023)."""
    snr_floor: float = 0.0
    """Least weight on it: 1 is the truncated SNR of Salimans & Ho 2022; 0 leaves it out."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    spelling_dropout: float = 0.15
    """Share of captions split at random into smaller pieces."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, with diffusers' warm-up."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Autocast on the CPU or GPU; weights stay float32."""
    save_steps: int = 500
    """Write the averaged pipeline to `<output_dir>.partial` every so many updates, to look at it."""


def main(config: PretrainConfig) -> None:
    """Train VAE, text encoder and U-Net; write the pipeline folder."""
    import time

    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    from configs.errors import UsageError

    if config.start_from and not (config.start_from / "model_index.json").is_file():
        raise UsageError(f"--start_from {config.start_from}: not a pipeline folder (no model_index.json in it)")
    if config.output_dir.exists():
        raise UsageError(f"--output_dir {config.output_dir}: already there; choose another folder or remove it")
    start = time.monotonic()
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pictures, captions = _read_pictures(config.train_data_dir, config.max_train_samples)
    work = config.output_dir.with_name(config.output_dir.name + ".partial")
    if config.start_from:
        pipeline = StableDiffusionPipeline.from_pretrained(config.start_from)
        vae, tokenizer = pipeline.vae, pipeline.tokenizer
        text_encoder, unet = pipeline.text_encoder, pipeline.unet
    else:
        vae = _new_vae(config, pictures.shape[1])
        tokenizer = _train_tokenizer(config, captions, work)
        text_encoder, unet = _new_denoiser(config, tokenizer, pictures.shape[1] >> len(config.vae_channels) - 1)
    if (work / "vae" / "diffusion_pytorch_model.safetensors").is_file():
        vae = AutoencoderKL.from_pretrained(work / "vae").to(device)
    else:
        _train_vae(config, vae.to(device), pictures, device)
        vae.save_pretrained(work / "vae")
    moments = _moments(vae, pictures, device)
    _train_denoiser(config, (moments, captions), (vae, tokenizer, text_encoder, unet), work, device)
    work.rename(config.output_dir)
    print(f"{config.output_dir} written after {(time.monotonic() - start) / 60:.0f} min")
    print(f"next: python benchmarks/tiny_sd.py --pretrained_model_name_or_path {config.output_dir}")


def _read_pictures(folder: Path, most: int | None) -> tuple[NDArray[np.uint8], list[str]]:
    """Read all pictures (N, H, W, 3) uint8 and their captions."""
    import json

    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from configs.errors import InputError

    table = folder / "metadata.jsonl"
    if not table.is_file():
        raise InputError(
            f"--train_data_dir {folder}: no metadata.jsonl in it; write one with python -m data_prep.shapes"
        )
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()][:most]
    pictures = [
        np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in tqdm(rows, "reading", disable=None)
    ]
    sizes = {picture.shape for picture in pictures}
    if len(sizes) != 1 or len(set(pictures[0].shape[:2])) != 1:
        raise InputError(
            f"--train_data_dir {folder}: pictures must be square and of one size, found {sorted(sizes)[:4]}"
        )
    return np.stack(pictures), [row["text"] for row in rows]


def _new_vae(config: PretrainConfig, size: int) -> AutoencoderKL:
    """Autoencoder with random weights, a small relative of Stable Diffusion's."""
    from diffusers import AutoencoderKL

    levels = len(config.vae_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=config.vae_channels,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=16,
        sample_size=size,
    )


def _train_vae(config: PretrainConfig, vae: AutoencoderKL, pictures: NDArray[np.uint8], device: torch.device) -> None:
    """Train the autoencoder in place on smooth L1 reconstruction and a light KL; a new one gets its scaling factor."""
    import numpy as np
    import torch
    from torch.nn import functional
    from tqdm import trange

    vae.train()
    size = pictures.shape[1]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.vae_learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.vae_learning_rate, total_steps=max(1, config.vae_steps)
    )
    random = np.random.default_rng((config.seed, 1))
    bar = trange(config.vae_steps, desc="vae", disable=None)
    for step in bar:
        is_whole = step >= config.vae_steps * 3 // 4
        side, batch = (size, config.vae_batch_size // 4) if is_whole else (size // 2, config.vae_batch_size)
        chosen, (top, left) = random.integers(len(pictures), size=batch), random.integers(size - side + 1, size=2)
        pixels = _pixels(pictures[chosen, top : top + side, left : left + side], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = functional.smooth_l1_loss(decoded.float(), pixels, beta=0.1)
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        (error + config.kl_weight * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 100 == 0:
            bar.set_postfix(error=f"{error.item():.4f}", kl=f"{divergence.item():.2f}")
            print(f"vae step {step}: error {error.item():.4f}, kl {divergence.item():.2f}", flush=True)
    vae.eval()
    if config.start_from is None:
        sample = _moments(vae, pictures[:1000], device)
        spread = (sample[:, 0].var() + sample[:, 1].square().mean()).sqrt().item()
        vae.register_to_config(scaling_factor=round(1.0 / spread, 5))


def _pixels(pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _moments(vae: AutoencoderKL, pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Encode to posterior mean and standard deviation, unscaled: (N, 2, 4, h, w) float32 on the CPU."""
    import torch
    from tqdm import trange

    parts = []
    with torch.inference_mode():
        for start in trange(0, len(pictures), 64, desc="encoding", disable=None):
            posterior = vae.encode(_pixels(pictures[start : start + 64], device)).latent_dist
            parts.append(torch.stack([posterior.mean, posterior.std], dim=1).cpu())
    return torch.cat(parts).clone()


def _train_tokenizer(config: PretrainConfig, captions: list[str], work: Path) -> CLIPTokenizer:
    """Learn a byte-level BPE in CLIP's layout from the captions; every byte is a piece, so nothing is unknown."""
    import json

    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    folder = work / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _new_denoiser(
    config: PretrainConfig, tokenizer: CLIPTokenizer, latent_size: int
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Text encoder and U-Net with random weights, small relatives of Stable Diffusion 1.5's."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            projection_dim=config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    crossing = len(config.unet_channels) - 1
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=4,
        out_channels=4,
        block_out_channels=config.unet_channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * crossing + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossing,
        cross_attention_dim=config.text_width,
        attention_head_dim=tuple(channels // 32 for channels in config.unet_channels),
        norm_num_groups=16,
    )
    return text_encoder, unet


def _spell(tokenizer: CLIPTokenizer, captions: list[str], random: np.random.Generator) -> Tensor:
    """Token ids of each caption: (N, 1 + SPELLINGS, L); the first as usual, the others split at random."""
    import json

    import torch

    backend = tokenizer.backend_tokenizer
    merges = json.loads(backend.to_str())["model"]["merges"]
    ranks = {tuple(merge): rank for rank, merge in enumerate(merges)}
    usual = tokenizer(captions, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH).input_ids
    spellings = [usual]
    for _ in range(SPELLINGS):
        rows = []
        for caption in captions:
            words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(caption))
            pieces = [piece for word, _ in words for piece in split_word(word, ranks, random, SPELLING_DROPOUT)]
            ids = tokenizer.convert_tokens_to_ids(pieces)[: CONTEXT_LENGTH - 2]
            rows.append([tokenizer.bos_token_id, *ids] + [tokenizer.eos_token_id] * (CONTEXT_LENGTH - 1 - len(ids)))
        spellings.append(rows)
    return torch.tensor(spellings).transpose(0, 1).contiguous()


def split_word(word: str, ranks: dict[tuple[str, ...], int], random: np.random.Generator, dropout: float) -> list[str]:
    """Split a word into pieces by merges, each skipped with probability ``dropout`` every time it is possible.

    The ``tokenizers`` library has this too, but from a source of randomness that cannot be seeded.

    Args:
        word: in byte-level letters, without the end-of-word mark.
        ranks: pair of pieces -> its place in the list of merges.
        random: source of randomness.
        dropout: 0 gives the usual split, 1 single letters (Provilkov et al. 2020, algorithm 1).
    """
    pieces = [*word[:-1], word[-1] + "</w>"]
    while True:
        possible = [
            (ranks[pair], place)
            for place, pair in enumerate(pairwise(pieces))
            if pair in ranks and random.random() >= dropout
        ]
        if not possible:
            return pieces
        _, place = min(possible)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


def _train_denoiser(
    config: PretrainConfig,
    data: tuple[Tensor, list[str]],
    parts: tuple[AutoencoderKL, CLIPTokenizer, CLIPTextModel, UNet2DConditionModel],
    work: Path,
    device: torch.device,
) -> None:
    """Train text encoder and U-Net on epsilon with min-SNR weights; leave the averaged pipeline in ``work``."""
    import time

    import numpy as np
    import torch
    from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
    from diffusers.training_utils import EMAModel, compute_snr
    from tqdm import trange

    moments, captions = data
    vae, tokenizer, text_encoder, unet = parts
    text_encoder.to(device).train()
    unet.to(device).train()
    noise_schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    scheduler = DDPMScheduler(**noise_schedule)
    sampler = DDIMScheduler(**noise_schedule, set_alpha_to_one=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae,
        text_encoder,
        tokenizer,
        unet,
        sampler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

    unique = sorted(set(captions))
    number = {caption: index for index, caption in enumerate(unique)}
    which = torch.tensor([number[caption] for caption in captions])
    spellings = _spell(tokenizer, [*unique, ""], np.random.default_rng((config.seed, 3)))
    empty = len(unique)

    weights = [*text_encoder.parameters(), *unet.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.max_train_steps, pct_start=0.05
    )
    average = EMAModel(weights, decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    random = torch.Generator().manual_seed(config.seed + 2)
    batch, start = config.train_batch_size, time.monotonic()
    running = 0.0
    for step in trange(1, config.max_train_steps + 1, desc="denoiser", disable=None):
        chosen = torch.randint(len(moments), (batch,), generator=random)
        mean, spread = moments[chosen].to(device).unbind(1)
        latents = mean + spread * torch.randn(mean.shape, generator=random).to(device)
        latents = latents * vae.config.scaling_factor
        noise = torch.randn(mean.shape, generator=random).to(device)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=random)
        caption = which[chosen].masked_fill(torch.rand(batch, generator=random) < config.caption_dropout, empty)
        spelling = torch.randint(1, SPELLINGS + 1, (batch,), generator=random)
        spelling = spelling.masked_fill(torch.rand(batch, generator=random) >= config.spelling_dropout, 0)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            embeds = text_encoder(spellings[caption, spelling].to(device))[0]
            noisy = scheduler.add_noise(latents, noise, timesteps.to(device))
            prediction = unet(noisy, timesteps.to(device), embeds).sample
        snr = compute_snr(scheduler, timesteps.to(device))
        weight = snr.clamp(config.snr_floor, config.snr_gamma) / snr  # of the epsilon error
        loss = (weight * (prediction.float() - noise).square().mean(dim=(1, 2, 3))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate.step()
        average.step(weights)
        running += loss.item()
        if step % 100 == 0:
            print(f"denoiser step {step}: loss {running / 100:.4f}, {time.monotonic() - start:.0f} s", flush=True)
            running = 0.0
        if step % config.save_steps == 0 or step == config.max_train_steps:
            average.store(weights)
            average.copy_to(weights)
            pipeline.save_pretrained(work, safe_serialization=True)
            average.restore(weights)


if __name__ == "__main__":
    command(PretrainConfig, main)
