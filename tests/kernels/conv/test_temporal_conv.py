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
    pairwise,
    planted,
)
from torch import Tensor

from vidaccel.kernels.conv import temporal_conv as op
from vidaccel.kernels.conv.temporal_conv import TEMPORAL_CONV, Tiling, choose_tiling, temporal_conv, temporal_conv_ref
from vidaccel.kernels.op import listening

SHAPES = [  # N, C_in, F, H, W, C
    pytest.param((2, 48, 5, 3, 7, 32), id="channels-cut"),
    pytest.param((1, 32, 1, 2, 3, 80), id="one-frame"),
    pytest.param((2, 16, 2, 1, 1, 16), id="two-frames-one-pixel"),
    pytest.param((1, 64, 3, 5, 27, 144), id="odd-pixels-two-tiles"),
    pytest.param((1, 80, 2, 3, 5, 128), id="wide-blocks"),
]
EPILOGUES = ["bias", "residual", "mix", "mix-image-only", "mix-image-only-spatial-second"]
SMALL = (2, 32, 3, 3, 5, 48)


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, epilogue: str = "residual"
) -> dict[str, Any]:
    """The arguments of a call in channels-last memory; every third frame is a still."""
    torch.manual_seed(0)
    samples, channels_in, *sides, channels = shape

    def activation(width: int) -> Tensor:
        return torch.randn(samples, *sides, width, device=device).to(dtype).movedim(-1, 1)

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
    return arguments


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def assert_matches_reference(out: Tensor, arguments: dict[str, Any]) -> None:
    gold = temporal_conv_ref(**in_float64(arguments))
    assert_close_to_gold(out, gold, temporal_conv_ref(**arguments))
    assert out.movedim(1, -1).is_contiguous()


@pairwise({"epilogue": EPILOGUES, "shape": SHAPES, "dtype": DTYPES})
def test_matches_reference(shape: tuple[int, ...], epilogue: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments = draw(shape, dtype, device, epilogue)
    assert_matches_reference(temporal_conv(**arguments, impl="triton"), arguments)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.contiguous(), id="channels-first"),
        pytest.param(lambda x: x.repeat_interleave(2, -1)[..., ::2], id="strided"),
    ],
)
def test_takes_any_strides(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    arguments = draw(SMALL, torch.float16, device, "mix-image-only")
    expected = temporal_conv(**arguments, impl="triton")
    for name in ("x", "weight", "residual"):
        arguments[name] = layout(arguments[name])
    arguments["bias"] = arguments["bias"].repeat_interleave(2)[::2]
    arguments["image_only"] = arguments["image_only"].t().contiguous().t()
    assert torch.equal(temporal_conv(**arguments, impl="triton"), expected)


def test_bias_of_another_dtype_is_rounded_first(device: torch.device) -> None:
    arguments = draw(SMALL, torch.float16, device)
    arguments["bias"] = torch.randn(SMALL[-1], device=device)
    out = temporal_conv(**arguments, impl="triton")
    arguments["bias"] = arguments["bias"].half()
    assert torch.equal(out, temporal_conv(**arguments, impl="triton"))


@pytest.mark.parametrize(
    "shape",
    [(0, 32, 3, 4, 4, 16), (2, 32, 0, 4, 4, 16), (2, 32, 3, 0, 4, 16), (2, 32, 3, 4, 4, 0)],
    ids=["no-samples", "no-frames", "no-pixels", "no-channels"],
)
def test_empty_input(shape: tuple[int, ...], device: torch.device) -> None:
    out = temporal_conv(**draw(shape, torch.float16, device))
    assert out.shape == (shape[0], shape[5], *shape[2:5]) and out.dtype == torch.float16


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
    with listening() as events:
        out = temporal_conv(**arguments)
    assert events[-1].op == "temporal_conv" and reason in events[-1].reason
    assert events[-1].implementation == ("cudnn" if device.type == "cuda" else "torch")
    assert_matches_reference(out, arguments)


def test_gradients_run_in_pytorch(device: torch.device) -> None:
    arguments = draw(SMALL, torch.float16, device)
    arguments["weight"].requires_grad_()
    with pytest.raises(ValueError, match="no backward pass"):
        temporal_conv(**arguments, impl="triton")
    temporal_conv(**arguments).sum().backward()
    assert arguments["weight"].grad.isfinite().all()


X = torch.ones(2, 4, 3, 2, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must be \[N, C_in, F, H, W\] with channels, got \(4, 3, 2, 2\)"),
        ({"x": X[:, :0]}, ValueError, r"x must be .* with channels, got \(2, 0, 3, 2, 2\)"),
        ({"x": X.int()}, TypeError, r"x must be floating-point, got torch.int32"),
        ({"weight": torch.ones(6, 4, 3, 1, 1).int()}, TypeError, r"weight must be floating-point, got torch.int32"),
        ({"weight": torch.ones(6, 4, 3, 1, 1, device="meta")}, ValueError, r"weight must be on cpu, as x is, got meta"),
        ({"weight": torch.ones(6, 4, 3, 3, 3)}, ValueError, r"weight must be \[C, 4, 3, 1, 1\], got \(6, 4, 3, 3, 3\)"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must be \[6\], got \(5,\)"),
        ({"residual": X}, ValueError, r"residual must be \(2, 6, 3, 2, 2\), .*, got \(2, 4, 3, 2, 2\)"),
        ({"mix_factor": torch.ones(1)}, ValueError, "mix_factor needs a residual to blend with"),
        ({"image_only": torch.ones(2, 3)}, ValueError, "image_only needs a mix_factor"),
        ({"impl": "cuda"}, ValueError, "impl must be one of cudnn, triton, torch, got 'cuda'"),
        ({"impl": "cudnn"}, ValueError, "impl='cudnn' cannot run: cuDNN is for GPUs .*, x is on cpu"),
    ],
)
def test_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "weight": torch.ones(6, 4, 3, 1, 1), "bias": torch.ones(6), **change}
    with pytest.raises(error, match=f"temporal_conv: .*{message}"):
        temporal_conv(**arguments)


