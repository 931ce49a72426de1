"""The (3, 1, 1) convolution over the frames of a clip, with what comes before and after it in a ResNet block.

    y[n, f, s] = bias + sum over d of weight[d] @ h[n, f + d - 1, s],   h = x or silu(group_norm(x + shift))
    y = residual + y;   y = alpha * residual + (1 - alpha) * y

Channels-last memory ``[N, F, HW, C]``; frames before the first and after the last are zeros, and not multiplied. Norm,
residual and blend are optional (``group_norm_silu.py``, ``conv_epilogue.py``). The
library's convolution leaves a tensor behind that another kernel reads again, to add to it; and needs one before it that
a kernel has just normalised. Here a matrix product of K = 3 C_in takes both passes along:

* ``cudnn``, or ``torch`` elsewhere: PyTorch's convolution without its bias, a kernel before it and one behind it.
* ``triton``: a program owns BLOCK_M pixels x BLOCK_N channels of one frame and walks over the frames around it and
  their channels; the next tiles, of the next frame too, are on their way (cp.async) while it multiplies. It adds,
  rounds and blends what it has multiplied before it stores it.
* ``triton_prologue``: it also normalises what it reads, for each tile anew, and h is never stored.

Which is fastest depends on the GPU and the shape: the first call of a shape times them, once, holds their results
against the library's, and keeps the answer on disk (``tuning_cache``). What is not measured runs in the library.

Accumulated in float32, rounded to the input dtype where eager stores. Fidelity: math-exact. Bound by the tensor cores,
and for few channels by memory.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.config import tuning_enabled
from vidaccel.kernels import tuning_cache
from vidaccel.kernels.channels_last import channels_last, empty_channels_last
from vidaccel.kernels.conv.alpha_blend import blend
from vidaccel.kernels.conv.conv_epilogue import conv_epilogue, conv_epilogue_ref, validate_epilogue
from vidaccel.kernels.conv.convolution import convolve
from vidaccel.kernels.dispatch import Choice, record_choice, requested, tensors_problem, triton_device_problem
from vidaccel.kernels.launch import Launch, prepared
from vidaccel.kernels.norm.group_norm_silu import (
    apply_silu,
    group_norm_silu,
    group_norm_silu_ref,
    group_norm_statistics,
    validate_norm,
)

__all__ = ["IMPLEMENTATIONS", "NormSiLU", "Tiling", "choose_tiling", "temporal_conv", "temporal_conv_ref"]

logger = logging.getLogger(__name__)

OP = "temporal_conv"
IMPLEMENTATIONS = ("cudnn", "triton", "triton_prologue", "torch")
CHANNEL_STEP = 16  # that the kernel's rows are divisible by, for accesses of 16 bytes
MEASURED_FLOPS = 1e9
MEASURED_CHANNELS = 512  # cuDNN has won at all wider layers: trying ours there would only be more to compile
CHECKED_PIXELS = 16
UNITS_IN_LAST_PLACE = 8  # that two correct results may be apart, relative L2


class NormSiLU(NamedTuple):
    """``silu(group_norm(x + shift))`` before the convolution, with the arguments of ``group_norm_silu``."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    shift: Tensor | None = None


