"""The diffusion baseline: latents and captions of the same pictures go in, a loss (training) or latents (sampling) out.

A text-conditioned transformer (PixArt's, of diffusers) that learns what the token models learn, on the continuous
latents of the same image tokenizer. It must never see a picture, a file format or a document that a token model of
the same configuration would not see at the same step. diffusers is an optional dependency, imported when it is used.
"""

from mmtrain.diffusion.count import Work, count_parameters, forward_flops, recomputed_flops
from mmtrain.diffusion.network import DiffusionTransformer, build_diffusion
from mmtrain.diffusion.noise import Draw, draw_noise
from mmtrain.diffusion.pictures import Pictures, pad_captions
from mmtrain.diffusion.sampling import sample_latents

__all__ = [
    "DiffusionTransformer",
    "Draw",
    "Pictures",
    "Work",
    "build_diffusion",
    "count_parameters",
    "draw_noise",
    "forward_flops",
    "pad_captions",
    "recomputed_flops",
    "sample_latents",
]
