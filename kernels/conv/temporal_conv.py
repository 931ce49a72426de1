"""The (3, 1, 1) convolution over the frames of a clip, with what comes after it in a ResNet block.

    y[n, f, s] = bias + sum over d of weight[d] @ x[n, f + d - 1, s]
    y = residual + y;   y = alpha * residual + (1 - alpha) * y

Channels-last memory ``[N, F, HW, C]``; frames before the first and after the last are zeros, and not multiplied.
Residual and blend are optional (``conv_epilogue.py``). The library's convolution leaves a tensor behind that another
kernel reads again, to add to it. Here a matrix product of K = 3 C_in takes that pass along:

* ``cudnn``: cuDNN's convolution (MIOpen's on AMD GPUs) without its bias, and ``conv_epilogue`` behind it.
* ``triton``: a program owns BLOCK_M pixels x BLOCK_N channels of one frame and walks over the frames around it and
  their channels; the next tiles, of the next frame too, are on their way (cp.async) while it multiplies. It adds,
  rounds and blends what it has multiplied before it stores it.

Which is faster depends on the GPU and the shape, and is measured; what is not measured runs in the library.

Accumulated in float32, rounded to the input dtype where eager stores. Fidelity: math-exact. Bound by the tensor cores,
and for few channels by memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels import settings
from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.channels_last import channels_last, channels_last_strides, empty_channels_last
from vidaccel.kernels.check import Part, piece_of, pieces
from vidaccel.kernels.conv.alpha_blend import blend
from vidaccel.kernels.conv.conv_epilogue import CONV_EPILOGUE, conv_epilogue_ref, validate_epilogue
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.op import REFERENCE, Costs, Implementation, Op, device_reason, scaled, tensors_reason

__all__ = ["TEMPORAL_CONV", "Tiling", "choose_tiling", "compile_ahead", "temporal_conv", "temporal_conv_ref"]

CHANNEL_STEP = 16  # that the kernel's rows are divisible by, for accesses of 16 bytes
MEASURED_FLOPS = 1e9
MEASURED_CHANNELS = 512  # cuDNN has won at all wider layers: trying ours there would only be more to compile


def temporal_conv_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    mix_factor: Tensor | None = None,
    image_only: Tensor | None = None,
    spatial_is_second: bool = False,
) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    y = _empty_output(x, weight)
    if y.numel():
        y = F.conv3d(x, weight.to(x.dtype), padding=(1, 0, 0))
    return conv_epilogue_ref(y, bias, residual, None, mix_factor, image_only, spatial_is_second)


@triton.jit(do_not_specialize=["frames", "pixels"])
def _temporal_conv_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, mix_factor_ptr, image_only_ptr, y_ptr,
    frames, pixels,
    C_IN: tl.constexpr, C_OUT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_MIX: tl.constexpr, HAS_IMAGE_ONLY: tl.constexpr, SPATIAL_IS_SECOND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # channel blocks, then frames, of the same pixels are neighbours: what they share is still in the L2 cache
    CHANNEL_BLOCKS: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    tiles = tl.cdiv(pixels, BLOCK_M)
    first_channel = tl.program_id(0) % CHANNEL_BLOCKS * BLOCK_N
    tile_frame = tl.program_id(0) // CHANNEL_BLOCKS
    frame = tile_frame % frames
    first_pixel = tile_frame // frames % tiles * BLOCK_M
    sample = (tile_frame // frames // tiles).to(tl.int64)
    row = (sample * frames + frame) * pixels  # of the clip's, where this frame begins

    # rows beyond the last are read as the last, and not stored
    offs_m = tl.minimum(first_pixel + tl.arange(0, BLOCK_M), pixels - 1)
    offs_n = tl.minimum(first_channel + tl.arange(0, BLOCK_N), C_OUT - 1)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (row - pixels) * C_IN + (offs_m[:, None] * C_IN + offs_k[None, :])
    weight_ptrs = weight_ptr + (offs_n[None, :] * (3 * C_IN) + offs_k[:, None])

    K_BLOCKS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    first_tap = tl.where(frame == 0, 1, 0)
    end_tap = tl.where(frame == frames - 1, 2, 3)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    # once: without a loop around it ptxas makes every product wait for the one before (C7514)
    for _ in tl.range(0, tl.minimum(frames, 1)):
        for step in tl.range(0, (end_tap - first_tap) * K_BLOCKS, num_stages=STAGES):
            tap = first_tap + step // K_BLOCKS
            k = step % K_BLOCKS * BLOCK_K
            x_offs = tap * (pixels * C_IN) + k
            weight_offs = tap * C_IN + k
            if C_IN % BLOCK_K == 0:
                x = tl.load(x_ptrs + x_offs)  # [BLOCK_M, BLOCK_K]
                weight = tl.load(weight_ptrs + weight_offs)  # [BLOCK_K, BLOCK_N]
            else:
                inside = k + offs_k < C_IN
                x = tl.load(x_ptrs + x_offs, mask=inside[None, :], other=0.0)
                weight = tl.load(weight_ptrs + weight_offs, mask=inside[:, None], other=0.0)
            acc = tl.dot(x, weight, acc=acc, input_precision="ieee")

    dtype = y_ptr.dtype.element_ty
    offs_m = first_pixel + tl.arange(0, BLOCK_M)
    offs_n = first_channel + tl.arange(0, BLOCK_N)
    mask = (offs_m < pixels)[:, None] & (offs_n < C_OUT)[None, :]
    offs = row * C_OUT + (offs_m[:, None] * C_OUT + offs_n[None, :])
    bias = tl.load(bias_ptr + offs_n, mask=offs_n < C_OUT).to(tl.float32)
    y = (acc.to(dtype).to(tl.float32) + bias[None, :]).to(dtype)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offs, mask=mask).to(tl.float32)
        y = (residual + y.to(tl.float32)).to(dtype)
        if HAS_MIX:
            y = blend(
                residual, y.to(tl.float32), mix_factor_ptr, image_only_ptr, sample * frames + frame,
                DTYPE=dtype, HAS_IMAGE_ONLY=HAS_IMAGE_ONLY, SPATIAL_IS_SECOND=SPATIAL_IS_SECOND,
            ).to(dtype)  # fmt: skip
    tl.store(y_ptr + offs, y, mask=mask)


class Tiling(NamedTuple):
    """How the kernel cuts its work: pixels, output and input channels of a tile, warps, and tiles in flight."""

    pixels: int
    channels: int
    channels_in: int
    num_warps: int
    stages: int


def choose_tiling(channels: int, dtype: torch.dtype = torch.float16) -> Tiling:
    """The tiling for this many output channels."""
    if dtype == torch.float32:  # no tensor cores: here for completeness, and never measured
        return Tiling(64, 32, 32, 4, 2)
    if channels % 128 == 0:
        return Tiling(128, 128, 64, 8, 3)
    return Tiling(128, 64, 64, 4, 3) if channels > 32 else Tiling(128, 32, 32, 4, 3)


class _Call(NamedTuple):
    """The arguments of a call."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None
    mix_factor: Tensor | None
    image_only: Tensor | None
    spatial_is_second: bool

    def shape(self) -> torch.Size:
        """The result's."""
        return torch.Size((self.x.shape[0], self.weight.shape[0], *self.x.shape[2:]))


