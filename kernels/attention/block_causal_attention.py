"""Attention in which a block of rows sees itself and the blocks before it, as a frame of a causal VAE does; one head.

    out[b, r] = softmax(q[b, r] @ k[b, :n].T * C ** -0.5) @ v[b, :n],  n = (r // block + 1) * block

Eager fills a mask of all rows by all rows and computes all scores. Here several blocks at a time are multiplied with
the keys up to the last of them, as in ``gemm_attention``, and the softmax of each row ends where its block does: behind
it, probabilities are zeros. So many blocks together fill a GPU, and few of their scores are wasted. Where there are
more keys than that softmax takes, block by block by PyTorch. Fidelity: math-exact. Bound by the tensor cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.attention.gemm_attention import MOST_KEYS, SCORES_BYTES, attend, softmax_launch
from vidaccel.kernels.attention.spatial_attention import FUSED_HEAD_DIM, spatial_attention_ref
from vidaccel.kernels.check import Part
from vidaccel.kernels.op import Costs, Implementation, Op, device_reason, tensors_reason

__all__ = ["BLOCK_CAUSAL_ATTENTION", "block_causal_attention", "block_causal_attention_ref"]

TOGETHER = 8  # blocks: of a clip of 31, an eighth of the scores is wasted


def block_causal_attention_ref(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    ends = range(block, q.shape[1] + 1, block)
    return torch.cat([spatial_attention_ref(q[:, end - block : end], k[:, :end], v[:, :end], 1) for end in ends], dim=1)


def _parts(q: Tensor, block: int) -> Iterator[tuple[int, int]]:
    """Where rows that are multiplied at once begin and end."""
    samples, length, _ = q.shape
    start = 0
    while start < length:
        keys = min(start + TOGETHER * block, length)
        blocks = SCORES_BYTES // (4 * samples * keys * block)
        end = min(start + max(min(blocks, TOGETHER), 1) * block, length)
        yield start, end
        start = end


def _bind(q: Tensor, k: Tensor, v: Tensor, block: int) -> Callable[..., Tensor]:
    samples, _, channels = q.shape
    work = [
        (slice(start, end), softmax_launch(samples, end - start, end, channels**-0.5, (block, start + block)))
        for start, end in _parts(q, block)
        if end <= MOST_KEYS
    ]
    done = work[-1][0].stop if work else 0

    def run(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for rows, softmax in work:
            attend(q[:, rows], k[:, : rows.stop], v[:, : rows.stop], out[:, rows], softmax)
        for start in range(done, q.shape[1], block):
            end = start + block
            out[:, start:end] = spatial_attention_ref(q[:, start:end], k[:, :end], v[:, :end], 1)
        return out

    return run


def _fake(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _reason(q: Tensor, k: Tensor, v: Tensor, block: int) -> str | None:
    if torch.version.hip is not None:
        return "products of float16 left in float32 are cuBLAS's"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the products take float16 and bfloat16, q is {q.dtype}"
    if not q.stride(2) == k.stride(2) == v.stride(2) == 1:
        return "the products take q, k and v with a last stride of 1"
    return device_reason(q) or tensors_reason(q, k, v)


def _pays(q: Tensor, k: Tensor, v: Tensor, block: int) -> bool:
    return q.dtype.itemsize == 2 and q.shape[2] > FUSED_HEAD_DIM


def _costs(q: Tensor, k: Tensor, v: Tensor, block: int) -> Costs:
    blocks = q.shape[1] // block
    return Costs(bytes=4 * q.nbytes, flops=2 * q.numel() * (blocks + 1) * block)


def _checked(q: Tensor, k: Tensor, v: Tensor, block: int) -> Iterator[Part]:
    def of(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (outputs[0].unflatten(1, (-1, block)).flatten(0, 1),)

    yield Part((q, k, v, block), of, of)


def _validate(q: Tensor, k: Tensor, v: Tensor, block: int) -> None:
    name, shapes = "block_causal_attention", f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    require_floats(name, q=q, k=k, v=v)
    if q.ndim != 3 or not q.shape == k.shape == v.shape:
        raise ValueError(f"{name}: q, k and v must be [B, S, C], got {shapes}")
    if q.numel() == 0:
        raise ValueError(f"{name}: q, k and v must not be empty, got {shapes}")
    if block < 1 or q.shape[1] % block:
        raise ValueError(f"{name}: block={block} must divide the S={q.shape[1]} rows")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"{name}: q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}")


BLOCK_CAUSAL_ATTENTION = Op(
    "block_causal_attention",
    reference=block_causal_attention_ref,
    implementations={"gemm": Implementation.bound(_bind, _reason, pays=_pays)},
    fake=_fake,
    costs=_costs,
    parts=_checked,
    validate=_validate,
)


def block_causal_attention(q: Tensor, k: Tensor, v: Tensor, block: int, *, impl: str | None = None) -> Tensor:
    """``F.scaled_dot_product_attention`` of one head, with a mask that lets a block see itself and those before it.

    Args:
        q: ``[B, S, C]``, rows of any strides; ``"gemm"`` takes fp16 and bf16.
        k: The same in ``q.dtype``.
        v: The same.
        block: Rows of a block; divides S.
        impl: ``"gemm"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[B, S, C]``, contiguous, in ``q.dtype``.

    Raises:
        ValueError: The shapes differ or are empty, ``block`` does not divide the rows, or ``impl`` cannot run here.
        TypeError: The dtypes differ.
    """
    out: Tensor = BLOCK_CAUSAL_ATTENTION(q, k, v, block, impl=impl)
    return out
