"""Text encoder and U-Net as the one module that is trained."""

from __future__ import annotations

from torch import Tensor, nn


class Denoiser(nn.Module):
    """Text encoder and U-Net as the one module that is trained, whatever of it learns."""

    def __init__(self, text_encoder: nn.Module | None, unet: nn.Module) -> None:
        """Take the modules as they are; without a text encoder where prompts come as embeddings."""
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def train(self, mode: bool = True) -> Denoiser:
        """Put the parts that learn into training mode, and no other: dropout in a frozen one is noise for nothing."""
        self.training = mode
        for part in filter(None, (self.text_encoder, self.unet)):
            part.train(mode and any(parameter.requires_grad for parameter in part.parameters()))
        return self

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        distinct: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Predict epsilon or v, whichever the U-Net learned.

        Args:
            noisy_latents: (B, 4, h, w), scaled.
            timesteps: (B,) int64, in [0, number of training timesteps).
            prompt_embeds: (B, L, D) embeddings, or (B, L) int64 token ids for the text encoder to read first.
            distinct: of token ids, as in ``batches.Batch``: what is equal is read once, and gradients add up.

        Returns:
            (B, 4, h, w).
        """
        if not prompt_embeds.is_floating_point():
            if self.text_encoder is None:
                raise TypeError("token ids come without a text encoder to read them")
            if distinct is None:
                prompt_embeds = self.text_encoder(prompt_embeds)[0]
            else:
                first, which = distinct
                prompt_embeds = self.text_encoder(prompt_embeds[first])[0][which]
        return self.unet(noisy_latents, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
