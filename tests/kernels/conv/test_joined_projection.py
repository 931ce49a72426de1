from __future__ import annotations

import pytest
import torch
from kernel_checks import FAULTS, assert_close_to_gold, planted
from torch import Tensor

from vidaccel.kernels.conv.joined_projection import JOINED_PROJECTION, joined_projection, joined_projection_ref
from vidaccel.kernels.op import listening

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CHANNELS_LAST = torch.channels_last


def draw(
    size: tuple[int, int, int], widths: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Both images, channels-last, and the weight, which makes one of ``widths[2]`` channels of theirs."""
    torch.manual_seed(0)
    samples, height, width = size
    x, skip = (torch.randn(samples, c, height, width, device=device).to(dtype) for c in widths[:2])
    weight = torch.randn(widths[2], widths[0] + widths[1], 1, 1, device=device).to(dtype)
    return x.to(memory_format=CHANNELS_LAST), skip.to(memory_format=CHANNELS_LAST), weight


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "widths"),
    [((1, 1, 1), (1, 1, 1)), ((3, 5, 7), (24, 16, 40)), ((2, 16, 16), (64, 32, 8))],
    ids=["one-number", "odd", "even"],
)
def test_matches_reference(
    size: tuple[int, int, int], widths: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x, skip, weight = draw(size, widths, dtype, device)
    out = joined_projection(x, skip, weight, impl="in place")
    gold = joined_projection_ref(x.double(), skip.double(), weight.double())
    assert_close_to_gold(out, gold, joined_projection_ref(x, skip, weight))
    assert out.is_contiguous(memory_format=CHANNELS_LAST)


@torch.no_grad()
def test_other_strides_and_no_pixels(device: torch.device) -> None:
    x, skip, weight = draw((2, 6, 5), (8, 4, 6), torch.float32, device)
    for some in (lambda t: t.contiguous(), lambda t: t[:, :, ::2], lambda t: t[:0]):
        out = joined_projection(some(x), some(skip), weight, impl="in place")
        torch.testing.assert_close(out, joined_projection_ref(some(x), some(skip), weight))


def test_unserved_input_runs_in_torch(device: torch.device) -> None:
    x, skip, weight = draw((2, 6, 5), (8, 4, 6), torch.float32, device)
    for changed in ([t.double() for t in (x, skip, weight)], [x, skip, weight.requires_grad_()]):
        with listening() as events:
            out = joined_projection(*changed)
        assert [event.implementation for event in events] == ["torch"] and events[0].reason
        assert torch.equal(out, joined_projection_ref(*changed))


@torch.no_grad()
@pytest.mark.parametrize("fault", FAULTS)
def test_the_check(fault: str, device: torch.device) -> None:
    tensors = draw((4, 8, 8), (16, 8, 32), torch.float16, device)
    spoil = FAULTS[fault]
    with (
        planted(JOINED_PROJECTION, "in place", lambda out: spoil(out.movedim(1, -1))),
        listening(checks=True) as events,
    ):
        out = joined_projection(*tensors)
    assert events[0].problem and torch.equal(out, joined_projection_ref(*tensors))


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.ones(2, 4, 3)},
        {"skip": torch.ones(2, 4, 3, 4)},
        {"skip": torch.ones(1, 4, 3, 3)},
        {"weight": torch.ones(8, 7, 1, 1)},
        {"weight": torch.ones(8, 8, 3, 3)},
    ],
)
def test_rejects(change: dict[str, Tensor]) -> None:
    arguments = {"x": torch.ones(2, 4, 3, 3), "skip": torch.ones(2, 4, 3, 3), "weight": torch.ones(8, 8, 1, 1)}
    with pytest.raises(ValueError, match="joined_projection: x and skip must be"):
        joined_projection(**arguments | change)


@torch.no_grad()
def test_compiles_fullgraph(device: torch.device) -> None:
    tensors = draw((2, 3, 5), (8, 4, 6), torch.float32, device)
    out = torch.compile(joined_projection, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(out, joined_projection_ref(*tensors))
