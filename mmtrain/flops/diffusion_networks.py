"""Published diffusion networks as configurations, counted on torch's meta device through diffusers: no weights needed.

Parameters match the published ones to the digit where a published number exists. Forward FLOPs only: the counter's
backward of grouped convolutions is wrong (65 x forward for a depthwise one), so a training step is 3 x forward of the
network plus one forward of what is frozen (VAE encoder, text encoders). Elementwise, norms and softmax are not counted.

Sources of the configurations: unet/config.json of the releases for the U-Nets; diffusers
scripts/convert_*_to_diffusers.py for
DiT, PixArt, SD3 and Sana; FluxTransformer2DModel's defaults for Flux; transformers' configurations of CLIP and T5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.config import UserError

SD15 = dict(sample_size=64, in_channels=4, out_channels=4, layers_per_block=2,
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)  # fmt: skip
SD21 = SD15 | dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
LDM_T2I = SD15 | dict(sample_size=32, cross_attention_dim=1280)
SDXL = dict(sample_size=128, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280),
            cross_attention_dim=2048, attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816)  # fmt: skip
DIT = dict(in_channels=4, out_channels=8, attention_bias=True, patch_size=2, activation_fn="gelu-approximate",
           num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False)  # fmt: skip
PIXART = dict(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
              cross_attention_dim=1152, attention_bias=True, patch_size=2, activation_fn="gelu-approximate",
              num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
              caption_channels=4096, use_additional_conditions=False)  # fmt: skip
SANA = dict(in_channels=32, out_channels=32, attention_head_dim=32, caption_channels=2304, mlp_ratio=2.5,
            patch_size=1)  # fmt: skip
SD_VAE = dict(in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4,
              up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
              norm_num_groups=32, sample_size=512)  # fmt: skip


def _dit(layers: int, heads: int, head_size: int) -> dict[str, Any]:
    return DIT | dict(num_layers=layers, num_attention_heads=heads, attention_head_dim=head_size)


def _sd3(depth: int) -> dict[str, Any]:
    return dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=depth, attention_head_dim=64,
                num_attention_heads=depth, joint_attention_dim=4096, caption_projection_dim=64 * depth,
                pooled_projection_dim=2048, pos_embed_max_size=192)  # fmt: skip


def _sana(layers: int, heads: int, cross_heads: int, width: int, cross_head_size: int) -> dict[str, Any]:
    return SANA | dict(num_layers=layers, num_attention_heads=heads, num_cross_attention_heads=cross_heads,
                       cross_attention_head_dim=cross_head_size, cross_attention_dim=width)  # fmt: skip


@dataclass(frozen=True)
class TextEncoder:
    """A frozen transformer over captions: layers, width, feed-forward width, matrices of the feed-forward layer."""

    name: str
    layers: int
    width: int
    ffn_width: int
    attention_width: int
    ffn_matrices: int = 2

    def forward_flops(self, tokens: int) -> int:
        """Projections, feed-forward and full attention over `tokens`; the head of CLIP (one product) is left out."""
        linear = 2 * self.layers * self.width * (4 * self.attention_width + self.ffn_matrices * self.ffn_width)
        return tokens * linear + 4 * self.layers * self.attention_width * tokens**2


CLIP_L = TextEncoder("CLIP ViT-L/14 text", 12, 768, 3072, 768)
OPENCLIP_H = TextEncoder("OpenCLIP ViT-H/14 text", 23, 1024, 4096, 1024)  # SD 2 reads the layer before the last of 24
OPENCLIP_BIGG = TextEncoder("OpenCLIP ViT-bigG/14 text", 32, 1280, 5120, 1280)
T5_XXL = TextEncoder("T5-XXL v1.1 encoder", 24, 4096, 10240, 4096, 3)
LDM_BERT = TextEncoder("text transformer of LDM (trained with it)", 32, 1280, 5120, 1280)


@dataclass(frozen=True)
class Network:
    """A diffusion network and what works around it. call: fields of the forward pass at a latent side and text length.

    factor: pixels per latent; vae: latent channels of the SD VAE, 0 for another one, which is not counted.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    call: Callable[[int, int], dict[str, Any]]
    resolutions: tuple[int, ...]
    text_tokens: int
    encoders: tuple[tuple[TextEncoder, int], ...] = ()
    vae: int = 4
    factor: int = 8
    sized: bool = False
    remark: str = ""


