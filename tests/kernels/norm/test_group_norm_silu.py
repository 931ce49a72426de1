from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_checks import relative_error
from kernel_checks import (
    DTYPES,
    FAULTS,
    TARGETS,
    assert_close_to_gold,
    assert_no_spills,
    compile_for,
    pairwise,
    planted,
)
from torch import Tensor

from vidaccel.kernels import check
from vidaccel.kernels.norm import group_norm_silu as op
from vidaccel.kernels.norm.channel_statistics import FOLD, ChannelStatistics, Tiling, choose_tiling
from vidaccel.kernels.norm.group_norm_silu import (
    GROUP_NORM_AND_SUM,
    GROUP_NORM_SILU,
    choose_apply_tiling,
    group_norm_and_sum,
    group_norm_and_sum_ref,
    group_norm_ref,
    group_norm_silu,
    group_norm_silu_ref,
)
from vidaccel.kernels.op import listening
from vidaccel.kernels.settings import constants_overridden

EPS = 1e-5
GROUPS = 2  # where their number does not matter: the interpreter takes one after the other, and long for each

SHAPES = [
    pytest.param((2, 32, 1, 1), 4, id="one-pixel"),
    pytest.param((1, 32, 11, 13), 32, id="one-channel-per-group"),
    pytest.param((1, 96, 3, 7, 5), 4, id="prime-frames"),
    pytest.param((1, 320, 5, 3), 32, id="sd-width"),
    pytest.param((1, 64, 131), 2, id="sequence"),
]
REAL_SHAPES = [
    pytest.param((28, 320, 72, 128), None, id="svd-spatial"),
    pytest.param((2, 320, 14, 72, 128), 14, id="svd-temporal"),
    pytest.param((28, 640, 36, 64), 1, id="svd-640"),
    pytest.param((28, 1280, 18, 32), 1, id="svd-deep"),
    pytest.param((28, 1280, 9, 16), 1, id="svd-mid"),
    pytest.param((2, 1280, 14, 18, 32), 14, id="svd-deep-temporal"),
    pytest.param((2, 2560, 14, 9, 16), None, id="svd-up-concatenated"),
    pytest.param((50, 320, 72, 128), None, id="svd-xt"),
    pytest.param((32, 320, 64, 64), 1, id="sd-320"),
    pytest.param((32, 640, 32, 32), 1, id="sd-640"),
    pytest.param((32, 1280, 16, 16), None, id="sd-1280"),
    pytest.param((32, 1280, 8, 8), 1, id="sd-mid"),
    pytest.param((32, 2560, 16, 16), None, id="sd-up-2560"),
    pytest.param((32, 1920, 32, 32), None, id="sd-up-1920"),
    pytest.param((32, 960, 64, 64), None, id="sd-up-960"),
    pytest.param((32, 320, 32, 32), 1, id="modelscope-320"),
    pytest.param((32, 1280, 4, 4), 1, id="modelscope-mid"),
    pytest.param((2, 320, 16, 32, 32), None, id="modelscope-temporal"),
    pytest.param((2, 1280, 16, 8, 8), 16, id="modelscope-deep-temporal"),
    pytest.param((48, 320, 40, 72), 1, id="zeroscope-320"),
    pytest.param((2, 640, 24, 20, 36), None, id="zeroscope-temporal"),
    pytest.param((16, 512, 64, 64), None, id="autoencoder-512"),
    pytest.param((14, 512, 72, 128), None, id="vae-512-small"),
    pytest.param((4, 512, 144, 256), None, id="vae-512"),
]


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, segments: int | None = None, centre: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x in channels-last memory, weight, bias and (given a number of segments) shift."""
    torch.manual_seed(0)
    samples, channels, *spatial = shape
    x = (torch.randn(samples, *spatial, channels, device=device) + centre).to(dtype).movedim(-1, 1)
    weight, bias = (torch.randn(channels, device=device).to(dtype) for _ in range(2))
    shift = None if segments is None else torch.randn(samples, segments, channels, device=device).to(dtype)
    return x, weight, bias, shift


def cut(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The first ``channels`` of x and the others, as two tensors in channels-last memory."""
    head, tail = (
        part.contiguous().movedim(-1, 1) for part in x.movedim(1, -1).split([channels, x.shape[1] - channels], -1)
    )
    return head, tail


