"""What stock diffusers runs where that is not an op's reference: the baseline that the op is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb as apply_rotary_emb_ltx
from einops import rearrange
from torch import Tensor

__all__ = ["STOCK", "Stock", "as_it_is"]


def as_it_is(outputs: Any) -> Any:
    return outputs


class Stock(NamedTuple):
    """Stock code, and what brings it together with the op.

    Attributes:
        run: Takes what ``prepare`` returns.
        prepare: Takes the op's arguments by position; puts them as stock code finds them, before the clock runs.
        collect: Takes what ``run`` returns; puts it as the op's outputs are, after the clock.
    """

    run: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]]
    collect: Callable[[Any], Any] = as_it_is


_turn_pairs: Any = apply_rotary_emb  # which returns one tensor, not two

# gated_residual_norm: x, branch, gate, scale and shift of one stream, then those of the next
STREAM = 5


def _streams_apart(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    scale2: Tensor | None,
    shift2: Tensor | None,
    rows: Tensor | None,
    *norm: Any,
) -> tuple[Any, ...]:
    """A stream for each row of the modulation, as CogVideoX keeps text and video."""
    if rows is None:
        return (*norm, x, branch, gate, scale, shift)
    lengths = rows.bincount().tolist()
    tokens = (_split(t, lengths) for t in (x, branch))
    modulation = (_split(t, [1] * len(lengths)) for t in (gate, scale, shift))
    return (*norm, *(t for stream in zip(*tokens, *modulation, strict=True) for t in stream))


def _split(x: Tensor | None, lengths: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(lengths) if x is None else x.split(lengths, dim=1)


def _add_norm_modulate(
    kind: str,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    branch_eps: float | None,
    rounding: str,
    *streams: Any,
) -> list[Tensor]:
    """The residual of each stream, then the norm of all: the next product takes them in one tensor."""
    residuals, normed = [], []
    for i in range(0, len(streams), STREAM):
        x, branch, gate, scale, shift = streams[i : i + STREAM]
        # Wan goes to float32 and back; the others stay in their dtype
        y = z = x.float() if rounding == "once" and gate is not None else x
        if branch is not None:
            z = (y + (branch if gate is None else branch * gate)).type_as(x)
            residuals.append(z)
        if kind == "none":
            continue
        y = z.float() if rounding == "once" else z
        y = F.layer_norm(y, y.shape[-1:], weight, bias, eps) if kind == "layer" else _rms_norm(y, weight, eps)
        if scale is not None:
            y = y * (1 + scale) + shift
        normed.append(y.type_as(x))
    return [*residuals, *([torch.cat(normed, dim=1)] if len(normed) > 1 else normed)]


def _streams_joined(outputs: list[Tensor]) -> list[Tensor]:
    *residuals, normed = outputs
    return [torch.cat(residuals, dim=1), normed] if len(residuals) > 1 else outputs


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """diffusers' RMSNorm."""
    y = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) if weight is None else y.to(weight.dtype) * weight


def _tables_of_stock(q: Tensor, k: Tensor, heads: int, norm: str, eps: float, rounding: str, *args: Any) -> Any:
    """The rotary tables as each processor takes them."""
    weights, (cos, sin), others = args[:4], args[5:7], args[7:]
    return (q, k, heads, norm, eps, *weights, *(_table(len(q), norm, table) for table in (cos, sin)), *others)


def _table(batch: int, norm: str, table: Tensor) -> Tensor:
    """Each angle twice: ``[S, D]``, Wan's ``[1, S, 1, D]`` or LTX's ``[B, S, H*D]``."""
    twice = table.repeat_interleave(2, -1)
    if norm != "rms_all":
        return twice[0, :, 0]
    return twice if table.shape[2] == 1 else twice.flatten(2).expand(batch, -1, -1)


def _norm_turn(
    q: Tensor,
    k: Tensor,
    heads: int,
    norm: str,
    eps: float,
    weight_q: Tensor,
    weight_k: Tensor,
    bias_q: Tensor | None,
    bias_k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    start: int,
    v: Tensor | None,
    second_q: Tensor | None,
    second_k: Tensor | None,
    second_v: Tensor | None,
    second_weight_q: Tensor | None,
    second_weight_k: Tensor | None,
    *_: Any,
) -> list[Tensor]:
    """What the attention processors of Wan, LTX, HunyuanVideo and CogVideoX do before they attend."""
    pairs = (q, weight_q, bias_q), (k, weight_k, bias_k)
    if norm == "rms_all":
        normed = [F.rms_norm(x, x.shape[-1:], weight, eps) for x, weight, _ in pairs]
        if cos.ndim == 4:
            return [_turn_wan(x.unflatten(2, (heads, -1)), cos, sin) for x in normed]
        return [apply_rotary_emb_ltx(x, (cos, sin)) for x in normed]
    if norm == "layer_head":
        turned = []
        for x, weight, bias in pairs:
            y = F.layer_norm(x.unflatten(2, (heads, -1)).transpose(1, 2), weight.shape, weight, bias, eps)
            y[:, :, start:] = _turn_pairs(y[:, :, start:], (cos, sin))
            turned.append(y.transpose(1, 2))
        return turned
    turned = [
        _turn_pairs(_rms_norm(x.unflatten(2, (heads, -1)), weight, eps), (cos, sin), sequence_dim=1)
        for x, weight, _ in pairs
    ]
    if second_q is None or second_k is None or second_v is None or v is None:
        return turned
    others = [
        _rms_norm(x.unflatten(2, (heads, -1)), weight, eps)
        for x, weight in ((second_q, second_weight_q), (second_k, second_weight_k))
    ]
    values = (x.unflatten(2, (heads, -1)) for x in (v, second_v))
    return [torch.cat(streams, dim=1) for streams in (*zip(turned, others, strict=True), tuple(values))]


def _turn_wan(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A copy of what is written out in Wan's processor."""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)


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


STOCK = {
    "gated_residual_norm": Stock(_add_norm_modulate, _streams_apart, _streams_joined),
    "qk_norm_rope": Stock(_norm_turn, _tables_of_stock),
    "temporal_attention": Stock(_attend_frames_inner, _keys_frames_inner),
}
