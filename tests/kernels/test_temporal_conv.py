from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_checks import TARGETS, assert_close_to_gold, assert_no_spills, compile_for
from torch import Tensor

from vidaccel.kernels import tuning_cache
from vidaccel.kernels.conv import temporal_conv as op
from vidaccel.kernels.conv.temporal_conv import NormSiLU, Tiling, choose_tiling, temporal_conv, temporal_conv_ref
from vidaccel.kernels.dispatch import record_choices

DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)  # the interpreter's bfloat16 is wrong

SHAPES = [  # N, C_in, F, H, W, C
    pytest.param((2, 48, 5, 3, 7, 32), id="channels-cut"),
    pytest.param((1, 32, 1, 2, 3, 80), id="one-frame"),
    pytest.param((2, 16, 2, 1, 1, 16), id="two-frames-one-pixel"),
    pytest.param((1, 64, 3, 5, 27, 144), id="odd-pixels-two-tiles"),
]
EPILOGUES = ["bias", "residual", "mix", "mix-image-only", "mix-image-only-spatial-second"]
SMALL = (2, 32, 3, 3, 5, 48)


@pytest.fixture(autouse=True)
def fresh_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(op, "_chosen", {})


def draw(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    epilogue: str = "residual",
    shifts: int | None = None,
    offset: float = 0.0,
) -> dict[str, Any]:
    """The arguments of a call in channels-last memory; ``shifts`` rows of a norm's shift, None for no norm at all."""
    torch.manual_seed(0)
    samples, channels_in, *sides, channels = shape

    def activation(width: int) -> Tensor:
        return (torch.randn(samples, *sides, width, device=device) + offset).to(dtype).movedim(-1, 1)

    weight = torch.randn(channels, channels_in, 3, 1, 1, device=device) / (3 * channels_in) ** 0.5
    arguments: dict[str, Any] = {
        "x": activation(channels_in),
        "weight": weight.to(dtype).contiguous(memory_format=torch.channels_last_3d),
        "bias": torch.randn(channels, device=device).to(dtype),
    }
    if epilogue != "bias":
        arguments["residual"] = activation(channels)
    if "mix" in epilogue:
        arguments["mix_factor"] = torch.tensor([0.7], device=device).to(dtype)
    if "image-only" in epilogue:
        arguments["image_only"] = (torch.arange(samples * sides[0], device=device) % 3 == 0).view(samples, -1).float()
    if "second" in epilogue:
        arguments["spatial_is_second"] = True
    if shifts is not None:
        weight, bias = torch.randn(2, channels_in, device=device).to(dtype)
        shift = torch.randn(samples, shifts, channels_in, device=device).to(dtype) if shifts else None
        arguments["norm"] = NormSiLU(weight, bias, 4, 1e-5, shift)
    return arguments


def in_float64(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: in_float64(inner) for name, inner in value.items()}
    if isinstance(value, NormSiLU):
        return NormSiLU(*map(in_float64, value))
    return value.double() if isinstance(value, Tensor) else value


