"""The VAE decoders: diffusers' ``autoencoders/vae.py`` and ``autoencoders/autoencoder_kl_temporal_decoder.py``.

Their blocks are patched one by one. What is left for the decoder is memory and statistics: the stock one, and each of
its up-blocks, holds its input until it returns, so that the largest tensor of all, the output of the last upsampler,
lies idle while three ResNet blocks run. Here the layers of the up-blocks are called in one loop, no tensor outlives its
last reader, and the kernel that writes a tensor hands the statistics of its channels on to the norm behind it. A decode
that runs out of memory nevertheless says how many frames would have fitted.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from diffusers.models.unets.unet_3d_blocks import UpBlockTemporalDecoder
from torch import Tensor, nn

from vidaccel.blocks.pixel_rows import convolve_rows
from vidaccel.blocks.unet.convolution import PLAIN_3X3, geometry_of
from vidaccel.blocks.unet.frames import convolve_frames
from vidaccel.blocks.unet.normalization import FusedGroupNorm, group_norm_module
from vidaccel.blocks.unet.resnet import FusedResnetBlock2D, FusedSpatioTemporalResBlock
from vidaccel.blocks.unet.upsampling import FusedUpsample2D
from vidaccel.blocks.vae.tile_batches import TileDecoder
from vidaccel.environment import memory_ran_out, usable_bytes
from vidaccel.kernels.norm.channel_statistics import ChannelStatistics
from vidaccel.kernels.op import runs_triton
from vidaccel.parallel.layout import PixelRows, pixel_rows, spread
from vidaccel.parallel.ranks import Agreement, Ranks
from vidaccel.sites.block import SITES, FusedBlock, call_site, cut_corner, fuses, run_part, unserved_reason
from vidaccel.sites.memo import once_per_call
from vidaccel.sites.plain import order_reason, plain_reason, stock_class

__all__ = ["FusedDecoder", "FusedTemporalDecoder", "decode_bytes", "frames_that_fit"]

_MARGIN = 1.1  # the allocator's rounding, the convolutions' workspaces, all that is small

Options = dict[str, Tensor | None]


class _Decoder(FusedBlock):
    """What the two decoders share."""

    conv_in: Any
    mid_block: Any
    up_blocks: Any
    conv_norm_out: Any
    conv_act: Any
    conv_out: Any
    advice: str

    def compile_ahead(self) -> None:
        for block in self.up_blocks:
            for layer in (*block.resnets, *(block.upsamplers or ())):
                if isinstance(layer, (FusedResnetBlock2D, FusedSpatioTemporalResBlock, FusedUpsample2D)):
                    layer.compile_ahead(statistics=True)

    def corner(self, args: Any, kwargs: Any) -> Any:
        return cut_corner(args, kwargs, most_whole=0)  # a whole decode is never small

    def explained(self, run: Any, sample: Tensor, *args: Any) -> Tensor:
        """``run(sample, *args)``, its running out of memory explained."""
        held = torch.cuda.memory_allocated(sample.device) if sample.is_cuda else 0
        try:
            return run(sample, *args)
        except RuntimeError as error:
            if not memory_ran_out(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold every tensor of the attempt
            raise torch.OutOfMemoryError(self._explain(sample, held)) from error

    def upsample(self, sample: Tensor, indicator: Tensor | None) -> Tensor:
        """All up-blocks, then norm, SiLU and the convolution to pixels; ``indicator`` is a clip's image_only one."""
        statistics = None
        for block in self.up_blocks:
            if _only_calls_its_layers(block):
                temporal = stock_class(block) is UpBlockTemporalDecoder
                options: Options = {"image_only_indicator": indicator} if temporal else {"temb": None}
                for resnet in block.resnets:
                    sample, statistics = _layer(resnet, sample, options, statistics)
                for upsampler in block.upsamplers or ():
                    sample, statistics = _layer(upsampler, sample, {}, statistics)
            elif indicator is None:
                sample, statistics = block(sample, None), None
            else:
                sample, statistics = block(sample, image_only_indicator=indicator), None
        return convolve_rows(self.conv_out, self.conv_out, self._norm_out(sample, statistics))

    def _norm_out(self, sample: Tensor, statistics: ChannelStatistics | None) -> Tensor:
        norm, activation = self.conv_norm_out, self.conv_act
        if isinstance(norm, FusedGroupNorm) and norm.serves_parent(sample) and not plain_reason(activation, nn.SiLU):
            return run_part(norm, group_norm_module, norm, sample, silu=True, statistics=statistics)
        return activation(norm(sample))

    def _explain(self, sample: Tensor, held: int) -> str:
        """What the stock error leaves out: how much a frame takes, how much there was, and what would fit."""
        frames, _, height, width = sample.shape
        needed, free = decode_bytes(self, sample), usable_bytes(sample.device) - held
        scale = 2 ** sum(block.upsamplers is not None for block in self.up_blocks)
        fit = frames_that_fit(frames, needed, free)
        return (
            f"out of memory while decoding {frames} frames of {width * scale} x {height * scale} pixels at once: "
            f"a frame takes about {needed / 2**30:.2f} GiB, and {max(free, 0) / 2**30:.2f} GiB were free; "
            + (self.advice.format(fit=fit) if fit else "not even one frame fits: make the video smaller, free memory "
               "(pipe.enable_model_cpu_offload()), or decode in tiles where the VAE can (vae.enable_tiling())")
        )  # fmt: skip


