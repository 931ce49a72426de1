"""The learned blend of a spatial and a temporal branch, in one pass.

    out = alpha * spatial + (1 - alpha) * (temporal + residual),   alpha = 1 where image_only, else sigmoid(mix_factor)

The residual, if there is one, is the temporal branch's last addition.
Rows of channels ``[B*F, S, C]`` (any memory order that both inputs share); alpha belongs to a frame and is worked out
in the kernel, where stock code launches five small kernels for it. Every intermediate is rounded to the input dtype
where eager PyTorch stores it; alpha itself may differ from eager's in the last place of float32 (fidelity: math-exact).
Bound by memory: two reads (three with a residual) and one write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.dispatch import choose, tensors_problem
from vidaccel.kernels.launch import Launch, prepared

__all__ = ["alpha_blend", "alpha_blend_ref", "blend"]

BLOCK = 2048
NUM_WARPS = 4


def alpha_blend_ref(
    spatial: Tensor,
    temporal: Tensor,
    mix_factor: Tensor,
    image_only: Tensor | None = None,
    *,
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
    return alpha * spatial + (1.0 - alpha) * temporal


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


@prepared
def _prepare(frame_size: int, frames: int, has_residual: bool, has_image_only: bool, spatial_is_second: bool) -> Launch:
    return Launch(
        _alpha_blend_kernel, (triton.cdiv(frame_size, BLOCK), frames),
        frame_size,
        HAS_RESIDUAL=has_residual, HAS_IMAGE_ONLY=has_image_only, SPATIAL_IS_SECOND=spatial_is_second, BLOCK=BLOCK,
        num_warps=NUM_WARPS, enable_fp_fusion=False,  # eager rounds the products before it adds them
    )  # fmt: skip


def _launch(
    spatial: Tensor,
    temporal: Tensor,
    residual: Tensor | None,
    mix_factor: Tensor,
    image_only: Tensor | None,
    spatial_is_second: bool,
) -> Tensor:
    out = torch.empty_like(spatial)
    frames = 1 if image_only is None else image_only.numel()
    size = spatial.numel() // frames
    launch = _prepare(size, frames, residual is not None, image_only is not None, spatial_is_second)
    launch(spatial, temporal, residual, mix_factor, image_only, out)
    return out


@torch.library.custom_op("vidaccel::alpha_blend", mutates_args=())
def _alpha_blend(
    spatial: Tensor,
    temporal: Tensor,
    residual: Tensor | None,
    mix_factor: Tensor,
    image_only: Tensor | None,
    spatial_is_second: bool,
) -> Tensor:
    return _launch(spatial, temporal, residual, mix_factor, image_only, spatial_is_second)


@_alpha_blend.register_fake
def _(
    spatial: Tensor,
    temporal: Tensor,
    residual: Tensor | None,
    mix_factor: Tensor,
    image_only: Tensor | None,
    spatial_is_second: bool,
) -> Tensor:
    return torch.empty_like(spatial)


def _problem(
    spatial: Tensor, temporal: Tensor, residual: Tensor | None, mix_factor: Tensor, image_only: Tensor | None
) -> str | None:
    """Why the kernel does not serve these arguments, or None."""
    for name, other in (("temporal", temporal), ("residual", residual)):
        if other is not None and other.dtype != spatial.dtype:
            return f"{name} differs from spatial in dtype: {other.dtype}, {spatial.dtype}"
        if other is not None and _memory_order(other) != _memory_order(spatial):
            return f"{name} differs from spatial in strides"
    # each frame must be one dense run of memory: its alpha is applied run by run
    dense = spatial.is_contiguous(memory_format=torch.channels_last_3d) if spatial.ndim == 5 else False
    dense = dense or (spatial.is_contiguous() and (spatial.ndim != 5 or image_only is None))
    if not dense:
        return "frames are not dense runs of memory"
    return tensors_problem(spatial, temporal, residual, mix_factor)


def _memory_order(x: Tensor) -> list[int]:
    """The strides that matter: a dim of one entry, as of a clip of one frame, may have any."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


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
        spatial: ``[B, C, F, H, W]`` or ``[B*F, S, C]``, fp16 / bf16 / fp32.
        temporal: As ``spatial``, same strides.
        mix_factor: ``[1]``, any float dtype.
        image_only: ``[B, F]``, nonzero where a frame is a still image and only ``spatial`` counts; None: nowhere.
        residual: As ``temporal``, added to it first; None adds nothing.
        spatial_is_second: Swap the two factors, as the SVD decoder does.
        impl: ``"triton"``, ``"torch"`` or None (chosen by device).

    Returns:
        As ``spatial``.

    Raises:
        ValueError: The branches differ in shape; ``image_only`` does not have one entry for each frame; ``impl``
            cannot run here.
    """
    if spatial.shape != temporal.shape:
        raise ValueError(f"alpha_blend: branches differ in shape: {tuple(spatial.shape)}, {tuple(temporal.shape)}")
    if residual is not None and residual.shape != temporal.shape:
        raise ValueError(f"alpha_blend: residual must be {tuple(temporal.shape)}, got {tuple(residual.shape)}")
    if image_only is not None:
        if spatial.ndim not in (3, 5):
            raise ValueError(f"alpha_blend: with image_only the branches are 3-D or 5-D, got {tuple(spatial.shape)}")
        frames = spatial.shape[0] * (spatial.shape[2] if spatial.ndim == 5 else 1)
        if image_only.numel() != frames:
            raise ValueError(f"alpha_blend: image_only is {tuple(image_only.shape)}, expected {frames} entries")
    problem = _problem(spatial, temporal, residual, mix_factor, image_only)
    if choose("alpha_blend", spatial, impl, problem) == "torch" or spatial.numel() == 0:
        branches = (spatial, temporal, mix_factor, image_only)
        return alpha_blend_ref(*branches, residual=residual, spatial_is_second=spatial_is_second)
    if image_only is not None:
        image_only = image_only.contiguous()
    run = _alpha_blend if torch.compiler.is_compiling() else _launch
    return run(spatial, temporal, residual, mix_factor, image_only, spatial_is_second)
