from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D
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

from vidaccel.kernels import check
from vidaccel.kernels.conv.conv_epilogue import conv_epilogue_and_statistics
from vidaccel.kernels.norm import spatial_norm_silu as op
from vidaccel.kernels.norm.group_norm_silu import choose_apply_tiling
from vidaccel.kernels.norm.spatial_norm_silu import SPATIAL_NORM_SILU, spatial_norm_silu, spatial_norm_silu_ref
from vidaccel.kernels.op import listening
from vidaccel.kernels.settings import constants_overridden

EPS = 1e-6
SHAPES = [
    pytest.param((1, 1, 1, 1, 32), (1, 1, 1), id="one-pixel"),
    pytest.param((1, 1, 8, 16, 32), (1, 1, 2), id="image"),
    pytest.param((2, 5, 2, 6, 64), (3, 1, 3), id="odd-frames"),
    pytest.param((1, 9, 3, 5, 64), (3, 3, 5), id="odd-frames-by-four"),
    pytest.param((1, 8, 4, 12, 96), (2, 1, 3), id="even-frames-by-four"),
    pytest.param((1, 5, 6, 9, 32), (3, 2, 3), id="by-three"),
]


def draw(
    shape: tuple[int, ...],
    latent: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *names: str,
    before: int = 2,
    centre: float = 0.0,
) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """The arguments of a call, and the tensors called ``names``."""
    torch.manual_seed(0)
    samples, _, *frame, channels = shape
    x = (torch.randn(shape, device=device) + centre).to(dtype)
    weight, bias = (torch.randn(channels, device=device).to(dtype) for _ in range(2))
    gain, shift = (torch.randn(samples, *latent, channels, device=device).to(dtype) for _ in range(2))
    shapes = {"addend": (channels,), "halo": (samples, before, *frame, channels)}
    given = {name: torch.randn(shapes[name], device=device).to(dtype) for name in names}
    return (x, weight, bias, 4, EPS, gain, shift), given


def wide(values: Any) -> Any:
    return [value.double() if isinstance(value, Tensor) else value for value in values]


def assert_matches_reference(y: Tensor, args: tuple[Any, ...], **given: Any) -> None:
    eager = spatial_norm_silu_ref(*args, **given)
    x, *others = args
    if (addend := given.get("addend")) is not None:  # eager rounds the sum, which would swamp the errors of the norm
        x, given["addend"] = x + addend, None
    given = dict(zip(given, wide(given.values()), strict=True))
    assert_close_to_gold(y, spatial_norm_silu_ref(*wide((x, *others)), **given), eager)


@pairwise(
    {
        "dtype": DTYPES,
        "shape, latent": SHAPES,
        "spans": [(0, 0), (0, 2), (3, 2), (5, 4)],
        "before": [0, 3],
        "names": [(), ("addend",), ("halo",), ("addend", "halo")],
        "silu": [True, False],
    }
)
def test_matches_reference(
    shape: tuple[int, ...], latent: tuple[int, ...], spans: tuple[int, int], before: int, names: tuple[str, ...],
    silu: bool, dtype: torch.dtype, device: torch.device,
) -> None:  # fmt: skip
    names = tuple(name for name in names if name != "halo" or before)
    args, given = draw(shape, latent, dtype, device, *names, before=before, centre=3.0)
    options = {"before": before, "first_span": spans[0], "span": spans[1], "silu": silu}
    y = spatial_norm_silu(*args, **given, **options, impl="triton")
    assert y.is_contiguous() and y.shape == (shape[0], before + shape[1], *shape[2:])
    assert_matches_reference(y, args, **given, **options)