def _laid_out(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    mix_factor: Tensor | None,
    image_only: Tensor | None,
) -> tuple[Any, ...]:
    """The tensors as the kernel reads them; the weight is ``[C, 3, C_in]`` in memory."""
    return (
        channels_last(x),
        channels_last(weight),
        bias.to(x.dtype).contiguous(),
        None if residual is None else channels_last(residual),
        mix_factor,
        None if image_only is None else image_only.contiguous(),
    )


def _bind(*args: Any) -> Callable[..., Tensor]:
    call = _Call(*args)
    ready = all(ours is given for ours, given in zip(_laid_out(*call[:6]), call[:6], strict=True))
    (samples, channels, frames, height, width), channels_in = call.shape(), call.x.shape[1]
    shape, strides = call.shape(), channels_last_strides(call.shape())
    pixels, tiling = height * width, choose_tiling(channels, call.x.dtype)
    programs = samples * frames * triton.cdiv(pixels, tiling.pixels) * triton.cdiv(channels, tiling.channels)
    launch = Launch(
        _temporal_conv_kernel, (programs,),
        frames, pixels,
        C_IN=channels_in, C_OUT=channels,
        HAS_RESIDUAL=call.residual is not None, HAS_MIX=call.mix_factor is not None,
        HAS_IMAGE_ONLY=call.image_only is not None, SPATIAL_IS_SECOND=call.spatial_is_second,
        BLOCK_M=tiling.pixels, BLOCK_N=tiling.channels, BLOCK_K=tiling.channels_in, STAGES=tiling.stages,
        num_warps=tiling.num_warps, enable_fp_fusion=False,  # eager rounds the blend's products before it adds them
    )  # fmt: skip

    def run(*args: Any) -> Tensor:
        tensors = args[:6] if ready else _laid_out(*args[:6])
        y = args[0].new_empty_strided(shape, strides)
        launch(*tensors, y)
        return y

    return run


