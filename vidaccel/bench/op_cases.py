"""The ops that the bench measures, at the models' shapes.

A new op adds an entry to :data:`OPS`; ``ops.py`` measures it.
"""

from __future__ import annotations

import copy
import math
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.resnet import TemporalResnetBlock
from torch import Tensor, nn

from vidaccel.bench.op_case import Arguments, Case, Op, Provider, channels_first, passes
from vidaccel.bench.streaming_cases import ADD_LAYER_NORM, ALPHA_BLEND, CONV_EPILOGUE, GEGLU
from vidaccel.blocks.unet.resnet import FusedTemporalResnetBlock
from vidaccel.kernels.attention import spatial_attention as sa
from vidaccel.kernels.attention import temporal_attention as ta
from vidaccel.kernels.conv import upsample_conv as uc
from vidaccel.kernels.ffn import linear_geglu as lg
from vidaccel.kernels.norm import group_norm_silu as gn
from vidaccel.sites.rules import Swap
from vidaccel.sites.site import Site

__all__ = ["OPS"]


def _norm_case(name: str, *shape: int, groups: int = 32) -> Case:
    return Case(name, (shape, shape[1:2], shape[1:2]), (groups, 1e-5))


def _stock_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


_GROUP_NORM_SILU = Op(
    cases=(
        _norm_case("svd level 0, frames together", 2, 320, 14, 72, 128),
        _norm_case("svd level 0, frames apart", 28, 320, 72, 128),
        _norm_case("svd level 1, frames together", 2, 640, 14, 36, 64),
        _norm_case("svd level 2, frames apart", 28, 1280, 18, 32),
        _norm_case("svd vae, frames apart", 14, 128, 576, 1024),
        _norm_case("svd vae, frames together", 1, 256, 14, 288, 512),
    ),
    tiny=_norm_case("tiny", 1, 32, 2, 4, 4, groups=8),
    reference=gn.group_norm_silu_ref,
    providers={
        "eager": Provider(_stock_norm, channels_first),
        "eager+channels_last": Provider(_stock_norm),
        "compile": Provider(_stock_norm, channels_first, compiled=True),
        "compile+channels_last": Provider(_stock_norm, compiled=True),
        "ours": Provider(gn.group_norm_silu),
        "ours, one stage": Provider(gn.group_norm_silu, one_stage=True),
    },
    numbers=passes(3),
)


def _attention_case(name: str, batch: int, frames: int, pixels: int, heads: int, head_dim: int) -> Case:
    return Case(name, ((batch * frames, pixels, heads * head_dim),) * 3, (frames, heads))


