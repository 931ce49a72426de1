"""The check of an op against its reference: it finds what is wrong, and passes what is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.kernels import check
from vidaccel.kernels.attention.qkv_projection import QKV_PROJECTION
from vidaccel.kernels.attention.spatial_attention import SPATIAL_ATTENTION
from vidaccel.kernels.attention.temporal_attention import TEMPORAL_ATTENTION
from vidaccel.kernels.check import Verdicts, disagreement
from vidaccel.kernels.conv.conv_epilogue import CONV_EPILOGUE
from vidaccel.kernels.conv.pixel_conv import PIXEL_CONV
from vidaccel.kernels.conv.temporal_conv import TEMPORAL_CONV
from vidaccel.kernels.conv.upsample_conv import UPSAMPLE_CONV
from vidaccel.kernels.ffn.geglu import GEGLU
from vidaccel.kernels.ffn.linear_geglu import LINEAR_GEGLU
from vidaccel.kernels.ffn.linear_gelu import LINEAR_GELU
from vidaccel.kernels.ffn.residual_projection import RESIDUAL_PROJECTION
from vidaccel.kernels.ffn.swiglu import SWIGLU
from vidaccel.kernels.norm.group_norm_silu import GROUP_NORM_SILU
from vidaccel.kernels.op import Implementation, Op, listening

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FRAMES, CHANNELS, SIDE = 14, 64, 12


def norm_arguments(x: Tensor) -> tuple[Any, ...]:
    """Of ``group_norm_silu``, by position: no shift, no tail, no statistics."""
    torch.manual_seed(1)
    weight, bias = (1 + 0.1 * torch.randn(2, CHANNELS)).to(x.dtype)
    return (x, weight, bias, 32, 1e-5, True, None, None, None, 0, 0)


def in_float32(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *others: Any) -> Tensor:
    """What a kernel does: one rounding at the end of the norm, one after SiLU."""
    y = F.group_norm(x.float(), groups, weight.float(), bias.float(), eps).to(x.dtype)
    return F.silu(y.float()).to(x.dtype)


def frames_swapped(y: Tensor) -> Tensor:
    return y[[1, 0, *range(2, len(y))]]


def pixels_zeroed(share: float) -> Callable[[Tensor], Tensor]:
    def fault(y: Tensor) -> Tensor:
        y = y.clone()
        pixels = y.permute(0, 2, 3, 1).reshape(-1, CHANNELS)
        pixels[-max(int(share * len(pixels)), 1) :] = 0
        return pixels.view(FRAMES, SIDE, SIDE, CHANNELS).permute(0, 3, 1, 2)

    return fault


def a_frame_scaled(y: Tensor) -> Tensor:
    return torch.cat([y[:-1], 1.02 * y[-1:]])


def a_channel_shifted(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, 5] += 0.1 * y.std()
    return y


def not_a_number(y: Tensor) -> Tensor:
    y = y.clone()
    y[3, 3, 3, 3] = float("nan")
    return y


FAULTS = {
    "0.05 % of pixels zeroed": pixels_zeroed(5e-4),
    "one pixel zeroed": pixels_zeroed(0.0),
    "1 % gain": lambda y: 1.01 * y,
    "2 % on one frame": a_frame_scaled,
    "two frames swapped": frames_swapped,
    "a channel's bias": a_channel_shifted,
    "one NaN": not_a_number,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    args = norm_arguments((2 * torch.randn(FRAMES, CHANNELS, SIDE, SIDE) + 0.3).to(dtype))
    right = in_float32(*args)
    assert disagreement(GROUP_NORM_SILU, args, right, "math-exact") is None
    assert disagreement(GROUP_NORM_SILU, args, FAULTS[fault](right).to(dtype), "math-exact")


def odd_inputs(seed: int, dtype: torch.dtype) -> Tensor:
    """Ordinary, sparse, constant, tiny, huge, off-centre activations in turn."""
    torch.manual_seed(seed)
    x = torch.randn(2, CHANNELS, 6, 5)
    kinds = [
        x,
        x * (torch.rand_like(x) < 0.02),
        torch.full_like(x, float(torch.randn(()))),
        1e-6 * x,
        1e3 * x,
        x + 30,
        x.round(),
        torch.zeros_like(x),
        torch.where(torch.arange(2)[:, None, None, None] == 0, x, 0.0),
    ]
    return kinds[seed % len(kinds)].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_right_calls_pass(dtype: torch.dtype) -> None:
    alarms = {}
    for seed in range(500):
        args = norm_arguments(odd_inputs(seed, dtype))
        if problem := disagreement(GROUP_NORM_SILU, args, in_float32(*args), "math-exact"):
            alarms[seed] = problem
    assert not alarms


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_several_checks_have_one_answer(fault: str | None) -> None:
    torch.manual_seed(0)
    args = norm_arguments(2 * torch.randn(FRAMES, CHANNELS, SIDE, SIDE) + 0.3)
    right, verdicts, failed = in_float32(*args), Verdicts(), []
    assert not verdicts.doubted()
    for name, out in {
        "first": right,
        "second": right if fault is None else FAULTS[fault](right),
        "third": right,
    }.items():
        with verdicts.about(lambda reason, name=name: failed.append(name)):  # type: ignore[misc]
            assert disagreement(GROUP_NORM_SILU, args, out, "math-exact", verdicts=verdicts) is None
    for fail in verdicts.doubted():
        fail("it is wrong")
    assert failed == ([] if fault is None else ["second"])


def test_where_all_has_overflowed_nothing_is_computed_in_float64() -> None:
    """As in a model whose input was not a number: a minute of float64 would find nothing to go by."""
    dtypes = []

    def reference(x: Tensor) -> Tensor:
        dtypes.append(x.dtype)
        return GEGLU.reference(x)

    op = Op("overflows", reference=reference, implementations={}, fake=reference, costs=GEGLU.costs)
    x = torch.full((4, 8), torch.nan)
    assert disagreement(op, (x,), op.reference(x), "math-exact") is None
    assert set(dtypes) == {torch.float32}
    x[0] = 1.0
    assert disagreement(op, (x,), op.reference(x), "math-exact") is None
    assert torch.float64 in dtypes


def test_not_a_number_is_no_alarm_where_the_reference_makes_numbers_of_it() -> None:
    """As PyTorch's attention on a CPU does of few keys; in float64 it does not."""
    q, k, v = torch.randn(3, 2, 12, 64)
    q[1] = torch.nan
    args = q, k, v, *ATTENTIONS[SPATIAL_ATTENTION]
    right = SPATIAL_ATTENTION.reference(*args)
    assert disagreement(SPATIAL_ATTENTION, args, right, "math-exact") is None
    assert disagreement(SPATIAL_ATTENTION, args, torch.cat([1.01 * right[:1], right[1:]]), "math-exact")


