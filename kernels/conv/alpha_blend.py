"""The learned blend of a spatial and a temporal branch, in one pass.

    out = alpha * spatial + (1 - alpha) * (temporal + residual),   alpha = 1 where image_only, else sigmoid(mix_factor)

The residual, if there is one, is the temporal branch's last addition.
Rows of channels ``[B*F, S, C]`` (any memory order that both inputs share); alpha belongs to a frame and is worked out
in the kernel, where stock code launches five small kernels for it. Every intermediate is rounded to the input dtype
where eager PyTorch stores it; alpha itself may differ from eager's in the last place of float32 (fidelity: math-exact).
Bound by memory: two reads (three with a residual) and one write.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.check import Part, piece_of, pieces
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.op import DTYPES, Costs, Implementation, Op, device_reason, tensors_reason

__all__ = ["ALPHA_BLEND", "alpha_blend", "alpha_blend_ref", "blend", "compile_ahead"]

BLOCK = 2048
NUM_WARPS = 4
CUT_DIMS = {3: (0, 1), 4: (0, 2), 5: (0, 2, 3)}  # of a branch: frames, then rows


def alpha_blend_ref(
    spatial: Tensor,
    temporal: Tensor,
    mix_factor: Tensor,
    image_only: Tensor | None = None,
    residual: Tensor | None = None,
    spatial_is_second: bool = False,
) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    if residual is not None:
        temporal = temporal + residual
    alpha = torch.sigmoid(mix_factor)
    if image_only is not None:
        alpha = torch.where(image_only.bool(), torch.ones((), device=alpha.device), alpha)  # [B, F]
        frame = (slice(None), None, slice(None), None, None) if spatial.ndim == 5 else (slice(None), None, None)
        alpha = (alpha if spatial.ndim == 5 else alpha.reshape(-1))[frame]
    alpha = alpha.to(spatial.dtype)
    if spatial_is_second:
        alpha = 1.0 - alpha
    return spatial * alpha + temporal * (1.0 - alpha)  # in this order: the result lies in memory as spatial does


@triton.jit
def blend(
    spatial, temporal, mix_factor_ptr, image_only_ptr, frame,
    DTYPE: tl.constexpr, HAS_IMAGE_ONLY: tl.constexpr, SPATIAL_IS_SECOND: tl.constexpr,
):  # fmt: skip
    """The blend of two float32 tiles of one frame, every intermediate rounded to DTYPE where eager stores it."""
    alpha = tl.sigmoid(tl.load(mix_factor_ptr).to(tl.float32)).to(mix_factor_ptr.dtype.element_ty).to(tl.float32)
    if HAS_IMAGE_ONLY:
        alpha = tl.where(tl.load(image_only_ptr + frame) != 0, 1.0, alpha)
    alpha = alpha.to(DTYPE).to(tl.float32)
    if SPATIAL_IS_SECOND:
        alpha = (1.0 - alpha).to(DTYPE).to(tl.float32)
    beta = (1.0 - alpha).to(DTYPE).to(tl.float32)
    return (alpha * spatial).to(DTYPE).to(tl.float32) + (beta * temporal).to(DTYPE).to(tl.float32)


@triton.jit
def _alpha_blend_kernel(
    spatial_ptr, temporal_ptr, residual_ptr, mix_factor_ptr, image_only_ptr, out_ptr,
    frame_size,
    HAS_RESIDUAL: tl.constexpr, HAS_IMAGE_ONLY: tl.constexpr, SPATIAL_IS_SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < frame_size
    offs += frame * frame_size
    spatial = tl.load(spatial_ptr + offs, mask=mask).to(tl.float32)
    temporal = tl.load(temporal_ptr + offs, mask=mask).to(tl.float32)
    if HAS_RESIDUAL:
        temporal += tl.load(residual_ptr + offs, mask=mask).to(tl.float32)
        temporal = temporal.to(out_ptr.dtype.element_ty).to(tl.float32)
    out = blend(
        spatial, temporal, mix_factor_ptr, image_only_ptr, frame,
        DTYPE=out_ptr.dtype.element_ty, HAS_IMAGE_ONLY=HAS_IMAGE_ONLY, SPATIAL_IS_SECOND=SPATIAL_IS_SECOND,
    )  # fmt: skip
    tl.store(out_ptr + offs, out, mask=mask)


def _bind(
    spatial: Tensor,
    temporal: Tensor,
    mix_factor: Tensor,
    image_only: Tensor | None,
    residual: Tensor | None,
    spatial_is_second: bool,
) -> Callable[..., Tensor]:
    frames = 1 if image_only is None else image_only.numel()
    frame_size = spatial.numel() // frames
    launch = Launch(
        _alpha_blend_kernel, (triton.cdiv(frame_size, BLOCK), frames),
        frame_size,
        HAS_RESIDUAL=residual is not None, HAS_IMAGE_ONLY=image_only is not None,
        SPATIAL_IS_SECOND=spatial_is_second, BLOCK=BLOCK,
        num_warps=NUM_WARPS, enable_fp_fusion=False,  # eager rounds the products before it adds them
    )  # fmt: skip

    def run(
        spatial: Tensor,
        temporal: Tensor,
        mix_factor: Tensor,
        image_only: Tensor | None,
        residual: Tensor | None,
        spatial_is_second: bool,
    ) -> Tensor:
        out = torch.empty_like(spatial)
        launch(
            spatial, temporal, residual, mix_factor, None if image_only is None else image_only.contiguous(), out
        )  # fmt: skip
        return out

    return run


def _empty_output(spatial: Tensor, *others: object) -> Tensor:
    return torch.empty_like(spatial)


def _reason(
    spatial: Tensor,
    temporal: Tensor,
    mix_factor: Tensor,
    image_only: Tensor | None,
    residual: Tensor | None,
    spatial_is_second: bool,
) -> str | None:
    if spatial.numel() == 0:
        return "there is nothing to blend"
    if reason := device_reason(spatial):
        return reason
    for name, other in (("temporal", temporal), ("residual", residual)):
        if other is not None and other.dtype != spatial.dtype:
            return f"{name} differs from spatial in dtype: {other.dtype}, {spatial.dtype}"
        if other is not None and _memory_order(other) != _memory_order(spatial):
            return f"{name} differs from spatial in strides"
    # each frame must be one dense run of memory: its alpha is applied run by run
    dense = spatial.ndim == 5 and spatial.is_contiguous(memory_format=torch.channels_last_3d)
    if not dense and not (spatial.is_contiguous() and (spatial.ndim != 5 or image_only is None)):
        return "frames are not dense runs of memory"
    return tensors_reason(spatial, temporal, residual, mix_factor)


def _memory_order(x: Tensor) -> list[int]:
    """The strides that matter: a dim of one entry, as of a clip of one frame, may have any."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def _costs(
    spatial: Tensor,
    temporal: Tensor,
    mix_factor: Tensor,
    image_only: Tensor | None,
    residual: Tensor | None,
    spatial_is_second: bool,
) -> Costs:
    return Costs(bytes=spatial.nbytes * (3 if residual is None else 4))


