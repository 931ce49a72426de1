from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_checks import (
    DTYPES,
    FAULTS,
    TARGETS,
    assert_close_to_gold,
    assert_no_spills,
    compile_for,
    narrow_accesses,
    pairwise,
    planted,
)
from torch import Tensor

from vidaccel.kernels import check
from vidaccel.kernels.conv import upsample_conv as op
from vidaccel.kernels.conv.enlarged_clip import cells_of_rows, rows_of_cells
from vidaccel.kernels.conv.upsample_conv import (
    UPSAMPLE_CELLS,
    UPSAMPLE_CONV,
    UPSAMPLE_CONV_AND_STATISTICS,
    upsample_cells,
    upsample_conv,
    upsample_conv_and_statistics,
    upsample_conv_ref,
)
from vidaccel.kernels.norm.channel_statistics import FOLD, channel_statistics_ref, writer_tiling
from vidaccel.kernels.norm.group_norm_silu import group_norm_silu, group_norm_silu_ref
from vidaccel.kernels.op import listening

SHAPES = [
    pytest.param((1, 32, 8, 1, 1), id="one-pixel"),
    pytest.param((2, 5, 24, 3, 7), id="odd-sides"),
    pytest.param((1, 16, 8, 2, 70), id="wide-row"),
    pytest.param((1, 64, 128, 4, 3), id="two-channel-blocks"),
]


WEIGHT_LAYOUTS = [
    pytest.param(lambda weight: weight.contiguous(memory_format=torch.channels_last), id="channels-last"),
    pytest.param(lambda weight: weight.contiguous(), id="contiguous"),
    pytest.param(lambda weight: weight.repeat_interleave(2, 1)[:, ::2], id="strided"),
]