def test_float64_gets_smaller_parts_than_the_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a part may be large without copies of it that are four times as large."""
    most = 4 * CHANNELS * SIDE * SIDE  # four of the fourteen pictures
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    torch.manual_seed(0)
    args = norm_arguments(torch.randn(FRAMES, CHANNELS, SIDE, SIDE).half())
    wrong = 1.01 * in_float32(*args)
    sizes: dict[torch.dtype, list[int]] = {}

    def reference(x: Tensor, *others: Any) -> Tensor:
        sizes.setdefault(x.dtype, []).append(x.numel())
        return GROUP_NORM_SILU.reference(x, *others)

    op = Op("sized", reference=reference, implementations={}, fake=reference, costs=GROUP_NORM_SILU.costs,
            parts=GROUP_NORM_SILU.parts)  # fmt: skip
    assert disagreement(op, args, wrong, "math-exact")
    assert max(sizes[torch.float16]) == args[0].numel()
    assert max(sizes[torch.float64]) <= most


ATTENTIONS: dict[Op, tuple[Any, ...]] = {SPATIAL_ATTENTION: (4, 0.25), TEMPORAL_ATTENTION: (3, 4, 0.25)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ATTENTIONS, ids=lambda op: op.name)
def test_each_head_of_each_sample_is_right_by_its_own_scale(op: Op, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 6, 20, 64).to(dtype)
    v[..., 16:32] *= 1e-3  # beside the others, nothing of this head would show
    args = q, k, v, *ATTENTIONS[op]
    right = op.reference(*(x.float() if isinstance(x, Tensor) else x for x in args)).to(dtype)
    assert disagreement(op, args, right, "math-exact") is None
    for head in range(4):
        wrong = right.clone()
        wrong[2, :, 16 * head : 16 * (head + 1)] *= 1.05
        assert "is off by" in str(disagreement(op, args, wrong, "math-exact")), head


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [GEGLU, SWIGLU, LINEAR_GEGLU, LINEAR_GELU, QKV_PROJECTION, RESIDUAL_PROJECTION])
@pytest.mark.parametrize("last", [1.0, 1e-2])
def test_each_frame_of_rows_is_right_by_its_own_scale(last: float, op: Op, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    scales = torch.ones(FRAMES, 1, 1)
    scales[-1] = last
    x, weight = scales * draw(FRAMES, 100, CHANNELS), draw(2 * CHANNELS, CHANNELS) / 8
    others: dict[Op, tuple[Any, ...]] = {
        LINEAR_GEGLU: (weight, torch.zeros(2 * CHANNELS)),
        LINEAR_GELU: (weight, None, "tanh"),
        QKV_PROJECTION: (weight[:CHANNELS], weight[CHANNELS:], weight[:CHANNELS]),
        RESIDUAL_PROJECTION: (weight[:CHANNELS], scales * draw(FRAMES, 100, CHANNELS)),
    }
    args = tuple(t.to(dtype) if isinstance(t, Tensor) else t for t in (x, *others.get(op, ())))
    out = op.reference(*args)
    right = [out] if isinstance(out, Tensor) else list(out)
    assert disagreement(op, args, out, "math-exact") is None
    wrong = [*right[:-1], right[-1].clone()]
    wrong[-1][-1] *= 1.02
    assert disagreement(op, args, tuple(wrong), "math-exact")


def test_another_shape_is_told_in_one_line() -> None:
    x = torch.randn(2, 4, 8)
    assert disagreement(GEGLU, (x,), torch.zeros(2, 4, 3), "math-exact") == (
        "returned (2, 4, 3) float32 where the reference returned (2, 4, 4) float32"
    )


def test_bit_exact_is_held_to_its_bits() -> None:
    x = torch.randn(4, 8)
    right = GEGLU.reference(x)
    assert disagreement(GEGLU, (x,), right, "bit-exact") is None
    assert "bits" in (disagreement(GEGLU, (x,), right * (1 + 2**-22), "bit-exact") or "")


LOST_BIASES: dict[Op, Callable[..., tuple[Any, ...]]] = {
    CONV_EPILOGUE: lambda x, w, b: (x, b, x, None, None, None, False, False),
    LINEAR_GELU: lambda x, w, b: (x.permute(0, 2, 3, 1).flatten(1, 2), w[:, :, 0, 0], b, "tanh"),
    PIXEL_CONV: lambda x, w, b: (x.permute(0, 2, 3, 1)[None], w[:, :, None].expand(-1, -1, 3, -1, -1), b, False),
    TEMPORAL_CONV: lambda x, w, b: (x.movedim(1, 0)[None], w[:, :, :, 0, None, None], b, None, None, None, False),
    UPSAMPLE_CONV: lambda x, w, b: (x, w, b),
}


@pytest.mark.parametrize("op", LOST_BIASES, ids=lambda op: op.name)
def test_a_lost_bias_shows_where_roundings_are_larger(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 16, 8, 10), torch.randn(16, 16, 3, 3) / 12
    x = x.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    bias = (torch.randn(16) * 2**-10).to(torch.bfloat16)  # of results around 1
    args = LOST_BIASES[op](x, weight.to(torch.bfloat16), bias)

    def without_bias(*args: Any) -> Any:
        return op.reference(*(torch.zeros_like(arg) if arg is bias else arg for arg in args))

    monkeypatch.setitem(op.implementations, "wrong", Implementation(without_bias))
    monkeypatch.setenv("VIDACCEL_IMPL", f"{op.name}=wrong")
    op.forget()
    with torch.no_grad():
        for probes in (False, True):
            with listening(checks=True, probes=probes) as events:
                op(*args)
            assert bool(events[-1].problem) is probes
    op.forget()
