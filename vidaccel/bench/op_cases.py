"""The ops that the bench measures, at the models' shapes.

A case says an op's arguments by the names of its reference's parameters; those that it leaves out keep their defaults.
A tuple is the shape of a random tensor, from 4-D on in channels-last memory. A new op adds an entry to :data:`CASES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

__all__ = ["CASES", "STOCK", "TINY", "Arguments", "Stock", "Zeros"]

TINY = "tiny"  # the case of a dry run

Arguments = Mapping[str, Any]


class Zeros(tuple[int, ...]):
    """The shape of a tensor of zeros."""


class Stock(NamedTuple):
    """What stock diffusers runs where that is not the op's reference.

    Attributes:
        run: Takes what ``prepare`` returns.
        prepare: Takes the op's arguments by position; puts them as stock code finds them, before the clock runs.
    """

    run: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]]


def _norm(*shape: int, groups: int = 32) -> Arguments:
    return {"x": shape, "weight": shape[1:2], "bias": shape[1:2], "groups": groups, "eps": 1e-5}


def _norm_rows(frames: int, pixels: int, channels: int, **others: Any) -> Arguments:
    x = frames, pixels, channels
    shapes = {"residual": x, "row": (frames, 1, channels), "position": (frames // 2, channels)}
    addends = {name: shapes[name] if there is True else there for name, there in others.items()}
    return {"x": x, "weight": (channels,), "bias": (channels,), "eps": 1e-5, **addends}


def _blend(batch: int, frames: int, pixels: int, channels: int) -> Arguments:
    x = batch * frames, pixels, channels
    return {"spatial": x, "temporal": x, "residual": x, **_mix(batch, frames)}


def _mix(batch: int, frames: int) -> Arguments:
    return {"mix_factor": (1,), "image_only": Zeros((batch, frames))}  # a clip has no still images


def _epilogue(*shape: int) -> Arguments:
    """With a residual; of clips, ``[B, C, F, H, W]``, also with the blend."""
    mix = _mix(shape[0], shape[2]) if len(shape) == 5 else {}
    return {"x": shape, "bias": shape[1:2], "residual": shape, **mix}


def _temporal_conv(batch: int, channels: int, *sizes: int) -> Arguments:
    x = batch, channels, *sizes
    return {
        "x": x,
        "weight": (channels, channels, 3, 1, 1),
        "bias": (channels,),
        "residual": x,
        **_mix(batch, sizes[0]),
    }


def _upsample(frames: int, channels: int, height: int, width: int) -> Arguments:
    weight = channels, channels, 3, 3
    return {"x": (frames, channels, height, width), "weight": weight, "bias": (channels,)}


def _projection(frames: int, pixels: int, channels: int) -> Arguments:
    return {"x": (frames, pixels, channels), "weight": (8 * channels, channels), "bias": (8 * channels,)}


def _spatial(frames: int, heads: int, pixels: int, head_dim: int) -> Arguments:
    return {**dict.fromkeys("qkv", (frames, pixels, heads * head_dim)), "num_heads": heads, "scale": head_dim**-0.5}


def _temporal(batch: int, frames: int, pixels: int, heads: int, head_dim: int) -> Arguments:
    x = batch * frames, pixels, heads * head_dim
    return {**dict.fromkeys("qkv", x), "num_frames": frames, "num_heads": heads, "scale": head_dim**-0.5}


# By op and case; the first case of an op tells most.
CASES: dict[str, dict[str, Arguments]] = {
    "add_layer_norm": {
        "svd level 0, residual and row": _norm_rows(28, 9216, 320, residual=True, row=True),
        "svd level 0, norm alone": _norm_rows(28, 9216, 320),
        "svd level 0, residual": _norm_rows(28, 9216, 320, residual=True),
        "svd level 0, row to the norm": _norm_rows(28, 9216, 320, residual=True, row=True, row_to="norm"),
        "svd level 1, residual and row": _norm_rows(28, 2304, 640, residual=True, row=True),
        "svd level 2, residual and row": _norm_rows(28, 576, 1280, residual=True, row=True),
        "animatediff level 0, residual and position": _norm_rows(32, 4096, 320, residual=True, position=True),
        TINY: _norm_rows(4, 3, 32, residual=True, row=True),
    },
    "alpha_blend": {
        "svd level 0": _blend(2, 14, 9216, 320),
        "svd level 1": _blend(2, 14, 2304, 640),
        "svd level 2": _blend(2, 14, 576, 1280),
        TINY: _blend(1, 2, 4, 32),
    },
    "conv_epilogue": {
        "svd level 0, residual and blend": _epilogue(2, 320, 14, 72, 128),
        "svd level 0, residual": _epilogue(28, 320, 72, 128),
        "svd level 1, residual and blend": _epilogue(2, 640, 14, 36, 64),
        "animatediff level 0, residual": _epilogue(32, 320, 64, 64),
        TINY: _epilogue(1, 32, 2, 4, 4),
    },
    "geglu": {
        "svd level 0": {"x": (28, 9216, 2560)},
        "svd level 1": {"x": (28, 2304, 5120)},
        "svd level 2": {"x": (28, 576, 10240)},
        "animatediff level 0": {"x": (32, 4096, 2560)},
        TINY: {"x": (2, 3, 32)},
    },
    "group_norm_silu": {
        "svd level 0, frames together": _norm(2, 320, 14, 72, 128),
        "svd level 0, frames apart": _norm(28, 320, 72, 128),
        "svd level 1, frames together": _norm(2, 640, 14, 36, 64),
        "svd level 2, frames apart": _norm(28, 1280, 18, 32),
        "svd vae, frames apart": _norm(14, 128, 576, 1024),
        "svd vae, frames together": _norm(1, 256, 14, 288, 512),
        TINY: _norm(1, 32, 2, 4, 4, groups=8),
    },
    "linear_geglu": {
        "svd level 0": _projection(28, 9216, 320),
        "svd level 1": _projection(28, 2304, 640),
        "animatediff level 0": _projection(32, 4096, 320),
        "modelscope level 0": _projection(32, 1024, 320),
        TINY: _projection(2, 3, 16),
    },
    "spatial_attention": {
        "svd level 0": _spatial(28, 5, 9216, 64),
        "wan 1.3b": _spatial(2, 12, 32760, 128),
        "ltx": _spatial(2, 32, 8064, 64),
        "animatediff level 0": _spatial(32, 8, 4096, 40),
        "svd vae": _spatial(14, 1, 9216, 512),
        TINY: _spatial(2, 2, 16, 32),
    },
    "temporal_attention": {
        "svd level 0": _temporal(2, 14, 9216, 5, 64),
        "svd level 1": _temporal(2, 14, 2304, 10, 64),
        "svd level 2": _temporal(2, 14, 576, 20, 64),
        "svd-xt level 0": _temporal(2, 25, 9216, 5, 64),
        "animatediff level 0": _temporal(2, 16, 4096, 8, 40),
        "animatediff level 1": _temporal(2, 16, 1024, 8, 80),
        "animatediff level 2": _temporal(2, 16, 256, 8, 160),
        TINY: _temporal(1, 3, 4, 2, 32),
    },
    "temporal_conv": {
        "svd level 0": _temporal_conv(2, 320, 14, 72, 128),
        "svd level 1": _temporal_conv(2, 640, 14, 36, 64),
        "svd level 2": _temporal_conv(2, 1280, 14, 18, 32),
        TINY: _temporal_conv(1, 32, 2, 4, 4),
    },
    "upsample_conv": {
        "svd vae, 72x128": _upsample(14, 512, 72, 128),
        "svd vae, 144x256": _upsample(4, 512, 144, 256),
        "svd vae, 288x512": _upsample(2, 256, 288, 512),
        TINY: _upsample(1, 32, 4, 4),
    },
}


def _frames_inner(x: Tensor, frames: int) -> Tensor:
    """``[B F, HW, C]`` to ``[B, HW, F, C]``, the order of stock temporal blocks; a copy."""
    return rearrange(x, "(b f) p c -> b p f c", f=frames).contiguous()


def _keys_frames_inner(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int, *_: Any) -> tuple[Any, ...]:
    return q, _frames_inner(k, frames), _frames_inner(v, frames), frames, heads


def _attend_frames_inner(x: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
    """What a stock temporal block spends around its attention: the copy of its input, SDPA, the copy back."""
    q = _frames_inner(x, frames)
    query, key, value = (rearrange(y, "b p f (h d) -> (b p) h f d", h=heads) for y in (q, k, v))
    out = F.scaled_dot_product_attention(query, key, value)
    return rearrange(out, "(b p) h f d -> (b f) p (h d)", b=len(q))


STOCK = {"temporal_attention": Stock(_attend_frames_inner, _keys_frames_inner)}
