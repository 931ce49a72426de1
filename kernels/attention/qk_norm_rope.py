"""Queries and keys between their projections and their attention: norm, rotary embedding, one buffer for two streams.

    q, k = rope(norm(q) * weight_q, cos, sin), rope(norm(k) * weight_k, cos, sin)

in one pass over rows ``[B, S, H*D]``. The norm runs across all heads of a token (``"rms_all"``: Wan, LTX) or over each
head (``"rms_head"``: HunyuanVideo, Cosmos, Mochi; ``"layer_head"``: CogVideoX), or there is none. The rotary embedding
turns pairs of neighbouring channels (``"pairs"``), or channel i of a head with channel i + D/2 (``"halves"``), from
token ``start`` on; the tables hold each angle once. Queries and keys of a token share them, and one program.

A joint block has a second stream (text) with projections and weights of its own, and no rotary embedding. Its queries,
keys and values come in as ``second``; then the results are joint ones, the streams one behind the other, that attention
reads as they are: no ``torch.cat``.

``rounding`` as in ``gated_residual_norm``: ``"once"`` is ``torch.nn.RMSNorm``; ``"each"`` is diffusers' RMSNorm, which
rounds before it multiplies by a weight of half precision. Either way the result of the norm is rounded, and that of the
rotary embedding, which is calculated in float32. Fidelity: math-exact. Bound by memory: reads and writes q and k once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.kernels.check import MOST_ELEMENTS, Part, cuts
from vidaccel.kernels.op import Costs, Op

__all__ = ["QK_NORM_ROPE", "HeadNorm", "Rope", "SecondStream", "qk_norm_rope", "qk_norm_rope_ref"]

NormKind = Literal["rms_all", "rms_head", "layer_head", "none"]
RopeKind = Literal["pairs", "halves", "none"]
Rounding = Literal["once", "each"]


class HeadNorm(NamedTuple):
    """The norms of queries and keys: across heads with weights ``[H*D]``, or per head with weights ``[D]``.

    Attributes:
        kind: What is normed, and how.
        eps: Added to the variance, or to the mean square.
        weight_q: Any float dtype, or None.
        weight_k: As ``weight_q``.
        bias_q: Of a LayerNorm, or None.
        bias_k: As ``bias_q``.
        rounding: Whether the norm is rounded before its weight is multiplied (``"each"``), or only after (``"once"``).
    """

    kind: NormKind
    eps: float = 0.0
    weight_q: Tensor | None = None
    weight_k: Tensor | None = None
    bias_q: Tensor | None = None
    bias_k: Tensor | None = None
    rounding: Rounding = "once"


class Rope(NamedTuple):
    """A rotary embedding.

    Attributes:
        kind: Which channels turn together.
        cos: ``[B, S, H, D/2]``, float32, any strides; B and H may be 1: the same for all. S counts the tokens that
            turn, those from ``start`` on.
        sin: As ``cos``.
        start: The first token that turns.
    """

    kind: RopeKind
    cos: Tensor
    sin: Tensor
    start: int = 0


class SecondStream(NamedTuple):
    """Queries, keys and values ``[B, T, H*D]`` of another stream, and their norms (of the same kind).

    Attributes:
        first: Whether this stream comes before the other in the joint result.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    norm: HeadNorm
    first: bool = False


class _Call(NamedTuple):
    """The arguments of the op, by position."""

    q: Tensor
    k: Tensor
    num_heads: int
    norm: str
    eps: float
    rounding: str
    weight_q: Tensor | None
    weight_k: Tensor | None
    bias_q: Tensor | None
    bias_k: Tensor | None
    rope: str
    cos: Tensor | None
    sin: Tensor | None
    start: int
    v: Tensor | None
    second_q: Tensor | None
    second_k: Tensor | None
    second_v: Tensor | None
    second_weight_q: Tensor | None
    second_weight_k: Tensor | None
    second_bias_q: Tensor | None
    second_bias_k: Tensor | None
    second_first: bool