def draw(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """x in channels-last memory, weight and bias; the shape is N, C_in, C, H, W."""
    torch.manual_seed(0)
    samples, channels_in, channels, height, width = shape
    x = (torch.randn(samples, height, width, channels_in, device=device) + offset).to(dtype).permute(0, 3, 1, 2)
    weight = (torch.randn(channels, channels_in, 3, 3, device=device) / (3 * channels_in**0.5)).to(dtype)
    bias = torch.randn(channels, device=device).to(dtype)
    return x, weight.contiguous(memory_format=torch.channels_last), bias


@pairwise(
    {"offset": [pytest.param(0.0, id="centred"), pytest.param(30.0, id="off-centre")], "shape": SHAPES, "dtype": DTYPES}
)
def test_matches_reference(
    shape: tuple[int, int, int, int, int], offset: float, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, bias = draw(shape, dtype, device, offset)
    out = upsample_conv(x, weight, bias, impl="whole")
    gold = upsample_conv_ref(x.double(), weight.double(), bias.double())
    assert_close_to_gold(out, gold, upsample_conv_ref(x, weight, bias))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_every_output_pixel_is_written(device: torch.device) -> None:
    x, weight, bias = draw((2, 8, 24, 3, 37), torch.float32, device)
    assert x.new_empty(1).isnan()
    assert upsample_conv(x, weight, bias, impl="whole").isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["whole", "halves"])
def test_a_norm_goes_by_the_statistics(impl: str, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = draw((3, 16, 32, 3, 7), dtype, device)
    out, statistics = upsample_conv_and_statistics(x, weight, bias + 30, impl=impl)
    assert torch.equal(out, upsample_conv(x, weight, bias + 30, impl=impl))
    assert (statistics.segment_rows, len(statistics.parts)) == (6 * 14, 3)
    expected = channel_statistics_ref(out, statistics.chunk_rows)
    torch.testing.assert_close(statistics.parts, expected, rtol=1e-4, atol=1e-3)
    norm_weight, norm_bias = torch.randn(2, 32, device=device, dtype=dtype)
    gold = group_norm_silu_ref(out.double(), norm_weight.double(), norm_bias.double(), 2, 1e-5)
    known, own = (
        group_norm_silu(out, norm_weight, norm_bias, 2, 1e-5, statistics=given, impl="triton")
        for given in (statistics, None)
    )
    assert_close_to_gold(known, gold, own)


def test_error_of_one_rounding_more(device: torch.device) -> None:
    """At a real width the relative L2 error is at most half as much again as that of eager."""
    x, weight, bias = draw((1, 512, 16, 6, 6), torch.float16, device)
    gold = upsample_conv_ref(x.double(), weight.double(), bias.double())
    ours, eager = (
        run.double().sub(gold).norm()
        for run in (upsample_conv(x, weight, bias, impl="whole"), upsample_conv_ref(x, weight, bias))
    )
    assert ours <= 1.5 * eager


@pytest.mark.parametrize("laid_out", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("channels_in", [1, 37, 256, 521], ids=["one", "odd", "one-block", "ragged-block"])
def test_every_tap_weighs_its_pixel(
    channels_in: int, laid_out: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    """Of small integers, whose sums are exact whatever their order."""
    torch.manual_seed(0)
    x = torch.randint(-4, 5, (1, channels_in, 3, 4), device=device).float()
    weight = torch.randint(-8, 9, (8, channels_in, 3, 3), device=device).float()
    bias = torch.randint(-8, 9, (8,), device=device).float()
    out = upsample_conv(x, laid_out(weight), bias, impl="whole")
    assert torch.equal(out, upsample_conv_ref(x, weight, bias))


@pytest.mark.parametrize("laid_out", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_taps_are_rounded_once(
    laid_out: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Each of them is what one input channel, 1 at one pixel and 0 elsewhere, gives."""
    weight = draw((1, 40, 8, 1, 1), dtype, device)[1]
    weight = (weight * 2.0 ** torch.randint(-7, 8, weight.shape, device=device)).to(dtype)  # float32 has to round them
    x = torch.eye(40, device=device, dtype=dtype).view(40, 40, 1, 1)
    out = upsample_conv(x, laid_out(weight), torch.zeros(8, device=device, dtype=dtype), impl="whole")
    gold = upsample_conv_ref(x.double(), weight.double(), torch.zeros(8, device=device).double())
    largest = upsample_conv_ref(x.double(), weight.double().abs(), torch.zeros(8, device=device).double())
    allowed = torch.finfo(dtype).eps / 2 * gold.abs() + 4 * torch.finfo(torch.float32).eps * largest
    assert ((out.double() - gold).abs() <= allowed).all()


def test_weight_changed_in_place_is_seen(device: torch.device) -> None:
    x, weight, bias = draw((1, 8, 16, 3, 4), torch.float32, device)
    before = upsample_conv(x, weight, torch.zeros_like(bias), impl="whole")
    weight.data.mul_(2)
    assert torch.equal(upsample_conv(x, weight, torch.zeros_like(bias), impl="whole"), 2 * before)


@pairwise(
    {"offset": [pytest.param(0.0, id="centred"), pytest.param(30.0, id="off-centre")], "shape": SHAPES, "dtype": DTYPES}
)
@torch.no_grad()
def test_cells_are_the_pixels(
    shape: tuple[int, int, int, int, int], offset: float, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, bias = draw(shape, dtype, device, offset)
    expected = upsample_conv(x, weight, torch.zeros_like(bias), impl="whole").permute(0, 2, 3, 1)
    for given in (weight, weight.float()):
        cells = upsample_cells(x, given, impl="whole")
        assert cells.is_contiguous() and cells.shape == (len(x), x.shape[2] + 1, x.shape[3] + 1, 4, shape[2])
        assert torch.equal(rows_of_cells(cells), expected)
    reference = upsample_cells(x, weight, impl="torch")
    assert reference.is_contiguous() and reference.shape == cells.shape
    plain = upsample_conv_ref(x, weight, torch.zeros_like(bias)).permute(0, 2, 3, 1)
    torch.testing.assert_close(rows_of_cells(reference), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("most", [2**23, 100], ids=["whole", "in-parts"])
@pytest.mark.parametrize("fault", [None, *FAULTS])
@torch.no_grad()
def test_a_fault_of_cells_is_found(
    fault: str | None, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    x, weight, _ = draw((2, 16, 8, 3, 4), torch.float16, device)

    def spoil(cells: Tensor) -> None:
        if fault:
            rows = rows_of_cells(cells).contiguous()
            FAULTS[fault](rows)
            cells.copy_(cells_of_rows(rows))

    with planted(UPSAMPLE_CELLS, "whole", spoil), listening(checks=True) as events:
        upsample_cells(x, weight)
    assert [event.implementation for event in events] == ["whole"] and bool(events[0].problem) == bool(fault)


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_halves_are_the_whole(samples: int, device: torch.device) -> None:
    x, weight, bias = draw((samples, 16, 24, 3, 5), torch.float32, device)
    whole, halves = (upsample_conv(x, weight, bias, impl=impl) for impl in ("whole", "halves"))
    torch.testing.assert_close(halves, whole, rtol=0, atol=2e-5)
    assert halves.stride() == whole.stride()


def test_one_image_has_no_halves(device: torch.device) -> None:
    with pytest.raises(ValueError, match="upsample_conv: impl='halves' cannot run: there are no halves of 1 images"):
        upsample_conv(*draw((1, 16, 24, 3, 5), torch.float32, device), impl="halves")


def test_takes_any_strides(device: torch.device) -> None:
    x, weight, bias = draw((2, 8, 16, 3, 4), torch.float32, device)
    expected = upsample_conv(x, weight, bias, impl="whole")
    for other in (x.contiguous(), x.repeat_interleave(2, -1)[..., ::2]):
        out = upsample_conv(other, weight.contiguous(), bias.repeat_interleave(2)[::2], impl="whole")
        torch.testing.assert_close(out, expected)
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "shape", [(0, 8, 16, 3, 4), (1, 8, 16, 0, 4), (1, 8, 0, 3, 4)], ids=["no-images", "no-pixels", "no-channels"]
)
def test_empty_input(shape: tuple[int, int, int, int, int], device: torch.device) -> None:
    samples, channels_in, channels, height, width = shape
    x = torch.empty(samples, channels_in, height, width, dtype=torch.float16, device=device)
    weight = torch.empty(channels, channels_in, 3, 3, dtype=torch.float16, device=device)
    out, statistics = upsample_conv_and_statistics(x, weight, weight[:, 0, 0, 0])
    assert out.shape == (samples, channels, 2 * height, 2 * width) and out.dtype == torch.float16
    assert upsample_conv(x, weight, weight[:, 0, 0, 0]).shape == out.shape and statistics.parts.numel() == 0


@pytest.mark.parametrize(
    ("channels", "dtype", "weight_dtype", "requires_grad", "reason"),
    [
        (16, torch.float64, torch.float64, False, "x is torch.float64"),
        (12, torch.float32, torch.float32, False, "divisible by 8, got 12"),
        (16, torch.float32, torch.float16, False, "dtype of x, torch.float32, got torch.float16"),
        (16, torch.float32, torch.float32, True, "no backward pass"),
    ],
    ids=["float64", "channels", "mixed-dtypes", "gradient"],
)
def test_unserved_input_runs_in_torch(
    channels: int, dtype: torch.dtype, weight_dtype: torch.dtype, requires_grad: bool, reason: str, device: torch.device
) -> None:
    x, weight, bias = draw((1, 8, channels, 3, 4), dtype, device)
    weight = weight.to(weight_dtype).requires_grad_(requires_grad)
    with listening() as events:
        out = upsample_conv(x, weight, bias)
    assert [event.implementation for event in events] == ["torch"] and reason in events[0].reason
    assert out.requires_grad == requires_grad
    assert torch.equal(out, upsample_conv_ref(x, weight, bias))
    assert out.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=f"upsample_conv: impl='whole' cannot run: .*{re.escape(reason)}"):
        upsample_conv(x, weight, bias, impl="whole")


X = torch.ones(2, 4, 3, 5)


@pytest.mark.parametrize("run", [upsample_conv, upsample_conv_and_statistics])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 4, 3)}, ValueError, r"x must be \[N, C_in, H, W\] with channels, got \(2, 4, 3\)"),
        ({"x": X[:, :0]}, ValueError, r"x must be .* with channels, got \(2, 0, 3, 5\)"),
        ({"x": X.int()}, TypeError, r"x must be floating-point, got torch.int32"),
        ({"weight": torch.ones(6, 4, 3, 3).int()}, TypeError, r"weight must be floating-point, got torch.int32"),
        ({"bias": torch.ones(6, device="meta")}, ValueError, r"bias must be on cpu, as x is, got meta"),
        ({"weight": torch.ones(6, 4, 1, 1)}, ValueError, r"weight must be \[C, 4, 3, 3\], got \(6, 4, 1, 1\)"),
        ({"weight": torch.ones(6, 5, 3, 3)}, ValueError, r"weight must be \[C, 4, 3, 3\], got \(6, 5, 3, 3\)"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \[6\], got \(4,\)"),
        ({"impl": "cuda"}, ValueError, r"impl must be one of whole, halves, torch, got 'cuda'"),
    ],
)
def test_rejects(change: dict[str, object], error: type[Exception], message: str, run: Any) -> None:
    arguments = {"x": X, "weight": torch.ones(6, 4, 3, 3), "bias": torch.ones(6)}
    with pytest.raises(error, match=f"{run.__name__}: .*{message}"):
        run(**{**arguments, **change})


@pytest.mark.parametrize("impl", ["whole", "halves"])
def test_registration(impl: str, device: torch.device) -> None:
    x, weight, bias = draw((2, 5, 8, 2, 3), torch.float32, device)
    for laid_out in (x, x.contiguous()):
        torch.library.opcheck(UPSAMPLE_CONV.registered[impl], (laid_out, weight, bias))
        torch.library.opcheck(UPSAMPLE_CONV_AND_STATISTICS.registered[impl], (laid_out, weight, bias, 8))
        if impl in UPSAMPLE_CELLS.registered:
            torch.library.opcheck(UPSAMPLE_CELLS.registered[impl], (laid_out, weight))


@pytest.mark.parametrize("impl", ["whole", "halves", None])
def test_compiles_fullgraph(impl: str | None, device: torch.device) -> None:
    x, weight, bias = draw((2, 8, 8, 3, 4), torch.float32, device)

    def double(x: Tensor) -> tuple[Tensor, Tensor]:
        out, statistics = upsample_conv_and_statistics(x, weight, bias, impl=impl)
        return 2 * upsample_conv(x, weight, bias, impl=impl), statistics.parts + out.mean()

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, double(x))
    assert compiled[0].stride() == double(x)[0].stride()


def frames_of(y: Tensor) -> Tensor:
    return y.movedim(1, -1)


@torch.no_grad()
@pytest.mark.parametrize(("impl", "dtype"), [("whole", torch.float32), ("halves", torch.float16)])
def test_the_check(impl: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = draw((3, 8, 8, 5, 7), dtype, device)
    monkeypatch.setenv("VIDACCEL_IMPL", f"upsample_conv={impl},upsample_conv_and_statistics={impl}")
    expected = upsample_conv_ref(x, weight, bias)

    def problems() -> list[str]:
        with listening(checks=True) as events:
            out = upsample_conv(x, weight, bias)
            same, statistics = upsample_conv_and_statistics(x, weight, bias)
        assert [event.implementation for event in events] == [impl, impl]
        if events[1].problem:
            assert torch.equal(same, expected)
            assert torch.equal(statistics.parts, channel_statistics_ref(expected, statistics.chunk_rows))
        assert not events[0].problem or torch.equal(out, expected)
        return [event.problem for event in events]

    def forget_bias(rows: Tensor) -> None:
        rows[..., 3] -= bias[3]

    assert problems() == ["", ""]
    for fault, spoil in {**FAULTS, "forgotten-bias": forget_bias}.items():
        with (
            planted(UPSAMPLE_CONV, impl, lambda y, spoil=spoil: spoil(frames_of(y))),
            planted(UPSAMPLE_CONV_AND_STATISTICS, impl, lambda outputs, spoil=spoil: spoil(frames_of(outputs[0]))),
        ):
            assert all(problems()), fault
    for moment in (0, 1):
        with planted(UPSAMPLE_CONV_AND_STATISTICS, impl, lambda outputs, i=moment: outputs[1][:, :, i].mul_(1.05)):
            assert problems()[1]


def test_compile_ahead_passes_over_what_no_kernel_serves() -> None:
    for weight in (torch.empty(12, 8, 3, 3), torch.empty(32, 8, 3, 3, dtype=torch.float64), torch.empty(32, 8, 3, 3)):
        for statistics in (False, True):
            op.compile_ahead(weight, statistics=statistics)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_accesses_are_16_bytes_wide_with_statistics(target: str) -> None:
    tiling = writer_tiling((14, 512, 144, 256))
    asm = compile_for(
        target,
        op._interleave_statistics_kernel,
        {
            **dict.fromkeys(["z_ptr", "bias_ptr", "y_ptr"], "*fp16:16"),
            **{"part_ptr": "*fp32:16", "channels": "i32:16"},
            **dict.fromkeys(["height", "width", "chunk_rows"], "i32"),
        },
        {"BLOCK_R": tiling.block_r, "BLOCK_C": tiling.block_c, "FOLD": FOLD, "STAGES": tiling.stages},
        num_warps=tiling.num_warps,
    )
    assert_no_spills(asm)
    assert len(narrow_accesses(asm)) <= 4, "all but the bias and the statistics"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_accesses_are_16_bytes_wide(target: str) -> None:
    asm = compile_for(
        target,
        op._interleave_kernel,
        {
            **dict.fromkeys(["z_ptr", "bias_ptr", "y_ptr"], "*fp16:16"),
            **{"channels": "i32:16", "height": "i32", "width": "i32"},
        },
        {"BLOCK": op.BLOCK},
        num_warps=op.NUM_WARPS,
    )
    assert_no_spills(asm)
    assert not narrow_accesses(asm)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_accesses_to_cells_are_16_bytes_wide(target: str, dtype: str) -> None:
    asm = compile_for(
        target,
        op._cells_kernel,
        {
            **dict.fromkeys(["weight_ptr", "cells_ptr"], f"*{dtype}:16"),
            **dict.fromkeys(["channels", "channels_in"], "i32:16"),
            **dict.fromkeys(["stride_weight_c", "stride_weight_h", "stride_weight_w"], "i32:16"),
        },
        {"stride_weight_i": 1, "BLOCK_I": op.CELLS_BLOCK},
        num_warps=op.CELLS_NUM_WARPS,
    )
    assert_no_spills(asm)
    if target != "gfx942" or dtype == "fp32":
        assert not narrow_accesses(asm)  # a wave of AMD's is 64 threads


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_cells_of_any_strides_do_not_spill(target: str) -> None:
    """A weight of odd width, input channels not innermost."""
    asm = compile_for(
        target,
        op._cells_kernel,
        {
            **dict.fromkeys(["weight_ptr", "cells_ptr"], "*fp16:16"),
            **dict.fromkeys(["channels", "channels_in", "stride_weight_c"], "i32"),
            **dict.fromkeys(["stride_weight_i", "stride_weight_h", "stride_weight_w"], "i32"),
        },
        {"BLOCK_I": op.CELLS_BLOCK},
        num_warps=op.CELLS_NUM_WARPS,
    )
    assert_no_spills(asm)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(2, 512, 512, 72, 128), (1, 256, 256, 288, 512)], ids=["svd-vae-level-3", "svd-vae-level-1"]
)
def test_real_shapes(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = draw(shape, dtype, device)
    out = upsample_conv(x, weight, bias, impl="whole")
    gold = upsample_conv_ref(x.double(), weight.double(), bias.double())
    assert_close_to_gold(out, gold, upsample_conv_ref(x, weight, bias))
    assert torch.equal(rows_of_cells(upsample_cells(x, weight)) + bias, out.permute(0, 2, 3, 1))


@pytest.mark.gpu
@torch.no_grad()
def test_the_choice_on_a_gpu(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where cuDNN's kernel for the whole batch is a slow one."""
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path))
    UPSAMPLE_CONV.forget()
    x, weight, bias = draw((32, 1280, 1280, 16, 16), torch.float16, device)
    with listening(checks=True) as events:
        out = upsample_conv(x, weight, bias)
    assert not events[0].problem and events[0].implementation in ("whole", "halves")
    gold = upsample_conv_ref(x[-2:].double(), weight.double(), bias.double())
    assert_close_to_gold(out[-2:], gold, upsample_conv_ref(x[-2:], weight, bias))
    assert len(list(tmp_path.rglob("*.json"))) == 1


@pytest.mark.gpu
def test_offsets_beyond_int32(device: torch.device) -> None:
    x, weight, bias = draw((17, 16, 128, 512, 512), torch.float16, device)
    out = upsample_conv(x, weight, bias, impl="whole")
    assert out.numel() > 2**31
    torch.testing.assert_close(out[-1:], upsample_conv(x[-1:], weight, bias, impl="whole"))
