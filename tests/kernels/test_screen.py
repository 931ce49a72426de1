"""The first look of a check: the kernel sees what PyTorch's norms see, whatever the layout."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernel_checks import TARGETS, assert_no_spills, compile_for
from torch import Tensor

from vidaccel.kernels import screen as module
from vidaccel.kernels.screen import Limits, frames_of, limits, screen, screen_by_kernel, screen_ref

FRAMES = 3
SHAPES = [
    (FRAMES, 5, 7),
    (FRAMES, 1, 64),
    (FRAMES, 130, 72),
    (FRAMES, 1100, 33),
    (FRAMES, 3, 1300),
    (FRAMES, 70, 1),
    (1, 1, 1),
]
Fault = Callable[[Tensor], Tensor]


def rows_last(values: Tensor) -> Tensor:
    """The same in the memory order of ``[N, C, H, W]``."""
    return values.transpose(1, 2).contiguous().transpose(1, 2)


def spread_out(values: Tensor) -> Tensor:
    """The same with gaps in every direction, at an address that is no multiple of 16 bytes."""
    frames, rows, channels = values.shape
    memory = values.new_full((frames, 2 * rows, 3 * channels + 1), math.nan)
    return memory[:, ::2, 1 : 3 * channels + 1 : 3].copy_(values)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": torch.Tensor.contiguous,
    "rows last": rows_last,
    "spread out": spread_out,
}


def wrong_row(y: Tensor) -> Tensor:
    y[-1, -1] *= 1.5
    return y


def wrong_channel(y: Tensor) -> Tensor:
    y[0, :, -1] *= 1.5
    return y


def no_row(y: Tensor) -> Tensor:
    y[0, 0] = 0
    return y


def not_finite(y: Tensor) -> Tensor:
    y[-1, 0, -1] = math.inf
    return y


FAULTS: dict[str, tuple[Fault, int]] = {  # and how many of the frames are wrong
    "nothing": (torch.clone, 0),
    "a row": (wrong_row, 1),
    "a channel": (wrong_channel, 1),
    "a row of zeros": (no_row, 1),
    "a value": (not_finite, 1),
    "one percent": (lambda y: y * 1.01, FRAMES),
    "another sign": (torch.neg, FRAMES),
}


def values_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    torch.manual_seed(0)
    return (1 + torch.randn(shape, dtype=torch.float64)).to(device, dtype)


def is_suspect(x: Tensor, y: Tensor, allowed: Limits) -> bool:
    """What the kernel says; beside its slot there is another, which stays as it is."""
    suspects = torch.tensor([7, 0], dtype=torch.int32, device=x.device)
    screen_by_kernel(x, y, allowed, suspects, 1)
    other, found = suspects.tolist()
    assert other == 7
    return found > 0


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_sees_what_the_specification_sees(shape: tuple[int, ...], fault: str, device: torch.device) -> None:
    y = values_of(shape, torch.float32, device)
    make, frames = FAULTS[fault]
    x, allowed = make(y.clone()), limits(2.0**-20)
    wrong = int((~screen_ref(x, y, allowed)).sum())
    assert wrong == min(frames, shape[0])
    assert is_suspect(x, y, allowed) == (wrong > 0)


@pytest.mark.parametrize("theirs", LAYOUTS)
@pytest.mark.parametrize("mine", LAYOUTS)
def test_every_memory_order(mine: str, theirs: str, device: torch.device) -> None:
    y, allowed = values_of((FRAMES, 130, 72), torch.float16, device), limits(2.0**-10)
    right, wrong = (LAYOUTS[mine](x) for x in (y, wrong_row(y.clone())))
    assert not is_suspect(right, LAYOUTS[theirs](y), allowed)
    assert is_suspect(wrong, LAYOUTS[theirs](y), allowed)


@pytest.mark.parametrize("order", ["channels last", "rows last"])
@pytest.mark.parametrize("rule", range(3), ids=["row", "channel", "gain"])
def test_each_rule_by_itself(rule: int, order: str, device: torch.device) -> None:
    """What is just within a limit passes, what is just beyond it does not; the other two are off."""
    y = LAYOUTS[order](values_of((1, 96, 80), torch.float32, device))
    x = 1.001 * y  # a row, a channel and the scale are off by as much
    for limit, wrong in ((1.01e-3, False), (0.99e-3, True)):
        allowed = Limits(*(limit if at == rule else math.inf for at in range(3)))
        assert bool((~screen_ref(x, y, allowed)).any()) is wrong
        assert is_suspect(x, y, allowed) is wrong


def test_rows_may_be_further_off_than_channels(device: torch.device) -> None:
    y = values_of((1, 64, 48), torch.float32, device)
    x = y.clone()
    x[0, 0] *= 1 + 3 * 2.0**-10
    assert is_suspect(x, y, limits(2.0**-10)._replace(channel=math.inf, gain=math.inf))
    assert not is_suspect(x, y, limits(2.0**-10, rows=2)._replace(channel=math.inf, gain=math.inf))


@pytest.mark.parametrize("size", [0.0, 1e-14, 1e14, math.inf, math.nan])
def test_what_float32_cannot_judge_needs_a_second_look(size: float, device: torch.device) -> None:
    y, allowed = torch.full((2, 16, 16), size, device=device), Limits(1.0, 1.0, 1.0)
    with np.errstate(invalid="ignore"):  # the interpreter computes with NumPy
        assert is_suspect(y, y, allowed)
        assert not screen_ref(y, y, allowed).any()


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("size", [1e-3, 1e-9, 2e-14, 1e-16])
def test_errors_of_small_float32_numbers_are_seen(size: float, order: str, device: torch.device) -> None:
    y = size * values_of((2, 64, 48), torch.float32, device)
    x = LAYOUTS[order](y.clone())
    x[1, 5] *= 1 + 2.0**-18
    assert is_suspect(x, LAYOUTS[order](y), limits(2.0**-20)._replace(channel=math.inf, gain=math.inf))


@pytest.mark.parametrize("shape", [(5,), (4, 6), (2, 4, 6), (2, 6, 3, 5), (2, 6, 3, 2, 5), (2, 3, 4, 5, 6, 7), ()])
def test_frames(shape: tuple[int, ...]) -> None:
    x = torch.arange(math.prod(shape)).reshape(shape)
    frames = frames_of(x)
    assert frames.ndim == 3
    assert sorted(frames.flatten().tolist()) == x.flatten().tolist()
    if x.ndim == 5:
        assert torch.equal(frames[4], x[1, :, 1].permute(1, 2, 0).flatten(0, 1))  # the second frame of the second clip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
def test_one_wrong_pixel_of_a_real_clip(order: str, dtype: torch.dtype) -> None:
    """By the way that checks take, kernels proven first; and in a memory of which the rest is poison."""
    device = torch.device("cuda")
    y = values_of((14, 320, 72, 128), dtype, device)
    y = y.to(memory_format=torch.channels_last) if order == "channels_last" else y
    unit = 2.0**-20 if dtype == torch.float32 else torch.finfo(dtype).eps
    right = (y.double() * (1 + unit / 8 * torch.rand(y.shape, dtype=torch.float64, device=device))).to(dtype)
    wrong = right.clone()
    wrong[9, :, 70, 3] = 0
    suspects = torch.zeros(2, dtype=torch.int32, device=device)
    for at, x in enumerate((right, wrong)):
        screen(x, y, limits(unit), suspects, at)
    assert [count > 0 for count in suspects.tolist()] == [False, True]


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers() -> None:
    y = torch.ones(1, 2**16 + 3, 2**15 + 8, dtype=torch.bfloat16, device="cuda")
    assert not is_suspect(y, y, limits(2.0**-7))
    x = y.clone()
    x[0, -1, -1] = 200
    assert is_suspect(x, y, limits(2.0**-7))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_loads_are_16_bytes_wide(target: str) -> None:
    kernel = module._screen_sums_kernel
    types = ["*fp16", "*fp16", "*fp32:16", *("i32",) * 9]
    blocks = {name: getattr(module, name) for name in ("BLOCK_OUTER", "BLOCK_INNER", "CHUNK", "STAGES")}
    constants = {"X_UNIT": True, "Y_UNIT": True, "ALIGN": module.VECTOR, **blocks}
    asm = compile_for(target, kernel, dict(zip(kernel.arg_names, types, strict=False)), constants)
    assert_no_spills(asm)
    code = asm.get("sass") or asm["amdgcn"]
    loads = re.findall(r"\bLDG(?:STS)?\.\S+|\b(?:global|buffer)_load_\w+", code)
    assert loads
    assert all(re.search(r"\.128|x4$", load) for load in loads), loads
