from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from kernel_checks import TARGETS, assert_close_to_gold, assert_no_spills, compile_for, narrow_accesses
from torch import Tensor

from vidaccel.kernels.conv import conv_epilogue as op
from vidaccel.kernels.conv.alpha_blend import alpha_blend_ref
from vidaccel.kernels.conv.conv_epilogue import conv_epilogue, conv_epilogue_ref
from vidaccel.kernels.dispatch import record_choices
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.norm.channel_statistics import Tiling, carried, carry, choose_writer_tiling
from vidaccel.kernels.norm.group_norm_silu import group_norm_silu, group_norm_silu_ref

DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)  # the interpreter's bfloat16 is wrong

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
    """What follows x in ``_launch`` and in the registered op."""
    names = ("residual", "residual_bias", "mix_factor", "image_only")
    return (bias, *(arguments.get(name) for name in names), arguments.get("spatial_is_second", False))


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


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_inplace_takes_the_memory_of_x(epilogue: str, device: torch.device) -> None:
    x, bias, arguments = draw((2, 24, 3, 5, 7), torch.float16, device, epilogue)
    before = x.clone()
    expected = conv_epilogue(x, bias, **arguments, impl="triton")
    assert torch.equal(x, before) and expected.data_ptr() != x.data_ptr()
    out = conv_epilogue(x, bias, **arguments, inplace=True, impl="triton")
    assert torch.equal(out, expected)
    assert out.data_ptr() == x.data_ptr() and out.stride() == x.stride()


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
    out = conv_epilogue(layout(x), strided_bias, **arguments, inplace=inplace, impl="triton")
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


@pytest.mark.parametrize(
    ("dtype", "residual_dtype", "requires_grad", "reason"),
    [
        (torch.float64, torch.float64, False, "x is torch.float64"),
        (torch.float16, torch.float32, False, "have the dtype of x, torch.float16, got torch.float32"),
        (torch.float32, torch.float32, True, "no backward pass"),
    ],
    ids=["float64", "mixed-dtypes", "gradient"],
)
def test_unserved_input_runs_in_torch(
    dtype: torch.dtype, residual_dtype: torch.dtype, requires_grad: bool, reason: str, device: torch.device
) -> None:
    x, bias, arguments = draw((2, 24, 5, 7), dtype, device)
    arguments["residual"] = arguments["residual"].to(residual_dtype)
    bias.requires_grad_(requires_grad)
    with record_choices() as choices:
        out = conv_epilogue(x.contiguous(), bias, **arguments)
    assert [choice.impl for choice in choices] == ["torch"] and reason in choices[0].reason
    assert torch.equal(out, conv_epilogue_ref(x, bias, **arguments)) and out.movedim(1, -1).is_contiguous()
    with pytest.raises(ValueError, match=f"conv_epilogue: impl='triton' cannot run: .*{re.escape(reason)}"):
        conv_epilogue(x, bias, **arguments, impl="triton")


X = torch.ones(2, 4, 3, 2, 2)
MIX = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 4)}, r"1 to 3 spatial dims, got \(2, 4\)"),
        ({"bias": torch.ones(5)}, r"bias must be \[4\], got \(5,\)"),
        ({"residual": X[:, :, :1]}, r"residual must be \(2, 4, 3, 2, 2\), as x is, got \(2, 4, 1, 2, 2\)"),
        ({"residual_bias": torch.ones(4)}, r"residual_bias must be \[4\] and needs a residual, got \(4,\)"),
        ({"residual": X, "residual_bias": torch.ones(5)}, r"residual_bias must be \[4\] .*, got \(5,\)"),
        ({"mix_factor": MIX}, r"mix_factor needs a residual to blend with"),
        ({"residual": X, "image_only": torch.ones(2, 3)}, r"image_only needs a mix_factor"),
        ({"residual": X, "mix_factor": torch.ones(2)}, r"mix_factor must be \[1\], got \(2,\)"),
        (
            {"residual": X, "mix_factor": MIX, "image_only": torch.ones(6)},
            r"image_only must be \[B, F\] of x \[B, C, F, H, W\], got \(6,\) \(x is \(2, 4, 3, 2, 2\)\)",
        ),
        (
            {"x": X[:, :, 0], "residual": X[:, :, 0], "mix_factor": MIX, "image_only": torch.ones(2, 2)},
            r"image_only must be \[B, F\] of x \[B, C, F, H, W\], got \(2, 2\) \(x is \(2, 4, 2, 2\)\)",
        ),
        ({"impl": "cuda"}, r"impl must be 'triton' or 'torch', got 'cuda'"),
    ],
)
def test_rejects(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"conv_epilogue: .*{message}"):
        conv_epilogue(**{"x": X, "bias": torch.ones(4), **change})