@dataclass(frozen=True)
class NetworkCount:
    """FLOPs per image. attention: the part of `forward` that is products of queries, keys and values."""

    parameters: int
    forward: int
    attention: int
    vae_encode: int | None
    text: dict[str, int]

    @property
    def frozen(self) -> int:
        """One forward pass of what is not trained."""
        return (self.vae_encode or 0) + sum(self.text.values())

    @property
    def training_step(self) -> int:
        """3 x forward of the network, and the frozen forward passes."""
        return 3 * self.forward + self.frozen


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def _unet(width: int, channels: int = 4) -> Callable[[int, int], dict[str, Any]]:
    return lambda side, text: dict(sample=_meta(1, channels, side, side), timestep=_meta(1),
                                   encoder_hidden_states=_meta(1, text, width))  # fmt: skip


def _sdxl_call(side: int, text: int) -> dict[str, Any]:
    added = dict(text_embeds=_meta(1, 1280), time_ids=_meta(1, 6))
    return _unet(2048)(side, text) | dict(added_cond_kwargs=added)


def _dit_call(side: int, text: int) -> dict[str, Any]:
    one = _meta(1, dtype=torch.long)
    return dict(hidden_states=_meta(1, 4, side, side), timestep=one, class_labels=one)


def _pixart_call(side: int, text: int) -> dict[str, Any]:
    return dict(hidden_states=_meta(1, 4, side, side), encoder_hidden_states=_meta(1, text, 4096), timestep=_meta(1),
                added_cond_kwargs=dict(resolution=None, aspect_ratio=None))  # fmt: skip


def _sd3_call(side: int, text: int) -> dict[str, Any]:
    return dict(hidden_states=_meta(1, 16, side, side), encoder_hidden_states=_meta(1, text, 4096),
                pooled_projections=_meta(1, 2048), timestep=_meta(1))  # fmt: skip


def _sana_call(side: int, text: int) -> dict[str, Any]:
    return dict(hidden_states=_meta(1, 32, side, side), encoder_hidden_states=_meta(1, text, 2304),
                timestep=_meta(1))  # fmt: skip