def _frames_inner(x: Tensor, frames: int) -> Tensor:
    """``[B F, HW, C]`` to ``[B, HW, F, C]``, the order of stock temporal blocks; a copy."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2).contiguous()


def _all_frames_inner(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Arguments:
    return _frames_inner(q, frames), _frames_inner(k, frames), _frames_inner(v, frames)


def _keys_frames_inner(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Arguments:
    return q, _frames_inner(k, frames), _frames_inner(v, frames)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
    """Self-attention over the frames of ``[B, HW, F, C]``; returns a view ``[B, F, HW, C]``."""
    q_items, k_items, v_items = (x.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q_items, k_items, v_items).transpose(1, 2)
    return out.reshape(q.shape).transpose(1, 2)


def _stock_attention(x: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
    """What a stock temporal block spends around its attention: the copy of its input, SDPA, the copy back."""
    return _sdpa(_frames_inner(x, frames), k, v, frames, heads).contiguous()


_TEMPORAL_ATTENTION = Op(
    cases=(
        _attention_case("svd level 0", 2, 14, 9216, 5, 64),
        _attention_case("svd level 1", 2, 14, 2304, 10, 64),
        _attention_case("svd level 2", 2, 14, 576, 20, 64),
        _attention_case("svd-xt level 0", 2, 25, 9216, 5, 64),
        _attention_case("animatediff level 0", 2, 16, 4096, 8, 40),
        _attention_case("animatediff level 1", 2, 16, 1024, 8, 80),
        _attention_case("animatediff level 2", 2, 16, 256, 8, 160),
    ),
    tiny=_attention_case("tiny", 1, 3, 4, 2, 32),
    reference=ta.temporal_attention_ref,
    providers={
        "eager": Provider(_stock_attention, _keys_frames_inner),
        "eager, SDPA alone": Provider(_sdpa, _all_frames_inner),
        "compile": Provider(_stock_attention, _keys_frames_inner, compiled=True),
        "ours": Provider(ta.temporal_attention),
        "ours, one stage": Provider(ta.temporal_attention, one_stage=True),
    },
    numbers=passes(4),
    flops=lambda case: 4.0 * math.prod(case.shapes[0]) * case.scalars[0],
)


def _upsample_case(name: str, frames: int, channels: int, height: int, width: int) -> Case:
    return Case(name, ((frames, channels, height, width), (channels, channels, 3, 3), (channels,)))


def _cells_flops(case: Case) -> float:
    """Of four 2x2 convolutions, which are the 3x3 one on the image of twice the sides."""
    return 2.0 * math.prod(case.shapes[0]) * case.shapes[0][1] * 4 * 4


_UPSAMPLE_CONV = Op(
    cases=(
        _upsample_case("svd vae, 72x128", 14, 512, 72, 128),
        _upsample_case("svd vae, 144x256", 4, 512, 144, 256),
        _upsample_case("svd vae, 288x512", 2, 256, 288, 512),
    ),
    tiny=_upsample_case("tiny", 1, 32, 4, 4),
    reference=uc.upsample_conv_ref,
    providers={
        "eager": Provider(uc.upsample_conv_ref, channels_first),
        "eager+channels_last": Provider(uc.upsample_conv_ref),
        "compile": Provider(uc.upsample_conv_ref, channels_first, compiled=True),
        "compile+channels_last": Provider(uc.upsample_conv_ref, compiled=True),
        "ours": Provider(uc.upsample_conv),
    },
    numbers=passes(13),
    flops=_cells_flops,
)


def _sequence_case(name: str, batch: int, heads: int, tokens: int, head_dim: int) -> Case:
    return Case(name, ((batch, tokens, heads * head_dim),) * 3, (heads,))


def _sequence_flops(case: Case) -> float:
    batch, tokens, channels = case.shapes[0]
    return 4.0 * batch * tokens**2 * channels


def _implementation(name: str) -> Provider:
    def problem(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> str | None:
        return sa.SPATIAL_ATTENTION.unserved(q, k, v, num_heads, 1.0, impl=name)

    return Provider(partial(sa.spatial_attention, impl=name), problem=problem)


_SPATIAL_ATTENTION = Op(
    cases=(
        _sequence_case("svd level 0", 28, 5, 9216, 64),
        _sequence_case("wan 1.3b", 2, 12, 32760, 128),
        _sequence_case("ltx", 2, 32, 8064, 64),
        _sequence_case("animatediff level 0", 32, 8, 4096, 40),
        _sequence_case("svd vae", 14, 1, 9216, 512),
    ),
    tiny=_sequence_case("tiny", 2, 2, 16, 32),
    reference=sa.spatial_attention_ref,
    providers={
        "eager": Provider(sa.spatial_attention_ref),
        **{name: _implementation(name) for name in ("cudnn", "flash", "fa3", "triton", "gluon", "gemm")},
        "ours": Provider(sa.spatial_attention),
    },
    numbers=passes(4),
    flops=_sequence_flops,
)


def _projection_case(name: str, frames: int, pixels: int, channels: int) -> Case:
    return Case(name, ((frames, pixels, channels), (8 * channels, channels), (8 * channels,)))


def _projection_numbers(case: Case) -> float:
    """x, the weight, and a result half as wide as the projection."""
    x, weight, bias = (math.prod(shape) for shape in case.shapes)
    return x + weight + bias + 4 * x


_LINEAR_GEGLU = Op(
    cases=(
        _projection_case("svd level 0", 28, 9216, 320),
        _projection_case("svd level 1", 28, 2304, 640),
        _projection_case("animatediff level 0", 32, 4096, 320),
        _projection_case("modelscope level 0", 32, 1024, 320),
    ),
    tiny=_projection_case("tiny", 2, 3, 16),
    reference=lg.linear_geglu_ref,
    providers={
        "eager": Provider(lg.linear_geglu_ref),
        "compile": Provider(lg.linear_geglu_ref, compiled=True),
        "two-step": Provider(partial(lg.linear_geglu, impl=lg.TWO_STEP)),
        "ours": Provider(lg.linear_geglu),
    },
    numbers=_projection_numbers,
    flops=lambda case: 16.0 * math.prod(case.shapes[0]) * case.shapes[0][2],
)


def _block_case(name: str, *shape: int, time_channels: int) -> Case:
    return Case(name, (shape, (shape[0], shape[2], time_channels)))


def _with_block(x: Tensor, time_embedding: Tensor) -> Arguments:
    """The block as SVD makes it, with random weights, and its arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = TemporalResnetBlock(x.shape[1], temb_channels=time_embedding.shape[-1], eps=1e-5)
    return block.to(x.device, x.dtype).eval().requires_grad_(False), x, time_embedding