def _layer(
    layer: Any, sample: Tensor, options: Options, given: ChannelStatistics | None
) -> tuple[Tensor, ChannelStatistics | None]:
    """What a layer of an up-block makes of ``sample``, whose statistics may be ``given``, and those of the result.

    ``options`` are what the up-block calls a layer at this place with, whatever stands there.
    """
    if not runs_triton("conv_epilogue", sample) or not isinstance(layer, FusedBlock):
        return layer(sample, **options), None
    if isinstance(layer, FusedResnetBlock2D) and layer.serves_parent(sample, None):
        return run_part(layer, layer.with_statistics, sample, None, None, given)
    indicator = options.get("image_only_indicator")
    if isinstance(layer, FusedSpatioTemporalResBlock) and layer.serves_parent(sample, None, indicator):
        return run_part(layer, layer.with_statistics, sample, indicator, given)
    if isinstance(layer, FusedUpsample2D) and layer.serves_parent(sample, None):
        return run_part(layer, layer.with_statistics, sample)
    return layer(sample, **options), None


@fuses(Decoder, {"decode_memory": "bit-exact"})
class FusedDecoder(TileDecoder, _Decoder, Decoder):
    """The decoder of ``AutoencoderKL``: frames are independent."""

    advice = (
        "decode_chunk_size={fit} would fit, in a pipeline that takes it; else vae.enable_slicing(), one frame at a time"
    )

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        return call_site(FusedDecoder, self, sample, latent_embeds)

    def call_reason(self, sample: Tensor, latent_embeds: Tensor | None) -> str | None:
        return None if latent_embeds is None else "latent embeddings were passed"

    def tile_reason(self, *args: Any, **kwargs: Any) -> str | None:
        return order_reason(self) or super().tile_reason(*args, **kwargs)

    def bytes_at_once(self, latents: Tensor) -> int:
        return len(latents) * decode_bytes(self, latents)

    def fused_forward(self, sample: Tensor, latent_embeds: None) -> Tensor:
        return self.explained(self._decode, sample)

    def _decode(self, sample: Tensor) -> Tensor:
        return self.upsample(self.mid_block(self.conv_in(sample), None), None)