@pytest.mark.parametrize("frames", [1, 4, 5, 9])
def test_reference_is_what_diffusers_does(frames: int, device: torch.device) -> None:
    """A convolution of the latents before they are enlarged."""
    torch.manual_seed(0)
    norm = CogVideoXSpatialNorm3D(64, 4, groups=8).to(device, torch.float64)
    for parameter in norm.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    latents = torch.randn(2, 4, {1: 1, 4: 2, 5: 3, 9: 3}[frames], 3, 2, device=device, dtype=torch.float64)
    x = torch.randn(2, 64, frames, 12, 8, device=device, dtype=torch.float64)
    expected = F.silu(norm(x, latents)[0]).permute(0, 2, 3, 4, 1)
    gain, shift = (conv.conv(latents).permute(0, 2, 3, 4, 1) for conv in (norm.conv_y, norm.conv_b))
    rows, layer = x.permute(0, 2, 3, 4, 1), norm.norm_layer
    y = spatial_norm_silu_ref(rows, layer.weight, layer.bias, 8, EPS, gain, shift, before=2)
    torch.testing.assert_close(y[:, 2:], expected)
    torch.testing.assert_close(y[:, :2], expected[:, :1].expand(-1, 2, -1, -1, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_span_is_normalised_as_if_alone(dtype: torch.dtype, device: torch.device) -> None:
    (x, *others, gain, shift), _ = draw((2, 7, 4, 2, 64), (7, 2, 1), dtype, device, centre=30.0)
    y = spatial_norm_silu(x, *others, gain, shift, first_span=3, span=2, impl="triton")
    for some in (slice(0, 3), slice(3, 5), slice(5, 7)):
        args = x[:, some], *others, gain[:, some], shift[:, some]
        assert_matches_reference(y[:, some], args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_the_kernel_before(dtype: torch.dtype, device: torch.device) -> None:
    (h, *others), given = draw((2, 5, 4, 6, 64), (3, 2, 3), dtype, device, "addend")
    summed, statistics = conv_epilogue_and_statistics(h.permute(0, 4, 1, 2, 3), given["addend"], impl="triton")
    args = summed.permute(0, 2, 3, 4, 1), *others
    options = {"before": 2, "first_span": 3, "span": 2}
    y = spatial_norm_silu(*args, **options, statistics=statistics, impl="triton")
    assert_matches_reference(y, args, **options)


def test_result_does_not_depend_on_the_cut(device: torch.device) -> None:
    args, given = draw((1, 5, 6, 10, 64), (3, 3, 5), torch.float32, device, "addend", "halo")
    with constants_overridden(BLOCK_R=8, STAGES=1):
        y = spatial_norm_silu(*args, **given, before=2, impl="triton")
    assert_matches_reference(y, args, **given, before=2)


def test_any_strides_and_parameters_of_another_dtype(device: torch.device) -> None:
    (x, weight, bias, *rest, gain, shift), given = draw((2, 3, 4, 2, 64), (3, 2, 1), torch.float16, device, "halo")
    expected = spatial_norm_silu(x, weight, bias, *rest, gain, shift, **given, before=2, impl="triton")
    mixed = [t.transpose(1, 4).contiguous().transpose(1, 4) for t in (x, gain, shift, given["halo"])]
    y = spatial_norm_silu(
        mixed[0], weight.float(), bias.float(), *rest, *mixed[1:3], halo=mixed[3], before=2, impl="triton"
    )  # fmt: skip
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("frames", "latent"), [(6, (4, 2, 3)), (4, (4, 2, 2))], ids=["frames", "sides"])
def test_what_the_kernel_does_not_enlarge_goes_through_the_reference(
    frames: int, latent: tuple[int, ...], device: torch.device
) -> None:
    args, _ = draw((1, frames, 4, 6, 32), latent, torch.float32, device)
    with torch.no_grad(), listening() as events:
        y = spatial_norm_silu(*args)
    assert [event.implementation for event in events] == ["torch"] and "by whole numbers" in events[0].reason
    assert torch.equal(y, spatial_norm_silu_ref(*args))


@pytest.mark.parametrize("name", FAULTS)
def test_the_check_finds_faults(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", 500)  # in many parts
    args, given = draw((1, 3, 4, 6, 64), (2, 2, 3), torch.float32, device, "addend", "halo")
    options: dict[str, Any] = {**given, "before": 2, "first_span": 1, "span": 2}
    with listening(checks=True) as events:
        spatial_norm_silu(*args, **options, impl="triton")
    assert not events[0].problem, events
    with planted(SPATIAL_NORM_SILU, "triton", lambda y: FAULTS[name](y[0])), listening(checks=True) as events:
        y = spatial_norm_silu(*args, **options, impl="triton")
    assert events[0].problem
    assert torch.equal(y, spatial_norm_silu_ref(*args, **options))


def test_costs_are_two_readings_and_a_writing(device: torch.device) -> None:
    args, given = draw((1, 3, 4, 6, 64), (3, 2, 3), torch.float16, device, "addend")
    with listening() as events:
        spatial_norm_silu(*args, **given, before=2, impl="triton")
    x, gain = args[0], args[5]
    assert events[0].costs == (2 * x.nbytes + 2 * gain.nbytes + x.nbytes // 3 * 5, 0)


@torch.no_grad()
def test_a_wrong_epsilon_is_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    args, given = draw((1, 2, 2, 4, 64), (2, 1, 2), torch.float32, device, "addend", "halo")
    right = SPATIAL_NORM_SILU.implementations["triton"]
    for eps, wrong in ((EPS, False), (10 * EPS, True)):
        other = right._replace(run=lambda *args, eps=eps: right.run(*args[:4], eps, *args[5:]), bind=None)
        monkeypatch.setitem(SPATIAL_NORM_SILU.implementations, "triton", other)
        SPATIAL_NORM_SILU.forget()
        with listening(checks=True, probes=True) as events:
            spatial_norm_silu(*args, **given, before=2)
        SPATIAL_NORM_SILU.forget()
        assert bool(events[0].problem) == wrong, events


def test_registration(device: torch.device) -> None:
    args, given = draw((1, 3, 4, 2, 64), (2, 2, 1), torch.float32, device, "addend", "halo")
    others = given["addend"], given["halo"], 2, 1, 2, True, None, 0, 0
    torch.library.opcheck(SPATIAL_NORM_SILU.registered["triton"], (*args, *others))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 64)}, r"x must be \[B, F, H, W, C\]"),
        ({"groups": 5}, "groups=5 does not divide C=64"),
        ({"weight": torch.zeros(32)}, r"weight must be \[64\], got \(32,\)"),
        ({"gain": torch.zeros(1, 3, 2, 2, 32)}, r"gain must be \[1, Z, h, w, 64\]"),
        ({"shift": torch.zeros(1, 1, 2, 2, 64)}, "as gain is"),
        ({"addend": torch.zeros(32)}, r"addend must be \[64\], got \(32,\)"),
        ({"halo": torch.zeros(1, 1, 2, 2, 64), "before": 2}, "halo must be"),
        ({"before": -1}, "before must not be negative"),
        ({"span": -1}, "spans must have frames"),
        ({"statistics": (torch.zeros(3, 1, 2, 64), 5, 4)}, "statistics must be of frames"),
        ({"statistics": (torch.zeros(3, 1, 2, 64), 4, 4), "addend": torch.zeros(64)}, "do not serve with an addend"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(1, 3, 2, 2, 64), "weight": torch.ones(64), "bias": torch.ones(64), "groups": 8, "eps": EPS,
        "gain": torch.ones(1, 3, 2, 2, 64), "shift": torch.ones(1, 3, 2, 2, 64),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        spatial_norm_silu(**arguments | changes)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("everything", [False, True], ids=["alone", "everything"])
def test_compiles_without_spills(everything: bool, target: str) -> None:
    tiling = choose_apply_tiling(128)
    pointers = ("x_ptr", "addend_ptr", "bias_ptr", "gain_ptr", "shift_ptr", "halo_ptr", "y_ptr")
    sizes = (
        "before", "frames", "height", "width", "chunk_rows", "latent_frames", "rate", "first_span", "span", "spans"
    )  # fmt: skip
    asm = compile_for(
        target, op._spatial_apply_kernel,
        {**dict.fromkeys(pointers, "*bf16:16"), "norm_ptr": "*fp32:16", "channels": "i32:16"}
        | dict.fromkeys(sizes, "i32"),
        {
            "SCALE": 4, "HAS_ADDEND": everything, "HAS_HALO": everything, "SILU": True,
            "BLOCK_R": tiling.block_r, "BLOCK_C": tiling.block_c, "STAGES": tiling.stages,
        },
        num_warps=tiling.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    assert_no_spills(asm)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "latent", "spans"),
    [
        ((1, 13, 30, 45, 512), (13, 30, 45), (3, 2)),
        ((1, 17, 120, 180, 256), (5, 30, 45), (9, 8)),
        ((1, 17, 240, 360, 128), (5, 30, 45), (9, 8)),
    ],
    ids=["bottom", "middle", "top"],
)
def test_real_shapes(
    shape: tuple[int, ...], latent: tuple[int, ...], spans: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """One group of channels is held against float64: all are too large for it."""
    (x, weight, bias, groups, eps, *of_latents), given = draw(shape, latent, dtype, device, "addend", centre=3.0)
    options: dict[str, Any] = {"before": 2, "first_span": spans[0], "span": spans[1]}
    y = spatial_norm_silu(x, weight, bias, groups, eps, *of_latents, **given, **options, impl="triton")
    some = slice(-shape[-1] // groups, None)
    args = x[..., some], weight[some], bias[some], 1, eps, *(t[..., some] for t in of_latents)
    assert_matches_reference(y[..., some], args, addend=given["addend"][some], **options)
