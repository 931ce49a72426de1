"""Attention over the tokens of a sequence, on rows as projections leave them, by the fastest implementation there is.

    out[b, :, h] = softmax(q[b, :, h] @ k[b, :, h].T * scale) @ v[b, :, h]

Rows ``[B, S, H*D]`` in, rows out: nothing is transposed or copied around any implementation. Which one is fastest
depends on the GPU, the libraries and the shape, and no rule of thumb gets it right: so the first call of a shape times
those that serve it, once, holds their results against PyTorch's, and keeps the answer on disk (``tuning_cache``).

* ``torch``: ``F.scaled_dot_product_attention`` and its own choice; ``cudnn``, ``flash``, ``efficient``, ``math``: one
  of its backends.
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
import logging
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidaccel.config import tuning_enabled
from vidaccel.errors import first_line
from vidaccel.kernels import tuning_cache
from vidaccel.kernels.attention.gemm_attention import MOST_KEYS, gemm_attention
from vidaccel.kernels.dispatch import Choice, record_choice, requested, tensors_problem, triton_device_problem
from vidaccel.kernels.launch import Launch, prepared

__all__ = ["IMPLEMENTATIONS", "Blocks", "choose_blocks", "spatial_attention", "spatial_attention_ref"]

logger = logging.getLogger(__name__)

OP = "spatial_attention"
HEAD_DIMS = range(32, 161, 8)  # of the Triton kernel
FUSED_HEAD_DIM = 256  # the widest that flash attention takes, anybody's
GLUON_VERSIONS = ("3.6.", "3.7.")  # Triton's; Gluon changes from release to release
FA3_MODULES = ("flash_attn_interface", "fa3_fwd_interface")
MEASURED_KEYS = 81  # fewer keys and values, as a text has, leave nothing to win
MEASURED_FLOPS = 1e9
CHECKED_ROWS = 128
UNITS_IN_LAST_PLACE = 8  # that two correct results may be apart, relative L2


def spatial_attention_ref(q: Tensor, k: Tensor, v: Tensor, num_heads: int, *, scale: float | None = None) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    q, k, v = (_heads(x, num_heads) for x in (q, k, v))
    return _rows(F.scaled_dot_product_attention(q, k, v, scale=scale))


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """``[B, S, H*D]`` seen as ``[B, H, S, D]``."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


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


@prepared
def _prepare(
    shape: tuple[int, int, int],
    seq_kv: int,
    strides: tuple[int, ...],
    num_heads: int,
    scale: float,
    blocks: Blocks | None,
) -> Launch:
    batch, seq_q, channels = shape
    head_dim = channels // num_heads
    rows, columns, num_warps, stages = blocks or choose_blocks(head_dim)
    return Launch(
        _spatial_attention_kernel, (batch * num_heads * triton.cdiv(seq_q, rows),),
        seq_q, seq_kv,
        *strides,
        scale * math.log2(math.e),
        NUM_HEADS=num_heads, HEAD_DIM=head_dim,
        BLOCK_M=rows, BLOCK_N=columns, BLOCK_D=triton.next_power_of_2(head_dim),
        EVEN_N=seq_kv % columns == 0, ALIGN=math.gcd(16, head_dim, *strides), STAGES=stages,
        num_warps=num_warps,
    )  # fmt: skip


def _launch(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, *, blocks: Blocks | None = None) -> Tensor:
    out = _empty_output(q)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    _prepare(q.shape, k.shape[1], strides, num_heads, scale, blocks)(q, k, v, out)
    return out


