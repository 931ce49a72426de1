"""Its softmax is compiled in test_gemm_attention.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import FAULTS, assert_close_to_gold, planted
from torch import Tensor

from vidaccel.kernels.attention import block_causal_attention as op
from vidaccel.kernels.attention.block_causal_attention import (
    BLOCK_CAUSAL_ATTENTION,
    block_causal_attention,
    block_causal_attention_ref,
)
from vidaccel.kernels.op import listening


def draw(
    samples: int, rows: int, device: torch.device, channels: int = 288, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, ...]:
    """Slices of a packed projection."""
    packed = torch.randn(samples, rows, 3 * channels, generator=torch.Generator().manual_seed(0))
    return packed.to(device, dtype).chunk(3, dim=-1)


def assert_matches(out: Tensor, q: Tensor, k: Tensor, v: Tensor, block: int) -> None:
    gold = block_causal_attention_ref(q.double(), k.double(), v.double(), block)
    assert out.is_contiguous()
    assert_close_to_gold(out, gold, block_causal_attention_ref(q, k, v, block))


def test_reference_is_attention_with_a_mask(device: torch.device) -> None:
    q, k, v = draw(2, 15, device, dtype=torch.float64)
    frame = torch.arange(15, device=device) // 5
    mask = frame[:, None] >= frame[None, :]
    expected = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask)[:, 0]
    torch.testing.assert_close(block_causal_attention_ref(q, k, v, 5), expected)


@pytest.mark.parametrize(
    ("samples", "rows", "block"), [(1, 6, 6), (2, 57, 3), (1, 9, 1), (1, 64, 16)], ids=["one", "many", "rows", "even"]
)
@pytest.mark.parametrize("scores_bytes", [2**27, 4 * 2 * 57 * 3 * 2, 1], ids=["together", "twos", "apart"])
def test_matches_reference(
    scores_bytes: int, samples: int, rows: int, block: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "SCORES_BYTES", scores_bytes)
    BLOCK_CAUSAL_ATTENTION.forget()
    q, k, v = draw(samples, rows, device)
    assert_matches(block_causal_attention(q, k, v, block, impl="gemm"), q, k, v, block)


def test_more_keys_than_the_softmax_takes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "MOST_KEYS", 20)
    q, k, v = draw(1, 30, device)
    assert_matches(block_causal_attention(q, k, v, 2, impl="gemm"), q, k, v, 2)


@pytest.mark.parametrize(
    ("channels", "dtype", "way"),
    [(288, torch.float16, "gemm"), (288, torch.float32, "torch"), (64, torch.float16, "torch")],
)
@torch.no_grad()
def test_runs_where_it_pays(channels: int, dtype: torch.dtype, way: str, device: torch.device) -> None:
    with listening() as events:
        block_causal_attention(*draw(1, 6, device, channels, dtype), 3)
    assert [(event.implementation, event.reason) for event in events] == [(way, "")]


@pytest.mark.parametrize("fault", [None, *FAULTS])
@torch.no_grad()
def test_a_fault_is_found(fault: str | None, device: torch.device) -> None:
    q, k, v = draw(1, 12, device)

    def spoil(out: Tensor) -> None:
        if fault:
            FAULTS[fault](out.view(4, 3, -1))

    with planted(BLOCK_CAUSAL_ATTENTION, "gemm", spoil), listening(checks=True) as events:
        assert_matches(block_causal_attention(q, k, v, 3), q, k, v, 3)
    assert [(event.implementation, bool(event.problem)) for event in events] == [("gemm", bool(fault))]


@pytest.mark.parametrize(
    ("shapes", "block", "message"),
    [
        ([(1, 4, 8), (1, 4, 8), (1, 5, 8)], 2, r"q, k and v must be \[B, S, C\], got"),
        ([(1, 0, 8)] * 3, 1, "must not be empty"),
        ([(1, 4, 8)] * 3, 3, "block=3 must divide the S=4 rows"),
    ],
)
def test_rejects(shapes: list[tuple[int, ...]], block: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"block_causal_attention: .*{message}"):
        block_causal_attention(*map(torch.ones, shapes), block)


def test_registration(device: torch.device) -> None:
    torch.library.opcheck(BLOCK_CAUSAL_ATTENTION.registered["gemm"], (*draw(1, 6, device), 3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [256, 80, 30])
@torch.no_grad()
def test_real_shapes(block: int, dtype: torch.dtype, device: torch.device) -> None:
    """HunyuanVideo 1.5's tiles."""
    q, k, v = draw(1, 31 * block, device, 1024, dtype)
    with listening(checks=True) as events:
        assert_matches(block_causal_attention(q, k, v, block), q, k, v, block)
    assert [(event.implementation, event.problem) for event in events] == [("gemm", "")]