def assert_matches_reference(out: Tensor, arguments: dict[str, Any]) -> None:
    gold = temporal_conv_ref(**in_float64(arguments))
    assert_close_to_gold(out, gold, temporal_conv_ref(**arguments))
    assert out.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_matches_reference(shape: tuple[int, ...], epilogue: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments = draw(shape, dtype, device, epilogue)
    assert_matches_reference(temporal_conv(**arguments, impl="triton"), arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shifts", [0, 1, 3], ids=["no-shift", "one-shift", "shift-per-frame"])
@pytest.mark.parametrize("impl", ["triton", "triton_prologue", "torch"])
@pytest.mark.parametrize("offset", [0.0, 30.0], ids=["centred", "off-centre"])
def test_normalises_first(offset: float, impl: str, shifts: int, dtype: torch.dtype, device: torch.device) -> None:
    arguments = draw((2, 96, 3, 3, 5, 48), dtype, device, shifts=shifts, offset=offset)
    assert_matches_reference(temporal_conv(**arguments, impl=impl), arguments)


@pytest.mark.parametrize(
    "tiling", [Tiling(16, 16, 16, 1, 1), Tiling(64, 32, 32, 4, 2), Tiling(32, 128, 64, 4, 3)], ids=str
)
def test_result_does_not_depend_on_the_cut(tiling: Tiling, device: torch.device) -> None:
    arguments = draw((1, 48, 3, 5, 7, 80), torch.float16, device)
    rest = (arguments["residual"], None, None, False, *op.NO_NORM)
    out = op._launch(arguments["x"], arguments["weight"], arguments["bias"], *rest, tiling=tiling)
    assert_matches_reference(out, arguments)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.contiguous(), id="channels-first"),
        pytest.param(lambda x: x.repeat_interleave(2, -1)[..., ::2], id="strided"),
    ],
)
def test_takes_any_strides(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    arguments = draw(SMALL, torch.float16, device, "mix-image-only", shifts=3)
    expected = temporal_conv(**arguments, impl="triton_prologue")
    for name in ("x", "weight", "residual"):
        arguments[name] = layout(arguments[name])
    arguments["bias"] = arguments["bias"].repeat_interleave(2)[::2]
    assert torch.equal(temporal_conv(**arguments, impl="triton_prologue"), expected)


@pytest.mark.parametrize("shape", [(0, 32, 3, 4, 4, 16), (2, 32, 3, 0, 4, 16)], ids=["no-samples", "no-pixels"])
def test_empty_input(shape: tuple[int, ...], device: torch.device) -> None:
    out = temporal_conv(**draw(shape, torch.float16, device))
    assert out.shape == (shape[0], 16, *shape[2:5]) and out.dtype == torch.float16


UNSERVED = [
    (SMALL, {"dtype": torch.float64}, "takes float16, bfloat16 and float32, x is torch.float64"),
    ((1, 24, 2, 2, 2, 16), {}, "channels in steps of 16, got 24 and 16"),
    ((1, 32, 2, 2, 2, 20), {}, "channels in steps of 16, got 32 and 20"),
]


@pytest.mark.parametrize(("shape", "change", "reason"), UNSERVED, ids=["float64", "channels-in", "channels"])
def test_unserved_input_runs_in_pytorch(
    shape: tuple[int, ...], change: dict[str, Any], reason: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = draw(shape, change.get("dtype", torch.float16), device)
    with pytest.raises(ValueError, match=f"temporal_conv: impl='triton' cannot run: .*{re.escape(reason)}"):
        temporal_conv(**arguments, impl="triton")
    monkeypatch.setenv("VIDACCEL_IMPL", "temporal_conv=triton")
    with record_choices() as choices:
        out = temporal_conv(**arguments)
    [choice] = [choice for choice in choices if choice.op == op.OP]
    assert choice.impl == ("cudnn" if device.type == "cuda" else "torch") and reason in choice.reason
    assert_matches_reference(out, arguments)


def test_prologue_needs_a_norm_that_it_can_take(device: torch.device) -> None:
    for shifts, reason in ((None, "no norm to take along"), (5, "for each of 3 frames or one for all, got 5")):
        with pytest.raises(ValueError, match=reason):
            temporal_conv(**draw(SMALL, torch.float16, device, shifts=shifts), impl="triton_prologue")


def test_gradients_run_in_pytorch(device: torch.device) -> None:
    arguments = draw(SMALL, torch.float16, device)
    arguments["weight"].requires_grad_()
    with pytest.raises(ValueError, match="no backward pass"):
        temporal_conv(**arguments, impl="triton")
    assert temporal_conv(**arguments).requires_grad


X = torch.ones(2, 4, 3, 2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"x must be \[N, C_in, F, H, W\], got \(4, 3, 2, 2\)"),
        ({"weight": torch.ones(6, 4, 3, 3, 3)}, r"weight must be \[C, 4, 3, 1, 1\], got \(6, 4, 3, 3, 3\)"),
        ({"bias": torch.ones(5)}, r"bias must be \[6\], got \(5,\)"),
        ({"residual": X}, r"residual must be \(2, 6, 3, 2, 2\), .*, got \(2, 4, 3, 2, 2\)"),
        ({"mix_factor": torch.ones(1)}, "mix_factor needs a residual to blend with"),
        ({"image_only": torch.ones(2, 3)}, "image_only needs a mix_factor"),
        ({"norm": NormSiLU(torch.ones(4), torch.ones(4), 3, 1e-5)}, "groups=3 does not divide C=4"),
        ({"impl": "cuda"}, "impl must be one of cudnn, triton, triton_prologue, torch, got 'cuda'"),
    ],
)
def test_rejects(change: dict[str, Any], message: str) -> None:
    arguments = {"x": X, "weight": torch.ones(6, 4, 3, 1, 1), "bias": torch.ones(6), **change}
    with pytest.raises(ValueError, match=f"temporal_conv: .*{message}"):
        temporal_conv(**arguments)