class _Arguments(NamedTuple):
    """One call."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None = None
    mix_factor: Tensor | None = None
    image_only: Tensor | None = None
    spatial_is_second: bool = False
    norm: NormSiLU | None = None


def temporal_conv_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    mix_factor: Tensor | None = None,
    image_only: Tensor | None = None,
    spatial_is_second: bool = False,
    norm: NormSiLU | None = None,
) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    if norm is not None:
        x = group_norm_silu_ref(x, *norm[:4], shift=norm.shift)
    y = F.conv3d(x, weight.to(x.dtype), padding=(1, 0, 0))
    return conv_epilogue_ref(
        y, bias, residual, mix_factor=mix_factor, image_only=image_only, spatial_is_second=spatial_is_second
    )


@triton.jit
def _norm_silu(x, shift, mean, scale, bias, HAS_SHIFT: tl.constexpr):
    """A tile of x normalised, rounded where eager stores."""
    dtype = x.dtype
    z = x.to(tl.float32)
    if HAS_SHIFT:
        z = (z + shift).to(dtype).to(tl.float32)
    y = ((z - mean) * scale + bias).to(dtype).to(tl.float32)
    return apply_silu(y, dtype).to(dtype)


@triton.jit(do_not_specialize=["frames", "pixels", "segments", "stride_norm_sample"])
def _temporal_conv_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, mix_factor_ptr, image_only_ptr,
    norm_ptr, norm_bias_ptr, shift_ptr, y_ptr,
    frames, pixels, segments,
    stride_norm_sample,
    C_IN: tl.constexpr, C_OUT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_MIX: tl.constexpr, HAS_IMAGE_ONLY: tl.constexpr, SPATIAL_IS_SECOND: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_SHIFT: tl.constexpr,
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
                h = tl.load(x_ptrs + x_offs)  # [BLOCK_M, BLOCK_K]
                weight = tl.load(weight_ptrs + weight_offs)  # [BLOCK_K, BLOCK_N]
            else:
                inside = k + offs_k < C_IN
                h = tl.load(x_ptrs + x_offs, mask=inside[None, :], other=0.0)
                weight = tl.load(weight_ptrs + weight_offs, mask=inside[:, None], other=0.0)
            if HAS_NORM:
                channel = tl.minimum(k + offs_k, C_IN - 1)
                mean = tl.load(norm_ptr + sample * stride_norm_sample + channel)
                scale = tl.load(norm_ptr + sample * stride_norm_sample + C_IN + channel)
                norm_bias = tl.load(norm_bias_ptr + channel).to(tl.float32)
                shift = mean
                if HAS_SHIFT:
                    segment = sample * segments + tl.minimum(frame + tap - 1, segments - 1)
                    shift = tl.load(shift_ptr + segment * C_IN + channel).to(tl.float32)
                h = _norm_silu(h, shift[None, :], mean[None, :], scale[None, :], norm_bias[None, :], HAS_SHIFT)
            acc = tl.dot(h, weight, acc=acc, input_precision="ieee")

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


@prepared
def _prepare(
    sizes: tuple[int, int, int, int, int],
    shift_rows: int,
    norm_stride: int | None,
    has_shift: bool,
    flags: tuple[bool, bool, bool, bool],
    tiling: Tiling,
) -> Launch:
    """For ``sizes`` B, F, HW, C_in, C_out and ``flags`` residual, mix, image_only, spatial_is_second."""
    samples, frames, pixels, channels_in, channels = sizes
    has_residual, has_mix, has_image_only, spatial_is_second = flags
    programs = samples * frames * triton.cdiv(pixels, tiling.pixels) * triton.cdiv(channels, tiling.channels)
    return Launch(
        _temporal_conv_kernel, (programs,),
        frames, pixels, shift_rows, norm_stride or 0,
        C_IN=channels_in, C_OUT=channels,
        HAS_RESIDUAL=has_residual, HAS_MIX=has_mix, HAS_IMAGE_ONLY=has_image_only,
        SPATIAL_IS_SECOND=spatial_is_second, HAS_NORM=norm_stride is not None, HAS_SHIFT=has_shift,
        BLOCK_M=tiling.pixels, BLOCK_N=tiling.channels, BLOCK_K=tiling.channels_in, STAGES=tiling.stages,
        num_warps=tiling.num_warps, enable_fp_fusion=False,  # eager rounds the blend's products before it adds them
    )  # fmt: skip


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    mix_factor: Tensor | None,
    image_only: Tensor | None,
    spatial_is_second: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    groups: int,
    eps: float,
    shift: Tensor | None,
    *,
    tiling: Tiling | None = None,
) -> Tensor:
    x, weight = channels_last(x), channels_last(weight)  # [C, 3, C_in] in memory
    (samples, channels_in, frames, height, width), channels = x.shape, weight.shape[0]
    y = _empty_output(x, weight)
    shift = None if shift is None else shift.to(x.dtype).contiguous()
    norm = None
    if norm_weight is not None:
        norm = group_norm_statistics(x, norm_weight.contiguous(), groups, eps, shift)
    flags = residual is not None, mix_factor is not None, image_only is not None, spatial_is_second
    launch = _prepare(
        (samples, frames, height * width, channels_in, channels),
        1 if shift is None else shift.shape[1],
        None if norm is None else norm.stride(0),
        shift is not None,
        flags,
        tiling or choose_tiling(channels, x.dtype),
    )
    launch(
        x, weight, bias.to(x.dtype).contiguous(), None if residual is None else channels_last(residual),
        mix_factor, None if image_only is None else image_only.contiguous(),
        norm, None if norm_bias is None else norm_bias.contiguous(), shift, y,
    )  # fmt: skip
    return y


def _empty_output(x: Tensor, weight: Tensor) -> Tensor:
    samples, _, *sides = x.shape
    return empty_channels_last(x.new_empty(()).expand(samples, weight.shape[0], *sides))


@torch.library.custom_op("vidaccel::temporal_conv", mutates_args=())
def _temporal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    mix_factor: Tensor | None,
    image_only: Tensor | None,
    spatial_is_second: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    groups: int,
    eps: float,
    shift: Tensor | None,
) -> Tensor:
    return _launch(
        x, weight, bias, residual, mix_factor, image_only, spatial_is_second,
        norm_weight, norm_bias, groups, eps, shift,
    )  # fmt: skip


@_temporal_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    mix_factor: Tensor | None,
    image_only: Tensor | None,
    spatial_is_second: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    groups: int,
    eps: float,
    shift: Tensor | None,
) -> Tensor:
    return _empty_output(x, weight)


NO_NORM = (None, None, 0, 0.0, None)


def _run(name: str, arguments: _Arguments, statistics: bool = False) -> Tensor:
    """The implementation called ``name``; the library's result may carry ``statistics``, as the public op's."""
    x, norm = arguments.x, arguments.norm
    if name == "triton_prologue":
        return _run_kernel(*arguments[:-1], *(norm or NO_NORM))
    if norm is not None:
        x = group_norm_silu(x, *norm[:4], shift=norm.shift)
    if name == "triton":
        return _run_kernel(x, *arguments[1:-1], *NO_NORM)
    return _run_library(x, *arguments[1:-1], statistics)


def _run_kernel(*arguments: Any) -> Tensor:
    record_choice(Choice("conv_epilogue", "triton"))  # the same arithmetic, in the kernel
    return (_temporal_conv if torch.compiler.is_compiling() else _launch)(*arguments)


def _run_library(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    mix_factor: Tensor | None,
    image_only: Tensor | None,
    spatial_is_second: bool,
    statistics: bool,
) -> Tensor:
    return conv_epilogue(
        convolve(x, weight.to(x.dtype), (1, 1, 1), (1, 0, 0), (1, 1, 1), 1),
        bias,
        residual,
        mix_factor=mix_factor,
        image_only=image_only,
        spatial_is_second=spatial_is_second,
        inplace=True,
        statistics=statistics,
    )


def _problem(name: str, arguments: _Arguments) -> str | None:
    """Why an implementation does not serve these arguments, or None."""
    if name == "torch":
        return None
    x = arguments.x
    if name == "cudnn":
        here = x.is_cuda and torch.version.hip is None and torch.backends.cudnn.enabled
        return None if here else f"cuDNN is for Nvidia GPUs and turned on or off by PyTorch, x is on {x.device.type}"
    if problem := triton_device_problem(x):
        return problem
    if name == "triton_prologue" and (problem := _prologue_problem(arguments)):
        return problem
    return _kernel_problem(arguments)


def _kernel_problem(arguments: _Arguments) -> str | None:
    x, weight = arguments.x, arguments.weight
    for name, tensor in (("weight", weight), ("residual", arguments.residual)):
        if tensor is not None and tensor.dtype != x.dtype:
            return f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}"
    channels, channels_in = weight.shape[:2]
    if channels % CHANNEL_STEP or channels_in % CHANNEL_STEP:
        return f"the kernel takes channels in steps of {CHANNEL_STEP}, got {channels_in} and {channels}"
    if 4 * x.shape[3] * x.shape[4] * max(channels, channels_in) >= 2**31:
        return f"the kernel takes frames of less than 2 ** 29 elements, got {tuple(x.shape[3:])} pixels"
    return tensors_problem(x, weight, arguments.bias, arguments.residual, arguments.mix_factor)


def _prologue_problem(arguments: _Arguments) -> str | None:
    x, norm = arguments.x, arguments.norm
    if norm is None:
        return "there is no norm to take along"
    if torch.version.hip is not None:
        return "its kernel spills registers on AMD GPUs"
    if x.shape[1] % 32:
        return f"its kernels take C_in divisible by 32, got {x.shape[1]}"
    if norm.shift is not None and norm.shift.shape[1] not in (1, x.shape[2]):
        return f"it takes a shift for each of {x.shape[2]} frames or one for all, got {norm.shift.shape[1]}"
    return tensors_problem(x, norm.weight, norm.bias, norm.shift)


# What runs for a shape, and why ours does not if it failed; the keys are those of _shape.
_chosen: dict[tuple[Any, ...], tuple[str, str]] = {}


def _shape(arguments: _Arguments) -> tuple[Any, ...]:
    x, norm = arguments.x, arguments.norm
    traits = (arguments.residual is not None, arguments.mix_factor is not None, norm is not None)
    shifts = 0 if norm is None or norm.shift is None else norm.shift.shape[1]
    return (x.device.index, x.dtype, tuple(x.shape), arguments.weight.shape[0], *traits, shifts)


def _default(arguments: _Arguments) -> str:
    """What runs where nothing is measured: the library."""
    return "torch" if _problem("cudnn", arguments) else "cudnn"


def _choose(arguments: _Arguments, impl: str | None) -> tuple[str, str]:
    """The implementation to run, and why one that was wished for or measured faster does not."""
    problems = {name: functools.partial(_problem, name, arguments) for name in IMPLEMENTATIONS}
    asked, reason = requested(OP, impl, problems)
    if asked is not None:
        return asked, ""
    shape, default = _shape(arguments), _default(arguments)
    if torch.compiler.is_compiling():
        chosen = _chosen.get(shape, (default, ""))[0]
        return (default if problems[chosen]() else chosen), ""
    if shape not in _chosen:
        first = _first_choice(arguments, default)
        if first is None:
            return default, reason
        _chosen[shape] = first
    name, why_not_ours = _chosen[shape]
    if problem := problems[name]():  # as for another residual's dtype, or while gradients are recorded
        return default, problem
    return name, reason or why_not_ours


def _first_choice(arguments: _Arguments, default: str) -> tuple[str, str] | None:
    """The choice for a shape not seen before; None if it has to wait, because a graph is being captured."""
    if not _measures(arguments):
        return default, ""
    measure = functools.partial(_measure, arguments, default)
    measured = tuning_cache.settled(OP, _cache_key(arguments), IMPLEMENTATIONS, measure, arguments.x)
    if measured is None:
        return None
    return measured.winner or default, "; ".join(f"{name}: {problem}" for name, problem in measured.problems.items())


def _measures(arguments: _Arguments) -> bool:
    """Whether a choice would be worth measuring for these."""
    flops = 6 * arguments.x.numel() * arguments.weight.shape[0]
    may_win = arguments.x.dtype != torch.float32 and _problem("triton", arguments) is None
    may_win = may_win and max(arguments.weight.shape[:2]) <= MEASURED_CHANNELS
    return arguments.x.is_cuda and flops >= MEASURED_FLOPS and may_win and tuning_enabled()


def _cache_key(arguments: _Arguments) -> dict[str, Any]:
    _, dtype, shape, channels, has_residual, has_mix, has_norm, shifts = _shape(arguments)
    return {
        "device": torch.cuda.get_device_name(arguments.x.device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "dtype": str(dtype),
        "shape": list(shape),
        "channels": channels,
        "residual": has_residual,
        "mix": has_mix,
        "norm": has_norm,
        "shifts": shifts,
    }


def _measure(arguments: _Arguments, favourite: str) -> tuning_cache.Measured | None:
    """Time the implementations that serve these arguments and compute what the library does."""
    names = [favourite, *(name for name in ("triton", "triton_prologue") if _problem(name, arguments) is None)]
    with torch.no_grad(), torch.cuda.device_of(arguments.x):
        expected = _run(favourite, arguments)
        runs = {name: functools.partial(_run, name, arguments) for name in names}
        why_wrong = functools.partial(_why_wrong, arguments, expected)
        measured = tuning_cache.fastest(runs, why_wrong, tuning_cache.cuda_milliseconds, favourite)
    logger.debug("%s of %s: %s", OP, _shape(arguments), measured)
    return measured


def _why_wrong(arguments: _Arguments, expected: Tensor, out: Tensor) -> str | None:
    """What is wrong with ``out``: everywhere against the library's result, and in some pixels against float64."""
    eps = torch.finfo(out.dtype).eps
    apart = float(torch.linalg.vector_norm(out - expected, dtype=torch.float32))
    if not apart <= UNITS_IN_LAST_PLACE * eps * float(torch.linalg.vector_norm(expected, dtype=torch.float32)):
        return "its result is not PyTorch's"
    gold = _gold_of_last_pixels(arguments)
    error, own = ((_last_pixels(y).double() - gold).norm() for y in (out, expected))
    if not error <= 2 * own + eps * gold.norm():
        return f"its error against float64 is {float(error / own):.1f} times PyTorch's"
    return None


