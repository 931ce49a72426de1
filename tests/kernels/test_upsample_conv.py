from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from kernel_checks import TARGETS, assert_close_to_gold, assert_no_spills, compile_for, narrow_accesses
from torch import Tensor

from vidaccel.kernels import tuning_cache
from vidaccel.kernels.conv import upsample_conv as op
from vidaccel.kernels.conv.upsample_conv import cell_weights_ref, upsample_conv, upsample_conv_ref
from vidaccel.kernels.dispatch import record_choices
from vidaccel.kernels.norm.channel_statistics import carried, choose_writer_tiling
from vidaccel.kernels.norm.group_norm_silu import group_norm_silu, group_norm_silu_ref

DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)  # the interpreter's bfloat16 is wrong

SHAPES = [
    pytest.param((1, 32, 32, 1, 1), id="one-pixel"),
    pytest.param((2, 5, 24, 3, 7), id="odd-sides"),
    pytest.param((1, 16, 8, 2, 70), id="wide-row"),
    pytest.param((1, 64, 192, 4, 3), id="two-channel-blocks"),
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


def gold_cells(weight: Tensor) -> Tensor:
    """The cells in float64, tap by tap; ordered as the op's are."""
    cells = weight.new_zeros((2, 2, len(weight), weight.shape[1], 2, 2), dtype=torch.float64)
    for r, s, y, x in itertools.product(range(2), range(2), range(3), range(3)):
        # an upper pixel (r = 1) has its taps 1 and 2 in the second row of the cell, a lower one its tap 2
        cells[r, s, :, :, (y + r) // 2, (x + s) // 2] += weight[:, :, y, x].double()
    return cells.flatten(0, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 30.0], ids=["centred", "off-centre"])
def test_matches_reference(
    shape: tuple[int, int, int, int, int], offset: float, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, bias = draw(shape, dtype, device, offset)
    out = upsample_conv(x, weight, bias, impl="triton")
    gold = upsample_conv_ref(x.double(), weight.double(), bias.double())
    assert_close_to_gold(out, gold, upsample_conv_ref(x, weight, bias))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_every_output_pixel_is_written(device: torch.device) -> None:
    x, weight, bias = draw((2, 8, 24, 3, 37), torch.float32, device)
    assert x.new_empty(1).isnan()
    assert upsample_conv(x, weight, bias, impl="triton").isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [op.WHOLE, op.HALVES])
def test_a_norm_goes_by_the_statistics(parts: str, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = draw((3, 16, 64, 3, 7), dtype, device)
    out = op._run(parts, x, op._launch_cells(weight), bias + 30)
    known = carried(out)
    assert known and known.parts.isfinite().all()
    norm_weight, norm_bias = torch.randn(2, 64, device=device, dtype=dtype)
    norm = functools.partial(group_norm_silu, weight=norm_weight, bias=norm_bias, groups=8, eps=1e-5, impl="triton")
    gold = group_norm_silu_ref(out.double(), norm_weight.double(), norm_bias.double(), 8, 1e-5)
    assert_close_to_gold(norm(out), gold, norm(out.clone()))
    known.parts.zero_()  # a mean of 0 and no spread
    assert not torch.allclose(norm(out).double(), gold, atol=0.1), "the norm has read its input for itself"


def test_error_of_one_rounding_more(device: torch.device) -> None:
    """At a real width the relative L2 error is at most half as much again as that of eager."""
    x, weight, bias = draw((1, 512, 64, 6, 6), torch.float16, device)
    gold = upsample_conv_ref(x.double(), weight.double(), bias.double())
    ours, eager = (
        run.double().sub(gold).norm()
        for run in (upsample_conv(x, weight, bias, impl="triton"), upsample_conv_ref(x, weight, bias))
    )
    assert ours <= 1.5 * eager


@pytest.mark.parametrize("assemble", [cell_weights_ref, op._launch_cells], ids=["reference", "kernel"])
def test_cell_weights_are_sums_of_taps(assemble: Callable[[Tensor], Tensor], device: torch.device) -> None:
    weight = torch.arange(9.0, device=device).view(1, 1, 3, 3)
    upper_left, upper_right, lower_left, lower_right = (  # by (r, s): 1 is the upper row, the left column
        assemble(weight)[2 * r + s, 0].tolist() for r, s in ((1, 1), (1, 0), (0, 1), (0, 0))
    )
    assert upper_left == [[0, 1 + 2], [3 + 6, 4 + 5 + 7 + 8]]
    assert upper_right == [[0 + 1, 2], [3 + 4 + 6 + 7, 5 + 8]]
    assert lower_left == [[0 + 3, 1 + 2 + 4 + 5], [6, 7 + 8]]
    assert lower_right == [[0 + 1 + 3 + 4, 2 + 5], [6 + 7, 8]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("laid_out", WEIGHT_LAYOUTS)
@pytest.mark.parametrize(
    ("channels", "channels_in"), [(1, 1), (8, 37), (3, 256), (2, 521)], ids=["one", "odd", "one-block", "ragged-block"]
)
def test_cells_match_reference(
    channels: int, channels_in: int, laid_out: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """To the last bit of PyTorch's own, and one rounding from those in float64."""
    weight = draw((1, channels_in, channels, 1, 1), dtype, device)[1]
    weight = weight * 2.0 ** torch.randint(-7, 8, weight.shape, device=device)  # sums that float32 has to round
    weight = weight.to(dtype)
    cells = op._launch_cells(laid_out(weight))
    assert torch.equal(cells, cell_weights_ref(weight))
    assert cells.is_contiguous(memory_format=torch.channels_last)
    gold = gold_cells(weight)
    largest = gold_cells(weight.abs())  # what float32 may lose is relative to the largest of the numbers added
    error = (cells.double() - gold).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * gold.abs() + 4 * torch.finfo(torch.float32).eps * largest).all()


@pytest.mark.parametrize("laid_out", WEIGHT_LAYOUTS)
def test_cells_of_bfloat16(laid_out: Callable[[Tensor], Tensor], device: torch.device) -> None:
    """Of small integers, whose sums are not rounded: the interpreter rounds to bfloat16 wrongly."""
    torch.manual_seed(0)
    weight = torch.randint(-32, 33, (8, 300, 3, 3), device=device).bfloat16()
    assert torch.equal(op._launch_cells(laid_out(weight)).double(), gold_cells(weight))


def test_weight_changed_in_place_is_seen(device: torch.device) -> None:
    x, weight, bias = draw((1, 8, 16, 3, 4), torch.float32, device)
    before = upsample_conv(x, weight, torch.zeros_like(bias), impl="triton")
    weight.data.mul_(2)
    assert torch.equal(upsample_conv(x, weight, torch.zeros_like(bias), impl="triton"), 2 * before)


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_halves_are_the_whole(samples: int, device: torch.device) -> None:
    x, weight, bias = draw((samples, 16, 24, 3, 5), torch.float32, device)
    whole, halves = (op._run(parts, x, op._launch_cells(weight), bias) for parts in (op.WHOLE, op.HALVES))
    torch.testing.assert_close(halves, whole, rtol=0, atol=2e-5)
    assert halves.stride() == whole.stride()


def test_the_faster_way_is_taken(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(Tensor):
        is_cuda = True

    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(op, "_chosen", {})
    monkeypatch.setattr(op, "MEASURED_FLOPS", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x, weight, bias = draw((2, 16, 24, 3, 5), torch.float16, torch.device("cpu"))
    x, cells = x.as_subclass(OnGpu), cell_weights_ref(weight)
    for winner in (op.HALVES, op.WHOLE):
        measured = tuning_cache.Measured(winner, {}, {})
        with mock.patch.object(tuning_cache, "fastest", return_value=measured) as fastest:
            assert op._parts(x, cells, bias) == winner
            op._chosen.clear()  # as in another process
            assert op._parts(x, cells, bias) == winner and fastest.call_count == 1
        x = x[..., :-1]  # another shape, another question
    with mock.patch.object(tuning_cache, "fastest", return_value=None):  # neither could run
        assert op._parts(x, cells, bias) == op.WHOLE
    assert len(list(tmp_path.rglob("*.json"))) == 2
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    op._chosen.clear()
    assert op._parts(x, cells, bias) == op.WHOLE and not op._chosen, "it waits for a call that may be timed"
    assert op._parts(x[:1], cells, bias) == op._parts(x.as_subclass(Tensor), cells, bias) == op.WHOLE


def test_takes_any_strides(device: torch.device) -> None:
    x, weight, bias = draw((2, 8, 16, 3, 4), torch.float32, device)
    expected = upsample_conv(x, weight, bias, impl="triton")
    for other in (x.contiguous(), x.repeat_interleave(2, -1)[..., ::2]):
        out = upsample_conv(other, weight.contiguous(), bias.repeat_interleave(2)[::2], impl="triton")
        torch.testing.assert_close(out, expected)
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_empty_input(device: torch.device) -> None:
    _, weight, bias = draw((1, 8, 16, 3, 4), torch.float16, device)
    out = upsample_conv(torch.empty(0, 8, 3, 4, dtype=torch.float16, device=device), weight, bias)
    assert out.shape == (0, 16, 6, 8) and out.dtype == torch.float16


@pytest.mark.parametrize(
    ("channels", "dtype", "weight_dtype", "requires_grad", "reason"),
    [
        (16, torch.float64, torch.float64, False, "x is torch.float64"),
        (12, torch.float32, torch.float32, False, "divisible by 8, got 12"),
        (16, torch.float32, torch.float16, False, "the dtype of x, torch.float32, got torch.float16"),
        (16, torch.float32, torch.float32, True, "no backward pass"),
    ],
    ids=["float64", "channels", "mixed-dtypes", "gradient"],
)
def test_unserved_input_runs_in_torch(
    channels: int, dtype: torch.dtype, weight_dtype: torch.dtype, requires_grad: bool, reason: str, device: torch.device
) -> None:
    x, weight, bias = draw((1, 8, channels, 3, 4), dtype, device)
    weight = weight.to(weight_dtype).requires_grad_(requires_grad)
    with record_choices() as choices:
        out = upsample_conv(x, weight, bias)
    assert [choice.impl for choice in choices] == ["torch"] and reason in choices[0].reason
    assert torch.equal(out, upsample_conv_ref(x, weight, bias))
    assert out.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=f"upsample_conv: impl='triton' cannot run: .*{re.escape(reason)}"):
        upsample_conv(x, weight, bias, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 4, 3)}, r"x must be \[N, C_in, H, W\], got \(2, 4, 3\)"),
        ({"weight": torch.ones(6, 4, 1, 1)}, r"weight must be \[C, 4, 3, 3\], got \(6, 4, 1, 1\)"),
        ({"weight": torch.ones(6, 5, 3, 3)}, r"weight must be \[C, 4, 3, 3\], got \(6, 5, 3, 3\)"),
        ({"bias": torch.ones(4)}, r"bias must be \[6\], got \(4,\)"),
        ({"impl": "cuda"}, r"impl must be 'triton' or 'torch', got 'cuda'"),
    ],
)
def test_rejects(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.ones(2, 4, 3, 5), "weight": torch.ones(6, 4, 3, 3), "bias": torch.ones(6)}
    with pytest.raises(ValueError, match=f"upsample_conv: .*{message}"):
        upsample_conv(**{**arguments, **change})