@fuses(TemporalDecoder, {"decode_memory": "bit-exact"})
class FusedTemporalDecoder(_Decoder, TemporalDecoder):
    """The decoder of Stable Video Diffusion: the frames of a chunk are mixed with each other.

    Attributes:
        least_pixels: Of latents, by the type of their device: fewer are decoded faster by each rank alone. On a GPU, 80
            messages cost the host 40 ms, in which it decodes three frames of 576 x 1024 (profiles-h200.txt).
    """

    advice = "decode_chunk_size={fit} would fit"
    least_pixels: ClassVar[dict[str, int]] = {"cuda": 30_000}

    def forward(self, sample: Tensor, image_only_indicator: Tensor, num_frames: int = 1) -> Tensor:
        return call_site(FusedTemporalDecoder, self, sample, image_only_indicator, num_frames)

    @classmethod
    def original_forward(cls, host: Any, *args: Any, **kwargs: Any) -> Any:
        with spread(None):  # every rank decodes all pixels
            return super().original_forward(host, *args, **kwargs)

    def layout_for(
        self, ranks: Ranks, agreement: Agreement, latent_frames: int, sample: Tensor, image_only_indicator: Tensor,
        num_frames: int = 1,
    ) -> PixelRows | str:  # fmt: skip
        """How the pictures of such a call are decoded on several ranks, or why they are not."""
        if reason := unserved_reason(self, getattr(self, SITES), (sample, image_only_indicator, num_frames), {}):
            return reason
        frames, _, rows, columns = sample.shape
        if (pixels := frames * rows * columns) < self.least_pixels.get(sample.device.type, 0):
            return f"{pixels} pixels of latents are decoded faster by each rank alone"
        return _pixel_rows_reason(self) or PixelRows.reason(ranks, rows) or PixelRows(ranks, rows, agreement)

    def fused_forward(self, sample: Tensor, image_only_indicator: Tensor, num_frames: int) -> Tensor:
        return self.explained(self._decode, sample, image_only_indicator, num_frames)

    def _decode(self, sample: Tensor, image_only_indicator: Tensor, num_frames: int) -> Tensor:
        over = pixel_rows()
        # handed over without a name of its own, which would keep it alive
        middle = self._middle if over is None else partial(self._middle_rows, over)
        sample = self.upsample(middle(sample, image_only_indicator), image_only_indicator)
        sample = sample.unflatten(0, (-1, num_frames)).transpose(1, 2)  # [B, C, F, H, W]
        sample = convolve_frames(self.time_conv_out, self.time_conv_out, sample).transpose(1, 2).flatten(0, 1)
        return sample if over is None else over.gather(sample, 2)

    def _middle(self, sample: Tensor, image_only_indicator: Tensor) -> Tensor:
        """What the first up-block gets."""
        dtype = next(self.up_blocks.parameters()).dtype
        return self.mid_block(self.conv_in(sample), image_only_indicator=image_only_indicator).to(dtype)

    def _middle_rows(self, over: PixelRows, sample: Tensor, image_only_indicator: Tensor) -> Tensor:
        """This rank's rows of that.

        Every rank makes all of it: its pixels are a 64th of all, its attention is between all of a frame, and what
        ranks would tell one another costs more of their hosts' time than it saves of the GPUs'.
        """
        with spread(None):
            middle = self._middle(sample, image_only_indicator)
        return over.part(middle, 2).contiguous(memory_format=torch.channels_last)


def _pixel_rows_reason(decoder: Any) -> str | None:
    """Why the up-blocks of a fused decoder cannot work on some rows of pixels, or None."""
    if any(not _only_calls_its_layers(block) for block in decoder.up_blocks):
        return "an up-block is not a plain one"
    layers = [layer for block in decoder.up_blocks for layer in (*block.resnets, *(block.upsamplers or ()))]
    for layer in layers:
        parts = (layer.spatial_res_block, layer.temporal_res_block) if hasattr(layer, "spatial_res_block") else (layer,)
        if not all(isinstance(part, FusedBlock) for part in parts):
            return "a block that mixes pixels is not patched"
        if any(getattr(getattr(part, "conv_shortcut", None), "kernel_size", (1, 1)) != (1, 1) for part in parts):
            return "a convolution on a residual is not a 1x1 one"
        if any("group_norm_silu" in part.ops and not part.runs("group_norm_silu") for part in parts):
            return "its norms are not fused"
    if not isinstance(decoder.conv_norm_out, FusedGroupNorm):
        return "its last norm is not patched"
    if plain_reason(decoder.conv_out, nn.Conv2d) or geometry_of(decoder.conv_out) != PLAIN_3X3:
        return "its last convolution is not a plain 3 x 3 one"
    if plain_reason(decoder.time_conv_out, nn.Conv3d) or decoder.time_conv_out.kernel_size != (3, 1, 1):
        return "its last convolution is not one over three frames"
    return None


@once_per_call
def _only_calls_its_layers(block: nn.Module) -> bool:
    """Whether calling the up-block does nothing but call its layers."""
    return any(plain_reason(block, kind) is None for kind in (UpDecoderBlock2D, UpBlockTemporalDecoder))


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


def frames_that_fit(frames: int, needed: int, free: int) -> int:
    """How many frames of ``needed`` bytes each fit into ``free``, fewer than the ``frames`` that did not."""
    return max(min(free // needed, frames - 1), 0)
