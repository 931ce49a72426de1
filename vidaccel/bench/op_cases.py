"""The ops that the bench measures, at the models' shapes.

A case says an op's arguments by the names of its reference's parameters; those that it leaves out keep their defaults.
A tuple is the shape of a random tensor, from 4-D on in channels-last memory. A new op adds an entry to :data:`CASES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CASES", "TINY", "Arguments", "Float32", "Stretches", "Zeros"]

TINY = "tiny"  # the case of a dry run

Arguments = Mapping[str, Any]


class Zeros(tuple[int, ...]):
    """The shape of a tensor of zeros."""


class Float32(tuple[int, ...]):
    """The shape of a random tensor in float32 whatever the others are in, in contiguous memory."""


@dataclass(frozen=True)
class Stretches:
    """The row of a modulation for each token: i for the next ``lengths[i]`` of them."""

    lengths: tuple[int, ...]


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


def _gated(x: tuple[int, int, int], kind: str, rounding: str, *others: str, rows: Stretches | None = None) -> Arguments:
    """With ``others`` beside x: branch, gate, scale, shift, weight, bias; the modulation has one row, or ``rows``."""
    batch, _, channels = x
    row = 1 if rows is None else len(rows.lengths), channels
    modulation = Float32((1, *row)) if rounding == "once" else (batch, *row)
    weight = Float32((channels,)) if rounding == "once" else (channels,)
    shapes = {"branch": x, "weight": weight, "bias": weight}
    eps = 1e-5 if rows else 1e-6
    return {"x": x, "kind": kind, "eps": eps, "rounding": rounding, "rows": rows} | {
        name: shapes.get(name, modulation) for name in others
    }


MODULATION = ("scale", "shift")
NORM = ("weight", "bias")


def _query_key(
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    norm: str,
    *,
    start: int = 0,
    text: int = 0,
    per_head: bool = False,
) -> Arguments:
    """Queries and keys that turn from token ``start`` on; joint ones with as many tokens of ``text``."""
    x, other = (batch, tokens, heads * head_dim), (batch, text, heads * head_dim)
    width = (heads * head_dim,) if norm == "rms_all" else (head_dim,)
    table = Float32((1, tokens - start, heads if per_head else 1, head_dim // 2))
    case = {"q": x, "k": x, "num_heads": heads, "norm": norm, "eps": 1e-6, "rope": "pairs", "start": start}
    case |= {"weight_q": width, "weight_k": width, "cos": table, "sin": table}
    if norm == "layer_head":
        case |= {"bias_q": width, "bias_k": width}
    if norm == "rms_head":
        case |= {"rounding": "each"}
    if text:
        case |= {"v": x, **dict.fromkeys(("second_q", "second_k", "second_v"), other)}
        case |= {"second_weight_q": width, "second_weight_k": width}
    return case


def _first_product(batch: int, tokens: int, channels: int, width: int) -> Arguments:
    """Of a feed-forward."""
    return {"x": (batch, tokens, channels), "weight": (width, channels), "bias": (width,), "approximate": "tanh"}


# The video tokens of the models, at their default sizes.
WAN_1_3B, WAN_TI2V = (1, 32760, 1536), (1, 27280, 3072)
HUNYUAN, LTX, COGVIDEOX = (1, 49290, 2048), (2, 7392, 2048), (2, 17776, 3072)
TEXT_AND_VIDEO = Stretches((226, 17550))

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
    "gated_residual_norm": {
        "wan 1.3b, gate and norm": _gated(WAN_1_3B, "layer", "once", "branch", "gate", *NORM),
        "wan 1.3b, residual, norm and modulation": _gated(WAN_1_3B, "layer", "once", "branch", *MODULATION),
        "wan 1.3b, norm and modulation": _gated(WAN_1_3B, "layer", "once", *MODULATION),
        "wan 1.3b, gate": _gated(WAN_1_3B, "none", "once", "branch", "gate"),
        "wan ti2v, gate and norm": _gated(WAN_TI2V, "layer", "once", "branch", "gate", *NORM),
        "wan ti2v, residual, norm and modulation": _gated(WAN_TI2V, "layer", "once", "branch", *MODULATION),
        "wan ti2v, norm and modulation": _gated(WAN_TI2V, "layer", "once", *MODULATION),
        "hunyuanvideo 1.5, gate, norm and modulation": _gated(HUNYUAN, "layer", "each", "branch", "gate", *MODULATION),
        "hunyuanvideo 1.5, norm and modulation": _gated(HUNYUAN, "layer", "each", *MODULATION),
        "ltx, residual, norm and modulation": _gated(LTX, "rms", "each", "branch", *MODULATION),
        "ltx, norm and modulation": _gated(LTX, "rms", "each", *MODULATION),
        "cogvideox-5b, gate, norm and modulation": _gated(
            COGVIDEOX, "layer", "each", "branch", "gate", *MODULATION, *NORM, rows=TEXT_AND_VIDEO
        ),
        "cogvideox-5b, norm and modulation": _gated(
            COGVIDEOX, "layer", "each", *MODULATION, *NORM, rows=TEXT_AND_VIDEO
        ),
        TINY: _gated((2, 5, 32), "layer", "each", "branch", "gate", *MODULATION, rows=Stretches((2, 3))),
    },
    "geglu": {
        "svd level 0": {"x": (28, 9216, 2560)},
        "svd level 1": {"x": (28, 2304, 5120)},
        "svd level 2": {"x": (28, 576, 10240)},
        "animatediff level 0": {"x": (32, 4096, 2560)},
        TINY: {"x": (2, 3, 32)},
    },
    "swiglu": {
        "mochi": {"x": (2, 6360, 16384)},
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
    "linear_gelu": {
        "wan 1.3b": _first_product(*WAN_1_3B, 8960),
        "wan ti2v": _first_product(*WAN_TI2V, 14336),
        "hunyuanvideo 1.5": _first_product(*HUNYUAN, 8192),
        "ltx": _first_product(*LTX, 8192),
        "cogvideox-5b": _first_product(*COGVIDEOX, 12288),
        TINY: _first_product(2, 3, 16, 64),
    },
    "qk_norm_rope": {
        "wan 1.3b": _query_key(1, 32760, 12, 128, "rms_all"),
        "wan ti2v": _query_key(1, 27280, 24, 128, "rms_all"),
        "hunyuanvideo 1.5, and text": _query_key(1, 49290, 16, 128, "rms_head", text=64),
        "ltx": _query_key(2, 7392, 32, 64, "rms_all", per_head=True),
        "cogvideox-5b": _query_key(2, 17776, 48, 64, "layer_head", start=226),
        TINY: _query_key(1, 5, 2, 16, "rms_head", text=3),
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