def test_registration(device: torch.device) -> None:
    z, bias = torch.randn(2, 4 * 16, 3, 4, device=device), torch.randn(16, device=device)
    for laid_out in (z, z.contiguous(memory_format=torch.channels_last)):
        torch.library.opcheck(op._interleave, (laid_out, bias))
    weight = torch.randn(16, 5, 3, 3, device=device)
    for laid_out in (weight, weight.contiguous(memory_format=torch.channels_last)):
        torch.library.opcheck(op._cells, (laid_out,))


def test_compiles_fullgraph(device: torch.device) -> None:
    x, weight, bias = draw((2, 8, 16, 3, 4), torch.float32, device)
    expected = 2 * upsample_conv(x, weight, bias, impl="triton")

    def double(x: Tensor) -> Tensor:
        return 2 * upsample_conv(x, weight, bias, impl="triton")

    out = torch.compile(double, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()


@pytest.mark.parametrize("target", TARGETS)
def test_accesses_are_16_bytes_wide(target: str) -> None:
    tiling = choose_writer_tiling(14, 144 * 256, 512, 512)
    asm = compile_for(
        target,
        op._interleave_kernel,
        {
            **dict.fromkeys(["z_ptr", "bias_ptr", "y_ptr"], "*fp16:16"),
            **{"part_ptr": "*fp32:16", "channels": "i32:16"},
            **dict.fromkeys(["height", "width", "chunk_rows"], "i32"),
        },
        {"BLOCK_R": tiling.block_r, "BLOCK_C": tiling.block_c, "FOLD": op.FOLD, "STAGES": tiling.stages},
        num_warps=tiling.num_warps,
    )
    assert_no_spills(asm)
    assert len(narrow_accesses(asm)) <= 4, "all but the bias and the statistics, which a program touches once"


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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("laid_out", WEIGHT_LAYOUTS)
def test_cells_of_a_real_width(laid_out: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> None:
    weight = draw((1, 1280, 1280, 1, 1), dtype, device)[1]
    assert torch.equal(op._launch_cells(laid_out(weight)), cell_weights_ref(weight))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(2, 512, 512, 72, 128), (1, 256, 256, 288, 512)], ids=["svd-vae-level-3", "svd-vae-level-1"]
)
def test_real_shapes(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = draw(shape, dtype, device)
    out = upsample_conv(x, weight, bias, impl="triton")
    gold = upsample_conv_ref(x.double(), weight.double(), bias.double())
    assert_close_to_gold(out, gold, upsample_conv_ref(x, weight, bias))


@pytest.mark.gpu
def test_the_choice_on_a_gpu(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where cuDNN's kernel for the whole batch is a slow one."""
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(op, "_chosen", {})
    x, weight, bias = draw((32, 1280, 1280, 16, 16), torch.float16, device)
    out = upsample_conv(x, weight, bias, impl="triton")
    gold = upsample_conv_ref(x[-2:].double(), weight.double(), bias.double())
    assert_close_to_gold(out[-2:], gold, upsample_conv_ref(x[-2:], weight, bias))
    assert len(list(tmp_path.rglob("*.json"))) == 1 and len(op._chosen) == 1


@pytest.mark.gpu
def test_offsets_beyond_int32(device: torch.device) -> None:
    z = torch.randn(17, 513, 513, 4 * 128, dtype=torch.float16, device=device).permute(0, 3, 1, 2)
    bias = torch.randn(128, dtype=torch.float16, device=device)
    assert z.numel() > 2**31
    assert torch.equal(op._launch(z, bias).y[-1:], op._launch(z[-1:], bias).y)