def _cudnn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    mix_factor: Tensor | None,
    image_only: Tensor | None,
    spatial_is_second: bool,
) -> Tensor:
    y = F.conv3d(x, weight if weight.dtype == x.dtype else weight.to(x.dtype), padding=(1, 0, 0))
    return CONV_EPILOGUE(y, bias, residual, None, mix_factor, image_only, spatial_is_second, True)


def _empty_output(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return empty_channels_last(x, weight.shape[0])


def _nothing_reason(x: Tensor, weight: Tensor) -> str | None:
    return None if x.numel() and len(weight) else "there is nothing to multiply"


def _cudnn_reason(x: Tensor, weight: Tensor, *others: Any) -> str | None:
    if not x.is_cuda or not torch.backends.cudnn.enabled:
        return f"cuDNN is for GPUs and turned on or off by PyTorch, x is on {x.device.type}"
    return _nothing_reason(x, weight)


def _triton_reason(*args: Any) -> str | None:
    call = _Call(*args)
    x, weight = call.x, call.weight
    if reason := _nothing_reason(x, weight) or device_reason(x):
        return reason
    for name, tensor in (("weight", weight), ("residual", call.residual)):
        if tensor is not None and tensor.dtype != x.dtype:
            return f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}"
    channels, channels_in = weight.shape[:2]
    if channels % CHANNEL_STEP or channels_in % CHANNEL_STEP:
        return f"the kernel takes channels in steps of {CHANNEL_STEP}, got {channels_in} and {channels}"
    if 4 * x.shape[3] * x.shape[4] * max(channels, channels_in) >= 2**31:
        return f"the kernel takes frames of less than 2 ** 29 elements, got {tuple(x.shape[3:])} pixels"
    return tensors_reason(x, weight, call.bias, call.residual, call.mix_factor)


def _default(*args: Any) -> str:
    """Where nothing is measured: the library."""
    return REFERENCE if TEMPORAL_CONV.unserved(*args, impl="cudnn") else "cudnn"


def _costs(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *others: Any) -> Costs:
    output = x.nbytes // max(x.shape[1], 1) * len(weight)
    tensors = x.nbytes + weight.nbytes + output * (1 if residual is None else 2)
    return Costs(bytes=tensors, flops=_flops(x, weight))


def _flops(x: Tensor, weight: Tensor) -> int:
    return 6 * x.numel() * weight.shape[0]


def _measures(*args: Any) -> bool:
    """Only where ours may win, in 16 bits, and by something that matters."""
    x, weight = args[:2]
    may_win = x.is_cuda and x.dtype != torch.float32 and max(weight.shape[:2]) <= MEASURED_CHANNELS
    return may_win and _flops(x, weight) >= MEASURED_FLOPS and TEMPORAL_CONV.unserved(*args, impl="triton") is None


def _key(*args: Any) -> dict[str, Any]:
    call = _Call(*args)
    return {
        "dtype": str(call.x.dtype),
        "shape": tuple(call.x.shape),
        "channels": call.weight.shape[0],
        "residual": call.residual is not None,
        "mix": call.mix_factor is not None,
        "cudnn": settings.current().cudnn,
    }


