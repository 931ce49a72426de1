from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, assert_close_to_gold, pairwise, planted
from torch import Tensor

from vidaccel.kernels import check
from vidaccel.kernels.norm.channel_statistics import ChannelStatistics
from vidaccel.kernels.norm.frame_statistics import FRAME_STATISTICS, frame_statistics, frame_statistics_ref
from vidaccel.kernels.norm.group_norm_silu import (
    group_norm_and_sum,
    group_norm_silu,
    group_norm_silu_ref,
)
from vidaccel.kernels.op import listening

EPS = 1e-6


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, centre: float = 3.0) -> tuple[Tensor, ...]:
    """A clip in channels-last memory, a shift, weight and bias."""
    torch.manual_seed(0)
    samples, channels, frames, *_ = shape
    x = (torch.randn(shape, device=device) + centre).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    shift = torch.randn(samples, frames, channels, device=device).to(dtype)
    weight, bias = torch.randn(2, channels, device=device).to(dtype)
    return x, shift, weight, bias


@pairwise(
    {
        "shape": [(1, 32, 1, 1, 2), (2, 64, 3, 5, 7), (1, 320, 2, 9, 16)],
        "shifted": [False, True, "bias"],
        "centre": [0.0, 30.0],
        "dtype": DTYPES,
    }
)
def test_matches_reference(
    shape: tuple[int, ...], shifted: bool | str, centre: float, dtype: torch.dtype, device: torch.device
) -> None:
    x, shift, *_ = draw(shape, dtype, device, centre)
    if shifted == "bias":
        shift = shift[:1, :1].expand_as(shift)
    given = shift if shifted else None
    parts, rows, chunk_rows = frame_statistics(x, shift=given, impl="triton")
    z = x if given is None else x + given.mT[..., None, None]
    gold = frame_statistics_ref(z.double(), None, chunk_rows)
    assert rows == shape[3] * shape[4] and parts.shape == gold.shape
    error, size = ((x.abs().amax((0, 1, 3))) for x in (parts - gold, gold))  # of means, of sums of squares
    assert (error <= 32 * torch.finfo(torch.float32).eps * (size + z.double().abs().max())).all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shift"])
def test_a_part_of_a_clip_is_normalised_as_in_the_whole(
    shifted: bool, dtype: torch.dtype, impl: str, device: torch.device
) -> None:
    x, shift, weight, bias = draw((2, 64, 5, 7, 3), dtype, device)
    given = shift if shifted else None
    whole = group_norm_silu(x, weight, bias, 8, EPS, shift=given, impl="triton")
    wide = x if given is None else x + given.mT[..., None, None]
    gold = group_norm_silu_ref(wide.double(), weight.double(), bias.double(), 8, EPS)
    stretches = slice(0, 3), slice(3, 5)
    parts = [
        frame_statistics(x[:, :, s], shift=shift[:, s] if shifted else None, most_frames=3, impl=impl)
        for s in stretches
    ]
    of_all = torch.cat([part.parts.unflatten(0, (2, -1)) for part in parts], dim=1).flatten(0, 1)
    known = ChannelStatistics(of_all, *parts[0][1:])
    assert parts[0][1:] == parts[1][1:], "chunks are the same for all stretches"
    for s in stretches:
        part = x[:, :, s].contiguous(memory_format=torch.channels_last_3d)
        arguments = {"shift": shift[:, s] if shifted else None, "statistics": known}
        with listening(checks=True) as events:
            out = group_norm_silu(part, weight, bias, 8, EPS, **arguments, impl=impl)
        assert not events[0].problem, events
        assert_close_to_gold(out, gold[:, :, s], whole[:, :, s])
    if not shifted:
        out, summed = group_norm_and_sum(part, weight, bias, 8, EPS, bias, statistics=known, impl=impl)
        unactivated = group_norm_silu(x, weight, bias, 8, EPS, silu=False, impl="triton")
        gold = group_norm_silu_ref(x.double(), weight.double(), bias.double(), 8, EPS, silu=False)
        assert_close_to_gold(out, gold[:, :, s], unactivated[:, :, s])
        assert torch.equal(summed, part + bias.view(-1, 1, 1, 1))


def test_the_check_finds_faults(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", 500)  # in many parts
    x, shift, *_ = draw((2, 32, 3, 4, 5), torch.float32, device)
    with listening(checks=True) as events:
        frame_statistics(x, shift=shift)
    assert events[0].implementation == "triton" and not events[0].problem, events
    with planted(FRAME_STATISTICS, "triton", lambda parts: parts[-1].mul_(1.01)), listening(checks=True) as events:
        found = frame_statistics(x, shift=shift)
    assert events[0].problem
    assert torch.equal(found.parts, frame_statistics_ref(x, shift, found.chunk_rows))


def test_registration(device: torch.device) -> None:
    x, shift, *_ = draw((1, 32, 2, 3, 3), torch.float32, device)
    for given in (None, shift):
        torch.library.opcheck(FRAME_STATISTICS.registered["triton"], (x, given, 16))


@pytest.mark.parametrize(
    ("x", "shift", "message"),
    [
        (torch.ones(2, 32, 3, 4), None, r"x must be \[N, C, F, H, W\], got \(2, 32, 3, 4\)"),
        (torch.ones([]), None, r"x must be \[N, C, F, H, W\], got \(\)"),
        (torch.ones(2, 32, 3, 4, 4), torch.ones(2, 1, 32), r"shift must be \(2, 3, 32\), got \(2, 1, 32\)"),
    ],
)
def test_rejects(x: Tensor, shift: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"frame_statistics: {message}"):
        frame_statistics(x, shift=shift)
