from __future__ import annotations

import pytest
import torch
import triton
from kernel_checks import FAULTS, TARGETS, assert_no_spills, compile_for, planted
from torch import Tensor

from vidaccel.kernels.conv import channels_last_weight as op
from vidaccel.kernels.conv.channels_last_weight import (
    CHANNELS_LAST_WEIGHT,
    channels_last_weight,
    channels_last_weight_ref,
)
from vidaccel.kernels.op import listening

SHAPES = [
    pytest.param((3, 140, 3, 3, 3), id="two-tiles"),
    pytest.param((2, 5, 1, 3, 3), id="few-channels"),
    pytest.param((1, 16, 4, 4, 4), id="most-taps"),
    pytest.param((4, 7, 1, 1, 1), id="one-tap"),
]


def draw(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("of_weight", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_numbers_in_another_order(
    shape: tuple[int, ...], of_weight: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    weight = draw(shape, device, of_weight)
    out = channels_last_weight(weight, dtype, impl="triton")
    assert torch.equal(out, channels_last_weight_ref(weight, dtype))
    assert out.is_contiguous(memory_format=torch.channels_last_3d) and out.data_ptr() != weight.data_ptr()


def test_runs_where_it_pays(device: torch.device) -> None:
    large, small = draw((128, 128, 3, 3, 3), device), draw((4, 8, 3, 3, 3), device)
    in_order = large.contiguous(memory_format=torch.channels_last_3d)
    with listening() as events:
        assert torch.equal(channels_last_weight(large, torch.float32), large)
        assert torch.equal(channels_last_weight(small, torch.float16), small.half())
        assert channels_last_weight(in_order, torch.float32) is in_order
    assert [(event.implementation, event.reason) for event in events] == [("triton", ""), ("torch", ""), ("torch", "")]


def test_too_many_taps_run_in_torch(device: torch.device) -> None:
    weight = draw((1, 2100, 5, 5, 5), device)
    with listening() as events:
        assert torch.equal(channels_last_weight(weight, torch.float16), weight.half())
    assert [event.implementation for event in events] == ["torch"] and "64 taps, got 125" in events[0].reason


@pytest.mark.parametrize("fault", [None, *FAULTS])
@torch.no_grad()
def test_a_fault_is_found(fault: str | None, device: torch.device) -> None:
    weight = draw((130, 128, 2, 3, 3), device)

    def spoil(out: Tensor) -> None:
        if fault:
            FAULTS[fault](out.permute(0, 2, 3, 4, 1))

    with planted(CHANNELS_LAST_WEIGHT, "triton", spoil), listening(checks=True) as events:
        assert torch.equal(channels_last_weight(weight, torch.float16), weight.half())
    assert [(event.implementation, bool(event.problem)) for event in events] == [("triton", fault is not None)]


def test_rejects() -> None:
    with pytest.raises(ValueError, match=r"channels_last_weight: weight must be \[C', C, T, Y, X\], got \(2, 3\)"):
        channels_last_weight(torch.ones(2, 3), torch.float32)
    with pytest.raises(TypeError, match=r"dtype must be a floating-point one, got torch\.int64"):
        channels_last_weight(torch.ones(1, 1, 1, 1, 1), torch.int64)


def test_registration(device: torch.device) -> None:
    torch.library.opcheck(
        CHANNELS_LAST_WEIGHT.registered["triton"], (draw((2, 5, 1, 3, 3), device), torch.float16)
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernel_writes_wide_and_does_not_spill(target: str) -> None:
    block_t = triton.next_power_of_2(27)
    asm = compile_for(
        target,
        op._channels_last_weight_kernel,
        {"weight_ptr": "*bf16:16", "out_ptr": "*bf16:16", "channels": "i32:16"},
        {"TAPS": 27, "BLOCK_T": block_t, "BLOCK_C": op.TILE // block_t},
        num_warps=op.NUM_WARPS,
    )
    assert_no_spills(asm)
    if "sass" in asm:
        assert "STG.E.128" in asm["sass"] and "STG.E.U16" not in asm["sass"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(8192, 1024, 3, 3, 3), (512, 96, 3, 3, 3)], ids=["hunyuanvideo1.5", "wan2.1"])
def test_real_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    weight = draw(shape, device, dtype)
    out = channels_last_weight(weight, torch.bfloat16, impl="triton")
    assert torch.equal(out, channels_last_weight_ref(weight, torch.bfloat16))
