from __future__ import annotations

import re
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

from vidaccel.kernels.conv import conv_epilogue as op
from vidaccel.kernels.conv.alpha_blend import alpha_blend_ref
from vidaccel.kernels.conv.conv_epilogue import (
    CONV_EPILOGUE,
    CONV_EPILOGUE_AND_STATISTICS,
    conv_epilogue,
    conv_epilogue_and_statistics,
    conv_epilogue_ref,
)
from vidaccel.kernels.norm.channel_statistics import FOLD, ChannelStatistics, channel_statistics_ref, writer_tiling
from vidaccel.kernels.norm.group_norm_silu import group_norm_silu, group_norm_silu_ref
from vidaccel.kernels.norm.padded_group_norm import padded_group_norm
from vidaccel.kernels.op import listening

SHAPES = [
    pytest.param((2, 1, 3, 5, 7), id="one-channel"),
    pytest.param((2, 3, 3, 5, 7), id="rgb"),
    pytest.param((1, 320, 3, 3, 5), id="svd-width"),
]
EPILOGUES = ["bias", "residual", "residual-with-bias", "mix", "mix-image-only", "mix-image-only-spatial-second"]


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, epilogue: str = "residual"
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """x in channels-last memory, bias, and the arguments of one of ``EPILOGUES``; every third frame is a still."""
    torch.manual_seed(0)
    samples, channels, *spatial = shape
    x, residual = (torch.randn(samples, *spatial, channels, device=device).to(dtype).movedim(-1, 1) for _ in range(2))
    bias = torch.randn(channels, device=device).to(dtype)
    arguments: dict[str, Any] = {}
    if epilogue != "bias":
        arguments["residual"] = residual
    if "with-bias" in epilogue:
        arguments["residual_bias"] = torch.randn(channels, device=device).to(dtype)
    if "mix" in epilogue:
        arguments["mix_factor"] = torch.tensor([0.7], device=device).to(dtype)
    if "image-only" in epilogue:
        frames = torch.arange(samples * spatial[0], device=device).view(samples, spatial[0])
        arguments["image_only"] = (frames % 3 == 0).float()
    if "second" in epilogue:
        arguments["spatial_is_second"] = True
    return x, bias, arguments


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def positional(bias: Tensor, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """What follows x in the ops' arguments."""
    names = ("residual", "residual_bias", "mix_factor", "image_only")
    return (bias, *(arguments.get(name) for name in names), arguments.get("spatial_is_second", False), False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_matches_reference(shape: tuple[int, ...], epilogue: str, dtype: torch.dtype, device: torch.device) -> None:
    x, bias, arguments = draw(shape, dtype, device, epilogue)
    out = conv_epilogue(x, bias, **arguments, impl="triton")
    gold = conv_epilogue_ref(x.double(), bias.double(), **in_float64(arguments))
    assert_close_to_gold(out, gold, conv_epilogue_ref(x, bias, **arguments))
    assert out.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["bias", "residual", "residual-with-bias"])
@pytest.mark.parametrize("shape", [(2, 24, 35), (2, 24, 5, 7), (2, 24, 3, 5, 7)], ids=["3d", "4d", "5d"])
def test_sums_are_rounded_once(shape: tuple[int, ...], epilogue: str, dtype: torch.dtype, device: torch.device) -> None:
    x, bias, arguments = draw(shape, dtype, device, epilogue)
    out = conv_epilogue(x, bias, **arguments, impl="triton")
    in_float32 = {name: tensor.float() for name, tensor in arguments.items()}
    assert torch.equal(out, conv_epilogue_ref(x.float(), bias.float(), **in_float32).to(dtype))


def test_blend_is_rounded_as_eager_rounds_it(device: torch.device) -> None:
    x, bias, arguments = draw((2, 24, 3, 5, 7), torch.float16, device, "mix-image-only")
    out = conv_epilogue(x, bias, **arguments, impl="triton")
    residual, mix = arguments["residual"], (arguments["mix_factor"], arguments["image_only"])
    summed = conv_epilogue_ref(x.float(), bias.float(), residual.float()).half()
    assert torch.equal(out, alpha_blend_ref(residual, summed, *mix))
    assert torch.equal(out[0, :, 0], residual[0, :, 0])


@torch.no_grad()
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_inplace_takes_the_memory_of_x(epilogue: str, device: torch.device) -> None:
    x, bias, arguments = draw((2, 32, 2, 5, 7), torch.float16, device, epilogue)
    before = x.clone()
    expected = conv_epilogue(x, bias, **arguments)
    assert torch.equal(x, before) and expected.data_ptr() != x.data_ptr()
    out = conv_epilogue(x, bias, **arguments, inplace=True)
    assert torch.equal(out, expected)
    assert out.data_ptr() == x.data_ptr() and out.stride() == x.stride()
    x = before.clone()
    out, _ = conv_epilogue_and_statistics(x, bias, **arguments, inplace=True)
    assert torch.equal(out, expected) and out.data_ptr() == x.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("epilogue", ["residual", "residual-with-bias"])
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.contiguous()], ids=["channels-last", "channels-first"])
def test_a_float32_residual_makes_the_sum_float32(layout: Any, epilogue: str, device: torch.device) -> None:
    x, bias, arguments = draw((2, 24, 2, 5, 7), torch.float32, device, epilogue)
    x, arguments["residual"] = x.half(), layout(arguments["residual"])
    expected = conv_epilogue_ref(x.float(), bias, **arguments)
    with listening(checks=True) as events:
        out = conv_epilogue(x, bias, **arguments)
        residual = arguments["residual"] = arguments["residual"].clone()
        same = conv_epilogue(x, bias, **arguments, inplace=True)
    assert [(event.implementation, event.problem) for event in events] == [("triton", "")] * 2
    assert events[0].costs.bytes == x.nbytes + 2 * residual.nbytes
    assert out.dtype == torch.float32 and torch.equal(out, expected) and torch.equal(same, expected)


