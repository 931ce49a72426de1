from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from kernel_checks import TARGETS, assert_close_to_gold, assert_no_spills, compile_for, narrow_accesses
from torch import Tensor

from vidaccel.kernels import conv_epilogue as op
from vidaccel.kernels.conv_epilogue import conv_epilogue, conv_epilogue_ref
from vidaccel.kernels.dispatch import record_choices

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
def test_sums_have_the_bits_of_eager(
    shape: tuple[int, ...], epilogue: str, dtype: torch.dtype, device: torch.device
) -> None:
    x, bias, arguments = draw(shape, dtype, device, epilogue)
    out = conv_epilogue(x, bias, **arguments, impl="triton")
    assert torch.equal(out, conv_epilogue_ref(x, bias, **arguments))


def test_blend_has_the_bits_of_eager(device: torch.device) -> None:
    x, bias, arguments = draw((2, 24, 3, 5, 7), torch.float16, device, "mix-image-only")
    out = conv_epilogue(x, bias, **arguments, impl="triton")
    assert torch.equal(out, conv_epilogue_ref(x, bias, **arguments))
    assert torch.equal(out[0, :, 0], arguments["residual"][0, :, 0])


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
    assert torch.equal(out, conv_epilogue_ref(x, bias.half(), **arguments))


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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("epilogue", ["bias", "residual-with-bias", "mix-image-only"])
def test_accesses_are_16_bytes_wide(target: str, epilogue: str) -> None:
    _, _, arguments = draw((2, 24, 3, 5, 7), torch.float16, torch.device("cpu"), epilogue)
    optional = {name: f"{name}_ptr" for name in ("residual", "residual_bias", "mix_factor", "image_only")}
    present = [pointer for name, pointer in optional.items() if name in arguments]
    asm = compile_for(
        target,
        op._conv_epilogue_kernel,
        {
            **dict.fromkeys(["x_ptr", "bias_ptr", "y_ptr", *present], "*fp16:16"),
            **{"channels": "i32:16", "frame_size": "i32:16"},
        },
        {
            **dict.fromkeys(set(optional.values()).difference(present)),
            **{"HAS_RESIDUAL": "residual" in arguments, "HAS_RESIDUAL_BIAS": "residual_bias" in arguments},
            **{"HAS_MIX": "mix_factor" in arguments},
            **{"HAS_IMAGE_ONLY": "image_only" in arguments, "SPATIAL_IS_SECOND": False, "BLOCK": op.BLOCK},
        },
        num_warps=op.NUM_WARPS,
    )
    assert_no_spills(asm)
    scalars = {"mix_factor", "image_only"} & arguments.keys()
    assert len(narrow_accesses(asm)) == len(scalars), "all but the scalars of the blend"


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


@pytest.mark.gpu
def test_offsets_beyond_int32(device: torch.device) -> None:
    x, bias, arguments = draw((1, 128, 17, 1024, 1024), torch.float16, device, "mix-image-only")
    assert x.numel() > 2**31
    out = conv_epilogue(x, bias, **arguments, impl="triton")
    arguments["residual"] = arguments["residual"][:, :, -1:]
    arguments["image_only"] = arguments["image_only"][:, -1:]
    assert torch.equal(out[:, :, -1:], conv_epilogue(x[:, :, -1:], bias, **arguments, impl="triton"))