def assert_matches_reference(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int, *, silu: bool = True, shift: Tensor | None = None
) -> None:
    gold = group_norm_silu_ref(x.double(), weight.double(), bias.double(), groups, EPS, silu=silu, shift=shift)
    eager = group_norm_silu_ref(x, weight, bias, groups, EPS, silu=silu, shift=shift)
    assert_close_to_gold(out, gold, eager)
    assert out.movedim(1, -1).is_contiguous()


@pairwise(
    {
        "centre": [pytest.param(0.0, id="centred"), pytest.param(30.0, id="off-centre")],
        "shape, groups": SHAPES,
        "dtype": DTYPES,
    }
)
def test_matches_reference(
    shape: tuple[int, ...], groups: int, centre: float, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, bias, _ = draw(shape, dtype, device, centre=centre)
    out = group_norm_silu(x, weight, bias, groups, EPS, impl="triton")
    assert_matches_reference(out, x, weight, bias, groups)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("segments", "silu"),
    [
        pytest.param(1, True, id="per-sample"),
        pytest.param(1, False, id="per-sample-norm-only"),
        pytest.param(3, True, id="per-frame"),
        pytest.param(6, True, id="per-pixel"),
    ],
)
def test_adds_shift(segments: int, silu: bool, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias, shift = draw((2, 32, 3, 1, 2), dtype, device, segments)
    out = group_norm_silu(x, weight, bias, GROUPS, EPS, silu=silu, shift=shift, impl="triton")
    assert_matches_reference(out, x, weight, bias, GROUPS, silu=silu, shift=shift)


@pytest.mark.parametrize(
    "restride",
    [
        pytest.param(lambda shift: shift[:1, :1].expand(2, 1, -1), id="a-bias-expanded"),
        pytest.param(lambda shift: shift[:, :1], id="every-third-row"),
        pytest.param(lambda shift: shift.mT.contiguous().mT, id="channels-outermost"),
        pytest.param(lambda shift: shift[:1].expand(2, -1, -1), id="the-same-for-both-samples"),
        pytest.param(lambda shift: shift.repeat(1, 1, 2)[..., :64], id="rows-apart"),
    ],
)
def test_shift_of_any_strides(restride: Callable[[Tensor], Tensor], device: torch.device) -> None:
    x, weight, bias, shift = draw((2, 64, 3, 2, 5), torch.float16, device, 3)
    assert shift is not None
    shift = restride(shift)
    out = group_norm_silu(x, weight, bias, GROUPS, EPS, shift=shift, impl="triton")
    assert torch.equal(out, group_norm_silu(x, weight, bias, GROUPS, EPS, shift=shift.contiguous(), impl="triton"))
    assert_matches_reference(out, x, weight, bias, GROUPS, shift=shift)


def test_shift_rounds_as_a_stored_sum_does(device: torch.device) -> None:
    x, weight, bias, shift = draw((2, 32, 7, 5), torch.float16, device, 1)
    assert shift is not None
    out = group_norm_silu(x, weight, bias, GROUPS, EPS, shift=shift, impl="triton")
    stored = x + shift.movedim(1, -1)[..., None]
    assert torch.equal(out, group_norm_silu(stored, weight, bias, GROUPS, EPS, impl="triton"))


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("block_rows", [4, 8, 64])
def test_result_does_not_depend_on_the_cut(block_rows: int, stages: int, device: torch.device) -> None:
    """Several tiles to a chunk, chunks of unequal size, a last tile that is mostly outside."""
    x, weight, bias, shift = draw((1, 32, 3, 9, 5), torch.float32, device, 3, centre=30.0)
    with constants_overridden(BLOCK_R=block_rows, STAGES=stages):
        out = group_norm_silu(x, weight, bias, GROUPS, EPS, shift=shift, impl="triton")
    assert_matches_reference(out, x, weight, bias, GROUPS, shift=shift)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "head", "groups", "segments"),
    [
        pytest.param((2, 64, 5, 7), 32, 2, None, id="halves"),
        pytest.param((1, 480, 3, 3), 320, 16, 1, id="cut-across-a-group"),
        pytest.param((1, 96, 3, 7, 5), 64, 4, 3, id="5d"),
        pytest.param((2, 96, 13), 40, 3, None, id="cut-across-blocks"),
        pytest.param((2, 64, 5), 0, 2, None, id="all-in-the-tail"),
    ],
)
def test_tail(
    shape: tuple[int, ...], head: int, groups: int, segments: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    whole, weight, bias, shift = draw(shape, dtype, device, segments, centre=3.0)
    x, tail = cut(whole, head)
    for impl in ("triton", "torch"):
        out = group_norm_silu(x, weight, bias, groups, EPS, shift=shift, tail=tail, impl=impl)
        assert_matches_reference(out, whole, weight, bias, groups, shift=shift)


def test_tail_of_any_strides(device: torch.device) -> None:
    whole, weight, bias, _ = draw((2, 96, 5, 7), torch.float16, device)
    x, tail = cut(whole, 32)
    expected = group_norm_silu(x, weight, bias, GROUPS, EPS, tail=tail, impl="triton")
    assert torch.equal(
        expected, group_norm_silu(whole[:, :32], weight, bias, GROUPS, EPS, tail=whole[:, 32:], impl="triton")
    )
    x, tail = x.contiguous(), tail.contiguous()
    assert torch.equal(expected, group_norm_silu(x, weight, bias, GROUPS, EPS, tail=tail, impl="triton"))


def test_off_centre_mean_is_right_to_half_a_unit_in_the_last_place(device: torch.device) -> None:
    x, weight, bias, _ = draw((1, 32, 24, 25), torch.float32, device, centre=30.0)
    out = group_norm_silu(x, weight, bias, 4, EPS, impl="triton")
    gold = group_norm_silu_ref(x.double(), weight.double(), bias.double(), 4, EPS)
    eps = torch.finfo(torch.float32).eps
    assert (out - gold).abs().max() <= eps / 2 * 30.0 * weight.abs().max() + eps * gold.abs().max()


def test_one_outlying_row_does_not_spoil_the_variance(device: torch.device) -> None:
    x, weight, bias, _ = draw((1, 32, 64, 4), torch.float32, device)
    x[:, :, 0, 0] = 1e4
    out = group_norm_silu(x, weight, bias, 4, EPS, impl="triton")
    assert_matches_reference(out, x, weight, bias, 4)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.contiguous(), id="channels-first"),
        pytest.param(lambda x: x.repeat_interleave(2, -1)[..., ::2], id="strided"),
        pytest.param(lambda x: x.repeat_interleave(2, 1)[:, ::2], id="strided-channels"),
    ],
)
def test_takes_any_strides(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    x, weight, bias, _ = draw((2, 64, 5, 7), torch.float16, device)
    laid_out = layout(x)
    assert torch.equal(laid_out, x) and not laid_out.movedim(1, -1).is_contiguous()
    out = group_norm_silu(laid_out, weight, bias, GROUPS, EPS, impl="triton")
    assert torch.equal(out, group_norm_silu(x, weight, bias, GROUPS, EPS, impl="triton"))
    assert out.movedim(1, -1).is_contiguous()


def test_images_of_one_pixel(device: torch.device) -> None:
    """They lie in both orders at once, and PyTorch's CPU kernel for one of them is poor."""
    x = (torch.randn(4, 1, 1, 64, generator=torch.Generator().manual_seed(0)) + 30).to(device).permute(0, 3, 1, 2)
    weight, bias = torch.ones(64, device=device), torch.zeros(64, device=device)
    gold = group_norm_ref(x.double(), weight.double(), bias.double(), 16, EPS)
    assert relative_error(group_norm_ref(x, weight, bias, 16, EPS).double(), gold) <= 1e-4


def test_parameters_of_another_dtype(device: torch.device) -> None:
    x, weight, bias, shift = draw((2, 64, 5, 7), torch.float16, device, 1)
    assert shift is not None
    out = group_norm_silu(x, weight.float(), bias.float(), GROUPS, EPS, shift=shift.float(), impl="triton")
    assert torch.equal(out, group_norm_silu(x, weight, bias, GROUPS, EPS, shift=shift, impl="triton"))


@pytest.mark.parametrize("shape", [(0, 64, 4, 4), (2, 64, 0, 4)], ids=["no-samples", "no-pixels"])
def test_empty_input(shape: tuple[int, ...], device: torch.device) -> None:
    x, weight, bias, _ = draw(shape, torch.float16, device)
    head, tail = cut(x, 32)
    try:
        torch.nn.functional.group_norm(x, GROUPS)
    except RuntimeError:  # PyTorch 2.14's, of no pixels
        with pytest.raises(RuntimeError):
            group_norm_silu(x, weight, bias, GROUPS, EPS)
        return
    for out in (
        group_norm_silu(x, weight, bias, GROUPS, EPS),
        group_norm_silu(head, weight, bias, GROUPS, EPS, tail=tail),
    ):
        assert out.shape == shape and out.dtype == x.dtype


@pytest.mark.parametrize(
    ("channels", "dtype", "reason"),
    [(40, torch.float32, "C divisible by 32, got C=40"), (32, torch.float64, "x is torch.float64")],
)
def test_unserved_input_runs_in_torch(channels: int, dtype: torch.dtype, reason: str, device: torch.device) -> None:
    x, weight, bias, shift = draw((2, channels, 5, 7), dtype, device, 5)
    with listening() as events:
        out = group_norm_silu(x, weight, bias, GROUPS, EPS, shift=shift)
    assert [event.implementation for event in events] == ["torch"]
    assert reason in events[0].reason
    assert_matches_reference(out, x, weight, bias, GROUPS, shift=shift)
    with pytest.raises(ValueError, match=f"impl='triton' cannot run: .*{re.escape(reason)}"):
        group_norm_silu(x, weight, bias, GROUPS, EPS, impl="triton")


@pytest.mark.parametrize("name", ["x", "weight", "bias", "shift"])
def test_gradients_flow_where_they_are_wanted(name: str, device: torch.device) -> None:
    x, weight, bias, shift = draw((2, 32, 5, 7), torch.float32, device, 5)
    arguments = {"x": x, "weight": weight, "bias": bias, "groups": 8, "eps": EPS, "shift": shift}
    arguments[name].requires_grad_()
    with listening() as events:
        group_norm_silu(**arguments).sum().backward()
    assert [event.implementation for event in events] == ["torch"]
    assert arguments[name].grad is not None
    with pytest.raises(ValueError, match="no backward pass"):
        group_norm_silu(**arguments, impl="triton")


def test_torch_implementation_returns_channels_last(device: torch.device) -> None:
    x, weight, bias, _ = draw((2, 32, 5, 7), torch.float32, device)
    assert_matches_reference(group_norm_silu(x, weight, bias, GROUPS, EPS, impl="torch"), x, weight, bias, GROUPS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 32)}, r"1 to 3 spatial dims, got \(2, 32\)"),
        ({"groups": 5}, r"groups=5 does not divide C=32 \(x is \(2, 32, 2, 3\)\)"),
        ({"weight": torch.ones(31)}, r"weight and bias must be \[32\], got \(31,\) and \(32,\)"),
        ({"bias": torch.ones(1)}, r"weight and bias must be \[32\], got \(32,\) and \(1,\)"),
        ({"shift": torch.ones(2, 32)}, r"shift must be \[2, T, 32\], got \(2, 32\)"),
        ({"shift": torch.ones(1, 1, 32)}, r"shift must be \[2, T, 32\], got \(1, 1, 32\)"),
        ({"shift": torch.ones(2, 4, 32)}, r"T=4 of shift does not divide the 6 rows of x \(2, 32, 2, 3\)"),
        ({"tail": torch.ones(2, 32, 2, 3)}, r"weight and bias must be \[64\], got \(32,\) and \(32,\)"),
        ({"tail": torch.ones(2, 8, 3, 2)}, r"tail must be x but for its channels, got \(2, 8, 3, 2\) torch.float32 "),
        ({"tail": torch.ones(2, 8, 2, 3).half()}, r"but for its channels, got \(2, 8, 2, 3\) torch.float16 behind"),
        ({"impl": "cuda"}, r"impl must be one of triton, torch, got 'cuda'"),
        ({"statistics": ChannelStatistics(torch.ones(2, 1, 2, 32), 4, 4)}, r"must divide the 6 rows .* segment_rows=4"),
        ({"statistics": ChannelStatistics(torch.ones(2, 1, 2, 32), 3, 3)}, r"must be \(4, 1, 2, 32\) torch.float32"),
        ({"statistics": ChannelStatistics(torch.ones(2, 1, 2, 32).half(), 6, 6)}, r"got \(2, 1, 2, 32\) torch.float16"),
        (
            {
                "statistics": ChannelStatistics(torch.ones(2, 1, 2, 32), 6, 6),
                "tail": torch.ones(2, 8, 2, 3),
                "weight": torch.ones(40),
                "bias": torch.ones(40),
            },
            "statistics are of x alone",
        ),
    ],
)
def test_rejects(change: dict[str, Any], message: str) -> None:
    arguments = {
        "x": torch.ones(2, 32, 2, 3),
        "weight": torch.ones(32),
        "bias": torch.ones(32),
        "groups": 8,
        "eps": EPS,
    }
    with pytest.raises(ValueError, match=f"group_norm_silu: .*{message}"):
        group_norm_silu(**{**arguments, **change})