@pytest.mark.parametrize("epilogue", ["bias", "residual-with-bias", "mix-image-only"])
def test_registration(epilogue: str, device: torch.device) -> None:
    x, bias, arguments = draw((2, 24, 3, 5, 7), torch.float32, device, epilogue)
    for laid_out in (x, x.contiguous()):
        torch.library.opcheck(op._conv_epilogue, (laid_out, *positional(bias, arguments)))


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_compiles_fullgraph(epilogue: str, device: torch.device) -> None:
    x, bias, arguments = draw((2, 24, 3, 5, 7), torch.float32, device, epilogue)
    expected = 2 * conv_epilogue(x, bias, **arguments, impl="triton")

    def double(x: Tensor) -> Tensor:
        return 2 * conv_epilogue(x, bias, **arguments, inplace=True, impl="triton")

    out = torch.compile(double, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(out, expected) and out.stride() == expected.stride()


TILINGS = [
    pytest.param(None, id="chosen"),
    pytest.param(Tiling(block_r=8, block_c=32, chunk_rows=8, stages=1, num_warps=1), id="a-tile-to-a-chunk"),
    pytest.param(Tiling(block_r=4, block_c=64, chunk_rows=12, stages=2, num_warps=2), id="several-tiles"),
]


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_statistics_change_nothing(
    epilogue: str, dtype: torch.dtype, tiling: Tiling | None, device: torch.device
) -> None:
    x, bias, arguments = draw((2, 64, 3, 5, 7), dtype, device, epilogue)
    expected = op._launch(x, *positional(bias, arguments))
    for inplace in (False, True):
        out = op._launch(x, *positional(bias, arguments), inplace=inplace, statistics=True, tiling=tiling)
        assert torch.equal(out, expected) and out.stride() == expected.stride()


def by_the_norm(out: Tensor) -> tuple[Tensor, Tensor]:
    """What a norm makes of ``out``, and what the statistics in float64 would make of it."""
    weight, bias = torch.randn(2, out.shape[1], device=out.device, dtype=out.dtype)
    gold = group_norm_silu_ref(out.double(), weight.double(), bias.double(), 8, 1e-5)
    return group_norm_silu(out, weight, bias, 8, 1e-5, impl="triton"), gold


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 64, 5, 7), (2, 64, 3, 5, 7), (3, 64, 35)], ids=["4d", "5d", "3d"])
def test_a_norm_goes_by_the_statistics(
    shape: tuple[int, ...], dtype: torch.dtype, tiling: Tiling | None, device: torch.device
) -> None:
    x, bias, arguments = draw(shape, dtype, device)
    out = op._launch(x + 30, *positional(bias, arguments), statistics=True, tiling=tiling)
    known = carried(out)
    assert known and known.parts.isfinite().all()
    normed, gold = by_the_norm(out)
    assert_close_to_gold(normed, gold, by_the_norm(out.clone())[0])
    known.parts.zero_()  # a mean of 0 and no spread
    assert not torch.allclose(by_the_norm(out)[0].double(), gold, atol=0.1), "the norm has read x for itself"


def test_what_is_written_to_carries_no_statistics(device: torch.device) -> None:
    x, bias, arguments = draw((2, 64, 5, 7), torch.float32, device)
    out = conv_epilogue(x, bias, **arguments, statistics=True, impl="triton")
    out[:, :8].mul_(3)
    assert carried(out) is None
    normed, gold = by_the_norm(out)
    assert_close_to_gold(normed, gold, by_the_norm(out.clone())[0])


def test_views_and_copies_carry_what_is_still_true(device: torch.device) -> None:
    x, bias, arguments = draw((6, 64, 5, 7), torch.float32, device)
    out = conv_epilogue(x, bias, **arguments, statistics=True, impl="triton")
    clip = carry(out.unflatten(0, (2, 3)).transpose(1, 2), out)  # [B, C, F, H, W]
    assert carried(clip) == carried(out) == carried(carry(out.clone(), out)) is not None
    normed, gold = by_the_norm(clip)
    assert_close_to_gold(normed, gold, by_the_norm(clip.clone())[0])
    out[:, :8].mul_(3)
    assert carried(clip) is None
    assert carried(carry(out.clone(), out)) is None, "the copy has been written to as often as the original had"


def test_no_statistics_where_they_cannot_be_had(device: torch.device) -> None:
    x, bias, arguments = draw((2, 64, 5, 7), torch.float32, device)
    assert carried(conv_epilogue(x, bias, **arguments, impl="triton")) is None
    assert carried(conv_epilogue(x, bias, **arguments, statistics=True, impl="torch")) is None
    with torch.inference_mode():
        assert carried(conv_epilogue(x, bias, **arguments, statistics=True, impl="triton")) is None
    x, bias, arguments = draw((2, 24, 5, 7), torch.float32, device)
    assert carried(conv_epilogue(x, bias, **arguments, statistics=True, impl="triton")) is None


