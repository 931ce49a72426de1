"""What a video transformer does between two products: a gated residual, the next norm, its scale and shift.

    z[b, s, c] = x[b, s, c] + gate[b, r(s), c] * branch[b, s, c]
    y[b, s, c] = norm(z)[b, s, c] * (1 + scale[b, r(s), c]) + shift[b, r(s), c]

in one pass over rows of channels. Each piece may be left out: without a branch it is the modulated norm at the start of
a block (:func:`norm_modulate`), without a gate a plain residual, without scale and shift a plain norm, without a norm
the residual alone. ``norm`` is LayerNorm or RMSNorm, with weight and bias or without. Of one norm there may be two
modulations, ``y2`` beside ``y``. The branch itself may be normed on its way (``branch_norm``, Mochi's RMSNorm).

The modulation has R rows per sample: one, or one for each token, or a few that ``rows`` assigns to the tokens (text and
video; the noised frames and the first one). It is mostly a chunk of a bigger tensor, and is read there by its strides,
as is a branch that is a slice of one.

Families round at different places, and here is rounded where each of them stores (``rounding``):

* ``"once"`` (Wan): everything from x and the branch to z, and from z to y, in float32, rounded once;
* ``"each"`` (LTX, HunyuanVideo, CogVideoX): gate * branch, z, the norm, 1 + scale, the product and the sum, each to
  the dtype of x.

Statistics are those of the stored z, in float32. Fidelity: math-exact. Bound by memory: reads x and branch, writes z
and y; eager makes 15 to 30 such passes, half of them in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.kernels.check import Part, cuts
from vidaccel.kernels.op import Costs, Op

__all__ = [
    "GATED_RESIDUAL_NORM",
    "Norm",
    "Rounding",
    "gated_residual",
    "gated_residual_norm",
    "gated_residual_norm_ref",
    "norm_modulate",
]

Kind = Literal["layer", "rms", "none"]
Rounding = Literal["once", "each"]


class Norm(NamedTuple):
    """A norm over channels.

    Attributes:
        kind: LayerNorm, RMSNorm, or none.
        eps: Added to the variance, or to the mean square.
        weight: ``[C]``, any float dtype, or None.
        bias: ``[C]``, of a LayerNorm with a weight, or None.
    """

    kind: Kind
    eps: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | None = None


NO_NORM = Norm("none")


class _Call(NamedTuple):
    """The arguments of the op, by position."""

    x: Tensor
    branch: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    scale2: Tensor | None
    shift2: Tensor | None
    rows: Tensor | None
    kind: str
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    branch_eps: float | None
    rounding: str


def gated_residual_norm_ref(*args: Any) -> list[Tensor]:
    """The specification: ``[z, y, y2]`` without those that there are not. Pass float64 inputs for gold values."""
    call = _Call(*args)
    z, outputs = call.x, []
    if call.branch is not None:
        z = _residual(call)
        outputs.append(z)
    if call.kind != "none":
        normed = _norm(call, z)
        outputs.append(_modulated(call, normed, call.scale, call.shift))
        if call.scale2 is not None:
            outputs.append(_modulated(call, normed, call.scale2, call.shift2))
    return outputs


def _wide(call: _Call) -> torch.dtype:
    """What is calculated in."""
    return torch.promote_types(call.x.dtype, torch.float32)


def _residual(call: _Call) -> Tensor:
    x, branch = call.x, call.branch
    assert branch is not None
    wide, rounded = _wide(call), x.dtype if call.rounding == "each" else _wide(call)
    if call.branch_eps is not None:  # Mochi's, in float32 up to and with the gate
        branch = F.rms_norm(branch.to(wide), branch.shape[-1:], eps=call.branch_eps)
        branch = branch if call.gate is None else branch * _of_tokens(call.gate, call.rows).to(wide)
        return x + branch.to(x.dtype)
    if call.gate is not None:
        branch = branch.to(rounded) * _of_tokens(call.gate, call.rows).to(rounded)
    return (x.to(rounded) + branch).to(x.dtype)


def _norm(call: _Call, z: Tensor) -> Tensor:
    """In float32, or rounded to the dtype of x where each step is."""
    wide, shape = _wide(call), z.shape[-1:]
    weight, bias = (None if t is None else t.to(wide) for t in (call.weight, call.bias))
    if call.kind == "layer":
        y = F.layer_norm(z.to(wide), shape, weight, bias, call.eps)
    else:
        y = F.rms_norm(z.to(wide), shape, weight, call.eps)
    return y.to(z.dtype) if call.rounding == "each" else y


def _modulated(call: _Call, normed: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    y = normed
    if scale is not None:
        y = y * (1 + _of_tokens(scale, call.rows).to(y.dtype))
    if shift is not None:
        y = y + _of_tokens(shift, call.rows).to(y.dtype)
    return y.to(call.x.dtype)


def _of_tokens(modulation: Tensor, rows: Tensor | None) -> Tensor:
    """``[B, R, C]`` as it meets ``[B, S, C]``."""
    return modulation if rows is None else modulation[:, rows]


def _outputs(*args: Any) -> int:
    call = _Call(*args)
    normed = 0 if call.kind == "none" else 1 + (call.scale2 is not None)
    return (call.branch is not None) + normed


def _fake(*args: Any) -> list[Tensor]:
    x = _Call(*args).x
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(_outputs(*args))]


def _costs(*args: Any) -> Costs:
    """x and the branch once, every output once; the modulation where it has a row for each token."""
    call = _Call(*args)
    passes = 1 + (call.branch is not None) + _outputs(*args)
    modulations = (t for t in (call.gate, call.scale, call.shift, call.scale2, call.shift2) if t is not None)
    return Costs(bytes=passes * call.x.nbytes + sum(t.nbytes for t in modulations if t.shape[1] > 1))


def _parts(*args: Any) -> Iterator[Part]:
    call = _Call(*args)
    samples, tokens, channels = call.x.shape
    for n in cuts(samples, tokens * channels):
        for s in cuts(tokens, (n.stop - n.start) * channels):
            part = call._replace(
                x=call.x[n, s],
                branch=None if call.branch is None else call.branch[n, s],
                rows=None if call.rows is None else call.rows[s],
                **{name: _part_of(getattr(call, name), call, n, s) for name in _Call._fields[2:7]},
            )
            yield Part(tuple(part), lambda outputs, n=n, s=s: tuple(out[n, s] for out in outputs))


def _part_of(modulation: Tensor | None, call: _Call, samples: slice, tokens: slice) -> Tensor | None:
    if modulation is None:
        return None
    modulation = modulation[samples] if len(modulation) > 1 else modulation
    return modulation[:, tokens] if call.rows is None and modulation.shape[1] > 1 else modulation


def _validate(*args: Any) -> None:
    call = _Call(*args)
    x = call.x
    if x.ndim != 3:
        raise ValueError(f"gated_residual_norm: x must be [B, S, C], got {tuple(x.shape)}")
    samples, tokens, channels = x.shape
    if call.branch is not None and call.branch.shape != x.shape:
        raise ValueError(f"gated_residual_norm: branch must be {tuple(x.shape)}, got {tuple(call.branch.shape)}")
    if call.branch is None and (call.gate is not None or call.kind == "none"):
        raise ValueError("gated_residual_norm: without a branch there is nothing to gate, and no norm means no work")
    for name in ("gate", "scale", "shift", "scale2", "shift2"):
        modulation = getattr(call, name)
        if modulation is None:
            continue
        fits = modulation.ndim == 3 and modulation.shape[0] in (1, samples) and modulation.shape[2] == channels
        if not fits or (call.rows is None and modulation.shape[1] not in (1, tokens)):
            raise ValueError(
                f"gated_residual_norm: {name} must be [B, R, C] with R=1 or S, or other R with rows, "
                f"got {tuple(modulation.shape)} for x {tuple(x.shape)}"
            )
    if call.rows is not None and (call.rows.shape != (tokens,) or call.rows.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"gated_residual_norm: rows must be [{tokens}] int32, got {tuple(call.rows.shape)}")
    for name in ("weight", "bias"):
        parameter = getattr(call, name)
        if parameter is not None and parameter.shape != (channels,):
            raise ValueError(f"gated_residual_norm: {name} must be [{channels}], got {tuple(parameter.shape)}")
    if call.kind not in get_args(Kind) or call.rounding not in get_args(Rounding):
        raise ValueError(f"gated_residual_norm: no such kind or rounding: {call.kind!r}, {call.rounding!r}")


GATED_RESIDUAL_NORM = Op(
    "gated_residual_norm",
    reference=gated_residual_norm_ref,
    implementations={},
    fake=_fake,
    costs=_costs,
    parts=_parts,
    validate=_validate,
)


def norm_modulate(
    x: Tensor,
    norm: Norm,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    rounding: Rounding = "once",
    impl: str | None = None,
) -> Tensor:
    """``norm(x) * (1 + scale) + shift``.

    Args:
        x: ``[B, S, C]``, fp16 / bf16 / fp32; rows of any stride.
        norm: LayerNorm or RMSNorm.
        scale: ``[B, R, C]``, any float dtype and strides (B may be 1), R = 1 or S, or any R with ``rows``; or None.
        shift: As ``scale``.
        rows: ``[S]`` int32: the row of the modulation that each token takes. None: the only one, or its own.
        rounding: Where intermediate results are rounded to ``x.dtype``; see the module's docstring.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[B, S, C]``, contiguous, in ``x.dtype``.

    Raises:
        ValueError: The shapes do not fit one another; ``impl`` cannot run here.
    """
    args = x, None, None, scale, shift, None, None, rows, norm.kind, norm.eps, norm.weight, norm.bias, None, rounding
    return GATED_RESIDUAL_NORM(*args, impl=impl)[0]


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    branch_eps: float | None = None,
    rounding: Rounding = "once",
    impl: str | None = None,
) -> Tensor:
    """``x + gate * branch``; arguments as of :func:`gated_residual_norm`."""
    args = x, branch, gate, None, None, None, None, rows, "none", 0.0, None, None, branch_eps, rounding
    return GATED_RESIDUAL_NORM(*args, impl=impl)[0]


def gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    norm: Norm,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    second: tuple[Tensor, Tensor] | None = None,
    rows: Tensor | None = None,
    branch_eps: float | None = None,
    rounding: Rounding = "once",
    impl: str | None = None,
) -> list[Tensor]:
    """``z = x + gate * branch`` and ``norm(z) * (1 + scale) + shift``.

    Args:
        x: ``[B, S, C]``, fp16 / bf16 / fp32; rows of any stride.
        branch: Like x; any float dtype that x has.
        gate: ``[B, R, C]``, any float dtype and strides (B may be 1), R = 1 or S, or any R with ``rows``; None: 1.
        norm: Of z.
        scale: As ``gate``; None: 0.
        shift: As ``gate``; None: 0.
        second: Another scale and shift for the same norm.
        rows: ``[S]`` int32: the row of the modulation that each token takes. None: the only one, or its own.
        branch_eps: Not None: the branch is RMS-normed first, with this eps and no weight.
        rounding: Where intermediate results are rounded to ``x.dtype``; see the module's docstring.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        z, y, and with ``second`` y2: ``[B, S, C]`` each, contiguous, in ``x.dtype``.

    Raises:
        ValueError: The shapes do not fit one another; ``impl`` cannot run here.
    """
    scale2, shift2 = second or (None, None)
    return GATED_RESIDUAL_NORM(
        x, branch, gate, scale, shift, scale2, shift2, rows,
        norm.kind, norm.eps, norm.weight, norm.bias, branch_eps, rounding,
        impl=impl,
    )  # fmt: skip