@pytest.mark.parametrize(
    ("shape", "segments", "channels_last"),
    [
        pytest.param((2, 32, 3, 5), None, True, id="4d"),
        pytest.param((1, 32, 3, 4, 5), 3, True, id="5d-shift"),
        pytest.param((1, 32, 7), None, False, id="3d-channels-first"),
    ],
)
def test_registration(shape: tuple[int, ...], segments: int | None, channels_last: bool, device: torch.device) -> None:
    x, weight, bias, shift = draw(shape, torch.float32, device, segments)
    x = x if channels_last else x.contiguous()
    torch.library.opcheck(
        GROUP_NORM_SILU.registered["triton"], (x, weight, bias, GROUPS, EPS, True, shift, None, None, 0, 0)
    )


def test_registration_with_tail(device: torch.device) -> None:
    whole, weight, bias, shift = draw((2, 64, 3, 5), torch.float32, device, 1)
    x, tail = cut(whole, 32)
    torch.library.opcheck(
        GROUP_NORM_SILU.registered["triton"], (x, weight, bias, GROUPS, EPS, True, shift, tail, None, 0, 0)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("shape", [(2, 32, 3, 5), (1, 64, 3, 2, 5), (1, 320, 11)], ids=str)
def test_norm_and_sum(shape: tuple[int, ...], impl: str, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias, _ = draw(shape, dtype, device, centre=3.0)
    row = torch.randn(shape[1], device=device)
    out, summed = group_norm_and_sum(x, weight, bias, GROUPS, EPS, row, impl=impl)
    assert torch.equal(summed, x + row.to(dtype).view(-1, *(1,) * (len(shape) - 2)))
    assert summed.movedim(1, -1).is_contiguous()
    assert_matches_reference(out, x, weight, bias, GROUPS, silu=False)


def test_registration_of_norm_and_sum(device: torch.device) -> None:
    x, weight, bias, _ = draw((1, 32, 3, 2, 1), torch.float32, device)
    arguments = x, weight, bias, GROUPS, EPS, weight, None, 0, 0
    torch.library.opcheck(GROUP_NORM_AND_SUM.registered["triton"], arguments)


def test_norm_and_sum_wants_a_row_for_every_channel(device: torch.device) -> None:
    x, weight, bias, _ = draw((1, 32, 2, 2), torch.float32, device)
    with pytest.raises(ValueError, match=r"row must be \[32\], got \(31,\)"):
        group_norm_and_sum(x, weight, bias, GROUPS, EPS, weight[1:])
    assert [y.shape for y in group_norm_and_sum(x[:0], weight, bias, GROUPS, EPS, weight)] == [x[:0].shape] * 2


@pytest.mark.parametrize("head", [64, 32], ids=["whole", "tail"])
@pytest.mark.parametrize("segments", [None, 3], ids=["plain", "shift"])
def test_compiles_fullgraph(segments: int | None, head: int, device: torch.device) -> None:
    whole, weight, bias, shift = draw((1, 64, 3, 2, 5), torch.float32, device, segments)
    x, tail = (whole, None) if head == 64 else cut(whole, head)

    def double(x: Tensor, tail: Tensor | None) -> Tensor:
        return 2 * group_norm_silu(x, weight, bias, GROUPS, EPS, shift=shift, tail=tail, impl="triton")

    out, eager = torch.compile(double, fullgraph=True, backend="aot_eager")(x, tail), double(x, tail)
    assert torch.equal(out, eager) and out.stride() == eager.stride()


def statistics_of(x: Tensor, segment_rows: int, chunk_rows: int) -> ChannelStatistics:
    """In float64, then stored as kernels do."""
    rows = x.movedim(1, -1).reshape(-1, segment_rows, x.shape[1]).double()  # [S, R, C]
    chunks = rows.split(chunk_rows, dim=1)
    parts = [torch.stack([part.mean(1), part.var(1, correction=0) * part.shape[1]], 1) for part in chunks]
    return ChannelStatistics(torch.stack(parts, 1).float(), segment_rows, chunk_rows)


@pytest.mark.parametrize(
    ("segment_rows", "chunk_rows"), [(105, 105), (105, 8), (35, 16), (7, 4)], ids=["whole", "chunks", "frames", "lines"]
)
@pytest.mark.parametrize("centre", [0.0, 30.0], ids=["centred", "off-centre"])
def test_takes_statistics(segment_rows: int, chunk_rows: int, centre: float, device: torch.device) -> None:
    x, weight, bias, row = draw((2, 96, 3, 7, 5), torch.float32, device, 1, centre=centre)
    assert row is not None
    known = statistics_of(x, segment_rows, chunk_rows)
    out = group_norm_silu(x, weight, bias, 6, EPS, statistics=known, impl="triton")
    assert_matches_reference(out, x, weight, bias, 6)
    out, summed = group_norm_and_sum(x, weight, bias, 6, EPS, row[0, 0], statistics=known, impl="triton")
    assert_matches_reference(out, x, weight, bias, 6, silu=False)
    assert torch.equal(summed, x + row[:1, 0, :, None, None, None])


def test_statistics_are_what_it_normalises_by(device: torch.device) -> None:
    x, weight, bias, _ = draw((2, 32, 5, 7), torch.float32, device)
    known = statistics_of(2 * x, 35, 16)
    with listening(checks=True) as events:
        out = group_norm_silu(x, weight, bias, GROUPS, EPS, statistics=known)
    assert "worst row" in events[0].problem, "wrong ones are found"
    assert torch.equal(out, group_norm_silu_ref(x, weight, bias, GROUPS, EPS))
    out = group_norm_silu(x, weight, bias, GROUPS, EPS, silu=False, statistics=known, impl="triton")
    plain = group_norm_silu(x, weight, bias, GROUPS, EPS, silu=False, impl="triton")
    bias = bias.view(-1, 1, 1)
    assert not torch.allclose(out - bias, plain - bias, rtol=0.1)
    known = known._replace(parts=known.parts.repeat_interleave(2, -1)[..., ::2])
    strided = group_norm_silu(x, weight, bias.flatten(), GROUPS, EPS, silu=False, statistics=known, impl="triton")
    assert torch.equal(strided, out)


# the check against the reference


@pairwise(
    {
        "head, segments": [
            pytest.param(64, None, id="plain"),
            pytest.param(64, 3, id="shift"),
            pytest.param(40, None, id="tail"),
        ],
        "most": [pytest.param(2**23, id="whole"), pytest.param(700, id="in-parts")],
        "dtype": DTYPES,
    }
)
def test_a_right_result_is_found_right(
    head: int,
    segments: int | None,
    most: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    whole, weight, bias, shift = draw((2, 64, 3, 4, 5), dtype, device, segments, centre=3.0)
    x, tail = (whole, None) if head == 64 else cut(whole, head)
    with listening(checks=True) as events:
        group_norm_silu(x, weight, bias, GROUPS, EPS, shift=shift, tail=tail)
        group_norm_and_sum(whole, weight, bias, GROUPS, EPS, weight)
    assert [event[:2] for event in events] == [("group_norm_silu", "triton"), ("group_norm_and_sum", "triton")]
    assert not any(event.problem for event in events), events
    numbers = whole.nbytes
    assert [event.costs.bytes for event in events] == [3 * numbers, 4 * numbers]


@pytest.mark.parametrize("most", [2**23, 700], ids=["whole", "in-parts"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    x, weight, bias, _ = draw((3, 32, 9, 5), torch.float16, device)
    spoil = FAULTS[fault]
    arguments = x + 1000, weight, bias, GROUPS, EPS
    with planted(GROUP_NORM_SILU, "triton", lambda y: spoil(y.movedim(1, -1))), listening(checks=True) as events:
        out = group_norm_silu(*arguments)
    assert events[0].problem
    assert torch.equal(out, group_norm_silu_ref(*arguments))
    arguments = x, *arguments[1:]
    with (
        planted(GROUP_NORM_AND_SUM, "triton", lambda outputs: spoil(outputs[1].movedim(1, -1))),
        listening(checks=True) as events,
    ):
        outputs = group_norm_and_sum(*arguments, weight)
    assert events[0].problem
    assert all(map(torch.equal, outputs, group_norm_and_sum_ref(*arguments, weight)))


SIGNATURE = {
    **dict.fromkeys(("x_ptr", "tail_ptr", "shift_ptr", "weight_ptr", "bias_ptr", "row_ptr"), "*fp16:16"),
    **dict.fromkeys(("sum_ptr", "y_ptr"), "*fp16:16"),
    **dict.fromkeys(("part_ptr", "norm_ptr"), "*fp32:16"),
    **dict.fromkeys(("groups", "group_channels", "segments", "segment_rows", "chunk_rows"), "i32"),
    **dict.fromkeys(("first_span", "span", "spans"), "i32"),
    **dict.fromkeys(("channels", "head_channels"), "i32:16"),
    "stride_shift_segment": "i32",
    "eps": "fp32",
}


def compile_tiled(target: str, kernel: Any, tiling: Tiling, **flags: Any) -> dict[str, str]:
    constexprs = {
        "BLOCK_R": tiling.block_r,
        "BLOCK_C": tiling.block_c,
        "STAGES": tiling.stages,
        "HAS_SHIFT": True,
        "HAS_ROW": False,
        **flags,
    }
    return compile_for(target, kernel, SIGNATURE, constexprs, num_warps=tiling.num_warps)


def assert_loads_16_bytes_ahead(asm: dict[str, str]) -> None:
    if "ptx" not in asm:
        assert re.search(r"(global|buffer)_load_dwordx4", asm["amdgcn"])
        return
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?\], (0x\w+)", asm["ptx"])
    assert sizes and set(sizes) == {"0x10"}, "the tiles are not prefetched, or not 16 bytes at a time"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_threads_work_alone_on_the_statistics(target: str) -> None:
    asm = compile_tiled(target, op._chunk_stats_kernel, choose_tiling(28, 9216, 320, 64), FOLD=FOLD)
    assert_no_spills(asm)
    if target.startswith("sm_"):
        assert "LDG.E.128" in asm["sass"] and "BAR.SYNC" not in asm["sass"].split("LBB")[0]
        loop = re.search(r"scf\.for .*?scf\.yield", asm["ttgir"], re.DOTALL)
        assert loop and "convert_layout" not in loop[0], "threads exchange data inside the loop"


@pytest.mark.slow
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "sum"])
@pytest.mark.parametrize("target", TARGETS)
def test_apply_prefetches_and_stores_16_bytes(target: str, shift: bool) -> None:
    asm = compile_tiled(
        target, op._apply_kernel, choose_apply_tiling(64), SILU=True, HAS_SHIFT=shift, HAS_ROW=not shift
    )
    assert_no_spills(asm)
    assert_loads_16_bytes_ahead(asm)
    if "ptx" in asm:
        assert set(re.findall(r"st\.global\.(\S+)", asm["ptx"])) == {"v4.b32"}
    else:
        assert re.search(r"(global|buffer)_store_dwordx4", asm["amdgcn"])


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_merge_of_the_statistics_compiles(target: str) -> None:
    for num_warps in (1, 8):
        constexprs = {"BLOCK": 256 * num_warps}
        assert_no_spills(compile_for(target, op._group_stats_kernel, SIGNATURE, constexprs, num_warps=num_warps))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "segments"), REAL_SHAPES)
