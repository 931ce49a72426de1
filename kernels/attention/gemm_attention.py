"""Attention for heads wider than fused kernels take, as two matrix products of cuBLAS and a softmax between them.

    s = q @ k.T                                               float32
    p = 64 * softmax(s * scale)                               rounded to the input dtype
    out = p @ v / 64                                          float32, rounded once

A VAE's attention has one head of 512 channels: too wide for the registers of a fused kernel, and so wide that writing
the scores costs less than the products do. They are stored for a part of the rows at a time, ``SCORES_BYTES`` of them,
so that the memory does not grow with the image.

Both products are summed and left in float32, the scores as well as what v is weighted to: a softmax of rounded scores
would be wrong by their rounding times their size, and cuBLAS may sum what it leaves in float16 in float16. The
probabilities are rounded before they meet v, as PyTorch's fused kernels do; of 9216 keys most get less than 6e-5, the
least that float16 holds in full precision, hence the factor of 64, which is a power of two and costs nothing. Fidelity:
math-exact. Bound by the tensor cores, and by the memory that the scores go through: three passes, one of them of half
the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.launch import Launch

__all__ = ["MOST_KEYS", "SCORES_BYTES", "attend", "bind_gemm_attention", "softmax_launch"]

SCORES_BYTES = 2**27
ROW_STEP = 128  # rows of the products' tiles
MOST_KEYS = 16384  # a program holds a row of scores in registers
P_SCALE = 64
NUM_WARPS = 8


@triton.jit
def _softmax_kernel(
    s_ptr, p_ptr,
    columns, rows, seen, step,
    scale_log2,
    STEPS: tl.constexpr, P_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * columns
    offs = tl.arange(0, BLOCK)
    mask = offs < columns
    there = mask
    if STEPS:
        there = offs < seen + tl.program_id(0) % rows // step * step
    s = tl.load(s_ptr + start + offs, mask=there, other=float("-inf"))
    p = tl.exp2((s - tl.max(s, axis=0)) * scale_log2)
    p *= P_SCALE / tl.sum(p, axis=0)
    tl.store(p_ptr + start + offs, p.to(p_ptr.dtype.element_ty), mask=mask)


def softmax_launch(samples: int, rows: int, columns: int, scale: float, steps: tuple[int, int] | None = None) -> Launch:
    """Writes ``P_SCALE * softmax(s * scale, -1)`` of float32 scores ``[samples, rows, columns]`` to its second tensor.

    Args:
        samples: Their number.
        rows: Of a sample.
        columns: Of a row.
        scale: Factor of the scores, positive.
        steps: The first so many rows of a sample see so many columns, the next so many more of both, and so on. None:
            every row sees all.
    """
    step, seen = steps or (rows, columns)
    return Launch(
        _softmax_kernel, (samples * rows,),
        columns, rows, seen, step,
        scale * math.log2(math.e),
        STEPS=steps is not None, P_SCALE=P_SCALE, BLOCK=triton.next_power_of_2(columns),
        num_warps=NUM_WARPS,
    )  # fmt: skip


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, ``[N, M, K] @ [N, K, L]``, in float32 from inputs of fewer bits; only CUDA has it as one call."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax: Launch) -> None:
    """One head's part, ``[N, M, D]``; what it stores meanwhile is free again when it returns."""
    s = _product(q, k.mT)
    p = torch.empty_like(s, dtype=q.dtype)
    softmax(s, p)
    del s
    torch.mul(_product(p, v), 1 / P_SCALE, out=out)


def _parts(batch: int, seq_q: int, seq_kv: int, scores_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Samples and rows of q whose scores are computed at once: whole samples, or as equal parts of one as may be."""
    most_rows = max(scores_bytes // (4 * seq_kv), ROW_STEP)
    if seq_q <= most_rows:
        samples, rows = most_rows // seq_q, seq_q
    else:
        samples, parts = 1, triton.cdiv(seq_q, most_rows // ROW_STEP * ROW_STEP)
        rows = triton.cdiv(triton.cdiv(seq_q, parts), ROW_STEP) * ROW_STEP
    for sample in range(0, batch, samples):
        for row in range(0, seq_q, rows):
            yield slice(sample, min(sample + samples, batch)), slice(row, min(row + rows, seq_q))


def bind_gemm_attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, *, scores_bytes: int = SCORES_BYTES
) -> Callable[..., Tensor]:
    """``F.scaled_dot_product_attention``, no mask, on rows, prepared for tensors of these sizes.

    Args:
        q: ``[B, S, H*D]``, fp16 / bf16, with a last stride of 1.
        k: ``[B, Skv, H*D]`` in ``q.dtype``, at most ``MOST_KEYS`` rows; may be expanded over the batch.
        v: As ``k``.
        num_heads: ``H``.
        scale: Factor of the scores, positive.
        scores_bytes: Of the scores that are stored at a time.

    Returns:
        Takes the same arguments; returns ``[B, S, H*D]``, contiguous.
    """
    (batch, seq_q, _), seq_kv = q.shape, k.shape[1]
    work = []
    for samples, rows in _parts(batch, seq_q, seq_kv, scores_bytes):
        count = samples.stop - samples.start, rows.stop - rows.start
        work.append((samples, rows, softmax_launch(*count, seq_kv, scale)))

    def run(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for head in zip(*(x.chunk(num_heads, dim=-1) for x in (q, k, v, out)), strict=True):
            q_head, k_head, v_head, out_head = head
            for samples, rows, softmax in work:
                part = samples, rows
                attend(q_head[part], k_head[samples], v_head[samples], out_head[part], softmax)
        return out

    return run