def _parts(
    spatial: Tensor,
    temporal: Tensor,
    mix_factor: Tensor,
    image_only: Tensor | None,
    residual: Tensor | None,
    spatial_is_second: bool,
) -> Iterator[Part]:
    for piece in pieces(spatial.shape, *CUT_DIMS[spatial.ndim]):
        stills = image_only
        if stills is not None:
            stills = stills[piece[0], piece[2]] if spatial.ndim == 5 else stills.flatten()[piece[0]]
        added = None if residual is None else residual[piece]
        args = spatial[piece], temporal[piece], mix_factor, stills, added, spatial_is_second
        yield Part(args, functools.partial(piece_of, piece))


def _validate(
    spatial: Tensor,
    temporal: Tensor,
    mix_factor: Tensor,
    image_only: Tensor | None,
    residual: Tensor | None,
    spatial_is_second: bool,
) -> None:
    op, shape = ALPHA_BLEND.name, tuple(spatial.shape)
    require_floats(op, spatial=spatial, temporal=temporal, mix_factor=mix_factor, residual=residual)
    if spatial.ndim not in CUT_DIMS:
        raise ValueError(f"{op}: spatial must be [B, C, F, H, W], [N, C, H, W] or [B * F, S, C], got {shape}")
    for name, other in (("temporal", temporal), ("residual", residual)):
        if other is not None and other.shape != shape:
            raise ValueError(f"{op}: {name} must be {shape}, as spatial is, got {tuple(other.shape)}")
    if mix_factor.shape not in ((), (1,)):  # with more dims it would add them to the blend
        raise ValueError(f"{op}: mix_factor must be [1], got {tuple(mix_factor.shape)}")
    if image_only is None:
        return
    if image_only.device != spatial.device:
        raise ValueError(f"{op}: image_only must be on {spatial.device}, as spatial is, got {image_only.device}")
    if spatial.ndim == 4:
        raise ValueError(f"{op}: with image_only, spatial must be [B, C, F, H, W] or [B * F, S, C], got {shape}")
    frames = (shape[0], shape[2]) if spatial.ndim == 5 else shape[:1]
    if image_only.shape != frames and (spatial.ndim == 5 or image_only.numel() != shape[0]):
        raise ValueError(f"{op}: image_only must have {frames} entries, one a frame, got {tuple(image_only.shape)}")