def _last_pixels(x: Tensor) -> Tensor:
    """Some pixels of all frames of the last sample: the largest offsets."""
    return x[-1:, :, :, -1:, -CHECKED_PIXELS:]


def _gold_of_last_pixels(arguments: _Arguments) -> Tensor:
    x, image_only = arguments.x, arguments.image_only
    if arguments.norm is not None:  # its statistics take all pixels
        x = group_norm_silu(x, *arguments.norm[:4], shift=arguments.norm.shift)
    return temporal_conv_ref(
        _last_pixels(x).double(),
        arguments.weight.double(),
        arguments.bias.to(x.dtype).double(),
        None if arguments.residual is None else _last_pixels(arguments.residual).double(),
        mix_factor=arguments.mix_factor,
        image_only=None if image_only is None else image_only[-1:],
        spatial_is_second=arguments.spatial_is_second,
    )


def _validate(arguments: _Arguments) -> None:
    x, weight, norm = arguments.x, arguments.weight, arguments.norm
    if x.ndim != 5:
        raise ValueError(f"{OP}: x must be [N, C_in, F, H, W], got {tuple(x.shape)}")
    if weight.ndim != 5 or weight.shape[1:] != (x.shape[1], 3, 1, 1):
        raise ValueError(f"{OP}: weight must be [C, {x.shape[1]}, 3, 1, 1], got {tuple(weight.shape)}")
    shape = torch.Size((x.shape[0], weight.shape[0], *x.shape[2:]))
    epilogue = (arguments.residual, None, arguments.mix_factor, arguments.image_only)
    validate_epilogue(OP, shape, arguments.bias, *epilogue)
    if norm is not None:
        validate_norm(OP, x, *norm[:3], norm.shift)


