from __future__ import annotations

import pytest
import torch
from kernel_checks import FAULTS, TARGETS, assert_no_spills, compile_for, planted
from torch import Tensor

from vidaccel.kernels.conv import merged_taps as op
from vidaccel.kernels.conv.merged_taps import MERGED_TAPS, merged_taps, merged_taps_ref
from vidaccel.kernels.op import listening

SHAPES = [pytest.param((3, 70), id="two-blocks"), pytest.param((2, 5), id="few"), pytest.param((1, 1), id="one")]


def draw(shape: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, 3, 3, 3, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def written_out(weight: Tensor, factor_t: int) -> Tensor:
    """Tap by tap: which of the small clip's pixels each tap of the large one's reads."""
    channels, channels_in = weight.shape[:2]
    reads = {0: (0, 0, 1), 1: (0, 1, 1)}  # by pixel of the cell
    cells = [(t, r, s) for t in range(factor_t) for r in range(2) for s in range(2)]
    out = weight.new_zeros(len(cells), channels, channels_in, 2 if factor_t == 2 else 3, 2, 2)
    for at, (t, r, s) in enumerate(cells):
        for z in range(3):
            for y in range(3):
                for x in range(3):
                    frame = reads[t][z] if factor_t == 2 else z
                    out[at, :, :, frame, reads[r][y], reads[s][x]] += weight[:, :, z, y, x]
    return out.flatten(0, 1)


@pytest.mark.parametrize("factor_t", [1, 2])
def test_every_tap_is_where_it_reads_the_same_pixel(factor_t: int, device: torch.device) -> None:
    weight = draw((3, 4), device, torch.float64)
    torch.testing.assert_close(merged_taps_ref(weight, factor_t), written_out(weight, factor_t))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("factor_t", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_adds_as_the_reference_does(
    shape: tuple[int, int], factor_t: int, dtype: torch.dtype, channels_last: bool, device: torch.device
) -> None:
    weight = draw(shape, device, dtype)
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
    out = merged_taps(weight, factor_t=factor_t, impl="triton")
    expected = merged_taps_ref(weight, factor_t)
    assert torch.equal(out, expected) and out.stride() == expected.stride()


def test_strides_of_any_kind(device: torch.device) -> None:
    weight = draw((6, 10), device)[::2, 1::3]
    assert torch.equal(merged_taps(weight, factor_t=2, impl="triton"), merged_taps_ref(weight, 2))


def test_nothing_to_add_up(device: torch.device) -> None:
    with listening() as events:
        assert merged_taps(draw((0, 3), device), factor_t=2).shape == (0, 3, 2, 2, 2)
        assert merged_taps(draw((3, 0), device), factor_t=1).shape == (12, 0, 3, 2, 2)
    assert {event.implementation for event in events} == {"torch"}


@pytest.mark.parametrize("fault", [None, *FAULTS])
@torch.no_grad()
def test_a_fault_is_found(fault: str | None, device: torch.device) -> None:
    weight = draw((16, 64), device, torch.float16)

    def spoil(out: Tensor) -> None:
        if fault:
            FAULTS[fault](out.permute(0, 2, 3, 4, 1))

    with planted(MERGED_TAPS, "triton", spoil), listening(checks=True) as events:
        assert torch.equal(merged_taps(weight, factor_t=2), merged_taps_ref(weight, 2))
    assert [bool(event.problem) for event in events] == [bool(fault)]


@pytest.mark.parametrize(
    ("shape", "factor_t", "message"),
    [
        ((2, 3, 3, 3), 2, r"weight must be \[C', C, 3, 3, 3\], got \(2, 3, 3, 3\)"),
        ((2, 2, 1, 3, 3), 2, r"weight must be \[C', C, 3, 3, 3\], got \(2, 2, 1, 3, 3\)"),
        ((2, 2, 3, 3, 3), 3, "factor_t must be 1 or 2, got 3"),
    ],
)
def test_bad_arguments(shape: tuple[int, ...], factor_t: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merged_taps(torch.ones(shape), factor_t=factor_t)


def test_registered_as_a_custom_op(device: torch.device) -> None:
    for factor_t in (1, 2):
        torch.library.opcheck(MERGED_TAPS.registered["triton"], (draw((2, 5), device), factor_t))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernel_writes_wide_and_does_not_spill(target: str) -> None:
    signature = {
        "weight_ptr": "*bf16:16", "out_ptr": "*bf16:16", "channels": "i32:16", "channels_in": "i32:16",
        "stride_out": "i32:16", "stride_in": "i32", "stride_t": "i32", "stride_y": "i32",
    }  # fmt: skip
    constants = {"stride_x": 1, "FACTOR_T": 2, "BLOCK": op.BLOCK}
    asm = compile_for(target, op._merged_taps_kernel, signature, constants, num_warps=op.NUM_WARPS)
    assert_no_spills(asm)
    if "sass" in asm:
        assert "STG.E.U16" not in asm["sass"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factor_t", [1, 2])
def test_real_shapes(factor_t: int, dtype: torch.dtype, device: torch.device) -> None:
    weight = draw((512, 512), device, dtype)
    out = merged_taps(weight, factor_t=factor_t, impl="triton")
    assert torch.equal(out, merged_taps_ref(weight, factor_t))