def compile_epilogue(target: str, epilogue: str, kernel: Any, num_warps: int, **constants: Any) -> dict[str, str]:
    arguments = draw((2, 24, 3, 5, 7), torch.float16, torch.device("cpu"), epilogue)[2]
    optional = {name: f"{name}_ptr" for name in ("residual", "residual_bias", "mix_factor", "image_only")}
    present = [pointer for name, pointer in optional.items() if name in arguments]
    flags = op._Flags(*(name in arguments for name in optional), spatial_is_second=False)
    return compile_for(
        target,
        kernel,
        {
            **dict.fromkeys(["x_ptr", "bias_ptr", "y_ptr", *present], "*fp16:16"),
            **{"part_ptr": "*fp32:16", "channels": "i32:16", "frame_size": "i32:16"},
            **{"frame_rows": "i32", "chunk_rows": "i32"},
        },
        {**dict.fromkeys(set(optional.values()).difference(present)), **flags.constants(), **constants},
        num_warps=num_warps,
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("epilogue", ["bias", "residual-with-bias", "mix-image-only"])
def test_accesses_are_16_bytes_wide(target: str, epilogue: str) -> None:
    asm = compile_epilogue(target, epilogue, op._conv_epilogue_kernel, op.NUM_WARPS, BLOCK=op.BLOCK)
    assert_no_spills(asm)
    scalars = 2 if "mix" in epilogue else 0
    assert len(narrow_accesses(asm)) == scalars, "all but the scalars of the blend"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("epilogue", ["residual-with-bias", "mix-image-only"])
@pytest.mark.parametrize("segment_rows", [64, 9216], ids=["small", "large"])
def test_tiles_with_statistics_are_read_and_written_16_bytes_at_a_time(
    segment_rows: int, epilogue: str, target: str
) -> None:
    tiling = choose_writer_tiling(28, segment_rows, 320, 64)
    blocks = {"BLOCK_R": tiling.block_r, "BLOCK_C": tiling.block_c, "FOLD": op.FOLD, "STAGES": tiling.stages}
    asm = compile_epilogue(target, epilogue, op._conv_epilogue_statistics_kernel, tiling.num_warps, **blocks)
    assert_no_spills(asm)
    if "sass" in asm:
        reads = len(re.findall(r"LDG\.E\.128|LDGSTS\.E\S*\.128", asm["sass"]))
        assert reads >= 2 * asm["sass"].count("STG.E.128") > 0
        assert ("LDGSTS" in asm["sass"]) == (tiling.stages > 1), "the next tile is to be on its way"
        if tiling.num_warps == 1:
            assert "BAR.SYNC" not in re.search(r"\n(LBB\d+):.*BRA \1;", asm["sass"], re.DOTALL)[0]


@pytest.mark.parametrize("shape", [(28, 320, 9, 16), (2, 320, 14, 72, 128)], ids=["small", "large"])
@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
def test_what_is_compiled_ahead_is_what_runs(
    second: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Launch, "compile_ahead", lambda launch, *dtypes: begun.append((launch._identity(), *dtypes)))
    mix = len(shape) == 5
    op.compile_ahead(torch.empty(320, 320, 3, 3), mix=mix, image_only=mix, spatial_is_second=second)
    frames, rows = (shape[0] * shape[2], 72 * 128) if mix else (shape[0], 9 * 16)
    launch, _ = op._prepare_statistics(320, rows, frames, op._Flags(True, False, mix, mix, second))
    assert launch._identity() in [identity for identity, *_ in begun]
    assert {len(dtypes) for _, _, *dtypes in begun} == {8}, "one for each of the kernel's tensors"
    op.compile_ahead(torch.empty(24, 24, 3, 3))
    op.compile_ahead(torch.empty(32, 32, 3, 3, dtype=torch.float64))
    assert len(begun) == 2


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
    with_statistics = conv_epilogue(x, bias, **arguments, statistics=True, impl="triton")
    assert torch.equal(with_statistics, out) and carried(with_statistics)
    normed, gold = by_the_norm(with_statistics)
    assert_close_to_gold(normed, gold, by_the_norm(out)[0])


@pytest.mark.gpu
def test_offsets_beyond_int32(device: torch.device) -> None:
    x, bias, arguments = draw((1, 128, 17, 1024, 1024), torch.float16, device, "mix-image-only")
    assert x.numel() > 2**31
    out = conv_epilogue(x, bias, **arguments, impl="triton")
    arguments["residual"] = arguments["residual"][:, :, -1:]
    arguments["image_only"] = arguments["image_only"][:, -1:]
    assert torch.equal(out[:, :, -1:], conv_epilogue(x[:, :, -1:], bias, **arguments, impl="triton"))
