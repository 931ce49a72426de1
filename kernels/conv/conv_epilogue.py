"""What follows a convolution in a ResNet block, in one pass: its bias, the residual, and SVD's blend of the two.

    y[n, s, c] = x[n, s, c] + bias[c];   y = residual + y;   y = alpha * residual + (1 - alpha) * y

Channels-last memory ``[N, S, C]``; the residual and the blend are optional, alpha is that of ``alpha_blend.py``.
PyTorch adds the bias of a cuDNN convolution in a kernel of its own, so a caller runs the convolution without it and
leaves the bias to this op; the residual may be such an output too, with a bias still to come. The sum is computed in
float32 and rounded once, where eager stores three sums: what is lost in a VAE's decoder by other roundings
(``upsample_conv``) is more than made up for by that. The blend is rounded where eager's is. The residual may be float32
where the convolution's output has 16 bits: so is the sum then. Fidelity: math-exact. Bound by memory: one or two reads
and a write.

A second op returns the statistics of the result, too, for the GroupNorm that follows (``channel_statistics.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.channels_last import channels_last, channels_last_strides, empty_channels_last
from vidaccel.kernels.check import PICTURES, Part, cuts, piece_of, pieces
from vidaccel.kernels.conv.alpha_blend import alpha_blend_ref, blend
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.norm.channel_statistics import (
    FOLD,
    ChannelStatistics,
    Tiling,
    channel_statistics_ref,
    chunk_rows_for,
    empty_parts,
    fold,
    frames_and_rows,
    locate,
    merge_lanes,
    moments,
    rows_of_tile,
    store_part,
    writer_tiling,
)
from vidaccel.kernels.op import DTYPES, Costs, Implementation, Op, device_reason, scaled, tensors_reason

__all__ = [
    "CONV_EPILOGUE",
    "CONV_EPILOGUE_AND_STATISTICS",
    "compile_ahead",
    "conv_epilogue",
    "conv_epilogue_and_statistics",
    "conv_epilogue_and_statistics_ref",
    "conv_epilogue_ref",
    "validate_epilogue",
]

BLOCK = 2048
NUM_WARPS = 4
CUT_DIMS = {3: (0, 2), 4: (0, 2), 5: (0, 2, 3)}  # of an activation: frames, then rows
STATISTICS_STEP = 32  # that the channels of statistics are divisible by


def conv_epilogue_ref(
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    mix_factor: Tensor | None = None,
    image_only: Tensor | None = None,
    spatial_is_second: bool = False,
    inplace: bool = False,
) -> Tensor:
    """The specification; nothing happens in place. Pass float64 inputs for gold values."""
    per_channel, dtype = (-1, *(1 for _ in x.shape[2:])), _sum_dtype(x, residual)
    y = x + bias.to(dtype).view(per_channel)
    if residual is not None:
        if residual_bias is not None:
            residual = residual + residual_bias.to(dtype).view(per_channel)
        y = residual + y
        if mix_factor is not None:
            y = alpha_blend_ref(residual, y, mix_factor, image_only, None, spatial_is_second)
    return channels_last(y)


def _sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def conv_epilogue_and_statistics_ref(x: Tensor, bias: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """The specification; the last argument is how many rows make a chunk of the statistics."""
    *addends, chunk_rows = others
    y = conv_epilogue_ref(x, bias, *addends)
    return y, channel_statistics_ref(y, chunk_rows)


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


def _flags(
    *, residual: bool, residual_bias: bool, mix: bool, image_only: bool, spatial_is_second: bool
) -> dict[str, bool]:
    return {
        "HAS_RESIDUAL": residual,
        "HAS_RESIDUAL_BIAS": residual_bias,
        "HAS_MIX": mix,
        "HAS_IMAGE_ONLY": image_only,
        "SPATIAL_IS_SECOND": spatial_is_second,
    }


def _launch(channels: int, frame_size: int, frames: int, flags: dict[str, bool]) -> Launch:
    return Launch(
        _conv_epilogue_kernel, (triton.cdiv(frame_size, BLOCK), frames),
        channels, frame_size,
        **flags, BLOCK=BLOCK,
        num_warps=NUM_WARPS, enable_fp_fusion=False,  # eager rounds the blend's products before it adds them
    )  # fmt: skip


def _launch_with_statistics(
    channels: int, frame_rows: int, frames: int, flags: dict[str, bool], tiling: Tiling
) -> Launch:
    return Launch(
        _conv_epilogue_statistics_kernel, (tiling.programs(frames, frame_rows, channels),),
        channels, frame_rows, tiling.chunk_rows,
        **flags, BLOCK_R=tiling.block_r, BLOCK_C=tiling.block_c, FOLD=FOLD, STAGES=tiling.stages,
        num_warps=tiling.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


class _Call(NamedTuple):
    """The arguments of a call, but for ``chunk_rows``."""

    x: Tensor
    bias: Tensor
    residual: Tensor | None
    residual_bias: Tensor | None
    mix_factor: Tensor | None
    image_only: Tensor | None
    spatial_is_second: bool
    inplace: bool

    def overwrites(self) -> int:
        """Position of the argument whose memory the sum may take: x, or the residual where that is wider."""
        return 0 if self.x.dtype == _sum_dtype(self.x, self.residual) else 2

    def flags(self) -> dict[str, bool]:
        return _flags(
            residual=self.residual is not None,
            residual_bias=self.residual_bias is not None,
            mix=self.mix_factor is not None,
            image_only=self.image_only is not None,
            spatial_is_second=self.spatial_is_second,
        )


def _laid_out(
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    mix_factor: Tensor | None,
    image_only: Tensor | None,
) -> tuple[Any, ...]:
    """The tensors as the kernels read them."""
    dtype = _sum_dtype(x, residual)
    return (
        channels_last(x),
        bias.to(dtype).contiguous(),
        None if residual is None else channels_last(residual),
        None if residual_bias is None else residual_bias.to(dtype).contiguous(),
        mix_factor,
        None if image_only is None else image_only.contiguous(),
    )


def _are_laid_out(call: _Call) -> bool:
    return all(ours is given for ours, given in zip(_laid_out(*call[:6]), call[:6], strict=True))


def _bind(*args: Any) -> Callable[..., Tensor]:
    call = _Call(*args)
    shape, strides, ready = call.x.shape, channels_last_strides(call.x.shape), _are_laid_out(call)
    frames = 1 if call.image_only is None else call.image_only.numel()
    launch = _launch(shape[1], call.x.numel() // frames, frames, call.flags())
    overwritten, dtype = call.overwrites(), _sum_dtype(call.x, call.residual)
    del call

    def run(*args: Any) -> Tensor:
        tensors = args[:6] if ready else _laid_out(*args[:6])
        inplace = args[7]
        y = tensors[overwritten] if inplace else tensors[0].new_empty_strided(shape, strides, dtype=dtype)
        launch(*tensors, y)
        return y

    return run


def _bind_with_statistics(*args: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    *others, chunk_rows = args
    call = _Call(*others)
    shape, strides, ready = call.x.shape, channels_last_strides(call.x.shape), _are_laid_out(call)
    frames, frame_rows = frames_and_rows(shape)
    tiling = writer_tiling(shape)._replace(chunk_rows=chunk_rows)
    launch = _launch_with_statistics(shape[1], frame_rows, frames, call.flags(), tiling)

    def run(*args: Any) -> tuple[Tensor, Tensor]:
        tensors = args[:6] if ready else _laid_out(*args[:6])
        x, inplace = tensors[0], args[7]
        y = x if inplace else x.new_empty_strided(shape, strides)
        parts = empty_parts(x, frames, frame_rows, chunk_rows, shape[1])
        launch(*tensors, y, parts)
        return y, parts

    return run


def _out_of_place(*args: Any) -> Tensor:
    """Never in place, for ``torch.compile`` is told so."""
    call = _Call(*args)._replace(inplace=False)
    return _bind(*call)(*call)


def _triton_with_statistics(
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    mix_factor: Tensor | None,
    image_only: Tensor | None,
    spatial_is_second: bool,
    inplace: bool,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    args = x, bias, residual, residual_bias, mix_factor, image_only, spatial_is_second, False, chunk_rows
    return _bind_with_statistics(*args)(*args)


def _empty_output(x: Tensor, bias: Tensor, residual: Tensor | None, *others: Any) -> Tensor:
    return x.new_empty_strided(x.shape, channels_last_strides(x.shape), dtype=_sum_dtype(x, residual))


def _empty_outputs(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return empty_channels_last(x), empty_parts(x, *frames_and_rows(x.shape), others[-1], x.shape[1])


def _reason(x: Tensor, bias: Tensor, residual: Tensor | None, *others: Any) -> str | None:
    if x.numel() == 0:
        return "there is nothing to add to"
    if reason := device_reason(x):
        return reason
    if residual is not None and residual.dtype not in (x.dtype, torch.float32):
        return f"residual must be float32 or have the dtype of x, {x.dtype}, got {residual.dtype}"
    residual_bias, mix_factor, *_ = others
    return tensors_reason(x, bias, residual, residual_bias, mix_factor)


def _statistics_reason(x: Tensor, bias: Tensor, residual: Tensor | None, *others: Any) -> str | None:
    if x.shape[1] % STATISTICS_STEP:
        return f"the kernel computes statistics of channels divisible by {STATISTICS_STEP}, got {x.shape[1]}"
    if residual is not None and residual.dtype != x.dtype:
        return f"with statistics, residual must have the dtype of x, {x.dtype}, got {residual.dtype}"
    return _reason(x, bias, residual, *others)


def _costs(x: Tensor, bias: Tensor, residual: Tensor | None, *others: Any) -> Costs:
    return Costs(bytes=2 * x.nbytes if residual is None else x.nbytes + 2 * residual.nbytes)


def _parts(*args: Any) -> Iterator[Part]:
    call = _Call(*args)
    for piece in pieces(call.x.shape, *CUT_DIMS[call.x.ndim]):
        residual = None if call.residual is None else call.residual[piece]
        stills = None if call.image_only is None else call.image_only[piece[0], piece[2]]
        part = call._replace(x=call.x[piece], residual=residual, image_only=stills)
        yield Part(tuple(part), functools.partial(piece_of, piece))


def _parts_with_statistics(*args: Any) -> Iterator[Part]:
    """Some frames of a sample, or some chunks of a frame."""
    *others, chunk_rows = args
    call = _Call(*others)
    shape, rows = call.x.shape, frames_and_rows(call.x.shape)[1]
    samples, frames = (shape[0], shape[2]) if len(shape) == 5 else (1, shape[0])
    seen = functools.partial(moments, chunk_rows, call.x.dtype)
    for sample in range(samples):
        for some in cuts(frames, rows * shape[1], PICTURES):
            segments = slice(sample * frames + some.start, sample * frames + some.stop)
            stills = None if call.image_only is None else call.image_only.flatten()[segments]
            of_chunk = (some.stop - some.start) * chunk_rows * shape[1]
            for chunks in cuts(triton.cdiv(rows, chunk_rows), of_chunk, PICTURES):
                where = sample, some, slice(chunks.start * chunk_rows, chunks.stop * chunk_rows)
                residual = None if call.residual is None else _rows_of(call.residual, *where)
                part = call._replace(x=_rows_of(call.x, *where), residual=residual, image_only=stills)
                yield Part((*part, chunk_rows), functools.partial(_of_rows, where, segments, chunks, seen), seen)


def _rows_of(x: Tensor, sample: int, frames: slice, rows: slice) -> Tensor:
    """Some rows of some frames of ``x`` ``[N, C, *spatial]``, of a clip those of one sample: ``[F, C, R]``."""
    images = x[sample, :, frames].transpose(0, 1) if x.ndim == 5 else x[frames]
    return images.flatten(2)[..., rows]


def _of_rows(
    where: tuple[int, slice, slice],
    segments: slice,
    chunks: slice,
    seen: Callable[..., tuple[Tensor, ...]],
    outputs: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    y, parts = outputs
    return seen((_rows_of(y, *where), parts[segments, chunks]))


def _validate(op: str, x: Tensor, *others: Any) -> None:
    validate_epilogue(op, x, x.shape, *others[:5])


def validate_epilogue(
    op: str,
    x: Tensor,
    shape: torch.Size,
    bias: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    mix_factor: Tensor | None,
    image_only: Tensor | None,
) -> None:
    """Raise for arguments that do not fit one another, or a convolution of ``x`` whose output has this ``shape``."""
    tensors = {"bias": bias, "residual": residual, "residual_bias": residual_bias, "mix_factor": mix_factor}
    require_floats(op, x=x, **tensors)
    if len(shape) not in CUT_DIMS:
        raise ValueError(f"{op}: x must be [N, C, *spatial] with 1 to 3 spatial dims, got {tuple(shape)}")
    if bias.shape != (shape[1],):
        raise ValueError(f"{op}: bias must be [{shape[1]}], got {tuple(bias.shape)}")
    if residual is not None and residual.shape != shape:
        raise ValueError(f"{op}: residual must be {tuple(shape)}, as the result is, got {tuple(residual.shape)}")
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
    if mix_factor.shape not in ((), (1,)):  # with more dims it would add them to the blend
        raise ValueError(f"{op}: mix_factor must be [1], got {tuple(mix_factor.shape)}")
    if image_only is None:
        return
    if image_only.device != x.device:
        raise ValueError(f"{op}: image_only must be on {x.device}, as x is, got {image_only.device}")
    if len(shape) != 5 or image_only.shape != (shape[0], shape[2]):
        raise ValueError(
            f"{op}: image_only must be [B, F] of x [B, C, F, H, W], got {tuple(image_only.shape)} (x is {tuple(shape)})"
        )


CONV_EPILOGUE = Op(
    "conv_epilogue",
    reference=conv_epilogue_ref,
    implementations={"triton": Implementation.bound(_bind, _reason, _Call, run=_out_of_place)},
    fake=_empty_output,
    costs=_costs,
    parts=_parts,
    validate=functools.partial(_validate, "conv_epilogue"),
    overwrites=lambda *args: _Call(*args).overwrites(),
    small=scaled(0, 2),  # x, residual
)

CONV_EPILOGUE_AND_STATISTICS = Op(
    "conv_epilogue_and_statistics",
    reference=conv_epilogue_and_statistics_ref,
    implementations={
        "triton": Implementation(_triton_with_statistics, _statistics_reason, _bind_with_statistics, registered=True)
    },
    fake=_empty_outputs,
    costs=_costs,
    parts=_parts_with_statistics,
    validate=functools.partial(_validate, "conv_epilogue_and_statistics"),
    overwrites=0,
    small=scaled(0, 2),  # x, residual
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
    impl: str | None = None,
) -> Tensor:
    """``y = residual + (x + bias)``, or with ``mix_factor`` ``alpha_blend(residual, y, mix_factor, image_only)``.

    Args:
        x: ``[N, C, *spatial]``, 3-D to 5-D, fp16 / bf16 / fp32: a convolution's output without its bias. Read as it is
            when the channels are innermost in memory, else copied into that order first.
        bias: ``[C]``, any float dtype; rounded to that of the result first.
        residual: As ``x``, or fp32; None adds nothing.
        residual_bias: ``[C]``, as ``bias``, added to ``residual`` first; None adds nothing.
        mix_factor: ``[1]``, any float dtype; None blends nothing.
        image_only: ``[B, F]`` for ``x`` ``[B, C, F, H, W]``, nonzero where a frame is a still image and only
            ``residual`` counts; None: nowhere.
        spatial_is_second: Swap the two factors of the blend, as the SVD decoder does.
        inplace: ``x`` is not needed any more, so the result may take its memory; that of the residual, where only that
            is fp32. No promise that it does: only the kernel makes use of it, and only where gradients are off and
            nothing is compiled.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[N, C, *spatial]`` in the wider dtype of x and residual, channels innermost in memory.

    Raises:
        ValueError: A shape or device is not as above; ``residual_bias`` or ``mix_factor`` comes without ``residual``,
            or ``image_only`` without ``mix_factor``; ``impl`` cannot run here.
        TypeError: A tensor but ``image_only`` is not floating-point.
    """
    return CONV_EPILOGUE(
        x, bias, residual, residual_bias, mix_factor, image_only, spatial_is_second, inplace, impl=impl
    )  # fmt: skip


def conv_epilogue_and_statistics(
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    residual_bias: Tensor | None = None,
    mix_factor: Tensor | None = None,
    image_only: Tensor | None = None,
    spatial_is_second: bool = False,
    inplace: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, ChannelStatistics]:
    """:func:`conv_epilogue`, and what a GroupNorm needs to know of its result.

    Arguments and errors are the same; the kernel takes ``C`` divisible by 32 only.

    Returns:
        The result; its statistics, frame by frame, those of a clip ``[B, C, F, H, W]`` told apart, so that they serve
        a norm of each frame and one of all.
    """
    chunk_rows = chunk_rows_for(x.shape) if x.ndim > 1 else 1  # else the op says what is wrong
    y, parts = CONV_EPILOGUE_AND_STATISTICS(
        x, bias, residual, residual_bias, mix_factor, image_only, spatial_is_second, inplace, chunk_rows, impl=impl
    )
    return y, ChannelStatistics(parts, frames_and_rows(x.shape)[1], chunk_rows)


def compile_ahead(
    weight: Tensor,
    *,
    residual_bias: bool = False,
    mix: bool = False,
    image_only: bool = False,
    spatial_is_second: bool = False,
    statistics: bool = False,
) -> None:
    """Begin to compile what sums will run for a convolution of this ``weight``, ``[C, ...]``.

    Args:
        weight: On the device in question.
        residual_bias: Whether the residual is a convolution's, too.
        mix: Whether a blend follows.
        image_only: Whether that is told which frames are still images.
        spatial_is_second: As of :func:`conv_epilogue`.
        statistics: Whether they are computed on the way.
    """
    channels, dtype = weight.shape[0], weight.dtype
    if dtype not in DTYPES:
        return
    flags = _flags(
        residual=True,
        residual_bias=residual_bias,
        mix=mix,
        image_only=image_only,
        spatial_is_second=spatial_is_second,
    )
    if not statistics:
        _launch(channels, 16 * channels, 1, flags).compile_ahead(weight.device, *[dtype] * 7)
    elif channels % STATISTICS_STEP == 0:
        for frame_rows in (1, 2**20):  # small images, and large ones
            tiling = writer_tiling((1, channels, frame_rows))
            launch = _launch_with_statistics(channels, frame_rows, 1, flags, tiling)
            launch.compile_ahead(weight.device, *[dtype] * 7, torch.float32)