ALPHA_BLEND = Op(
    "alpha_blend",
    reference=alpha_blend_ref,
    implementations={"triton": Implementation.bound(_bind, _reason)},
    fake=_empty_output,
    costs=_costs,
    parts=_parts,
    validate=_validate,
)


def compile_ahead(mix_factor: Tensor, *, image_only: bool, residual: bool, spatial_is_second: bool) -> None:
    """Begin to compile a blend by ``mix_factor`` of tensors of its dtype; the flags are as of :func:`alpha_blend`."""
    if mix_factor.dtype in DTYPES:
        x = mix_factor.new_empty(2, 16, device="meta")
        tensors = x, x, x[:1, 0], x[:, 0] if image_only else None, x if residual else None
        ALPHA_BLEND.compile_ahead(mix_factor.device, *tensors, spatial_is_second, impl="triton")


def alpha_blend(
    spatial: Tensor,
    temporal: Tensor,
    mix_factor: Tensor,
    image_only: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    spatial_is_second: bool = False,
    impl: str | None = None,
) -> Tensor:
    """``a * spatial + (1 - a) * (temporal + residual)`` with ``a = where(image_only, 1, sigmoid(mix_factor))``.

    Args:
        spatial: ``[B, C, F, H, W]``, ``[N, C, H, W]`` or ``[B * F, S, C]``, fp16 / bf16 / fp32.
        temporal: As ``spatial``; the kernel takes the same dtype and strides only.
        mix_factor: ``[1]``, any float dtype.
        image_only: Nonzero where a frame is a still image and only ``spatial`` counts, ``[B, F]``; for rows ``B * F``
            entries in any shape; not for a 4-D ``spatial``. None: nowhere.
        residual: As ``temporal``, added to it first; None adds nothing.
        spatial_is_second: Swap the two factors, as the SVD decoder does.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        As ``spatial``.

    Raises:
        ValueError: A shape or device is not as above; ``impl`` cannot run here.
        TypeError: A tensor but ``image_only`` is not floating-point.
    """
    return ALPHA_BLEND(spatial, temporal, mix_factor, image_only, residual, spatial_is_second, impl=impl)
