"""Attention over the tokens of a sequence, on rows as projections leave them, by the fastest implementation there is.

    out[b, :, h] = softmax(q[b, :, h] @ k[b, :, h].T * scale) @ v[b, :, h]

Rows ``[B, S, H*D]`` in, rows out: nothing is transposed or copied around any implementation. Which one is fastest
depends on the GPU, the libraries and the shape, and no rule of thumb gets it right, so it is measured (``choice.py``).

* ``torch``: ``F.scaled_dot_product_attention`` and its own choice; ``cudnn``, ``flash``, ``efficient``, ``math``: one
  of its backends, called directly: ``sdpa_kernel`` would change flags that all threads share.
* ``fa3``: FlashAttention-3, where a wheel of it is installed.
* ``gluon``: ours for Hopper, in ``spatial_attention_gluon.py``.
* ``gemm``: two products of cuBLAS around a softmax of ours, for the widest heads, in ``gemm_attention.py``.
* ``triton``: ours for any GPU, below. A program owns BLOCK_M query rows and walks over k and v, whose next blocks are
  on their way (cp.async); softmax online, in base 2; float32 accumulation; probabilities are rounded to the input dtype
  before they meet v, as PyTorch's fused kernels do.

Fidelity: math-exact. Bound by the tensor cores and, at D=64, by the exponentials as much.

Sources: FlashAttention-2 (https://arxiv.org/abs/2307.08691) and -3 (https://arxiv.org/abs/2407.08608).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Set
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.attention.alignment import aligned_rows
from vidaccel.kernels.attention.gemm_attention import MOST_KEYS, bind_gemm_attention
from vidaccel.kernels.check import Part, cuts, heads_apart, heads_of
from vidaccel.kernels.hopper import gluon_reason, on_hopper
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.op import REFERENCE, Costs, Implementation, Op, device_reason, tensors_reason
from vidaccel.kernels.without_plans import attention_without_plans

__all__ = [
    "SPATIAL_ATTENTION",
    "Blocks",
    "bind_triton",
    "choose_blocks",
    "spatial_attention",
    "spatial_attention_ref",
]

HEAD_DIMS = range(32, 161, 8)  # of the Triton kernel
FUSED_HEAD_DIM = 256  # the widest that flash attention takes, anybody's
FA3_MODULES = ("flash_attn_interface", "fa3_fwd_interface")
FOR_HOPPER = frozenset(["fa3", "gluon", "gemm"])
MEASURED_KEYS = 81  # fewer keys and values, as a text has, leave nothing to win
MEASURED_FLOPS = 1e9
AHEAD_ROWS = 128  # whole blocks of every kernel
SAMPLES = 8  # that make up the query rows of a large call


def spatial_attention_ref(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    q, k, v = _heads(q, num_heads), _heads(k, num_heads), _heads(v, num_heads)
    if q.dtype != torch.float64:
        return _rows(attention_without_plans(q, k, v, scale=scale))
    # No fused kernel takes float64, and the scores of all rows at once may not fit the memory.
    parts = cuts(q.shape[2], q.shape[0] * num_heads * k.shape[2])
    return _rows(torch.cat([F.scaled_dot_product_attention(q[:, :, rows], k, v, scale=scale) for rows in parts], dim=2))


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """``[B, S, H*D]`` seen as ``[B, H, S, D]``."""
    batch, rows, channels = x.shape
    return aligned_rows(x).view(batch, rows, num_heads, channels // num_heads).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """``[B, H, S, D]`` as ``[B, S, H*D]``; a view of what the backends write, which keep the memory order of q."""
    return x.transpose(1, 2).flatten(2).contiguous()


@triton.jit
def _rows_of(ptr, stride, rows, channel, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to ``BLOCK_D`` channels of ``rows``."""
    offs = tl.multiple_of(rows * stride, ALIGN)[:, None] + tl.arange(0, BLOCK_D)[None, :]
    return ptr + tl.multiple_of(channel, ALIGN) + offs  # 16-byte accesses and cp.async need to know