@torch.no_grad()
def test_inplace_takes_the_memory_of_the_wider_residual(device: torch.device) -> None:
    x, bias, arguments = draw((2, 24, 2, 5, 7), torch.float32, device)
    out = conv_epilogue(x.half(), bias, **arguments, inplace=True)
    assert out.data_ptr() == arguments["residual"].data_ptr()


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.contiguous(), id="channels-first"),
        pytest.param(lambda x: x.repeat_interleave(2, -1)[..., ::2], id="strided"),
        pytest.param(lambda x: x.repeat_interleave(2, 1)[:, ::2], id="strided-channels"),
    ],
)
@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "fresh"])
def test_takes_any_strides(layout: object, inplace: bool, device: torch.device) -> None:
    x, bias, arguments = draw((2, 24, 3, 5, 7), torch.float16, device, "mix-image-only")
    expected = conv_epilogue(x, bias, **arguments, impl="triton")
    assert not layout(x).movedim(1, -1).is_contiguous()
    arguments["residual"] = layout(arguments["residual"])
    arguments["image_only"] = arguments["image_only"].t().contiguous().t()
    strided_bias = bias.repeat_interleave(2)[::2]
    with torch.no_grad():
        out = conv_epilogue(layout(x), strided_bias, **arguments, inplace=inplace)
    assert torch.equal(out, expected) and out.movedim(1, -1).is_contiguous()


def test_bias_of_another_dtype_is_rounded_first(device: torch.device) -> None:
    x, _, arguments = draw((2, 24, 5, 7), torch.float16, device)
    bias = torch.randn(24, device=device)
    out = conv_epilogue(x, bias, **arguments, impl="triton")
    assert torch.equal(out, conv_epilogue(x, bias.half(), **arguments, impl="triton"))


