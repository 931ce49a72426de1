"""The ops that read their tensors once and write once: norm of rows, blend, what follows a convolution, GEGLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidaccel.bench.op_case import Arguments, Case, Op, Outputs, Provider, channels_first, passes
from vidaccel.kernels.conv import alpha_blend as ab
from vidaccel.kernels.conv import conv_epilogue as ce
from vidaccel.kernels.ffn import geglu as gg
from vidaccel.kernels.norm import add_layer_norm as aln

__all__ = ["ADD_LAYER_NORM", "ALPHA_BLEND", "CONV_EPILOGUE", "GEGLU"]


def _norm_rows_case(
    name: str, batch: int, tokens: int, channels: int, *addends: str, row_to: aln.RowTo = "sum"
) -> Case:
    rows = batch, tokens, channels
    frames = batch // 2
    shapes = {"residual": rows, "row": (batch, 1, channels), "position": (frames, channels)}
    return Case(name, (rows, rows[2:], rows[2:], *(shapes[name] for name in addends)), (addends, row_to, 1e-5))


def _add_layer_norm(op: Callable[..., Outputs]) -> Callable[..., Outputs]:
    def run(x: Tensor, weight: Tensor, bias: Tensor, *others: Any) -> Outputs:
        *tensors, addends, row_to, eps = others
        return op(x, weight, bias, eps, row_to=row_to, **dict(zip(addends, tensors, strict=True)))

    return run


def _norm_rows_numbers(case: Case) -> float:
    addends, row_to, _ = case.scalars
    has_sum = "residual" in addends or ("row" in addends and row_to != "norm")
    return passes(2 + has_sum + ("residual" in addends))(case)


ADD_LAYER_NORM = Op(
    cases=(
        _norm_rows_case("svd level 0, residual and row", 28, 9216, 320, "residual", "row"),
        _norm_rows_case("svd level 0, norm alone", 28, 9216, 320),
        _norm_rows_case("svd level 0, residual", 28, 9216, 320, "residual"),
        _norm_rows_case("svd level 0, row to the norm", 28, 9216, 320, "residual", "row", row_to="norm"),
        _norm_rows_case("svd level 1, residual and row", 28, 2304, 640, "residual", "row"),
        _norm_rows_case("svd level 2, residual and row", 28, 576, 1280, "residual", "row"),
        _norm_rows_case("animatediff level 0, residual and position", 32, 4096, 320, "residual", "position"),
    ),
    tiny=_norm_rows_case("tiny", 4, 3, 32, "residual", "row"),
    reference=_add_layer_norm(aln.add_layer_norm_ref),
    providers={
        "eager": Provider(_add_layer_norm(aln.add_layer_norm_ref)),
        "compile": Provider(_add_layer_norm(aln.add_layer_norm_ref), compiled=True),
        "ours": Provider(_add_layer_norm(aln.add_layer_norm)),
        "ours, one stage": Provider(_add_layer_norm(aln.add_layer_norm), one_stage=True),
    },
    numbers=_norm_rows_numbers,
)


def _no_still_images(*tensors: Tensor) -> Arguments:
    """The last one says which frames are still images: none is in a clip."""
    return *tensors[:-1], torch.zeros_like(tensors[-1])


def _blend_case(name: str, batch: int, frames: int, pixels: int, channels: int) -> Case:
    rows = batch * frames, pixels, channels
    return Case(name, (rows, rows, rows, (1,), (batch, frames)))


def _alpha_blend(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(spatial: Tensor, temporal: Tensor, residual: Tensor, mix_factor: Tensor, image_only: Tensor) -> Tensor:
        return op(spatial, temporal, mix_factor, image_only, residual=residual)

    return run


ALPHA_BLEND = Op(
    cases=(
        _blend_case("svd level 0", 2, 14, 9216, 320),
        _blend_case("svd level 1", 2, 14, 2304, 640),
        _blend_case("svd level 2", 2, 14, 576, 1280),
    ),
    tiny=_blend_case("tiny", 1, 2, 4, 32),
    reference=_alpha_blend(ab.alpha_blend_ref),
    providers={
        "eager": Provider(_alpha_blend(ab.alpha_blend_ref)),
        "compile": Provider(_alpha_blend(ab.alpha_blend_ref), compiled=True),
        "ours": Provider(_alpha_blend(ab.alpha_blend)),
    },
    numbers=passes(4),
    build=_no_still_images,
)


def _epilogue_case(name: str, *shape: int) -> Case:
    """With a residual; of clips, ``[B, C, F, H, W]``, also with the blend."""
    blend = ((1,), (shape[0], shape[2])) if len(shape) == 5 else ()
    return Case(name, (shape, shape[1:2], shape, *blend))


def _conv_epilogue(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, bias: Tensor, residual: Tensor, *blend: Tensor) -> Tensor:
        return op(x, bias, residual, **dict(zip(("mix_factor", "image_only"), blend, strict=False)))

    return run


CONV_EPILOGUE = Op(
    cases=(
        _epilogue_case("svd level 0, residual and blend", 2, 320, 14, 72, 128),
        _epilogue_case("svd level 0, residual", 28, 320, 72, 128),
        _epilogue_case("svd level 1, residual and blend", 2, 640, 14, 36, 64),
        _epilogue_case("animatediff level 0, residual", 32, 320, 64, 64),
    ),
    tiny=_epilogue_case("tiny", 1, 32, 2, 4, 4),
    reference=_conv_epilogue(ce.conv_epilogue_ref),
    providers={
        "eager": Provider(_conv_epilogue(ce.conv_epilogue_ref), channels_first),
        "compile": Provider(_conv_epilogue(ce.conv_epilogue_ref), channels_first, compiled=True),
        "ours": Provider(_conv_epilogue(ce.conv_epilogue)),
    },
    numbers=passes(3),
    build=lambda x, bias, residual, *blend: (x, bias, residual, *(_no_still_images(*blend) if blend else ())),
)

GEGLU = Op(
    cases=(
        Case("svd level 0", ((28, 9216, 2560),)),
        Case("svd level 1", ((28, 2304, 5120),)),
        Case("svd level 2", ((28, 576, 10240),)),
        Case("animatediff level 0", ((32, 4096, 2560),)),
    ),
    tiny=Case("tiny", ((2, 3, 32),)),
    reference=gg.geglu_ref,
    providers={
        "eager": Provider(gg.geglu_ref),
        "compile": Provider(gg.geglu_ref, compiled=True),
        "ours": Provider(gg.geglu),
    },
    numbers=passes(1.5),
)