def _parts(*args: Any) -> Iterator[Part]:
    """Samples, and rows of their pixels: a pixel of a frame depends on the same pixel of other frames alone."""
    call = _Call(*args)
    widest = max(call.x.shape[1], call.weight.shape[0])
    for piece in pieces((call.x.shape[0], widest, *call.x.shape[2:]), 0, 3):
        index = (piece[0], slice(None), *piece[2:])
        part = call._replace(
            x=call.x[index],
            residual=None if call.residual is None else call.residual[index],
            image_only=None if call.image_only is None else call.image_only[piece[0]],
        )
        yield Part(tuple(part), functools.partial(piece_of, index))


def _validate(*args: Any) -> None:
    call, op = _Call(*args), TEMPORAL_CONV.name
    x, weight = call.x, call.weight
    require_floats(op, x=x, weight=weight)
    if x.ndim != 5 or not x.shape[1]:
        raise ValueError(f"{op}: x must be [N, C_in, F, H, W] with channels, got {tuple(x.shape)}")
    if weight.ndim != 5 or weight.shape[1:] != (x.shape[1], 3, 1, 1):
        raise ValueError(f"{op}: weight must be [C, {x.shape[1]}, 3, 1, 1], got {tuple(weight.shape)}")
    validate_epilogue(op, x, call.shape(), call.bias, call.residual, None, call.mix_factor, call.image_only)


TEMPORAL_CONV = Op(
    "temporal_conv",
    reference=temporal_conv_ref,
    implementations={
        "cudnn": Implementation(_cudnn, _cudnn_reason),
        "triton": Implementation.bound(_bind, _triton_reason, _Call),
    },
    fake=_empty_output,
    costs=_costs,
    parts=_parts,
    measures=_measures,
    key=_key,
    default=_default,
    validate=_validate,
    small=scaled(0, 3),  # x, residual
)


def compile_ahead(
    weight: Tensor, *, mix: bool = False, image_only: bool = False, spatial_is_second: bool = False
) -> None:
    """Begin to compile the kernel for a convolution by ``weight``, ``[C, C, 3, 1, 1]``, if it may run.

    Args:
        weight: On the device in question.
        mix: Whether a blend with the residual follows.
        image_only: Whether that is told which frames are still images.
        spatial_is_second: As of :func:`temporal_conv`.
    """
    channels, dtype = len(weight), weight.dtype
    if dtype not in (torch.float16, torch.bfloat16) or channels % CHANNEL_STEP or channels > MEASURED_CHANNELS:
        return
    x = weight.new_empty(1, channels, 2, 1, 1, device="meta")
    factor, stills = x.new_empty(1) if mix else None, x.new_empty(1, 2) if image_only else None
    tensors = x, x.new_empty(weight.shape), x.new_empty(channels), x, factor, stills
    TEMPORAL_CONV.compile_ahead(weight.device, *tensors, spatial_is_second, impl="triton")


def temporal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    mix_factor: Tensor | None = None,
    image_only: Tensor | None = None,
    spatial_is_second: bool = False,
    impl: str | None = None,
) -> Tensor:
    """``residual + F.conv3d(x, weight, bias, padding=(1, 0, 0))``, blended with ``residual`` where that is asked for.

    Args:
        x: ``[N, C_in, F, H, W]``, fp16 / bf16 / fp32. The kernel reads it as it is in channels_last_3d memory, else
            copies it into that order first.
        weight: ``[C, C_in, 3, 1, 1]`` in ``x.dtype``, in channels_last_3d memory best.
        bias: ``[C]``, any float dtype; rounded to ``x.dtype`` first.
        residual: ``[N, C, F, H, W]`` in ``x.dtype``; None adds nothing.
        mix_factor: ``[1]``, any float dtype, the blend of ``conv_epilogue``; None blends nothing.
        image_only: ``[N, F]``, nonzero where a frame is a still image and only ``residual`` counts; None: nowhere.
        spatial_is_second: Swap the two factors of the blend, as the SVD decoder does.
        impl: ``"cudnn"``, ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[N, C, F, H, W]`` in ``x.dtype``, channels innermost in memory.

    Raises:
        ValueError: A shape or device is not as above; ``mix_factor`` comes without ``residual``, or ``image_only``
            without ``mix_factor``; ``impl`` is unknown or cannot run here.
        TypeError: A tensor but ``image_only`` is not floating-point.
    """
    return TEMPORAL_CONV(x, weight, bias, residual, mix_factor, image_only, spatial_is_second, impl=impl)
