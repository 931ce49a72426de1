"""Attention and convolutions of sizes that come once: what PyTorch says, without what a library takes to get ready.

cuDNN builds a plan for each shape that it has not seen in a process, for an attention in 50 ms (cuDNN 9, H200). A check
cuts a call into parts, or takes a corner of it, whose shapes nothing else has: in a first clip of SVD-XT their plans
took 0.3 s (profiles-h200.txt). So an attention is left to FlashAttention-2, and a convolution is one matrix product of
the windows that its taps see.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["WithoutPlans", "attention_without_plans", "convolution_by_product", "convolution_without_plans"]

PLANNED_FLOPS = 1e12  # of an attention, from which on cuDNN's faster kernel makes up for its plan
MOST_NUMBERS = 2**27  # of all windows

_ATTENTION: Any = torch._C._nn.scaled_dot_product_attention  # not what somebody has put in its place, which may call it


class WithoutPlans(TorchFunctionMode):
    """Inside the ``with`` block, in this thread, PyTorch's own functions for these need no plans."""

    def __torch_function__(
        self, function: Any, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _WAYS.get(function, function)(*args, **kwargs or {})


def attention_without_plans(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **others: Any,
) -> Tensor:
    """``F.scaled_dot_product_attention`` of ``[B, H, S, D]``."""
    plain = attn_mask is None and not dropout_p and not is_causal and not any(others.values())
    if not plain or not _flash_serves(query, key, value):
        return _ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others)
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention.default(query, key, value, scale=scale)[0]
    return out


def _flash_serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if torch.compiler.is_compiling() or not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    if q.ndim != 4 or q.shape[-1] % 8 or 4 * q.numel() * k.shape[-2] > PLANNED_FLOPS:
        return False
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)  # type: ignore[call-arg, arg-type]
    return torch.backends.cuda.can_use_flash_attention(params, False)


def convolution_without_plans(
    convolve: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``convolve``, which is ``torch.conv2d`` or ``torch.conv3d``, of ``[N, C, (T,) H, W]``."""
    simple = input.is_cuda and groups == 1 and set(_each(dilation)) == {1} and not isinstance(padding, str)
    product = convolution_by_product(input, weight, bias, _each(stride), _each(padding)) if simple else None
    return convolve(input, weight, bias, stride, padding, dilation, groups) if product is None else product


def convolution_by_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor | None:
    """A convolution as one matrix product.

    Args:
        x: ``[N, C, (T,) H, W]``.
        weight: ``[O, C, (kT,) kH, kW]``.
        bias: ``[O]``.
        stride: One number for all dimensions, or one for each.
        padding: The same; zeros.

    Returns:
        ``[N, O, *places]``; None where that would take too much memory, and where the arguments do not fit together.
    """
    dims = weight.ndim - 2
    plain = type(weight) in (Tensor, nn.Parameter)  # not a quantised one
    fits = plain and x.ndim == weight.ndim and x.dtype == weight.dtype and x.shape[1] == weight.shape[1]
    if not fits or {len(stride), len(padding)} - {1, dims} or not x.numel():
        return None
    strides, pads = (each * dims if len(each) == 1 else each for each in (stride, padding))
    windows = F.pad(x, [pad for size in reversed(pads) for pad in (size, size)])
    if any(size > length for size, length in zip(weight.shape[2:], windows.shape[2:], strict=True)):
        return None
    for dim, (size, step) in enumerate(zip(weight.shape[2:], strides, strict=True), 2):
        windows = windows.unfold(dim, size, step)
    if windows.numel() > MOST_NUMBERS:
        return None
    places, taps = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
    rows = windows.permute(0, *places, *taps, 1).flatten(1 + dims)
    matrix = weight.permute(0, *places, 1).flatten(1)  # of a channels-last weight a view
    out = F.linear(rows, matrix, bias).movedim(-1, 1)
    return out if any(map(_is_channels_last, (x, weight))) else out.contiguous()


def _each(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _is_channels_last(x: Tensor) -> bool:
    order = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=order) and not x.is_contiguous()


_WAYS: Mapping[Any, Callable[..., Tensor]] = {
    _ATTENTION: attention_without_plans,
    torch.conv2d: functools.partial(convolution_without_plans, torch.conv2d),
    torch.conv3d: functools.partial(convolution_without_plans, torch.conv3d),
}