def _empty_output(q: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("vidaccel::spatial_attention_triton", mutates_args=())
def _spatial_attention_triton(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    return _launch(q, k, v, num_heads, scale)


@torch.library.custom_op("vidaccel::spatial_attention_gluon", mutates_args=())
def _spatial_attention_gluon(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    return _launch_gluon(q, k, v, num_heads, scale)


@torch.library.custom_op("vidaccel::spatial_attention_gemm", mutates_args=())
def _spatial_attention_gemm(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    return _launch_gemm(q, k, v, num_heads, scale)


@_spatial_attention_triton.register_fake
@_spatial_attention_gluon.register_fake
@_spatial_attention_gemm.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    return _empty_output(q)


def _run_triton(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    run = _spatial_attention_triton if torch.compiler.is_compiling() else _launch
    return run(q, k, v, num_heads, scale)


def _run_gluon(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    run = _spatial_attention_gluon if torch.compiler.is_compiling() else _launch_gluon
    return run(q, k, v, num_heads, scale)


def _launch_gluon(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    from vidaccel.kernels.attention.spatial_attention_gluon import launch

    out = _empty_output(q)
    launch(q, k, v, out, num_heads, scale)
    return out


def _run_gemm(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    run = _spatial_attention_gemm if torch.compiler.is_compiling() else _launch_gemm
    return run(q, k, v, num_heads, scale)


def _launch_gemm(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    out = _empty_output(q)
    gemm_attention(q, k, v, out, num_heads, scale)
    return out


def _run_sdpa(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, *, backend: SDPBackend | None = None
) -> Tensor:
    if backend is None:
        return spatial_attention_ref(q, k, v, num_heads, scale=scale)
    with sdpa_kernel(backend):
        return spatial_attention_ref(q, k, v, num_heads, scale=scale)


def _run_fa3(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    module = _fa3()
    assert module is not None
    heads = (x.unflatten(-1, (num_heads, -1)) for x in (q, k, v))
    out = module.flash_attn_func(*heads, softmax_scale=scale)
    return (out[0] if isinstance(out, tuple) else out).flatten(2)  # some releases return the log-sums, too


@functools.cache
def _fa3() -> ModuleType | None:
    found = next((name for name in FA3_MODULES if importlib.util.find_spec(name)), None)
    return importlib.import_module(found) if found else None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _on_hopper(x: Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None and _capability(x.device)[0] == 9


def _no_problem(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> None:
    return None


def _sdpa_problem(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, *, can_use: Callable[..., bool]
) -> str | None:
    if not q.is_cuda:
        return f"this backend of PyTorch's attention needs a GPU, q is on {q.device.type}"
    heads = (_heads(x, num_heads) for x in (q, k, v))
    params = torch.backends.cuda.SDPAParams(*heads, None, 0.0, False, False)  # type: ignore[call-arg, arg-type]
    return None if can_use(params, False) else "PyTorch declines: this backend is off, not there or not for such input"


def _fa3_problem(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> str | None:
    if not _on_hopper(q):
        return "FlashAttention-3 needs a Hopper GPU"
    if _fa3() is None:
        return f"none of {', '.join(FA3_MODULES)} is installed"
    return _ours_problem(q, k, v, scale)


def _triton_problem(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> str | None:
    if problem := triton_device_problem(q):
        return problem
    head_dim = q.shape[2] // num_heads
    if head_dim not in HEAD_DIMS:
        return f"the kernel takes head_dim from 32 to 160 in steps of 8, got {head_dim}"
    return _ours_problem(q, k, v, scale)


def _gluon_problem(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> str | None:
    if not _on_hopper(q):
        return "the kernel is for Hopper GPUs"
    if not triton.__version__.startswith(GLUON_VERSIONS):
        return f"the kernel is written for Triton {' or '.join(GLUON_VERSIONS)}*, this is {triton.__version__}"
    from vidaccel.kernels.attention.spatial_attention_gluon import HEAD_DIMS as GLUON_HEAD_DIMS

    head_dim = q.shape[2] // num_heads
    if head_dim not in GLUON_HEAD_DIMS:
        return f"the kernel takes head_dim up to 128 in steps of 8, got {head_dim}"
    if not all(_is_for_tma(x) for x in (q, k, v)):
        return "TMA takes rows that start at multiples of 16 bytes"
    if (k.stride(0) == 0) != (v.stride(0) == 0):
        return "the kernel takes k and v that are both expanded over the batch, or neither"
    return _ours_problem(q, k, v, scale)


def _gemm_problem(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> str | None:
    if problem := triton_device_problem(q):
        return problem
    if torch.version.hip is not None:
        return "products of float16 left in float32 are cuBLAS's"
    head_dim = q.shape[2] // num_heads
    if head_dim <= FUSED_HEAD_DIM:
        return f"it is for head_dim beyond {FUSED_HEAD_DIM}, got {head_dim}"
    if k.shape[1] > MOST_KEYS:
        return f"its softmax takes at most {MOST_KEYS} keys, got {k.shape[1]}"
    return _ours_problem(q, k, v, scale)


def _is_for_tma(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.stride(1) > 0


def _ours_problem(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """What none of the kernels that are not PyTorch's takes."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 and bfloat16, q is {q.dtype}"
    if scale <= 0:
        return f"the kernel takes a positive scale, got {scale}"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the kernel takes q, k and v with a last stride of 1"
    return tensors_problem(q, k, v)


class Implementation(NamedTuple):
    """One way to compute the op: what runs it, what tells why it does not serve the arguments, whether it competes."""

    run: Callable[..., Tensor]
    problem: Callable[..., str | None]
    competes: bool = True


def _backend(backend: SDPBackend, can_use: Callable[..., bool], competes: bool) -> Implementation:
    run = functools.partial(_run_sdpa, backend=backend)
    return Implementation(run, functools.partial(_sdpa_problem, can_use=can_use), competes)


_cuda = torch.backends.cuda
# the likely winners first: those that come later are dropped by their times
IMPLEMENTATIONS = {
    "fa3": Implementation(_run_fa3, _fa3_problem),
    "gluon": Implementation(_run_gluon, _gluon_problem),
    "gemm": Implementation(_run_gemm, _gemm_problem),
    "cudnn": _backend(SDPBackend.CUDNN_ATTENTION, _cuda.can_use_cudnn_attention, competes=True),
    "torch": Implementation(_run_sdpa, _no_problem),
    "flash": _backend(SDPBackend.FLASH_ATTENTION, _cuda.can_use_flash_attention, competes=True),
    "efficient": _backend(SDPBackend.EFFICIENT_ATTENTION, _cuda.can_use_efficient_attention, competes=False),
    "math": Implementation(functools.partial(_run_sdpa, backend=SDPBackend.MATH), _no_problem, competes=False),
    "triton": Implementation(_run_triton, _triton_problem),
}
OURS = ("gluon", "gemm", "triton")
FOR_HOPPER = ("fa3", "gluon", "gemm")

# What runs for a shape, and why ours does not if it failed; the keys are those of _shape.
_chosen: dict[tuple[Any, ...], tuple[str, str]] = {}


def _shape(q: Tensor, k: Tensor, num_heads: int) -> tuple[Any, ...]:
    return q.device.index, q.dtype, q.shape[0] * num_heads, q.shape[1], k.shape[1], q.shape[2] // num_heads


def _choose(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, impl: str | None) -> tuple[str, str]:
    """The implementation to run, and why one that was wished for or measured faster does not."""
    arguments = q, k, v, num_heads, scale
    problems = {name: functools.partial(way.problem, *arguments) for name, way in IMPLEMENTATIONS.items()}
    asked, reason = requested(OP, impl, problems)
    if asked is not None:
        return asked, ""
    shape = _shape(q, k, num_heads)
    if torch.compiler.is_compiling():
        chosen = _chosen.get(shape, ("torch", ""))[0]
        return ("torch" if problems[chosen]() else chosen), ""
    if shape not in _chosen:
        first = _first_choice(*arguments)
        if first is None:
            return _default(*arguments), reason
        _chosen[shape] = first
    name, why_not_ours = _chosen[shape]
    if problem := problems[name]():  # as for other strides, or while gradients are recorded
        return "torch", problem
    return name, reason or why_not_ours


def _default(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> str:
    """What runs where nothing is measured: PyTorch's own choice, but for what is faster wherever it serves."""
    if not q.is_cuda:
        return "torch"
    faster = ["gemm"] * _is_large(q, k) + ["cudnn"] * _on_hopper(q)
    serving = (name for name in faster if IMPLEMENTATIONS[name].problem(q, k, v, num_heads, scale) is None)
    return next(serving, "torch")


def _first_choice(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> tuple[str, str] | None:
    """The choice for a shape not seen before; None if it has to wait, because a graph is being captured."""
    arguments = q, k, v, num_heads, scale
    default = _default(*arguments)
    if not _measures(q, k):
        return default, ""
    competitors = _competitors(*arguments)
    measure = functools.partial(_measure, *arguments, competitors, favourite=default)
    measured = tuning_cache.settled(OP, _cache_key(q, k, num_heads, list(competitors)), IMPLEMENTATIONS, measure, q)
    if measured is None:
        return None
    failed = [f"{name}: {measured.problems[name]}" for name in OURS if name in measured.problems]
    return measured.winner or default, "; ".join(failed)


def _measures(q: Tensor, k: Tensor) -> bool:
    """Whether a choice would be worth measuring for these."""
    return q.is_cuda and _is_large(q, k) and tuning_enabled()


def _is_large(q: Tensor, k: Tensor) -> bool:
    return k.shape[1] >= MEASURED_KEYS and 4 * q.numel() * k.shape[1] >= MEASURED_FLOPS


def _competitors(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> dict[str, Implementation]:
    """The implementations that serve these arguments, but for those that another one always beats.

    Each of them costs its compilation and its clock at the first call of a shape.
    """
    arguments = q, k, v, num_heads, scale
    competing = ((name, way) for name, way in IMPLEMENTATIONS.items() if way.competes)
    serving = {name: way for name, way in competing if way.problem(*arguments) is None}
    if not serving.keys().isdisjoint(FOR_HOPPER):
        serving.pop("triton", None)
    if _on_hopper(q) and not serving.keys().isdisjoint(("gluon", "cudnn")):
        serving.pop("flash", None)  # PyTorch's is FlashAttention-2
    return serving


def _cache_key(q: Tensor, k: Tensor, num_heads: int, competitors: list[str]) -> dict[str, Any]:
    _, dtype, batch_heads, seq_q, seq_kv, head_dim = _shape(q, k, num_heads)
    return {
        "device": torch.cuda.get_device_name(q.device),
        "capability": list(_capability(q.device)),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "competitors": competitors,
        "dtype": str(dtype),
        "batch_heads": batch_heads,
        "seq_q": seq_q,
        "seq_kv": seq_kv,
        "head_dim": head_dim,
    }


def _measure(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    scale: float,
    competitors: dict[str, Implementation],
    *,
    favourite: str,
) -> tuning_cache.Measured | None:
    """Time the competitors that compute what PyTorch does."""
    arguments = q, k, v, num_heads, scale
    with torch.no_grad(), torch.cuda.device_of(q):
        expected = _run_sdpa(*arguments)
        why_wrong = functools.partial(_why_wrong, arguments, expected)
        runs = {name: functools.partial(way.run, *arguments) for name, way in competitors.items()}
        measured = tuning_cache.fastest(runs, why_wrong, tuning_cache.cuda_milliseconds, favourite)
    logger.debug("%s of %s: %s", OP, _shape(q, k, num_heads), measured)
    return measured


def _why_wrong(arguments: tuple[Tensor, Tensor, Tensor, int, float], expected: Tensor, out: Tensor) -> str | None:
    """What is wrong with ``out``: everywhere against PyTorch's result, and in some rows against float64."""
    q, k, v, num_heads, scale = arguments
    eps = torch.finfo(q.dtype).eps
    apart = float(torch.linalg.vector_norm(out - expected, dtype=torch.float32))
    if not apart <= UNITS_IN_LAST_PLACE * eps * float(torch.linalg.vector_norm(expected, dtype=torch.float32)):
        return "its result is not PyTorch's"
    last_head = slice(-(q.shape[2] // num_heads), None)  # of the last sample: the largest offsets
    rows = torch.linspace(0, q.shape[1] - 1, min(q.shape[1], CHECKED_ROWS), device=q.device).long()
    gold_q, gold_k, gold_v = (x[-1, :, last_head].double() for x in (q, k, v))
    gold = (gold_q[rows] @ gold_k.T * scale).softmax(-1) @ gold_v
    error, own = ((x[-1, :, last_head][rows].double() - gold).norm() for x in (out, expected))
    if not error <= 2 * own + eps * gold.norm():
        return f"its error against float64 is {float(error / own):.1f} times PyTorch's"
    return None


def _validate(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise _mismatch("q must be [B, S, H*D], k and v [B, Skv, H*D]", q, k, v)
    if q.numel() == 0 or k.numel() == 0:
        raise _mismatch("q, k and v must not be empty", q, k, v)
    if num_heads < 1 or q.shape[2] % num_heads:
        raise _mismatch(f"num_heads={num_heads} must divide the H*D={q.shape[2]} channels of q", q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"{OP}: q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}")


def _mismatch(expected: str, q: Tensor, k: Tensor, v: Tensor) -> ValueError:
    return ValueError(f"{OP}: {expected}, got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")


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
        impl: A key of ``IMPLEMENTATIONS``; None for the fastest (see the module's docstring).

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
    chosen, reason = _choose(q, k, v, num_heads, scale, impl)
    run = IMPLEMENTATIONS[chosen].run
    if impl is not None or chosen == "torch" or torch.compiler.is_compiling():
        record_choice(Choice(OP, chosen, reason))
        return run(q, k, v, num_heads, scale)
    try:
        out = run(q, k, v, num_heads, scale)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a measurement of another day may not hold on this GPU: the clip goes on without
        reason = f"{chosen}: {first_line(error)}"
        logger.warning("%s: PyTorch's attention runs from now on for this shape: %s", OP, reason)
        _chosen[_shape(q, k, num_heads)] = "torch", reason
        chosen, out = "torch", _run_sdpa(q, k, v, num_heads, scale)
    record_choice(Choice(OP, chosen, reason))
    return out
