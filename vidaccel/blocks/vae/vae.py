"""The VAE decoders: diffusers' ``autoencoders/vae.py`` and ``autoencoders/autoencoder_kl_temporal_decoder.py``.

Their blocks are patched one by one. What is left for the decoder is memory: the stock one, and each of its up-blocks,
holds its input until it returns, so that the largest tensor of all, the output of the last upsampler, lies idle while
three ResNet blocks run. Here the layers of the up-blocks are called in one loop, and no tensor outlives its last
reader. A decode that runs out of memory nevertheless says how many frames would have fitted.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from diffusers.models.unets.unet_3d_blocks import UpBlockTemporalDecoder
from torch import Tensor, nn

from vidaccel.sites.parameters import has_hook
from vidaccel.sites.site import FusedBlock, fuses

__all__ = ["FusedDecoder", "FusedTemporalDecoder", "decode_bytes", "frames_that_fit"]

_MARGIN = 1.1  # the allocator's rounding, the convolutions' workspaces, all that is small


class _Decoder(FusedBlock):
    """What the two decoders share. Every layer checks itself; the loop around them needs no check of its own."""

    conv_in: Any
    mid_block: Any
    up_blocks: Any
    conv_norm_out: Any
    conv_act: Any
    conv_out: Any
    advice: str

    def decode(self, sample: Tensor, *args: Any) -> Tensor:
        """The fused forward, its running out of memory explained."""
        if reason := self._records_gradients((sample, *args)) or self.why_unserved(sample, *args):
            if not torch.compiler.is_compiling():
                self._vidaccel.note_fallback(reason)
            return self.original_forward(sample, *args)
        if torch.compiler.is_compiling():
            return self.fused_forward(sample, *args)
        self._vidaccel.note_choices([])
        held = torch.cuda.memory_allocated(sample.device) if sample.is_cuda else 0
        try:
            return self.fused_forward(sample, *args)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold every tensor of the attempt
            raise torch.OutOfMemoryError(self._explain(sample, held)) from error

    def upsample(self, sample: Tensor, **kwargs: Any) -> Tensor:
        """All up-blocks, then norm, SiLU and the convolution to pixels; ``kwargs`` are the ResNet blocks'."""
        for block in self.up_blocks:
            if _is_plain(block):
                for resnet in block.resnets:
                    sample = resnet(sample, **kwargs)
                for upsampler in block.upsamplers or ():
                    sample = upsampler(sample)
            else:
                sample = block(sample, **kwargs)
        sample = self.conv_act(self.conv_norm_out(sample))
        return self.conv_out(sample)

    def _explain(self, sample: Tensor, held: int) -> str:
        """What the stock error leaves out: how much a frame takes, how much there was, and what would fit."""
        frames, _, height, width = sample.shape
        needed, free = decode_bytes(self, sample), _usable_bytes(sample.device) - held
        scale = 2 ** sum(block.upsamplers is not None for block in self.up_blocks)
        fit = frames_that_fit(frames, needed, free)
        return (
            f"out of memory while decoding {frames} frames of {width * scale} x {height * scale} pixels at once: "
            f"a frame takes about {needed / 2**30:.2f} GiB, and {max(free, 0) / 2**30:.2f} GiB were free; "
            + (self.advice.format(fit=fit) if fit else "not even one frame fits: make the video smaller, free memory "
               "(pipe.enable_model_cpu_offload()), or decode in tiles where the VAE can (vae.enable_tiling())")
        )  # fmt: skip


@fuses(Decoder, {"decode_memory": "bit-exact"})
class FusedDecoder(_Decoder, Decoder):
    """The decoder of ``AutoencoderKL``: frames are independent."""

    advice = (
        "decode_chunk_size={fit} would fit, in a pipeline that takes it; else vae.enable_slicing(), one frame at a time"
    )

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        return self.decode(sample, latent_embeds)

    def why_unserved(self, sample: Tensor, latent_embeds: Tensor | None) -> str | None:
        return None if latent_embeds is None else "latent embeddings were passed"

    def fused_forward(self, sample: Tensor, latent_embeds: None) -> Tensor:
        return self.upsample(self.mid_block(self.conv_in(sample), latent_embeds), temb=None)


@fuses(TemporalDecoder, {"decode_memory": "bit-exact"})
class FusedTemporalDecoder(_Decoder, TemporalDecoder):
    """The decoder of Stable Video Diffusion: the frames of a chunk are mixed with each other."""

    advice = "decode_chunk_size={fit} would fit"

    def forward(self, sample: Tensor, image_only_indicator: Tensor, num_frames: int = 1) -> Tensor:
        return self.decode(sample, image_only_indicator, num_frames)

    def fused_forward(self, sample: Tensor, image_only_indicator: Tensor, num_frames: int) -> Tensor:
        dtype = next(self.up_blocks.parameters()).dtype
        sample = self.upsample(  # handed over without a name of its own, which would keep it alive
            self.mid_block(self.conv_in(sample), image_only_indicator=image_only_indicator).to(dtype),
            image_only_indicator=image_only_indicator,
        )
        sample = sample.unflatten(0, (-1, num_frames)).transpose(1, 2)  # [B, C, F, H, W]
        return self.time_conv_out(sample).transpose(1, 2).flatten(0, 1)


def _is_plain(block: nn.Module) -> bool:
    """Whether calling the block does nothing but call its layers."""
    hooked = has_hook(block) or block._forward_hooks or block._forward_pre_hooks
    return type(block) in (UpDecoderBlock2D, UpBlockTemporalDecoder) and not hooked


def decode_bytes(decoder: nn.Module, sample: Tensor) -> int:
    """Most memory that the layers of a fused decoder hold at once, for each frame of the latents ``sample``."""
    return int(max(_channels_held(decoder)) * sample.shape[2:].numel() * sample.element_size() * _MARGIN)


def _channels_held(decoder: Any) -> Iterator[int]:
    """For every layer: how many channels' worth of tensors it holds at its worst, in units of a latent pixel."""
    pixels = 1
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            yield pixels * _channels_in_resnet(resnet)
        for upsampler in block.upsamplers or ():
            yield pixels * (upsampler.channels + 8 * upsampler.out_channels)  # before and after the pixels are in place
            pixels *= 4


def _channels_in_resnet(resnet: ResnetBlock2D | SpatioTemporalResBlock) -> int:
    spatial = resnet.spatial_res_block if isinstance(resnet, SpatioTemporalResBlock) else resnet
    width_in, width_out = spatial.in_channels, spatial.out_channels
    first_convolution = 2 * width_in + width_out  # input, its norm, output
    # input, residual (the input itself if the width stays), norm, output
    changes = spatial.conv_shortcut is not None or spatial is not resnet
    return max(first_convolution, width_in + (3 if changes else 2) * width_out)


def _usable_bytes(device: torch.device) -> int:
    """What this process may allocate on ``device``, counting what it has allocated."""
    driver_free, total = torch.cuda.mem_get_info(device)
    limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(driver_free + torch.cuda.memory_reserved(device), limit)


def frames_that_fit(frames: int, needed: int, free: int) -> int:
    """How many frames of ``needed`` bytes each fit into ``free``, fewer than the ``frames`` that did not."""
    return max(min(free // needed, frames - 1), 0)
