"""The transformer: PixArt's blocks (Chen et al. 2023, arXiv 2310.00426) on latents, with a caption encoder trained along.

N pictures, C channels, G side of the latent grid, T caption tokens, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmtrain.config import DiffusionConfig, ModelConfig, UserError
from mmtrain.models import LossSums
from mmtrain.tokens import MODALITIES

IMAGE = MODALITIES.index("image")
EMBEDDING_STD = 0.5  # of captions: as large as what the encoder's layers add
CONDITION_STD = 0.02  # of the noise level's embedding and modulation, as in PixArt and DiT


class DiffusionTransformer(nn.Module):
    """`forward` is the training step, `predict` serves sampling."""

    def __init__(
        self, config: ModelConfig, diffusion: DiffusionConfig, text_size: int, max_text: int, latent: Sequence[int]
    ):
        """text_size: ids of captions; max_text: longest caption; latent: (C, G, G)."""
        super().__init__()
        Block, PixArt, schedule = _diffusers()
        self.config, self.diffusion, self.latent = config, diffusion, tuple(latent)
        self.max_positions, self.null_caption = max_text, text_size
        self.token_embedding = nn.Embedding(text_size + 1, config.width)
        self.position_embedding = nn.Embedding(max_text, config.width)
        self.text_blocks = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                config.head_size,
                dropout=config.dropout,
                activation_fn="gelu-approximate",
                attention_bias=True,
            )
            for _ in range(diffusion.text_layers)
        )
        channels, grid, _ = latent
        self.network = PixArt(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_size,
            in_channels=channels,
            out_channels=channels,
            num_layers=config.layers,
            dropout=config.dropout,
            cross_attention_dim=config.width,
            caption_channels=config.width,
            sample_size=grid,
            patch_size=diffusion.patch_size,
            use_additional_conditions=False,
        )
        if config.activation_checkpointing:
            self.network.enable_gradient_checkpointing()
        remaining = schedule(diffusion.num_train_timesteps, beta_schedule=diffusion.beta_schedule).alphas_cumprod
        self.register_buffer("remaining", remaining, persistent=False)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw all parameters as PixArt does; what is added to the residual stream by captions starts at zero."""
        generator = torch.Generator().manual_seed(seed)

        def normal(parameter: Tensor, std: float) -> None:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif name in ("token_embedding.weight", "position_embedding.weight"):
                normal(parameter, EMBEDDING_STD)
            elif "scale_shift_table" in name:
                normal(parameter, self.config.width**-0.5)
            elif "adaln_single" in name:
                normal(parameter, CONDITION_STD)
            elif "attn2.to_out" in name or "proj_out" in name:
                parameter.zero_()
            elif parameter.ndim >= 2:
                flat = parameter.flatten(1)
                std = (2 / (flat.shape[0] + flat.shape[1])) ** 0.5  # Xavier; a convolution as the product that it is
                normal(parameter, std)

    def watch(self, is_watched: bool) -> None:
        """There are no warning signs of this family."""

    def take_signs(self) -> None:
        """As above."""

    def forward(
        self, latents: Tensor, noise: Tensor, level: Tensor, caption: Tensor, length: Tensor, loss_weight: Tensor
    ) -> LossSums:
        """Loss sums: squared error, mean over channels, summed over latent cells; the image row counts the cells.

        latents, noise: (N, C, G, G) float32, normalized; level: (N,) float32 in (0, 1); caption: (N, T) int64; length:
        (N,) int64; loss_weight: (N,) float32, cells of a picture.
        """
        noisy, target, timestep = self.diffuse(latents, noise, level)
        predicted = self.predict(noisy, timestep, caption, length)
        cells = loss_weight / latents[0, 0].numel()
        total = ((predicted.float() - target).square().mean(1).sum((1, 2)) * cells).sum()
        by_modality = torch.zeros(len(MODALITIES), 2, device=latents.device)
        by_modality[IMAGE, 0], by_modality[IMAGE, 1] = total.detach(), loss_weight.sum()
        return LossSums(total, by_modality)

    def diffuse(self, latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, what is to be predicted from them, and the timestep (N,) float32."""
        if self.diffusion.objective == "rectified_flow":
            share = level[:, None, None, None]
            return (1 - share) * latents + share * noise, noise - latents, level * self.diffusion.num_train_timesteps
        timestep = (level * self.diffusion.num_train_timesteps).long().clamp_(max=self.diffusion.num_train_timesteps - 1)
        remaining = self.remaining.float()[timestep][:, None, None, None]
        return remaining.sqrt() * latents + (1 - remaining).sqrt() * noise, noise, timestep.float()

    def predict(self, noisy: Tensor, timestep: Tensor, caption: Tensor, length: Tensor) -> Tensor:
        """(N, C, G, G): the velocity or the noise in `noisy`."""
        context, mask = self._encode(caption, length)
        dtype = self.network.proj_out.weight.dtype
        return self.network(
            noisy.to(dtype),
            encoder_hidden_states=context,
            timestep=timestep,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]

    def _encode(self, caption: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, D), and (N, 1, T) to add to the scores: 0 on the caption, else a large negative number."""
        place = torch.arange(caption.shape[1], device=caption.device)
        x = self.token_embedding(caption) + self.position_embedding(place)
        mask = ((place >= length[:, None]).to(x.dtype) * -10000.0)[:, None]
        for block in self.text_blocks:
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, attention_mask=mask)
        return x, mask


def build_diffusion(
    config: ModelConfig,
    diffusion: DiffusionConfig,
    text_size: int,
    max_text: int,
    latent: Sequence[int],
    device: str = "cpu",
) -> DiffusionTransformer:
    """An uninitialized model on `device` ("meta" allocates nothing); arguments as of `DiffusionTransformer`."""
    with torch.device(device):
        return DiffusionTransformer(config, diffusion, text_size, max_text, latent)


def _diffusers() -> tuple[Any, Any, Any]:
    """diffusers' block, PixArt transformer and DDPM schedule; raises UserError when it is not installed."""
    try:
        from diffusers import DDPMScheduler, PixArtTransformer2DModel  # noqa: PLC0415  (slow to import)
        from diffusers.models.attention import BasicTransformerBlock  # noqa: PLC0415
    except ImportError as error:
        raise UserError(
            f"model.family=dit needs diffusers ({error}); install it with: pip install 'mmtrain[diffusion]'"
        ) from error
    return BasicTransformerBlock, PixArtTransformer2DModel, DDPMScheduler