def _flux_call(side: int, text: int) -> dict[str, Any]:
    patches = (side // 2) ** 2
    return dict(hidden_states=_meta(1, patches, 64), encoder_hidden_states=_meta(1, text, 4096),
                pooled_projections=_meta(1, 768), timestep=_meta(1), guidance=_meta(1), img_ids=_meta(patches, 3),
                txt_ids=_meta(text, 3))  # fmt: skip


_CLIPS = ((CLIP_L, 77), (OPENCLIP_BIGG, 77))
_SD3_TEXT = (*_CLIPS, (T5_XXL, 77))
_NO_GEMMA = "text encoder Gemma-2-2B and the DC-AE are frozen and not counted"
NETWORKS: dict[str, Network] = {
    "sd15": Network("Stable Diffusion 1.5", "UNet2DConditionModel", SD15, _unet(768), (256, 512), 77, ((CLIP_L, 77),)),
    "sd21": Network(
        "Stable Diffusion 2.1", "UNet2DConditionModel", SD21, _unet(1024), (256, 512, 768), 77, ((OPENCLIP_H, 77),)
    ),
    "ldm_t2i": Network(
        "LDM-KL-8 text-to-image", "UNet2DConditionModel", LDM_T2I, _unet(1280), (256,), 77, ((LDM_BERT, 77),),
        remark="its text transformer is trained: 3 x its forward in a training step",
    ),
    "sdxl": Network("SDXL base", "UNet2DConditionModel", SDXL, _sdxl_call, (256, 512, 1024), 77, _CLIPS),
    "dit_s2": Network("DiT-S/2", "DiTTransformer2DModel", _dit(12, 6, 64), _dit_call, (256,), 0, sized=True),
    "dit_b2": Network("DiT-B/2", "DiTTransformer2DModel", _dit(12, 12, 64), _dit_call, (256,), 0, sized=True),
    "dit_l2": Network("DiT-L/2", "DiTTransformer2DModel", _dit(24, 16, 64), _dit_call, (256,), 0, sized=True),
    "dit_xl2": Network("DiT-XL/2", "DiTTransformer2DModel", _dit(28, 16, 72), _dit_call, (256, 512), 0, sized=True,
                       remark="diffusers gives every block its own embedder: more parameters than the paper's 675 M"),
    "pixart_alpha": Network("PixArt-alpha XL/2", "PixArtTransformer2DModel", PIXART, _pixart_call, (256, 512, 1024),
                            120, ((T5_XXL, 120),), sized=True),
    "pixart_sigma": Network("PixArt-Sigma XL/2", "PixArtTransformer2DModel", PIXART, _pixart_call, (256, 1024), 300,
                            ((T5_XXL, 300),), sized=True),
    "sd3_medium": Network("Stable Diffusion 3 medium", "SD3Transformer2DModel", _sd3(24), _sd3_call, (256, 512, 1024),
                          154, _SD3_TEXT, vae=16),
    "sd3_8b": Network("Stable Diffusion 3 8B", "SD3Transformer2DModel", _sd3(38), _sd3_call, (256, 512, 1024), 154,
                      _SD3_TEXT, vae=16),
    "sana_1600m": Network("Sana 1.6B", "SanaTransformer2DModel", _sana(20, 70, 20, 2240, 112), _sana_call, (512, 1024),
                          300, vae=0, factor=32, sized=True, remark=_NO_GEMMA),
    "sana_600m": Network("Sana 0.6B", "SanaTransformer2DModel", _sana(28, 36, 16, 1152, 72), _sana_call, (512, 1024),
                         300, vae=0, factor=32, sized=True, remark=_NO_GEMMA),
    "flux_dev": Network("FLUX.1-dev", "FluxTransformer2DModel", dict(guidance_embeds=True), _flux_call, (256, 1024),
                        512, ((CLIP_L, 77), (T5_XXL, 512)), vae=16),
}  # fmt: skip


def count_network(name: str, resolution: int, text_tokens: int | None = None) -> NetworkCount:
    """Count the network `name` (a key of NETWORKS) for one image of `resolution` pixels.

    text_tokens: tokens per caption that the network attends to (None: as it was trained).
    Raises UserError without diffusers, for an unknown name, or a resolution that is no multiple of its latent grid.
    """
    if name not in NETWORKS:
        raise UserError(f"{name} is no diffusion network that mmtrain counts; there is {', '.join(NETWORKS)}")
    network = NETWORKS[name]
    step = 2 * network.factor
    if resolution < step or resolution % step:
        raise UserError(f"resolution={resolution} of {name} must be a multiple of {step}")
    side = resolution // network.factor
    text = network.text_tokens if text_tokens is None else text_tokens
    settings = network.settings | ({"sample_size": side} if network.sized else {})
    model = _build(network.kind, settings)
    forward, attention = forward_flops_of(model, **network.call(side, text))
    scale = text / network.text_tokens if network.text_tokens else 1
    encoders = {e.name: e.forward_flops(round(tokens * scale)) for e, tokens in network.encoders}
    encode = count_vae(resolution, network.vae)[0] if network.vae else None
    return NetworkCount(parameters_of(model), forward, attention, encode, encoders)


@lru_cache(maxsize=8)
def count_vae(resolution: int, latent_channels: int = 4) -> tuple[int, int, int]:
    """(encode, decode) FLOPs per image of the SD VAE at `resolution` pixels, and the parameters of the whole VAE."""
    vae = _build("AutoencoderKL", SD_VAE | dict(latent_channels=latent_channels))
    encode, _ = forward_flops_of(_Method(vae.encode), _meta(1, 3, resolution, resolution))
    side = resolution // 8
    decode, _ = forward_flops_of(_Method(vae.decode), _meta(1, latent_channels, side, side))
    return encode, decode, parameters_of(vae)


class _Method(torch.nn.Module):
    def __init__(self, method: Callable[..., Any]) -> None:
        super().__init__()
        self.method = method

    def forward(self, *arguments: Any) -> Any:
        return self.method(*arguments)


def _build(kind: str, settings: dict[str, Any]) -> torch.nn.Module:
    """A model of diffusers on the meta device."""
    try:
        import diffusers  # noqa: PLC0415
    except ImportError as error:
        raise UserError("counting diffusion networks needs diffusers: pip install 'mmtrain[diffusion]'") from error
    with torch.device("meta"):
        return getattr(diffusers, kind)(**settings)


def forward_flops_of(model: torch.nn.Module, *arguments: Any, **fields: Any) -> tuple[int, int]:
    """FLOPs of one forward pass on meta tensors, 1 multiply-add = 2: (all, those of batched products: attention)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*arguments, **fields)
    by_operation = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    return sum(by_operation.values()), sum(flops for op, flops in by_operation.items() if "bmm" in op)


def parameters_of(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