@pytest.mark.parametrize("shifts", [None, 3], ids=["plain", "prologue"])
def test_registration(shifts: int | None, device: torch.device) -> None:
    arguments = draw(SMALL, torch.float16, device, "mix-image-only", shifts=shifts)
    *positional, norm = op._Arguments(**arguments)
    torch.library.opcheck(op._temporal_conv, (*positional, *(norm or op.NO_NORM)))


@pytest.mark.parametrize("impl", ["triton", "triton_prologue", "torch", None])
def test_compiles_fullgraph(impl: str | None, device: torch.device) -> None:
    arguments = draw(SMALL, torch.float16, device, "mix-image-only", shifts=3)

    def double() -> Tensor:
        return 2 * temporal_conv(**arguments, impl=impl)

    expected = double()
    out = torch.compile(double, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()


# the choice, with a made-up clock


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Every shape is measured, as on a GPU, by a clock that the test sets: milliseconds by implementation."""
    times: dict[str, float] = {}
    monkeypatch.setattr(op, "_measures", lambda arguments: True)
    monkeypatch.setattr(op, "_cache_key", lambda arguments: {"shape": str(op._shape(arguments))})
    monkeypatch.setattr(tuning_cache, "cuda_milliseconds", lambda run: times[run.args[0]])
    return times


def ran(device: torch.device) -> str:
    with record_choices() as choices:
        temporal_conv(**draw(SMALL, torch.float16, device, shifts=3))
    [choice] = [choice for choice in choices if choice.op == op.OP]
    assert not choice.reason
    return choice.impl


@pytest.mark.parametrize("winner", ["triton", "triton_prologue", "library"])
def test_the_fastest_runs_and_is_remembered(
    winner: str, measuring: dict[str, float], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = "cudnn" if device.type == "cuda" else "torch"
    winner = library if winner == "library" else winner
    measuring.update({"triton": 2.0, "triton_prologue": 2.0, library: 2.0, winner: 1.0})
    assert ran(device) == winner
    monkeypatch.setattr(op, "_chosen", {})  # as in another process
    monkeypatch.setattr(op, "_measure", lambda *_: pytest.fail("it is measured again"))
    assert ran(device) == winner


def test_nothing_is_measured_on_a_cpu_or_when_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_TUNE", "0")
    assert not op._measures(op._Arguments(X, torch.ones(6, 4, 3, 1, 1), torch.ones(6)))


def test_a_wrong_result_is_found_out(device: torch.device) -> None:
    arguments = op._Arguments(**draw(SMALL, torch.float16, device, "mix-image-only", shifts=3))
    expected = op._run("torch", arguments)
    assert op._why_wrong(arguments, expected, expected) is None
    assert op._why_wrong(arguments, expected, expected * 1.05) == "its result is not PyTorch's"
    assert "against float64" in str(op._why_wrong(arguments, expected, expected * (1 + 2**-8)))


# what the compilers make of the kernel


def compile_kernel(target: str, channels: int, tiling: Tiling, *, prologue: bool) -> dict[str, str]:
    pointers = ("x_ptr", "weight_ptr", "bias_ptr", "residual_ptr", "mix_factor_ptr", "image_only_ptr", "y_ptr")
    norm_pointers = {"norm_ptr": "*fp32:16", "norm_bias_ptr": "*fp16:16", "shift_ptr": "*fp16:16"}
    return compile_for(
        target,
        op._temporal_conv_kernel,
        {
            **dict.fromkeys(pointers, "*fp16:16"),
            **(norm_pointers if prologue else {}),
            **dict.fromkeys(("frames", "pixels", "segments", "stride_norm_sample"), "i32"),
        },
        {
            **({} if prologue else dict.fromkeys(norm_pointers)),
            **{"C_IN": channels, "C_OUT": channels, "HAS_NORM": prologue, "HAS_SHIFT": prologue},
            **{"HAS_RESIDUAL": True, "HAS_MIX": True, "HAS_IMAGE_ONLY": True, "SPATIAL_IS_SECOND": False},
            **{"BLOCK_M": tiling.pixels, "BLOCK_N": tiling.channels, "BLOCK_K": tiling.channels_in},
            "STAGES": tiling.stages,
        },
        num_warps=tiling.num_warps,
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("channels", [32, 320, 640])
def test_prefetches_and_does_not_spill(target: str, channels: int) -> None:
    asm = compile_kernel(target, channels, choose_tiling(channels), prologue=False)
    assert_no_spills(asm)
    if "sass" not in asm:
        return
    copies = re.findall(r"\bLDGSTS\S*", asm["sass"])
    assert copies and all(".128" in copy for copy in copies), "x and weight are to be fetched 16 bytes at a time"
    groups_left_in_flight = [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", asm["ptx"])]
    assert max(groups_left_in_flight) > 0, "the next tiles are to be on their way while these are multiplied"
    if target == "sm_90":
        assert "HGMMA" in asm["sass"]
        assert asm["sass"].count("WARPGROUP.DEPBAR") <= 2, "products are not to wait for one another"


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
def test_prologue_does_not_spill(target: str) -> None:
    assert_no_spills(compile_kernel(target, 640, choose_tiling(640), prologue=True))


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 320, 14, 72, 128, 320), (2, 640, 14, 36, 64, 640), (1, 128, 14, 64, 64, 128), (1, 320, 25, 33, 65, 320)],
    ids=["svd-level-0", "svd-level-1", "vae", "25-frames"],
)
@pytest.mark.parametrize("impl", ["triton", "triton_prologue", "cudnn"])
def test_real_shapes(shape: tuple[int, ...], impl: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments = draw(shape, dtype, device, "mix-image-only", shifts=shape[2])
    assert_matches_reference(temporal_conv(**arguments, impl=impl), arguments)


@pytest.mark.gpu
def test_the_choice_on_a_gpu(device: torch.device, tmp_path: Path) -> None:
    arguments = draw((2, 320, 14, 36, 64, 320), torch.float16, device, "mix-image-only", shifts=14)
    with record_choices() as choices:
        out = temporal_conv(**arguments)
    assert_matches_reference(out, arguments)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    assert not any(choice.reason for choice in choices), "kernels of ours that fail are said here"


@pytest.mark.gpu
def test_offsets_beyond_int32(device: torch.device) -> None:
    arguments = draw((9, 128, 8, 512, 512, 128), torch.float16, device, "bias")
    assert arguments["x"].numel() > 2**31
    out = temporal_conv(**arguments, impl="triton")
    last = temporal_conv(arguments["x"][-1:], arguments["weight"], arguments["bias"], impl="triton")
    assert torch.equal(out[-1:], last)