def temporal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    mix_factor: Tensor | None = None,
    image_only: Tensor | None = None,
    spatial_is_second: bool = False,
    norm: NormSiLU | None = None,
    statistics: bool = False,
    impl: str | None = None,
) -> Tensor:
    """``residual + F.conv3d(x, weight, bias, padding=(1, 0, 0))``, blended with ``residual`` where that is asked for.

    Args:
        x: ``[N, C_in, F, H, W]``. Read as it is in channels_last_3d memory, else copied into that order first.
        weight: ``[C, C_in, 3, 1, 1]`` in ``x.dtype``, in channels_last_3d memory best.
        bias: ``[C]``, any float dtype; rounded to ``x.dtype`` first.
        residual: ``[N, C, F, H, W]``; None adds nothing.
        mix_factor: ``[1]``, any float dtype, the blend of ``conv_epilogue``; None blends nothing.
        image_only: ``[N, F]``, nonzero where a frame is a still image and only ``residual`` counts; None: nowhere.
        spatial_is_second: Swap the two factors of the blend, as the SVD decoder does.
        norm: GroupNorm and SiLU of ``x`` before the convolution; None: ``x`` has had them.
        statistics: A GroupNorm follows, so the result may carry what that needs to know of it (``conv_epilogue``).
        impl: One of ``IMPLEMENTATIONS``; None for the fastest (see the module's docstring).

    Returns:
        ``[N, C, F, H, W]`` in ``x.dtype``, channels innermost in memory.

    Raises:
        ValueError: A shape is not as above; ``mix_factor`` comes without ``residual``, or ``image_only`` without
            ``mix_factor``; ``impl`` is unknown or cannot run here.
    """
    arguments = _Arguments(x, weight, bias, residual, mix_factor, image_only, spatial_is_second, norm)
    _validate(arguments)
    if x.numel() == 0:
        return _empty_output(x, weight)
    chosen, reason = _choose(arguments, impl)
    default = _default(arguments)
    if impl is not None or chosen in ("torch", default) or torch.compiler.is_compiling():
        record_choice(Choice(OP, chosen, reason))
        return _run(chosen, arguments, statistics)
    try:
        out = _run(chosen, arguments, statistics)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a measurement of another day may not hold on this GPU: the clip goes on without
        reason = f"{chosen}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        logger.warning("%s: PyTorch's convolution runs from now on for this shape: %s", OP, reason)
        _chosen[_shape(arguments)] = default, reason
        chosen, out = default, _run(default, arguments, statistics)
    record_choice(Choice(OP, chosen, reason))
    return out