@triton.jit(
    do_not_specialize=[
        "seq_q", "seq_kv", "stride_q_batch", "stride_q_row", "stride_k_batch", "stride_k_row", "stride_v_batch",
        "stride_v_row",
    ],
)  # fmt: skip
def _spatial_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,
    seq_q, seq_kv,
    stride_q_batch, stride_q_row, stride_k_batch, stride_k_row, stride_v_batch, stride_v_row,
    scale_log2,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_N: tl.constexpr, ALIGN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(seq_q, BLOCK_M)
    head_of_batch = tl.program_id(0) // tiles  # tiles of one head are neighbours: its k and v stay in L2
    batch = (head_of_batch // NUM_HEADS).to(tl.int64)
    channel = head_of_batch % NUM_HEADS * HEAD_DIM
    first_row = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M
    offs_m, offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_m = (first_row + offs_m < seq_q)[:, None] & (offs_d < HEAD_DIM)[None, :]

    q_ptr += tl.multiple_of(batch * stride_q_batch + first_row * stride_q_row, ALIGN)
    q_ptrs = _rows_of(q_ptr, stride_q_row, offs_m, channel, BLOCK_D, ALIGN)
    q = tl.load(q_ptrs, mask=mask_m, other=0.0)  # [BLOCK_M, BLOCK_D]
    k_ptr += tl.multiple_of(batch * stride_k_batch, ALIGN)
    v_ptr += tl.multiple_of(batch * stride_v_batch, ALIGN)
    k_ptrs = _rows_of(k_ptr, stride_k_row, offs_n, channel, BLOCK_D, ALIGN)
    v_ptrs = _rows_of(v_ptr, stride_v_row, offs_n, channel, BLOCK_D, ALIGN)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in tl.range(0, seq_kv, BLOCK_N, num_stages=STAGES):
        mask_n = (offs_d < HEAD_DIM)[None, :]
        if not EVEN_N:
            mask_n = (start + offs_n < seq_kv)[:, None] & mask_n
        k = tl.load(k_ptrs, mask=mask_n, other=0.0)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(q, tl.trans(k)) * scale_log2  # [BLOCK_M, BLOCK_N]
        if not EVEN_N:
            s = tl.where((start + offs_n < seq_kv)[None, :], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        v = tl.load(v_ptrs, mask=mask_n, other=0.0)  # [BLOCK_N, BLOCK_D]
        acc = tl.dot(p.to(v.dtype), v, acc=acc * alpha[:, None])
        m_i = m_new
        k_ptrs += tl.multiple_of(BLOCK_N * stride_k_row, ALIGN)
        v_ptrs += tl.multiple_of(BLOCK_N * stride_v_row, ALIGN)

    out_ptr += (batch * seq_q + first_row) * NUM_HEADS * HEAD_DIM
    out_ptrs = _rows_of(out_ptr, NUM_HEADS * HEAD_DIM, offs_m, channel, BLOCK_D, ALIGN)
    tl.store(out_ptrs, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty), mask=mask_m)


class Blocks(NamedTuple):
    """How the Triton kernel cuts its work: rows of q, rows of k and v, warps, and blocks of k and v in flight."""

    rows: int
    columns: int
    num_warps: int
    stages: int


def choose_blocks(head_dim: int) -> Blocks:
    """The blocks the Triton kernel runs with."""
    if head_dim <= 64:
        return Blocks(128, 64, 8, 3)
    return Blocks(128, 64, 8, 2) if head_dim <= 128 else Blocks(64, 32, 8, 2)


def bind_triton(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, *, blocks: Blocks | None = None
) -> Callable[..., Tensor]:
    """The Triton kernel, prepared for tensors of these sizes and strides."""
    (batch, seq_q, channels), seq_kv = q.shape, k.shape[1]
    head_dim = channels // num_heads
    rows, columns, num_warps, stages = blocks or choose_blocks(head_dim)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    launch = Launch(
        _spatial_attention_kernel, (batch * num_heads * triton.cdiv(seq_q, rows),),
        seq_q, seq_kv,
        *strides,
        scale * math.log2(math.e),
        NUM_HEADS=num_heads, HEAD_DIM=head_dim,
        BLOCK_M=rows, BLOCK_N=columns, BLOCK_D=triton.next_power_of_2(head_dim),
        EVEN_N=seq_kv % columns == 0, ALIGN=math.gcd(16, head_dim, *strides), STAGES=stages,
        num_warps=num_warps,
    )  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
        out = _empty_output(q)
        launch(q, k, v, out)
        return out

    return run


def _bind_gluon(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Callable[..., Tensor]:
    from vidaccel.kernels.attention.spatial_attention_gluon import bind

    launch = bind(q, k, v, num_heads, scale)
    fallback = SPATIAL_ATTENTION.implementations[_default(q, k, v, num_heads, scale)].run

    def run(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
        if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:  # TMA takes no such address
            return fallback(q, k, v, num_heads, scale)
        out = _empty_output(q)
        launch(q, k, v, out)
        return out

    return run


def _fa3(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    module = _fa3_module()
    assert module is not None
    heads = (x.unflatten(-1, (num_heads, -1)) for x in (q, k, v))
    out = module.flash_attn_func(*heads, softmax_scale=scale)
    return (out[0] if isinstance(out, tuple) else out).flatten(2)  # some releases return the log-sums, too


def _cudnn(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    q, k, v = _heads(q, num_heads), _heads(k, num_heads), _heads(v, num_heads)
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    return _rows(attend(q, k, v, None, False, scale=scale)[0])


def _flash(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    q, k, v = _heads(q, num_heads), _heads(k, num_heads), _heads(v, num_heads)
    return _rows(torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, scale=scale)[0])


def _efficient(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    q, k, v = _heads(q, num_heads), _heads(k, num_heads), _heads(v, num_heads)
    attend = torch.ops.aten._scaled_dot_product_efficient_attention.default
    return _rows(attend(q, k, v, None, False, scale=scale)[0])


def _math(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    q, k, v = _heads(q, num_heads), _heads(k, num_heads), _heads(v, num_heads)
    return _rows(torch.ops.aten._scaled_dot_product_attention_math.default(q, k, v, scale=scale)[0])


def _empty_output(q: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@functools.cache
def _fa3_module() -> ModuleType | None:
    found = next((name for name in FA3_MODULES if importlib.util.find_spec(name)), None)
    return importlib.import_module(found) if found else None


def _backend(run: Callable[..., Tensor], can_use: Callable[..., bool], competes: bool = True) -> Implementation:
    """A fused backend of PyTorch's, where PyTorch itself, with the flags that the user has set, would take it."""

    def reason(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> str | None:
        if not q.is_cuda:
            return f"this backend of PyTorch's attention needs a GPU, q is on {q.device.type}"
        if q.shape[2] // num_heads % 8:
            return f"called directly, it takes head_dim in steps of 8, got {q.shape[2] // num_heads}"
        heads = _heads(q, num_heads), _heads(k, num_heads), _heads(v, num_heads)
        params = torch.backends.cuda.SDPAParams(*heads, None, 0.0, False, False)  # type: ignore[call-arg, arg-type]
        if not can_use(params, False):
            return "PyTorch declines: this backend is off, not there or not for such input"
        return tensors_reason(q, k, v)

    return Implementation(run, reason, competes=competes)


def _fa3_reason(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> str | None:
    if not on_hopper(q):
        return "FlashAttention-3 needs a Hopper GPU"
    if _fa3_module() is None:
        return f"none of {', '.join(FA3_MODULES)} is installed"
    return _rows_reason(q, k, v, scale)


def _gluon_reason(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> str | None:
    if reason := gluon_reason(q):
        return reason
    from vidaccel.kernels.attention.spatial_attention_gluon import HEAD_DIMS as GLUON_HEAD_DIMS

    head_dim = q.shape[2] // num_heads
    if head_dim not in GLUON_HEAD_DIMS:
        return f"the kernel takes head_dim up to 128 in steps of 8, got {head_dim}"
    if any(x.stride(0) % 8 or x.stride(1) % 8 or x.stride(1) == 0 for x in (q, k, v)):
        return "TMA takes rows that start at multiples of 16 bytes"
    if (k.stride(0) == 0) != (v.stride(0) == 0):
        return "the kernel takes k and v that are both expanded over the batch, or neither"
    return _rows_reason(q, k, v, scale)


def _gemm_reason(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> str | None:
    if reason := device_reason(q):
        return reason
    if torch.version.hip is not None:
        return "products of float16 left in float32 are cuBLAS's"
    head_dim = q.shape[2] // num_heads
    if head_dim <= FUSED_HEAD_DIM:
        return f"it is for head_dim beyond {FUSED_HEAD_DIM}, got {head_dim}"
    if k.shape[1] > MOST_KEYS:
        return f"its softmax takes at most {MOST_KEYS} keys, got {k.shape[1]}"
    return _rows_reason(q, k, v, scale)


def _triton_reason(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> str | None:
    if reason := device_reason(q):
        return reason
    head_dim = q.shape[2] // num_heads
    if head_dim not in HEAD_DIMS:
        return f"the kernel takes head_dim from 32 to 160 in steps of 8, got {head_dim}"
    return _rows_reason(q, k, v, scale)


def _rows_reason(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """What none of the kernels that are not PyTorch's takes."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 and bfloat16, q is {q.dtype}"
    if scale <= 0:
        return f"the kernel takes a positive scale, got {scale}"
    if not q.stride(2) == k.stride(2) == v.stride(2) == 1:
        return "the kernel takes q, k and v with a last stride of 1"
    return tensors_reason(q, k, v)


def _costs(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Costs:
    keys_and_values = sum(x[:1].nbytes if x.stride(0) == 0 else x.nbytes for x in (k, v))
    return Costs(bytes=2 * q.nbytes + keys_and_values, flops=4 * q.numel() * k.shape[1])


def _parts(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Iterator[Part]:
    return _parts_of(slice(0, q.shape[1]), q, k, v, num_heads, scale)


def _sample(number: int, q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Iterator[Part]:
    """Some query rows of every head, for large calls: their reference takes as long as they do."""
    rows = q.shape[1]
    step = triton.cdiv(rows, SAMPLES) if _is_large(q, k) else rows
    start = step * (number % triton.cdiv(rows, step))
    return _parts_of(slice(start, min(start + step, rows)), q, k, v, num_heads, scale)


def _parts_of(some: slice, q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Iterator[Part]:
    """Of these query rows, as many as fit, with as many samples and heads."""
    (batch, _, channels), seq_kv, seq_q = q.shape, k.shape[1], some.stop - some.start
    head_dim = channels // num_heads
    for samples in cuts(batch, (seq_q + seq_kv) * head_dim):
        together = samples.stop - samples.start
        for heads in cuts(num_heads, together * (seq_q + seq_kv) * head_dim):
            channel, count = slice(heads.start * head_dim, heads.stop * head_dim), heads.stop - heads.start
            for rows in cuts(seq_q, together * count * head_dim):
                place = samples, slice(some.start + rows.start, some.start + rows.stop), channel
                args = q[place], k[samples, :, channel], v[samples, :, channel], count, scale
                yield Part(args, functools.partial(heads_of, place, count), functools.partial(heads_apart, count))


def _measures(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> bool:
    return q.is_cuda and _is_large(q, k)


def _is_large(q: Tensor, k: Tensor) -> bool:
    return k.shape[1] >= MEASURED_KEYS and 4 * q.numel() * k.shape[1] >= MEASURED_FLOPS


def _key(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> dict[str, Any]:
    return {
        "dtype": str(q.dtype),
        "batch_heads": q.shape[0] * num_heads,
        "seq_q": _about(q.shape[1]),
        "seq_kv": _about(k.shape[1]),
        "head_dim": q.shape[2] // num_heads,
    }


def _about(length: int) -> int:
    """``length`` to 5 binary digits: every prompt makes another one, which is not worth another measurement."""
    unit = 1 << max(length.bit_length() - 5, 0)
    return -(-length // unit) * unit


def _default(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> str:
    """PyTorch's own choice, but for what is faster wherever it serves."""

    def serves(name: str) -> bool:
        return SPATIAL_ATTENTION.unserved(q, k, v, num_heads, scale, impl=name) is None

    if q.is_cuda and serves("gemm"):  # PyTorch's kernel for such heads is several times slower
        return "gemm"
    if torch.compiler.is_compiling():  # Dynamo cannot ask what a backend serves, and PyTorch's choice is the same
        return REFERENCE
    return "cudnn" if on_hopper(q) and serves("cudnn") else REFERENCE


def _beaten(serving: Set[str], q: Tensor, *others: Any) -> set[str]:
    beaten = set()
    if not serving.isdisjoint(FOR_HOPPER):
        beaten.add("triton")
    if on_hopper(q) and not serving.isdisjoint(("gluon", "cudnn")):
        beaten.add("flash")  # PyTorch's is FlashAttention-2
    return beaten


_cuda = torch.backends.cuda
SPATIAL_ATTENTION = Op(
    "spatial_attention",
    reference=spatial_attention_ref,
    # the likely winners first: those that come later are dropped by their times
    implementations={
        "fa3": Implementation(_fa3, _fa3_reason),
        "gluon": Implementation.bound(_bind_gluon, _gluon_reason),
        "gemm": Implementation.bound(bind_gemm_attention, _gemm_reason),
        "cudnn": _backend(_cudnn, _cuda.can_use_cudnn_attention),
        "flash": _backend(_flash, _cuda.can_use_flash_attention),
        "efficient": _backend(_efficient, _cuda.can_use_efficient_attention, competes=False),
        "math": Implementation(_math, competes=False),
        "triton": Implementation.bound(bind_triton, _triton_reason),
    },
    fake=_empty_output,
    costs=_costs,
    parts=_parts,
    sample=_sample,
    measures=_measures,
    key=_key,
    default=_default,
    beaten=_beaten,
)


def _validate(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> None:
    require_floats("spatial_attention", q=q, k=k, v=v)
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise _mismatch("q must be [B, S, H*D], k and v [B, Skv, H*D]", q, k, v)
    if q.numel() == 0 or k.numel() == 0:
        raise _mismatch("q, k and v must not be empty", q, k, v)
    if num_heads < 1 or q.shape[2] % num_heads:
        raise _mismatch(f"num_heads={num_heads} must divide the H*D={q.shape[2]} channels of q", q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"spatial_attention: q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}")


def _mismatch(expected: str, q: Tensor, k: Tensor, v: Tensor) -> ValueError:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    return ValueError(f"spatial_attention: {expected}, got {shapes}")


def compile_ahead(weight: Tensor, num_heads: int) -> None:
    """Begin to compile what may run for queries that are a projection by ``weight``, ``[H*D, C]``, and keys alike."""
    head_dim = len(weight) // num_heads
    if weight.dtype in (torch.float16, torch.bfloat16) and head_dim in HEAD_DIMS:
        x = weight.new_empty(1, AHEAD_ROWS, len(weight), device="meta")
        impl = "gluon" if head_dim <= 128 and not gluon_reason(weight) else "triton"
        SPATIAL_ATTENTION.compile_ahead(weight.device, x, x, x, num_heads, 1.0, impl=impl)


def spatial_attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, *, scale: float | None = None, impl: str | None = None
) -> Tensor:
    """``F.scaled_dot_product_attention``, no mask, on rows that stay in place.

    Args:
        q: ``[B, S, H*D]``, rows of any strides: a slice of a packed QKV projection will do.
        k: ``[B, Skv, H*D]`` in ``q.dtype``; may be expanded over the batch.
        v: As ``k``.
        num_heads: ``H``.
        scale: Factor of the scores; None for ``D ** -0.5``.
        impl: A key of ``SPATIAL_ATTENTION.implementations``; None for the fastest (see the module's docstring).

    Returns:
        ``[B, S, H*D]``, contiguous, in ``q.dtype``.

    Raises:
        ValueError: The shapes do not fit one another or ``num_heads``, or are empty; ``impl`` is unknown or cannot run
            here.
        TypeError: The dtypes differ.
    """
    _validate(q, k, v, num_heads)
    if scale is None:
        scale = (q.shape[2] // num_heads) ** -0.5
    return SPATIAL_ATTENTION(q, k, v, num_heads, scale, impl=impl)