@pytest.mark.parametrize("shape", [(0, 8, 3, 4, 4), (2, 8, 3, 0, 4)], ids=["no-samples", "no-pixels"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_empty_input(shape: tuple[int, ...], epilogue: str, device: torch.device) -> None:
    x, bias, arguments = draw(shape, torch.float16, device, epilogue)
    out = conv_epilogue(x, bias, **arguments)
    assert out.shape == shape and out.dtype == x.dtype


UNSERVED = pytest.mark.parametrize(
    ("dtype", "residual_dtype", "requires_grad", "reason"),
    [
        (torch.float64, torch.float64, False, "x is torch.float64"),
        (torch.float32, torch.float16, False, "have the dtype of x, torch.float32, got torch.float16"),
        (torch.float32, torch.float32, True, "no backward pass"),
    ],
    ids=["float64", "mixed-dtypes", "gradient"],
)


@UNSERVED
def test_unserved_input_runs_in_torch(
    dtype: torch.dtype, residual_dtype: torch.dtype, requires_grad: bool, reason: str, device: torch.device
) -> None:
    x, bias, arguments = draw((2, 32, 5, 7), dtype, device)
    arguments["residual"] = arguments["residual"].to(residual_dtype)
    bias.requires_grad_(requires_grad)
    with listening() as events:
        out = conv_epilogue(x.contiguous(), bias, **arguments)
        same, statistics = conv_epilogue_and_statistics(x, bias, **arguments)
    assert [event.implementation for event in events] == ["torch"] * 2
    assert all(reason in event.reason for event in events)
    assert torch.equal(out, conv_epilogue_ref(x, bias, **arguments)) and out.movedim(1, -1).is_contiguous()
    assert torch.equal(same, out) and out.requires_grad == requires_grad
    assert torch.equal(statistics.parts, channel_statistics_ref(out, statistics.chunk_rows))
    for run in (conv_epilogue, conv_epilogue_and_statistics):
        with pytest.raises(ValueError, match=f"{run.__name__}: impl='triton' cannot run: .*{re.escape(reason)}"):
            run(x, bias, **arguments, impl="triton")


X = torch.ones(2, 4, 3, 2, 2)
MIX = torch.ones(1)


@pytest.mark.parametrize("run", [conv_epilogue, conv_epilogue_and_statistics])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 4)}, ValueError, r"1 to 3 spatial dims, got \(2, 4\)"),
        ({"x": torch.ones([])}, ValueError, r"1 to 3 spatial dims, got \(\)"),
        ({"x": X.int()}, TypeError, r"x must be floating-point, got torch.int32"),
        ({"residual": X.bool()}, TypeError, r"residual must be floating-point, got torch.bool"),
        ({"bias": torch.ones(4, device="meta")}, ValueError, r"bias must be on cpu, as x is, got meta"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must be \[4\], got \(5,\)"),
        ({"residual": X[:, :, :1]}, ValueError, r"residual must be \(2, 4, 3, 2, 2\), .*, got \(2, 4, 1, 2, 2\)"),
        ({"residual_bias": torch.ones(4)}, ValueError, r"residual_bias must be \[4\] and needs a residual, got \(4,\)"),
        ({"residual": X, "residual_bias": torch.ones(5)}, ValueError, r"residual_bias must be \[4\] .*, got \(5,\)"),
        ({"mix_factor": MIX}, ValueError, r"mix_factor needs a residual to blend with"),
        ({"residual": X, "image_only": torch.ones(2, 3)}, ValueError, r"image_only needs a mix_factor"),
        ({"residual": X, "mix_factor": torch.ones(2)}, ValueError, r"mix_factor must be \[1\], got \(2,\)"),
        ({"residual": X, "mix_factor": MIX[None]}, ValueError, r"mix_factor must be \[1\], got \(1, 1\)"),
        (
            {"residual": X, "mix_factor": MIX, "image_only": torch.ones(6)},
            ValueError,
            r"image_only must be \[B, F\] of x \[B, C, F, H, W\], got \(6,\) \(x is \(2, 4, 3, 2, 2\)\)",
        ),
        (
            {"x": X[:, :, 0], "residual": X[:, :, 0], "mix_factor": MIX, "image_only": torch.ones(2, 2)},
            ValueError,
            r"image_only must be \[B, F\] of x \[B, C, F, H, W\], got \(2, 2\) \(x is \(2, 4, 2, 2\)\)",
        ),
        ({"impl": "cuda"}, ValueError, r"impl must be one of triton, torch, got 'cuda'"),
    ],
)
def test_rejects(change: dict[str, object], error: type[Exception], message: str, run: Any) -> None:
    with pytest.raises(error, match=f"{run.__name__}: .*{message}"):
        run(**{"x": X, "bias": torch.ones(4), **change})


