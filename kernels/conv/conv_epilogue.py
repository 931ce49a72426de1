"""What follows a convolution in a ResNet block, in one pass: its bias, the residual, and SVD's blend of the two.

    y[n, s, c] = x[n, s, c] + bias[c];   y = residual + y;   y = alpha * residual + (1 - alpha) * y

Channels-last memory ``[N, S, C]``; the residual and the blend are optional, alpha is that of
``alpha_blend.py``. PyTorch adds the bias of a cuDNN convolution in a kernel of its own, so a caller
runs the convolution without it and leaves the bias to this op; the residual may be such an output too, with a bias
still to come. The sum is computed in float32 and rounded once, where eager stores three sums: what is lost in a VAE's
decoder by other roundings (``upsample_conv``) is more than made up for by that. The blend is rounded where eager's is.
Fidelity: math-exact. Bound by memory: one or two reads and a write.

With ``statistics`` the result carries those of its channels, for the GroupNorm that follows
(``channel_statistics.py``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.channels_last import channels_last, empty_channels_last
from vidaccel.kernels.conv.alpha_blend import alpha_blend_ref, blend
from vidaccel.kernels.dispatch import DTYPES, choose, tensors_problem
from vidaccel.kernels.launch import Launch, prepared
from vidaccel.kernels.norm.channel_statistics import (
    FOLD,
    ChannelStatistics,
    Tiling,
    attach,
    choose_writer_tiling,
    empty_parts,
    fold,
    locate,
    merge_lanes,
    rows_of_tile,
    store_part,
)

__all__ = ["compile_ahead", "conv_epilogue", "conv_epilogue_ref", "validate_epilogue"]

BLOCK = 2048
NUM_WARPS = 4


def conv_epilogue_ref(
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    residual_bias: Tensor | None = None,
    mix_factor: Tensor | None = None,
    image_only: Tensor | None = None,
    spatial_is_second: bool = False,
) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    per_channel = (-1, *(1 for _ in x.shape[2:]))
    y = x + bias.to(x.dtype).view(per_channel)
    if residual is not None and residual_bias is not None:
        residual = residual + residual_bias.to(x.dtype).view(per_channel)
    if residual is not None:
        y = residual + y
    if residual is not None and mix_factor is not None:
        y = alpha_blend_ref(residual, y, mix_factor, image_only, spatial_is_second=spatial_is_second)
    return y


@triton.jit
def _load_or_zero(ptr, offs, mask, THERE: tl.constexpr):
    """Float32, and zeros where masked or where there is nothing to load."""
    values = tl.zeros(offs.shape, dtype=tl.float32)
    if THERE:
        values += tl.load(ptr + offs, mask=mask, other=0.0)
    return values


@triton.jit
def _finish(
    x, bias, residual, mix_factor_ptr, image_only_ptr, frame,
    DTYPE: tl.constexpr, HAS_MIX: tl.constexpr, HAS_IMAGE_ONLY: tl.constexpr, SPATIAL_IS_SECOND: tl.constexpr,
):  # fmt: skip
    """The epilogue on float32 tiles of one frame; ``residual`` is zero where there is none."""
    y = (residual + (x + bias)).to(DTYPE)
    if HAS_MIX:
        residual = residual.to(DTYPE).to(tl.float32)
        y = blend(
            residual, y.to(tl.float32), mix_factor_ptr, image_only_ptr, frame,
            DTYPE=DTYPE, HAS_IMAGE_ONLY=HAS_IMAGE_ONLY, SPATIAL_IS_SECOND=SPATIAL_IS_SECOND,
        ).to(DTYPE)  # fmt: skip
    return y


@triton.jit
def _conv_epilogue_kernel(
    x_ptr, bias_ptr, residual_ptr, residual_bias_ptr, mix_factor_ptr, image_only_ptr, y_ptr,
    channels, frame_size,
    HAS_RESIDUAL: tl.constexpr, HAS_RESIDUAL_BIAS: tl.constexpr, HAS_MIX: tl.constexpr, HAS_IMAGE_ONLY: tl.constexpr,
    SPATIAL_IS_SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    mask = offs < frame_size
    offs += frame * frame_size
    # 32 bits make the remainder of every lane cheap; written as a difference, the first one is seen to be aligned
    channel = ((start - start // channels * channels).to(tl.int32) + tl.arange(0, BLOCK)) % channels
    x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
    bias = tl.load(bias_ptr + channel).to(tl.float32)
    residual = _load_or_zero(residual_ptr, offs, mask, HAS_RESIDUAL)
    residual += _load_or_zero(residual_bias_ptr, channel, mask, HAS_RESIDUAL_BIAS)
    y = _finish(
        x, bias, residual, mix_factor_ptr, image_only_ptr, frame,
        y_ptr.dtype.element_ty, HAS_MIX, HAS_IMAGE_ONLY, SPATIAL_IS_SECOND,
    )  # fmt: skip
    tl.store(y_ptr + offs, y, mask=mask)


@triton.jit(do_not_specialize=["frame_rows", "chunk_rows"])
def _conv_epilogue_statistics_kernel(
    x_ptr, bias_ptr, residual_ptr, residual_bias_ptr, mix_factor_ptr, image_only_ptr, y_ptr, part_ptr,
    channels, frame_rows, chunk_rows,
    HAS_RESIDUAL: tl.constexpr, HAS_RESIDUAL_BIAS: tl.constexpr, HAS_MIX: tl.constexpr, HAS_IMAGE_ONLY: tl.constexpr,
    SPATIAL_IS_SECOND: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    frame, chunk, first_channel = locate(tl.program_id(0), channels, frame_rows, chunk_rows, BLOCK_C)
    first_row = chunk * chunk_rows
    rows = tl.minimum(chunk_rows, frame_rows - first_row)
    start = (frame * frame_rows + first_row) * channels + first_channel
    x_ptr, y_ptr = x_ptr + start, y_ptr + start
    if HAS_RESIDUAL:
        residual_ptr += start
    offs_c = tl.arange(0, BLOCK_C)
    offs_r = rows_of_tile(BLOCK_R, FOLD)
    bias = tl.load(bias_ptr + first_channel + offs_c).to(tl.float32)
    residual_bias = _load_or_zero(residual_bias_ptr, first_channel + offs_c, offs_c < channels, HAS_RESIDUAL_BIAS)
    mean = tl.zeros([BLOCK_R // FOLD, BLOCK_C], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_R // FOLD, BLOCK_C], dtype=tl.float32)
    for step in tl.range(0, tl.cdiv(rows, BLOCK_R), num_stages=STAGES):
        row = step * BLOCK_R + offs_r
        mask = row < rows
        offs = row * channels + offs_c  # [LANES, FOLD, BLOCK_C]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        residual = _load_or_zero(residual_ptr, offs, mask, HAS_RESIDUAL) + residual_bias
        y = _finish(
            x, bias, residual, mix_factor_ptr, image_only_ptr, frame,
            y_ptr.dtype.element_ty, HAS_MIX, HAS_IMAGE_ONLY, SPATIAL_IS_SECOND,
        )  # fmt: skip
        tl.store(y_ptr + offs, y, mask=mask)
        z = tl.where(mask, y.to(tl.float32), 0.0)
        mean, m2 = fold(z, mask, step, rows, mean, m2, BLOCK_R, FOLD)
    mean, m2 = merge_lanes(rows, mean, m2, BLOCK_R, FOLD)
    store_part(part_ptr, frame, chunk, first_channel, channels, frame_rows, chunk_rows, mean, m2)


class _Flags(NamedTuple):
    """What there is to add and to blend."""

    residual: bool
    residual_bias: bool
    mix: bool
    image_only: bool
    spatial_is_second: bool

    def constants(self) -> dict[str, bool]:
        return {
            "HAS_RESIDUAL": self.residual,
            "HAS_RESIDUAL_BIAS": self.residual_bias,
            "HAS_MIX": self.mix,
            "HAS_IMAGE_ONLY": self.image_only,
            "SPATIAL_IS_SECOND": self.spatial_is_second,
        }


@prepared
def _prepare(channels: int, frame_size: int, frames: int, flags: _Flags) -> Launch:
    return Launch(
        _conv_epilogue_kernel, (triton.cdiv(frame_size, BLOCK), frames),
        channels, frame_size,
        **flags.constants(), BLOCK=BLOCK,
        num_warps=NUM_WARPS, enable_fp_fusion=False,  # eager rounds the blend's products before it adds them
    )  # fmt: skip


@prepared
def _prepare_statistics(
    channels: int, frame_rows: int, frames: int, flags: _Flags, tiling: Tiling | None = None
) -> tuple[Launch, Tiling]:
    tiling = tiling or choose_writer_tiling(frames, frame_rows, channels, channels & -channels)
    launch = Launch(
        _conv_epilogue_statistics_kernel, (tiling.programs(frames, frame_rows, channels),),
        channels, frame_rows, tiling.chunk_rows,
        **flags.constants(), BLOCK_R=tiling.block_r, BLOCK_C=tiling.block_c, FOLD=FOLD, STAGES=tiling.stages,
        num_warps=tiling.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return launch, tiling


def _launch(
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    mix_factor: Tensor | None,
    image_only: Tensor | None,
    spatial_is_second: bool,
    *,
    inplace: bool = False,
    statistics: bool = False,
    tiling: Tiling | None = None,
) -> Tensor:
    x = channels_last(x)
    y = x if inplace else empty_channels_last(x)
    flags = _Flags(
        residual is not None, residual_bias is not None, mix_factor is not None, image_only is not None,
        spatial_is_second,
    )  # fmt: skip
    arguments = (
        x, bias.to(x.dtype).contiguous(), None if residual is None else channels_last(residual),
        None if residual_bias is None else residual_bias.to(x.dtype).contiguous(),
        mix_factor, None if image_only is None else image_only.contiguous(), y,
    )  # fmt: skip
    channels = x.shape[1]
    if not statistics:
        frames = 1 if image_only is None else image_only.numel()
        _prepare(channels, x.numel() // frames, frames, flags)(*arguments)
        return y
    frames = x.shape[0] * (x.shape[2] if x.ndim == 5 else 1)
    frame_rows = x.numel() // (frames * channels)
    launch, tiling = _prepare_statistics(channels, frame_rows, frames, flags, tiling)
    parts = empty_parts(x, frames, frame_rows, tiling.chunk_rows, channels)
    launch(*arguments, parts)
    return attach(y, ChannelStatistics(parts, frame_rows, tiling.chunk_rows))


def compile_ahead(
    weight: Tensor,
    *,
    residual_bias: bool = False,
    mix: bool = False,
    image_only: bool = False,
    spatial_is_second: bool = False,
) -> None:
    """Begin to compile what sums with statistics will run for a convolution of this ``weight``, ``[C, ...]``.

    Args:
        weight: On the device in question.
        residual_bias: Whether the residual is a convolution's, too.
        mix: Whether a blend follows.
        image_only: Whether that is told which frames are still images.
        spatial_is_second: As of :func:`conv_epilogue`.
    """
    channels, dtype = weight.shape[0], weight.dtype
    if channels % 32 or dtype not in DTYPES:
        return
    flags = _Flags(True, residual_bias, mix, image_only, spatial_is_second)
    for frame_rows in (1, 2**20):  # small images, and large ones
        launch, _ = _prepare_statistics(channels, frame_rows, 1, flags)
        launch.compile_ahead(weight.device, *[dtype] * 7, torch.float32)


@torch.library.custom_op("vidaccel::conv_epilogue", mutates_args=())
def _conv_epilogue(
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    mix_factor: Tensor | None,
    image_only: Tensor | None,
    spatial_is_second: bool,
) -> Tensor:
    return _launch(x, bias, residual, residual_bias, mix_factor, image_only, spatial_is_second)


@_conv_epilogue.register_fake
def _(
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    mix_factor: Tensor | None,
    image_only: Tensor | None,
    spatial_is_second: bool,
) -> Tensor:
    return empty_channels_last(x)


def _problem(x: Tensor, bias: Tensor, residual: Tensor | None, *others: Tensor | None) -> str | None:
    """Why the kernel does not serve these arguments, or None."""
    if residual is not None and residual.dtype != x.dtype:
        return f"residual must have the dtype of x, {x.dtype}, got {residual.dtype}"
    return tensors_problem(x, bias, residual, *others)


def validate_epilogue(
    op: str,
    shape: torch.Size,
    bias: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    mix_factor: Tensor | None,
    image_only: Tensor | None,
) -> None:
    """Raise for arguments that do not fit one another, or a convolution whose output has this ``shape``."""
    if bias.shape != (shape[1],):
        raise ValueError(f"{op}: bias must be [{shape[1]}], got {tuple(bias.shape)}")
    if residual is not None and residual.shape != shape:
        raise ValueError(f"{op}: residual must be {tuple(shape)}, as x is, got {tuple(residual.shape)}")
    if residual_bias is not None and (residual is None or residual_bias.shape != bias.shape):
        raise ValueError(
            f"{op}: residual_bias must be [{shape[1]}] and needs a residual, got {tuple(residual_bias.shape)}"
        )
    if mix_factor is None:
        if image_only is not None:
            raise ValueError(f"{op}: image_only needs a mix_factor")
        return
    if residual is None:
        raise ValueError(f"{op}: mix_factor needs a residual to blend with")
    if mix_factor.numel() != 1:
        raise ValueError(f"{op}: mix_factor must be [1], got {tuple(mix_factor.shape)}")
    if image_only is not None and (len(shape) != 5 or image_only.shape != (shape[0], shape[2])):
        raise ValueError(
            f"{op}: image_only must be [B, F] of x [B, C, F, H, W], got {tuple(image_only.shape)} (x is {tuple(shape)})"
        )


def conv_epilogue(
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    residual_bias: Tensor | None = None,
    mix_factor: Tensor | None = None,
    image_only: Tensor | None = None,
    spatial_is_second: bool = False,
    inplace: bool = False,
    statistics: bool = False,
    impl: str | None = None,
) -> Tensor:
    """``y = residual + (x + bias)``, or with ``mix_factor`` ``alpha_blend(residual, y, mix_factor, image_only)``.

    Args:
        x: ``[N, C, *spatial]``, 3-D to 5-D, fp16 / bf16 / fp32: a convolution's output without its bias. Read as it is
            when the channels are innermost in memory, else copied into that order first.
        bias: ``[C]``, any float dtype; rounded to ``x.dtype`` first.
        residual: As ``x``; None adds nothing.
        residual_bias: ``[C]``, as ``bias``, added to ``residual`` first; None adds nothing.
        mix_factor: ``[1]``, any float dtype; None blends nothing.
        image_only: ``[B, F]`` for ``x`` ``[B, C, F, H, W]``, nonzero where a frame is a still image and only
            ``residual`` counts; None: nowhere.
        spatial_is_second: Swap the two factors of the blend, as the SVD decoder does.
        inplace: ``x`` is not needed any more, so the result may take its memory. No promise that it does: only the
            kernel makes use of it, and only in eager mode.
        statistics: A GroupNorm follows, so the result may carry what that needs to know of it: with the frames of a
            5-D ``x`` told apart, for a norm of each or of all. No promise either; ``C`` must be divisible by 32.
        impl: ``"triton"`` or ``"torch"``; None lets ``vidaccel.kernels.dispatch`` choose.

    Returns:
        ``[N, C, *spatial]`` in ``x.dtype``, channels innermost in memory.

    Raises:
        ValueError: A shape is not as above; ``residual_bias`` or ``mix_factor`` comes without ``residual``, or
            ``image_only`` without ``mix_factor``; ``impl`` cannot run here.
    """
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"conv_epilogue: x must be [N, C, *spatial] with 1 to 3 spatial dims, got {tuple(x.shape)}")
    validate_epilogue("conv_epilogue", x.shape, bias, residual, residual_bias, mix_factor, image_only)
    chosen = choose("conv_epilogue", x, impl, _problem(x, bias, residual, residual_bias, mix_factor))
    if chosen == "torch" or x.numel() == 0:
        y = conv_epilogue_ref(
            x,
            bias,
            residual,
            residual_bias=residual_bias,
            mix_factor=mix_factor,
            image_only=image_only,
            spatial_is_second=spatial_is_second,
        )
        return channels_last(y)
    if torch.compiler.is_compiling():
        return _conv_epilogue(x, bias, residual, residual_bias, mix_factor, image_only, spatial_is_second)
    return _launch(
        x,
        bias,
        residual,
        residual_bias,
        mix_factor,
        image_only,
        spatial_is_second,
        inplace=inplace,
        statistics=statistics and x.shape[1] % 32 == 0,
    )


def conv_epilogue_and_statistics(*args, **kwargs):
    return conv_epilogue(*args, **kwargs), None
