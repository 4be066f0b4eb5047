"""Real tiles through the VAE of the model and back: the best that any generator behind this VAE can do."""

from __future__ import annotations

from dataclasses import dataclass

from configs.errors import UsageError
from eval.likeness.tile_sets import TileSets
from eval.stats.arrays import Grey
from eval.tiles.config import SlicesConfig
from eval.tiles.sets import Generated
from finetune.diffusion.hashes import model_hash
from finetune.diffusion.models import load_models
from finetune.diffusion.vae import round_trip


@dataclass(frozen=True, kw_only=True)
class RoundTrips:
    """Real tiles after the round trip.

    Attributes:
        held_out: (N, t, t) the held-out tiles; None without a VAE.
        aside: (M, t, t) the tiles set aside; None without a VAE.
        why_missing: why there is no VAE; empty if there is one.
        model_hash: hash of the model whose VAE it is; empty without one.
    """

    held_out: Grey | None = None
    aside: Grey | None = None
    why_missing: str = ""
    model_hash: str = ""


def round_trips(slices: SlicesConfig, generated: Generated, tiles: TileSets, *, device: str) -> RoundTrips:
    """Send held-out tiles and those set aside through the VAE of the model behind the slices, or say why not.

    Raises:
        UsageError: the model was named on the command line and cannot be loaded.
    """
    typed = slices.pretrained_model_name_or_path
    name = typed or generated.base_model
    if not name:
        why = "no VAE round trip: the records name no base model; pass --pretrained_model_name_or_path"
        return RoundTrips(why_missing=why)
    try:
        vae, found = load_models(name, device=device).vae, model_hash(name)
    except UsageError as error:
        if typed:
            raise
        return RoundTrips(why_missing=f"no VAE round trip: {error}")
    if not typed and generated.base_hash not in {"", found}:
        print(f"note: {name} has changed since these slices were generated; the VAE round trip is that of the new one")
    held_out, aside = (round_trip(vae, part.pixels) for part in (tiles.held_out, tiles.aside))
    return RoundTrips(held_out=held_out, aside=aside, model_hash=found)