@pytest.mark.parametrize("epilogue", ["bias", "residual-with-bias", "mix-image-only"])
def test_registration(epilogue: str, device: torch.device) -> None:
    x, bias, arguments = draw((1, 32, 2, 3, 3), torch.float32, device, epilogue)
    for laid_out in (x, x.contiguous()):
        given = (laid_out, *positional(bias, arguments))
        torch.library.opcheck(CONV_EPILOGUE.registered["triton"], given)
        torch.library.opcheck(CONV_EPILOGUE_AND_STATISTICS.registered["triton"], (*given, 8))


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_compiles_fullgraph(epilogue: str, device: torch.device) -> None:
    x, bias, arguments = draw((1, 32, 2, 3, 3), torch.float32, device, epilogue)
    expected = 2 * conv_epilogue(x, bias, **arguments, impl="triton")
    _, known = conv_epilogue_and_statistics(x, bias, **arguments, impl="triton")

    def double(x: Tensor) -> tuple[Tensor, Tensor, ChannelStatistics]:
        same, statistics = conv_epilogue_and_statistics(x, bias, **arguments, impl="triton")
        return 2 * conv_epilogue(x, bias, **arguments, inplace=True, impl="triton"), same, statistics

    out, same, statistics = torch.compile(double, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(out, expected) and torch.equal(2 * same, expected) and out.stride() == expected.stride()
    assert torch.equal(statistics.parts, known.parts) and statistics[1:] == known[1:]


@pairwise({"epilogue": EPILOGUES, "dtype": DTYPES, "chunk_rows": [8, 12, 35, 64]})
def test_statistics_in_chunks_of_any_size(
    epilogue: str, dtype: torch.dtype, chunk_rows: int, device: torch.device
) -> None:
    x, bias, arguments = draw((2, 32, 2, 5, 7), dtype, device, epilogue)
    given = positional(bias, arguments)
    out, parts = CONV_EPILOGUE_AND_STATISTICS(x + 30, *given, chunk_rows, impl="triton")
    assert torch.equal(out, CONV_EPILOGUE(x + 30, *given, impl="triton"))
    gold = channel_statistics_ref(out.double(), chunk_rows)
    error, size = ((x.abs().amax((0, 1, 3))) for x in (parts - gold, gold))  # of means, of sums of squares
    assert (error <= 16 * torch.finfo(torch.float32).eps * size).all()  # deviations from a mean of 30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 32, 5, 7), (1, 32, 3, 5, 7), (3, 32, 35)], ids=["4d", "5d", "3d"])
def test_a_norm_goes_by_the_statistics(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, bias, arguments = draw(shape, dtype, device)
    out, statistics = conv_epilogue_and_statistics(x + 30, bias, **arguments, impl="triton")
    assert torch.equal(out, conv_epilogue(x + 30, bias, **arguments, impl="triton"))
    assert_norm_goes_by(out, statistics, groups=2)  # the interpreter takes one after the other


@torch.no_grad()
def test_a_norm_goes_by_the_statistics_of_float64(device: torch.device) -> None:
    x, (weight, bias) = torch.randn(2, 32, 3, 4, 5, dtype=torch.float64, device=device), torch.ones(2, 32).to(device)
    out, statistics = conv_epilogue_and_statistics(x, bias)
    expected = group_norm_silu(out, weight, bias, 4, 1e-5)
    torch.testing.assert_close(group_norm_silu(out, weight, bias, 4, 1e-5, statistics=statistics), expected)
    rows = padded_group_norm(out.permute(0, 2, 3, 4, 1), weight, bias, 4, 1e-5, statistics=statistics)
    torch.testing.assert_close(rows.permute(0, 4, 1, 2, 3), expected)


def assert_norm_goes_by(out: Tensor, statistics: ChannelStatistics, groups: int = 8) -> None:
    weight, bias = torch.randn(2, out.shape[1], device=out.device, dtype=out.dtype)
    gold = group_norm_silu_ref(out.double(), weight.double(), bias.double(), groups, 1e-5)
    known = group_norm_silu(out, weight, bias, groups, 1e-5, statistics=statistics, impl="triton")
    assert_close_to_gold(known, gold, group_norm_silu(out, weight, bias, groups, 1e-5, impl="triton"))


@torch.no_grad()
@pairwise(
    {
        "shape": [(2, 32, 2, 5, 7), (3, 32, 5, 7), (3, 32, 35)],
        "dtype": DTYPES,
        "inplace": [pytest.param(False, id="fresh"), pytest.param(True, id="inplace")],
    }
)
def test_the_check_passes_right_calls(
    shape: tuple[int, ...], dtype: torch.dtype, inplace: bool, device: torch.device
) -> None:
    for epilogue in EPILOGUES if len(shape) == 5 else EPILOGUES[:4]:
        x, bias, arguments = draw(shape, dtype, device, epilogue)
        with listening(checks=True) as events:
            out = conv_epilogue(x.clone(), bias, **arguments, inplace=inplace)
            same, _ = conv_epilogue_and_statistics(x, bias, **arguments, inplace=inplace)
        assert [(event.implementation, event.problem) for event in events] == [("triton", "")] * 2, epilogue
        assert torch.equal(out, same)


def frames_of(out: Tensor) -> Tensor:
    """``[frames, ..., C]`` of an output of ours, a view."""
    rows = out.movedim(1, -1)
    return rows.flatten(0, 1) if out.ndim == 5 else rows


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", [*FAULTS, "forgotten-bias", "means", "spreads", "last-chunk"])
def test_the_check_finds_faults(fault: str, dtype: torch.dtype, device: torch.device) -> None:
    x, bias, arguments = draw((1, 32, 3, 9, 7), dtype, device)
    of_y = {**FAULTS, "forgotten-bias": lambda rows: rows[..., 3].sub_(bias[3])}
    of_parts = {
        "means": lambda parts: parts[:, :, 0].mul_(1.01),
        "spreads": lambda parts: parts[:, :, 1].mul_(1.05),
        "last-chunk": lambda parts: parts[-1, -1].zero_(),
    }

    def spoil(outputs: tuple[Tensor, Tensor]) -> None:
        of_y[fault](frames_of(outputs[0])) if fault in of_y else of_parts[fault](outputs[1])

    expected = conv_epilogue_ref(x, bias, **arguments)
    with planted(CONV_EPILOGUE_AND_STATISTICS, "triton", spoil), listening(checks=True) as events:
        out, statistics = conv_epilogue_and_statistics(x, bias, **arguments, inplace=True)
    assert events[0].implementation == "triton" and events[0].problem
    assert torch.equal(out, expected)
    assert torch.equal(statistics.parts, channel_statistics_ref(expected, statistics.chunk_rows))
    if fault in of_y:
        x, bias, arguments = draw((1, 32, 3, 9, 7), dtype, device)
        with (
            planted(CONV_EPILOGUE, "triton", lambda y: of_y[fault](frames_of(y))),
            listening(checks=True) as events,
        ):
            assert torch.equal(conv_epilogue(x, bias, **arguments), expected)
        assert events[0].problem


def test_compile_ahead_passes_over_what_no_kernel_serves() -> None:
    for weight in (torch.empty(24, 8, 3, 3), torch.empty(32, 8, 3, 3, dtype=torch.float64), torch.empty(32, 8, 3, 3)):
        for statistics in (False, True):
            op.compile_ahead(weight, residual_bias=True, mix=True, statistics=statistics)


def compile_epilogue(target: str, epilogue: str, kernel: Any, num_warps: int, **constants: Any) -> dict[str, str]:
    arguments = draw((2, 24, 3, 5, 7), torch.float16, torch.device("cpu"), epilogue)[2]
    optional = {name: f"{name}_ptr" for name in ("residual", "residual_bias", "mix_factor", "image_only")}
    present = [pointer for name, pointer in optional.items() if name in arguments]
    flags = {f"HAS_{name.upper()}": name in arguments for name in optional}
    flags["HAS_MIX"] = flags.pop("HAS_MIX_FACTOR")
    return compile_for(
        target,
        kernel,
        {
            **dict.fromkeys(["bias_ptr", "y_ptr", *present], "*fp32:16" if "wide" in epilogue else "*fp16:16"),
            **{"x_ptr": "*fp16:16"},
            **{"part_ptr": "*fp32:16", "channels": "i32:16", "frame_size": "i32:16"},
            **{"frame_rows": "i32", "chunk_rows": "i32"},
        },
        {
            **dict.fromkeys(set(optional.values()).difference(present)),
            **flags,
            **{"SPATIAL_IS_SECOND": False},
            **constants,
        },
        num_warps=num_warps,
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("epilogue", ["bias", "residual-with-bias", "mix-image-only", "wide-residual-with-bias"])
def test_accesses_are_16_bytes_wide(target: str, epilogue: str) -> None:
    asm = compile_epilogue(target, epilogue, op._conv_epilogue_kernel, op.NUM_WARPS, BLOCK=op.BLOCK)
    assert_no_spills(asm)
    scalars = 2 if "mix" in epilogue else 0
    assert len(narrow_accesses(asm)) == scalars, "all but the scalars of the blend"


@pytest.mark.slow
@pairwise(
    {
        "segment_rows": [pytest.param(64, id="small"), pytest.param(9216, id="large")],
        "epilogue": ["residual-with-bias", "mix-image-only"],
        "target": list(TARGETS),
    }
)
def test_tiles_with_statistics_are_read_and_written_16_bytes_at_a_time(
    segment_rows: int, epilogue: str, target: str
) -> None:
    tiling = writer_tiling((28, 320, segment_rows))
    blocks = {"BLOCK_R": tiling.block_r, "BLOCK_C": tiling.block_c, "FOLD": FOLD, "STAGES": tiling.stages}
    asm = compile_epilogue(target, epilogue, op._conv_epilogue_statistics_kernel, tiling.num_warps, **blocks)
    assert_no_spills(asm)
    if "sass" in asm:
        reads = len(re.findall(r"LDG\.E\.128|LDGSTS\.E\S*\.128", asm["sass"]))
        assert reads >= 2 * asm["sass"].count("STG.E.128") > 0
        assert ("LDGSTS" in asm["sass"]) == (tiling.stages > 1), "the next tile is to be on its way"
        if tiling.num_warps == 1:
            assert "BAR.SYNC" not in re.search(r"\n(LBB\d+):.*BRA \1;", asm["sass"], re.DOTALL)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(2, 320, 14, 72, 128), (2, 1280, 14, 18, 32), (1, 128, 3, 576, 1024)],
    ids=["svd-level-0", "svd-level-2", "vae"],
)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_real_shapes(shape: tuple[int, ...], epilogue: str, dtype: torch.dtype, device: torch.device) -> None:
    x, bias, arguments = draw(shape, dtype, device, epilogue)
    out = conv_epilogue(x, bias, **arguments, impl="triton")
    gold = conv_epilogue_ref(x.double(), bias.double(), **in_float64(arguments))
    assert_close_to_gold(out, gold, conv_epilogue_ref(x, bias, **arguments))
    same, statistics = conv_epilogue_and_statistics(x, bias, **arguments, impl="triton")
    assert torch.equal(same, out)
    assert_norm_goes_by(out, statistics)
    with torch.no_grad(), listening(checks=True) as events:
        conv_epilogue(x, bias, **arguments)
        conv_epilogue_and_statistics(x, bias, **arguments)
    assert not any(event.problem for event in events)


@pytest.mark.gpu
def test_offsets_beyond_int32(device: torch.device) -> None:
    x, bias, arguments = draw((1, 128, 17, 1024, 1024), torch.float16, device, "mix-image-only")
    assert x.numel() > 2**31
    out = conv_epilogue(x, bias, **arguments, impl="triton")
    arguments["residual"] = arguments["residual"][:, :, -1:]
    arguments["image_only"] = arguments["image_only"][:, -1:]
    assert torch.equal(out[:, :, -1:], conv_epilogue(x[:, :, -1:], bias, **arguments, impl="triton"))