def qk_norm_rope_ref(*args: Any) -> list[Tensor]:
    """The specification: ``[q, k]``, or joint ``[q, k, v]``. Pass float64 inputs for gold values."""
    call = _Call(*args)
    q = _rope(call, _norm(call, call.q, call.weight_q, call.bias_q))
    k = _rope(call, _norm(call, call.k, call.weight_k, call.bias_k))
    if call.second_q is None:
        return [q.contiguous(), k.contiguous()]
    second_q = _norm(call, call.second_q, call.second_weight_q, call.second_bias_q)
    second_k = _norm(call, call.second_k, call.second_weight_k, call.second_bias_k)
    pairs: list[Any] = [(q, second_q), (k, second_k), (call.v, call.second_v)]
    return [torch.cat(pair[::-1] if call.second_first else pair, dim=1) for pair in pairs]


def _norm(call: _Call, x: Any, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``[B, S, H*D]``, rounded to the dtype of x."""
    if call.norm == "none":
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = x.shape
    y = x.to(wide) if call.norm == "rms_all" else x.to(wide).unflatten(2, (call.num_heads, -1))
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    if call.norm == "layer_head":
        y = F.layer_norm(y, y.shape[-1:], weight, bias, call.eps)
    elif call.rounding == "each":
        y = F.rms_norm(y, y.shape[-1:], None, call.eps).to(x.dtype)
        y = y if weight is None else y * weight.to(x.dtype)
    else:
        y = F.rms_norm(y, y.shape[-1:], weight, call.eps)
    return y.to(x.dtype).view(shape)


def _rope(call: _Call, x: Tensor) -> Tensor:
    if call.rope == "none":
        return x
    assert call.cos is not None and call.sin is not None
    wide = torch.promote_types(x.dtype, torch.float32)
    still, turning = x[:, : call.start], x[:, call.start :].unflatten(2, (call.num_heads, -1)).to(wide)
    cos, sin = call.cos.to(wide), call.sin.to(wide)
    if call.rope == "pairs":
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    else:
        a, b = turning.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return torch.cat([still, turned.flatten(2).to(x.dtype)], dim=1)


def _joint_shape(call: _Call) -> tuple[int, ...]:
    batch, tokens, channels = call.q.shape
    return batch, tokens + (0 if call.second_q is None else call.second_q.shape[1]), channels


def _fake(*args: Any) -> list[Tensor]:
    call = _Call(*args)
    return [call.q.new_empty(_joint_shape(call)) for _ in range(2 if call.second_q is None else 3)]


def _costs(*args: Any) -> Costs:
    """Each of q, k (and v) once in, once out; the tables once."""
    call = _Call(*args)
    outputs = 2 if call.second_q is None else 3
    batch, tokens, channels = _joint_shape(call)
    tables = 0 if call.cos is None else 2 * call.cos.nbytes
    return Costs(bytes=2 * outputs * batch * tokens * channels * call.q.itemsize + tables)


def _parts(*args: Any) -> Iterator[Part]:
    """Some samples at a time: the tokens of a joint result do not lie where those of one stream do."""
    call = _Call(*args)
    batch, tokens, channels = _joint_shape(call)
    if call.second_q is None and batch * tokens * channels > MOST_ELEMENTS:
        yield from _token_parts(call)
        return
    for n in cuts(batch, tokens * channels):
        samples = {name: _samples(getattr(call, name), n) for name in _BATCHED}
        yield Part(tuple(call._replace(**samples)), lambda outputs, n=n: tuple(out[n] for out in outputs))


_BATCHED = "q", "k", "v", "second_q", "second_k", "second_v", "cos", "sin"


def _samples(x: Tensor | None, n: slice) -> Tensor | None:
    return x if x is None or len(x) == 1 else x[n]


def _token_parts(call: _Call) -> Iterator[Part]:
    batch, tokens, channels = call.q.shape
    for n in cuts(batch, tokens * channels):
        for s in cuts(tokens, (n.stop - n.start) * channels):
            turning = slice(max(s.start - call.start, 0), max(s.stop - call.start, 0))
            tables = {} if call.cos is None else {
                name: _samples(getattr(call, name), n)[:, turning] for name in ("cos", "sin")  # type: ignore[index]
            }  # fmt: skip
            start = min(max(call.start - s.start, 0), s.stop - s.start)
            part = call._replace(q=call.q[n, s], k=call.k[n, s], start=start, **tables)
            yield Part(tuple(part), lambda outputs, n=n, s=s: tuple(out[n, s] for out in outputs))


def _validate(*args: Any) -> None:
    call = _Call(*args)
    q, k = call.q, call.k
    if q.ndim != 3 or q.shape != k.shape or q.dtype != k.dtype:
        raise ValueError(f"qk_norm_rope: q and k must be [B, S, H*D] alike, got {tuple(q.shape)} and {tuple(k.shape)}")
    batch, tokens, channels = q.shape
    if call.num_heads < 1 or channels % call.num_heads:
        raise ValueError(f"qk_norm_rope: num_heads={call.num_heads} must divide the H*D={channels} channels")
    if call.norm not in get_args(NormKind) or call.rope not in get_args(RopeKind):
        raise ValueError(f"qk_norm_rope: no such norm or rope: {call.norm!r}, {call.rope!r}")
    head_dim = channels // call.num_heads
    width = channels if call.norm == "rms_all" else head_dim
    for name in _Call._fields[6:10] + _Call._fields[18:22]:
        parameter = getattr(call, name)
        if parameter is not None and parameter.shape != (width,):
            raise ValueError(f"qk_norm_rope: {name} must be [{width}], got {tuple(parameter.shape)}")
    if call.rope != "none":
        _validate_tables(call, batch, tokens, head_dim)
    if call.second_q is not None:
        _validate_second(call)


def _validate_tables(call: _Call, batch: int, tokens: int, head_dim: int) -> None:
    for name in ("cos", "sin"):
        table = getattr(call, name)
        fits = table is not None and table.ndim == 4 and table.shape[0] in (1, batch)
        if not fits or table.shape[1] != tokens - call.start or table.shape[2] not in (1, call.num_heads):
            got = None if table is None else tuple(table.shape)
            raise ValueError(f"qk_norm_rope: {name} must be [B, {tokens - call.start}, H, D/2], got {got}")
        if table.shape[3] * 2 != head_dim:
            raise ValueError(f"qk_norm_rope: {name} must hold D/2={head_dim // 2} angles, got {table.shape[3]}")


def _validate_second(call: _Call) -> None:
    q, shapes = call.q, [None if t is None else tuple(t.shape) for t in (call.second_q, call.second_k, call.second_v)]
    assert call.second_q is not None
    one = tuple(call.second_q.shape)
    if any(shape != one for shape in shapes) or one[0] != len(q) or one[2] != q.shape[2]:
        raise ValueError(f"qk_norm_rope: q, k and v of the second stream must be [B, T, H*D] alike, got {shapes}")
    if call.v is None or call.v.shape != q.shape:
        raise ValueError("qk_norm_rope: with a second stream, v must be given, shaped as q is")


QK_NORM_ROPE = Op(
    "qk_norm_rope",
    reference=qk_norm_rope_ref,
    implementations={},
    fake=_fake,
    costs=_costs,
    parts=_parts,
    validate=_validate,
)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    num_heads: int,
    norm: HeadNorm,
    rope: Rope | None = None,
    *,
    v: Tensor | None = None,
    second: SecondStream | None = None,
    impl: str | None = None,
) -> list[Tensor]:
    """Normed and turned queries and keys; with a ``second`` stream, joint ones, and the joint values.

    Args:
        q: ``[B, S, H*D]``, fp16 / bf16 / fp32; rows of any stride (a slice of a packed projection).
        k: As ``q``.
        num_heads: ``H``.
        norm: Of q and k.
        rope: None: nothing turns.
        v: As ``q``; only with ``second``.
        second: None: there is one stream.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        q and k ``[B, S, H*D]``, or q, k and v ``[B, S + T, H*D]``; contiguous, in ``q.dtype``.

    Raises:
        ValueError: The shapes do not fit one another; ``impl`` cannot run here.
    """
    kind, cos, sin, start = ("none", None, None, 0) if rope is None else rope
    other: Any = second or SecondStream(None, None, None, HeadNorm("none"))  # type: ignore[arg-type]
    return QK_NORM_ROPE(
        q, k, num_heads, norm.kind, norm.eps, norm.rounding,
        norm.weight_q, norm.weight_k, norm.bias_q, norm.bias_k,
        kind, cos, sin, start,
        v, other.q, other.k, other.v,
        other.norm.weight_q, other.norm.weight_k, other.norm.bias_q, other.norm.bias_k, other.first,
        impl=impl,
    )  # fmt: skip