@pytest.mark.parametrize("epilogue", ["bias", "mix-image-only"])
def test_registration(epilogue: str, device: torch.device) -> None:
    arguments = draw(SMALL, torch.float16, device, epilogue)
    names = ("x", "weight", "bias", "residual", "mix_factor", "image_only")
    torch.library.opcheck(TEMPORAL_CONV.registered["triton"], (*map(arguments.get, names), False))


@pytest.mark.parametrize("impl", ["triton", "torch", None])
def test_compiles_fullgraph(impl: str | None, device: torch.device) -> None:
    arguments = draw(SMALL, torch.float16, device, "mix-image-only")

    def double() -> Tensor:
        return 2 * temporal_conv(**arguments, impl=impl)

    expected = double()
    out = torch.compile(double, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_the_check(epilogue: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "temporal_conv=triton")
    arguments = draw(SMALL, dtype, device, epilogue)

    def problem() -> str:
        with listening(checks=True) as events:
            out = temporal_conv(**arguments)
        [event] = events
        assert event.implementation == "triton" and event.costs.flops
        assert not event.problem or torch.equal(out, temporal_conv_ref(**arguments))
        return event.problem

    def forget_bias(rows: Tensor) -> None:
        rows[..., 3] -= arguments["bias"][3]

    assert not problem()
    for fault, spoil in {**FAULTS, "forgotten-bias": forget_bias}.items():
        with planted(TEMPORAL_CONV, "triton", lambda y, spoil=spoil: spoil(y.movedim(1, -1).flatten(0, 1))):
            assert problem(), fault


def test_nothing_is_measured_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path))
    temporal_conv(**draw((2, 64, 5, 64, 64, 64), torch.float16, torch.device("cpu")))
    assert not list(tmp_path.rglob("*.json"))


# what the compilers make of the kernel


def compile_kernel(target: str, channels: int, tiling: Tiling) -> dict[str, str]:
    pointers = ("x_ptr", "weight_ptr", "bias_ptr", "residual_ptr", "mix_factor_ptr", "image_only_ptr", "y_ptr")
    return compile_for(
        target,
        op._temporal_conv_kernel,
        {**dict.fromkeys(pointers, "*fp16:16"), **dict.fromkeys(("frames", "pixels"), "i32")},
        {
            **{"C_IN": channels, "C_OUT": channels},
            **{"HAS_RESIDUAL": True, "HAS_MIX": True, "HAS_IMAGE_ONLY": True, "SPATIAL_IS_SECOND": False},
            **{"BLOCK_M": tiling.pixels, "BLOCK_N": tiling.channels, "BLOCK_K": tiling.channels_in},
            "STAGES": tiling.stages,
        },
        num_warps=tiling.num_warps,
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("channels", [32, 320, 640])
def test_prefetches_and_does_not_spill(target: str, channels: int) -> None:
    asm = compile_kernel(target, channels, choose_tiling(channels))
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


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 320, 14, 72, 128, 320), (2, 640, 14, 36, 64, 640), (1, 128, 14, 64, 64, 128), (1, 320, 25, 33, 65, 320)],
    ids=["svd-level-0", "svd-level-1", "vae", "25-frames"],
)
@pytest.mark.parametrize("impl", ["triton", "cudnn"])
def test_real_shapes(shape: tuple[int, ...], impl: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments = draw(shape, dtype, device, "mix-image-only")
    assert_matches_reference(temporal_conv(**arguments, impl=impl), arguments)


@pytest.mark.gpu
@torch.no_grad()
def test_the_choice_on_a_gpu(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path))
    TEMPORAL_CONV.forget()
    arguments = draw((2, 320, 14, 36, 64, 320), torch.float16, device, "mix-image-only")
    with listening(checks=True) as events:
        out = temporal_conv(**arguments)
    assert_matches_reference(out, arguments)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    assert not any(event.reason or event.problem for event in events), "kernels of ours that fail are said here"


@pytest.mark.gpu
def test_offsets_beyond_int32(device: torch.device) -> None:
    arguments = draw((9, 128, 8, 512, 512, 128), torch.float16, device, "bias")
    assert arguments["x"].numel() > 2**31
    out = temporal_conv(**arguments, impl="triton")
    last = temporal_conv(arguments["x"][-1:], arguments["weight"], arguments["bias"], impl="triton")
    assert torch.equal(out[-1:], last)