def test_real_shapes(shape: tuple[int, ...], segments: int | None, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias, shift = draw(shape, dtype, device, segments, centre=3.0)
    out = group_norm_silu(x, weight, bias, 32, EPS, shift=shift, impl="triton")
    assert_matches_reference(out, x, weight, bias, 32, shift=shift)


@pytest.mark.gpu
@pytest.mark.parametrize("head", [320, 640, 1280])
def test_real_tails(head: int, device: torch.device) -> None:
    whole, weight, bias, shift = draw((32, 1920, 32, 32), torch.float16, device, 1, centre=3.0)
    x, tail = cut(whole, head)
    out = group_norm_silu(x, weight, bias, 32, EPS, shift=shift, tail=tail, impl="triton")
    assert_matches_reference(out, whole, weight, bias, 32, shift=shift)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_of_long_groups(dtype: torch.dtype, device: torch.device) -> None:
    """Reductions over the whole GPU stand for PyTorch's norm there."""
    x, weight, bias, _ = draw((1, 64, 4, 256, 256), dtype, device, centre=3.0)
    gold = F.group_norm(x.double(), 32, weight.double(), bias.double(), EPS)
    with torch.no_grad():
        out = group_norm_silu_ref(x, weight, bias, 32, EPS, silu=False)
    assert_close_to_gold(out, gold, F.group_norm(x, 32, weight.to(dtype), bias.to(dtype), EPS))


@pytest.mark.gpu
def test_offsets_beyond_int32(device: torch.device) -> None:
    """17 equal frames have the statistics of one, and the last of them lies beyond 2**31 elements."""
    frame, weight, bias, _ = draw((1, 128, 1, 1024, 1024), torch.float16, device)
    clip = frame.movedim(1, -1).expand(1, 17, 1024, 1024, 128).contiguous().movedim(-1, 1)
    assert clip.numel() > 2**31
    out = group_norm_silu(clip, weight, bias, 32, EPS, impl="triton")
    assert_matches_reference(out[:, :, -1:], frame, weight, bias, 32)


@pytest.mark.gpu
def test_real_norm_and_sum(device: torch.device) -> None:
    x, weight, bias, row = draw((2, 320, 16, 64, 64), torch.float16, device, 1, centre=3.0)
    assert row is not None
    out, summed = group_norm_and_sum(x, weight, bias, 32, EPS, row[0, 0], impl="triton")
    assert torch.equal(summed, x + row[0].view(1, -1, 1, 1, 1))
    assert_matches_reference(out, x, weight, bias, 32, silu=False)
