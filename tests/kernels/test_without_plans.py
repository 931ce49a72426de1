"""Attention and convolutions without plans of a library: what PyTorch gives, in the same memory order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidaccel.kernels.without_plans import WithoutPlans, convolution_by_product

CONVOLVE = {4: F.conv2d, 5: F.conv3d}
ORDERS = {4: torch.channels_last, 5: torch.channels_last_3d}
SHAPES = [  # of a clip or pictures, of a weight, stride, padding
    ((2, 5, 7, 6), (4, 5, 3, 3), (1,), (1,)),
    ((2, 5, 7, 6), (4, 5, 3, 3), (2,), (0,)),
    ((2, 5, 7, 6), (4, 5, 1, 1), (1, 1), (0, 0)),
    ((1, 3, 8, 9), (2, 3, 4, 2), (3, 2), (2, 0)),
    ((2, 5, 4, 3, 6), (4, 5, 3, 1, 1), (1,), (1, 0, 0)),
    ((1, 2, 3, 7, 6), (4, 2, 3, 3, 3), (1, 2, 2), (1,)),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("channels_last", ["neither", "clip", "weight"])
@pytest.mark.parametrize(("shape", "taps", "stride", "padding"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_is_the_convolution(
    shape: tuple[int, ...],
    taps: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    with_bias: bool,
    channels_last: str,
) -> None:
    x, weight, bias = random(*shape), random(*taps, seed=1), random(taps[0], seed=2) if with_bias else None
    order = ORDERS[x.ndim]
    x = x.contiguous(memory_format=order) if channels_last == "clip" else x
    weight = weight.contiguous(memory_format=order) if channels_last == "weight" else weight
    expected = CONVOLVE[x.ndim](x, weight, bias, stride, padding)
    out = convolution_by_product(x, weight, bias, stride, padding)
    assert out is not None
    torch.testing.assert_close(out, expected)
    last = any(t.is_contiguous(memory_format=order) and not t.is_contiguous() for t in (x, weight))
    assert out.is_contiguous(memory_format=order if last else torch.contiguous_format)


@pytest.mark.parametrize(
    ("shape", "taps"),
    [
        ((2, 5, 7, 6), (4, 3, 3, 3)),
        ((2, 5, 2, 2), (4, 5, 3, 3)),
        ((0, 5, 7, 6), (4, 5, 3, 3)),
        ((5, 7, 6), (4, 5, 3, 3)),
    ],
)
def test_what_does_not_fit_is_left_to_the_library(shape: tuple[int, ...], taps: tuple[int, ...]) -> None:
    assert convolution_by_product(random(*shape), random(*taps), None, (1,), (0,)) is None


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_inside_the_block_no_plan_is_made(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 96, 3, stride=2, padding=1).to("cuda", dtype)
    over_frames = nn.Conv3d(96, 32, (3, 1, 1), padding=(1, 0, 0)).to("cuda", dtype)
    same, apart = (
        nn.Conv2d(96, 96, 3, padding="same").to("cuda", dtype),
        nn.Conv2d(96, 96, 3, groups=4).to("cuda", dtype),
    )
    x = torch.randn(4, 64, 16, 24, device="cuda", dtype=dtype)

    def run() -> list[Tensor]:
        y = conv(x)
        z = over_frames(y.unflatten(0, (1, 4)).transpose(1, 2))
        q, k = (t.flatten(2).unflatten(1, (3, 32)).transpose(2, 3).contiguous() for t in (y, y[:, :, :4]))
        mask = torch.ones(q.shape[2], k.shape[2], device="cuda", dtype=torch.bool).tril()
        attended = (
            F.scaled_dot_product_attention(q, k, k),
            F.scaled_dot_product_attention(query=q, key=k, value=k, scale=0.3),
        )
        return [y, z, *attended, F.scaled_dot_product_attention(q, k, k, attn_mask=mask), same(y), apart(y)]

    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as seen,
        WithoutPlans(),
    ):
        found = run()
    expected = run()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()
    assert [x.stride() for x in found[:2]] == [x.stride() for x in expected[:2]]
    calls = {event.key: event.count for event in seen.key_averages()}
    assert calls.get("aten::cudnn_convolution", 0) == 2  # with a padding in words, and in groups
    if dtype != torch.float32:
        assert calls["aten::_scaled_dot_product_flash_attention"] == 2


def test_attention_that_somebody_put_in_pytorchs_place_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, (q, k, v) = F.scaled_dot_product_attention, (random(1, 2, 5, 4, seed=seed) for seed in range(3))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *args: stock(q / 2, *args))
    expected = F.scaled_dot_product_attention(q, k, v)
    with WithoutPlans():
        out = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, expected)