def _channels_last_weights(block: TemporalResnetBlock, x: Tensor, time_embedding: Tensor) -> Arguments:
    block = copy.deepcopy(block)
    for conv in (block.conv1, block.conv2):
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return block, x, time_embedding


def _fused(block: TemporalResnetBlock, x: Tensor, time_embedding: Tensor) -> Arguments:
    fused, *others = _channels_last_weights(block, x, time_embedding)
    rule = Swap(FusedTemporalResnetBlock)
    # the bench itself holds the result against float64
    rule.apply(fused, [Site("block", op, fidelity) for op, fidelity in rule.ops.items()], self_check=False)
    return fused, *others


def _run_block(block: nn.Module, x: Tensor, time_embedding: Tensor) -> Tensor:
    return block(x, time_embedding)


def _block_flops(case: Case) -> float:
    return 2 * 2.0 * math.prod(case.shapes[0]) * 3 * case.shapes[0][1]  # two convolutions, three frames each


_TEMPORAL_RESNET_BLOCK = Op(
    cases=(_block_case("svd level 0", 2, 320, 14, 72, 128, time_channels=1280),),
    tiny=_block_case("tiny", 1, 32, 2, 4, 4, time_channels=16),
    reference=_run_block,
    providers={
        "eager": Provider(_run_block, channels_first),
        "eager+channels_last+cudnn.benchmark": Provider(_run_block, _channels_last_weights, cudnn_benchmark=True),
        "compile": Provider(_run_block, channels_first, compiled=True),
        "compile+channels_last+cudnn.benchmark": Provider(
            _run_block, _channels_last_weights, compiled=True, cudnn_benchmark=True
        ),
        "ours": Provider(_run_block, _fused),
        "ours+cudnn.benchmark": Provider(_run_block, _fused, cudnn_benchmark=True),
        "ours, one stage": Provider(_run_block, _fused, one_stage=True),
    },
    numbers=passes(13),  # two norms of three each, two convolutions of two, and three for the sum
    flops=_block_flops,
    build=_with_block,
)

# `vidaccel bench --op NAME`
OPS = {
    "add_layer_norm": ADD_LAYER_NORM,
    "alpha_blend": ALPHA_BLEND,
    "conv_epilogue": CONV_EPILOGUE,
    "geglu": GEGLU,
    "group_norm_silu": _GROUP_NORM_SILU,
    "linear_geglu": _LINEAR_GEGLU,
    "spatial_attention": _SPATIAL_ATTENTION,
    "temporal_attention": _TEMPORAL_ATTENTION,
    "temporal_resnet_block": _TEMPORAL_RESNET_BLOCK,
    "upsample_conv": _UPSAMPLE_CONV,
}
