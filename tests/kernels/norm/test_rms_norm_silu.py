from __future__ import annotations

import itertools
import re
import weakref
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import PerChannelRMSNorm
from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D, WanRMS_norm
from diffusers.models.normalization import RMSNorm
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
from vidaccel.kernels.conv.enlarged_clip import rows_of_cells
from vidaccel.kernels.conv.padded_clip import Padding
from vidaccel.kernels.norm import rms_norm_silu as op
from vidaccel.kernels.norm.rms_norm_silu import RMS_NORM_SILU, choose_tiling, rms_norm_silu, rms_norm_silu_ref
from vidaccel.kernels.op import listening
from vidaccel.kernels.settings import constants_overridden

SHAPES = [
    pytest.param((1, 1, 1, 1, 96), id="one-pixel"),
    pytest.param((2, 3, 2, 1, 1), id="one-channel"),
    pytest.param((2, 3, 5, 7, 42), id="odd-width"),
    pytest.param((1, 5, 3, 4, 96), id="wan-top"),
    pytest.param((2, 2, 1, 3, 384), id="wan-bottom"),
    pytest.param((1, 2, 1, 3, 160), id="five-parts"),
    pytest.param((1, 1, 2, 2, 1024), id="wan2.2-bottom"),
]
REAL_SHAPES = [
    pytest.param((1, 21, 60, 104, 384), id="wan-480p-bottom"),
    pytest.param((1, 81, 480, 832, 96), id="wan-480p-top"),
]
ADDENDS = [
    pytest.param((), id="norm-only"),
    pytest.param(("bias",), id="bias"),
    pytest.param(("residual",), id="residual"),
    pytest.param(("bias", "residual"), id="bias-residual"),
    pytest.param(("bias", "residual", "residual_bias"), id="bias-residual-bias"),
    pytest.param(("bias", "halo"), id="bias-halo"),
    pytest.param(("bias", "residual", "halo"), id="bias-residual-halo"),
]

SUM = ("bias", "residual", "residual_bias")
CAUSAL = Padding(before=2)
PADDINGS = [
    Padding(2, 0, 1, "replicate", "replicate"),  # HunyuanVideo
    Padding(1, 1, 1, "replicate", "reflect"),  # LTX-2
    Padding(1, 1, 0, "replicate"),  # LTX
    Padding(2, 1, 2, "zeros", "reflect"),
    Padding(0, 2, 1, "zeros", "zeros"),
    Padding(0, 0, 3, "zeros", "replicate"),
]


ENLARGED = [  # x; channels of the residual for each of x; frames that one of its frames makes, and first ones left out
    pytest.param((2, 3, 2, 4, 42), 1, 2, 1, id="first-chunk"),
    pytest.param((1, 4, 4, 2, 96), 1, 2, 0, id="following-chunk"),
    pytest.param((2, 2, 2, 6, 42), 2, 1, 0, id="pixels-only"),
    pytest.param((1, 1, 4, 4, 64), 2, 2, 1, id="one-frame"),
]


def draw(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    names: tuple[str, ...] = ("bias", "residual"),
    *,
    before: int = 2,
    centre: float = 0.0,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, gamma, and the tensors called ``names``."""
    torch.manual_seed(0)
    samples, _, height, width, channels = shape
    x = (torch.randn(shape, device=device) + centre).to(dtype)
    gamma = torch.randn(channels, device=device).to(dtype)
    halo = samples, before, height, width, channels
    shapes = {"bias": (channels,), "residual": shape, "residual_bias": (channels,), "halo": halo}
    shapes |= dict.fromkeys(("scale", "shift"), (samples, channels))
    return x, gamma, {name: torch.randn(shapes[name], device=device).to(dtype) for name in names}


def assert_matches_reference(
    out: tuple[Tensor, Tensor], x: Tensor, gamma: Tensor | None, **arguments: Any
) -> None:  # fmt: skip
    eager_z, eager_y = rms_norm_silu_ref(x, gamma, **arguments)
    z, y = out
    if arguments.get("keep", True):
        assert torch.equal(z, eager_z)
    # the norm is judged on the sum that both saw: its rounding would swamp the errors of the norm itself
    rest = {name: value for name, value in arguments.items() if name not in ("bias", "residual", "residual_bias")}
    rest = {name: value.double() if isinstance(value, Tensor) else value for name, value in rest.items()}
    _, gold = rms_norm_silu_ref(eager_z.double(), None if gamma is None else gamma.double(), **rest)
    assert_close_to_gold(y, gold, eager_y)


# every shape with all addends, and either with all dtypes, but not all three with one another
@pytest.mark.parametrize(
    ("shape", "names", "dtype"),
    [
        pytest.param(*shape.values, *names.values, DTYPES[(i + j) % len(DTYPES)], id=f"{shape.id}-{names.id}")
        for i, shape in enumerate(SHAPES)
        for j, names in enumerate(ADDENDS)
    ],
)
def test_matches_reference(
    shape: tuple[int, ...], names: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> None:
    x, gamma, given = draw(shape, dtype, device, names)
    for silu, keep in itertools.product([True, False], [True, False]):
        arguments = {**given, "padding": CAUSAL, "silu": silu, "keep": keep}
        assert_matches_reference(rms_norm_silu(x, gamma, **arguments, impl="triton"), x, gamma, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_frames_before(before: int, dtype: torch.dtype, device: torch.device) -> None:
    x, gamma, given = draw((2, 3, 2, 5, 42), dtype, device, ("halo",), before=before, centre=30.0)
    for halo in (None, given["halo"]):
        padding = Padding(before)
        _, y = rms_norm_silu(x, gamma, halo=halo, padding=padding, impl="triton")
        assert_matches_reference((x, y), x, gamma, halo=halo, padding=padding)
        expected = torch.zeros_like(given["halo"]) if halo is None else halo
        assert torch.equal(y[:, :before], expected)
        assert torch.equal(y[:, before:], rms_norm_silu(x, gamma, impl="triton")[1])


EVERYTHING = ("bias", "residual", "scale", "shift", "halo")


@pairwise(
    {
        "kind": ["normalize", "mean", "none"],
        "names": [pytest.param((), id="alone"), pytest.param(EVERYTHING, id="everything")],
        "padding": [pytest.param(padding, id=str(padding)) for padding in PADDINGS],
        "dtype": DTYPES,
    }
)
def test_padding(
    kind: str, names: tuple[str, ...], padding: Padding, dtype: torch.dtype, device: torch.device
) -> None:  # fmt: skip
    names = tuple(name for name in names if name != "halo" or padding.before)
    x, gamma, given = draw((2, 2, 4, 3, 42), dtype, device, names, before=padding.before)
    gamma = gamma if names else None
    arguments = {**given, "padding": padding, "kind": kind, "eps": 1e-8}
    out = rms_norm_silu(x.clone(), gamma, **arguments, inplace=True, impl="triton")
    assert_matches_reference(out, x, gamma, **arguments)


def test_reference_is_what_diffusers_does(device: torch.device) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, gamma, given = draw((2, 3, 4, 5, 42), dtype, device)
        norm = WanRMS_norm(42, images=False).to(device, dtype)
        norm.gamma.data.copy_(gamma.view(-1, 1, 1, 1))
        total = (x + given["bias"]) + given["residual"]
        expected = torch.nn.functional.silu(norm(total.permute(0, 4, 1, 2, 3))).permute(0, 2, 3, 4, 1)
        z, y = rms_norm_silu_ref(x, gamma, **given, padding=CAUSAL)
        assert torch.equal(z, total) and not y[:, :2].any()
        torch.testing.assert_close(y[:, 2:], expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_reference_is_what_ltx_does(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, gamma, given = draw((2, 3, 4, 5, 42), dtype, device, ("scale", "shift"))
        norm = RMSNorm(42, eps=1e-8).to(device, dtype)
        norm.weight.data.copy_(gamma)
        scale, shift = (given[name][:, None, None, None] for name in ("scale", "shift"))
        expected = torch.nn.functional.silu(norm(x) * (1 + scale) + shift)
        _, y = rms_norm_silu_ref(x, gamma, **given, kind="mean", eps=1e-8)
        torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        per_channel = PerChannelRMSNorm(channel_dim=-1)(x.double())
        _, y = rms_norm_silu_ref(x.double(), kind="mean", eps=1e-8, silu=False)
        torch.testing.assert_close(y, per_channel)


def draw_enlarged(
    shape: tuple[int, ...], step: int, factor_t: int, skip: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Cells, gamma, bias, and what the residual is made of."""
    samples, frames, height, width, channels = shape
    cells, gamma, _ = draw((samples, frames, height // 2 + 1, width // 2 + 1, 4 * channels), dtype, device, ())
    small = samples, -(-(frames + skip) // factor_t), height // 2, width // 2, channels * step
    _, _, given = draw((*small[:4], channels), dtype, device, ("bias",))
    given |= {"residual": torch.randn(small, device=device).to(dtype), "factor_t": factor_t, "skip": skip}
    return cells.unflatten(-1, (4, channels)), gamma[:channels], given


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "step", "factor_t", "skip"), ENLARGED)
def test_behind_an_upsampler(
    shape: tuple[int, ...], step: int, factor_t: int, skip: int, dtype: torch.dtype, device: torch.device
) -> None:
    cells, gamma, given = draw_enlarged(shape, step, factor_t, skip, dtype, device)
    shortcut = DupUp3D(step * shape[-1], shape[-1], factor_t, 2)
    repeated = shortcut(given["residual"].permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    rows = {**given, "residual": repeated[:, skip : skip + shape[1]], "factor_t": 0, "skip": 0}
    expected = rms_norm_silu(rows_of_cells(cells), gamma, **rows, padding=CAUSAL, impl="triton")
    for impl, keep in (("triton", True), ("torch", True), ("triton", False)):
        z, y = rms_norm_silu(cells.clone(), gamma, **given, padding=CAUSAL, keep=keep, inplace=True, impl=impl)
        assert torch.equal(z, expected[0] if keep else cells)
        if impl == "triton":
            assert torch.equal(y, expected[1])
        assert y.is_contiguous() and z.is_contiguous()
    assert_matches_reference(expected, rows_of_cells(cells), gamma, **rows, padding=CAUSAL)
    x = rows_of_cells(cells).contiguous()  # in place already
    assert all(map(torch.equal, rms_norm_silu(x, gamma, **given, padding=CAUSAL, impl="triton"), expected))


@torch.no_grad()
def test_a_residual_that_begins_in_the_middle_of_a_pair(device: torch.device) -> None:
    cells, gamma, given = draw_enlarged((1, 3, 2, 4, 32), 2, 2, 1, torch.float16, device)
    expected = rms_norm_silu(cells, gamma, **given, impl="triton")
    residual = given["residual"]
    wide = residual.new_zeros(residual.numel() + 1)
    given["residual"] = wide[1:].view(residual.shape).copy_(residual)
    assert all(map(torch.equal, rms_norm_silu(cells, gamma, **given, impl="triton"), expected))


@torch.no_grad()
def test_a_residual_whose_channels_the_kernel_cannot_repeat_runs_in_torch(device: torch.device) -> None:
    cells, gamma, given = draw_enlarged((1, 3, 2, 4, 42), 4, 2, 1, torch.float16, device)
    with listening() as events:
        outputs = rms_norm_silu(cells, gamma, **given)
    assert [event.implementation for event in events] == ["torch"]
    assert "as many channels of the residual as of x, or twice as many, got 168, 42" in events[0].reason
    assert all(map(torch.equal, outputs, rms_norm_silu_ref(cells, gamma, **given)))


@torch.no_grad()
def test_cells_alone(device: torch.device) -> None:
    cells, gamma, _ = draw_enlarged((2, 3, 4, 2, 64), 1, 1, 0, torch.float16, device)
    z, y = rms_norm_silu(cells, gamma, impl="triton")
    assert torch.equal(z, rows_of_cells(cells)) and torch.equal(y, rms_norm_silu(z, gamma, impl="triton")[1])


@pytest.mark.parametrize(("shape", "step", "factor_t", "skip"), ENLARGED)
@torch.no_grad()
def test_scaled_cells_of_a_float32_clip(
    shape: tuple[int, ...], step: int, factor_t: int, skip: int, device: torch.device
) -> None:
    """Of numbers that float16 does not hold."""
    cells, gamma, given = draw_enlarged(shape, step, factor_t, skip, torch.float32, device)
    cells = cells.half()
    for size in (2.0**18, 2.0**-26):
        scale = torch.full([1], 1 / size, device=device)
        arguments: dict[str, Any] = {**given, "padding": CAUSAL, "out_dtype": torch.float16}
        expected = rms_norm_silu_ref(cells.float() * size, gamma, **arguments)
        with listening(checks=True) as events:
            z, y = rms_norm_silu(cells, gamma, **arguments, x_scale=scale)
        assert [(event.implementation, event.problem) for event in events] == [("triton", "")]
        assert torch.equal(z, expected[0]) and z.dtype == torch.float32 and y.dtype == torch.float16
        assert (y == expected[1]).float().mean() > 0.99


@pytest.mark.parametrize("most", [2**23, 700], ids=["whole", "in-frames"])
@pytest.mark.parametrize("fault", [None, *FAULTS])
@pytest.mark.parametrize(("shape", "step", "factor_t", "skip"), ENLARGED)
@torch.no_grad()
def test_what_is_wrong_behind_an_upsampler_is_found(
    shape: tuple[int, ...],
    step: int,
    factor_t: int,
    skip: int,
    fault: str | None,
    most: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    cells, gamma, given = draw_enlarged(shape, step, factor_t, skip, torch.float16, device)

    def spoil(outputs: list[Tensor]) -> None:
        if fault:
            FAULTS[fault](outputs[0].flatten(0, 1))

    frames = shape[0] * shape[1]
    if fault == "swapped-frames" and frames < 2:
        return
    with planted(RMS_NORM_SILU, "triton", spoil), listening(checks=True) as events:
        z, y = rms_norm_silu(cells, gamma, **given, padding=CAUSAL)
    assert bool(events[0].problem) == bool(fault)
    pixels = rows_of_cells(cells).nbytes
    assert events[0].costs.bytes == 2 * pixels + given["residual"].nbytes + y.nbytes
    assert torch.equal(z, rms_norm_silu_ref(cells, gamma, **given)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pixel_of_zeros_stays_one(dtype: torch.dtype, device: torch.device) -> None:
    x, gamma, _ = draw((1, 2, 2, 2, 96), dtype, device)
    x[0, 1, 0, 1] = 0
    _, y = rms_norm_silu(x, gamma, impl="triton")
    assert not y[0, 1, 0, 1].any() and y.isfinite().all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_returns_its_input_when_nothing_is_added_or_the_sum_is_unwanted(impl: str, device: torch.device) -> None:
    x, gamma, given = draw((1, 2, 2, 3, 64), torch.float16, device)
    before = x.clone()
    assert rms_norm_silu(x, gamma, impl=impl)[0] is x
    assert rms_norm_silu(x, gamma, **given, keep=False, inplace=True, impl=impl)[0] is x
    assert torch.equal(x, before)


@torch.no_grad()
def test_the_sum_may_take_the_memory_of_x(device: torch.device) -> None:
    x, gamma, given = draw((2, 2, 2, 3, 64), torch.float16, device)
    expected = rms_norm_silu(x.clone(), gamma, **given, padding=CAUSAL)
    z, y = rms_norm_silu(x, gamma, **given, padding=CAUSAL, inplace=True)
    assert z.data_ptr() == x.data_ptr()
    assert torch.equal(z, expected[0]) and torch.equal(y, expected[1])


@pytest.mark.parametrize("narrow", [True, False], ids=["half-x", "float-x"])
@pytest.mark.parametrize("names", ADDENDS)
@torch.no_grad()
def test_half_precision_operands_of_a_float32_clip(
    names: tuple[str, ...], narrow: bool, device: torch.device
) -> None:  # fmt: skip
    x, gamma, given = draw((2, 3, 5, 7, 42), torch.float32, device, names)
    x = x.half() if narrow else x
    given |= {"halo": given["halo"].half()} if "halo" in given else {}
    arguments: dict[str, Any] = {**given, "padding": CAUSAL, "out_dtype": torch.float16}
    expected = rms_norm_silu_ref(x.float(), gamma, **arguments)
    with listening(checks=True) as events:
        z, y = rms_norm_silu(x.clone(), gamma, **{**arguments, "inplace": True})
    assert [(event.implementation, event.problem) for event in events] == [("triton", "")]
    assert y.dtype == torch.float16 and (z.dtype == torch.float32 or not {"bias", "residual"} & set(names))
    assert torch.equal(z.float(), expected[0])
    wide = rms_norm_silu_ref(x.float(), gamma, **{**given, "halo": None}, padding=CAUSAL)[1]
    wide[:, :2] = given.get("halo", 0)
    assert (y - wide).abs().max() <= 2**-10 * wide.abs().max()
    assert (y == expected[1]).float().mean() > 0.99  # rounded once


@torch.no_grad()
def test_the_sum_may_take_the_memory_of_the_wider_addend(device: torch.device) -> None:
    x, gamma, given = draw((2, 2, 2, 3, 64), torch.float32, device)
    expected = rms_norm_silu(x, gamma, **given, out_dtype=torch.float16)[0]
    z, _ = rms_norm_silu(x.clone(), gamma, **given, inplace=True, out_dtype=torch.float16)
    assert torch.equal(z, expected)
    narrow = x.half()
    expected = rms_norm_silu(narrow, gamma, **given, out_dtype=torch.float16)[0]
    z, _ = rms_norm_silu(narrow, gamma, **given, inplace=True, out_dtype=torch.float16)
    assert z.data_ptr() == given["residual"].data_ptr() and torch.equal(z, expected)


@torch.no_grad()
def test_no_tensor_outlives_its_call(device: torch.device) -> None:
    x, gamma, given = draw((2, 2, 3, 5, 96), torch.float16, device)
    outputs = rms_norm_silu(x, gamma, **given, padding=CAUSAL, inplace=True)
    alive = [weakref.ref(t) for t in (x, given["residual"], *outputs)]
    del x, given, outputs
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("block_m", [1, 4, 16])
def test_result_does_not_depend_on_the_cut(block_m: int, stages: int, device: torch.device) -> None:
    x, gamma, given = draw((3, 2, 3, 5, 96), torch.float32, device, ("bias", "residual", "halo"), centre=30.0)
    with constants_overridden(BLOCK_M=block_m, STAGES=stages):
        out = rms_norm_silu(x, gamma, **given, padding=CAUSAL, impl="triton")
    assert_matches_reference(out, x, gamma, **given, padding=CAUSAL)


def test_programs_take_several_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(op, "RESIDENT_BYTES", 4 * op.TILE_BYTES)
    x, gamma, given = draw((2, 5, 7, 5, 48), torch.float32, device, ("bias", "residual", "halo"))
    assert_matches_reference(
        rms_norm_silu(x, gamma, **given, padding=CAUSAL, impl="triton"), x, gamma, **given, padding=CAUSAL
    )


def test_takes_any_strides_and_parameters_of_another_dtype(device: torch.device) -> None:
    x, gamma, given = draw((2, 2, 3, 4, 42), torch.float16, device, ("bias", "residual", "halo"))
    expected = rms_norm_silu(x, gamma, **given, padding=CAUSAL, impl="triton")
    laid_out = {
        name: t.float() if t.ndim == 1 else t.transpose(1, 4).contiguous().transpose(1, 4) for name, t in given.items()
    }
    x = x.repeat_interleave(2, -1)[..., ::2]
    out = rms_norm_silu(x, gamma.float(), **laid_out, padding=CAUSAL, inplace=True, impl="triton")
    for strided, contiguous in zip(out, expected, strict=True):
        assert torch.equal(strided, contiguous) and strided.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 4, 2, 2, 64), (2, 3, 0, 2, 64)], ids=["no-samples", "no-rows"])
def test_empty_input(shape: tuple[int, ...], device: torch.device) -> None:
    x, gamma, given = draw(shape, torch.float16, device)
    z, y = rms_norm_silu(x, gamma, **given, padding=CAUSAL)
    assert z.shape == shape and y.shape == (shape[0], 2 + shape[1], *shape[2:])


@pytest.mark.parametrize(
    ("channels", "dtype", "residual_dtype", "requires_grad", "reason"),
    [
        (64, torch.float64, torch.float64, False, "x is torch.float64"),
        (64, torch.float16, torch.float32, False, "the residual must be torch.float16, got torch.float32"),
        (2049, torch.float32, torch.float32, False, "up to C=2048, got C=2049"),
        (64, torch.float32, torch.float32, True, "no backward pass"),
    ],
    ids=["float64", "mixed-dtypes", "wide", "gradient"],
)
def test_unserved_input_runs_in_torch(
    channels: int,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    requires_grad: bool,
    reason: str,
    device: torch.device,
) -> None:
    x, gamma, given = draw((1, 2, 1, 3, channels), dtype, device, ("residual",))
    given["residual"] = given["residual"].to(residual_dtype)
    gamma.requires_grad_(requires_grad)
    with listening() as events:
        out = rms_norm_silu(x, gamma, **given)
    assert [event.implementation for event in events] == ["torch"] and reason in events[0].reason
    for ours, eager in zip(out, rms_norm_silu_ref(x, gamma, **given), strict=True):
        assert torch.equal(ours, eager)
    with pytest.raises(ValueError, match=f"rms_norm_silu: impl='triton' cannot run: .*{re.escape(reason)}"):
        rms_norm_silu(x, gamma, **given, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, 32)}, r"x must be \[B, F, H, W, C\] with channels, or cells .*, got \(2, 3, 32\)"),
        ({"x": torch.ones(1, 2, 2, 2, 3, 32)}, r"x must be .*, got \(1, 2, 2, 2, 3, 32\)"),
        ({"x_scale": torch.ones(2)}, r"x_scale must be \[1\], got \(2,\)"),
        ({"factor_t": 2}, r"factor_t needs a residual"),
        ({"factor_t": 2, "skip": 2}, r"factor_t must be 0 or more, and skip from 0 to less, got 2 and 2"),
        ({"factor_t": 2, "residual": torch.ones(1, 1, 1, 1, 32)}, r"residual must be \(1, 1, 1, 1\), with .*, to make"),
        ({"gamma": torch.ones(31)}, r"gamma must be \[32\], got \(31,\)"),
        ({"gamma": torch.ones(32, 1, 1, 1)}, r"gamma must be \[32\], got \(32, 1, 1, 1\)"),
        ({"bias": torch.ones(1)}, r"bias must be \[32\], got \(1,\)"),
        ({"residual": torch.ones(1, 2, 1, 3, 32)}, r"residual must be \(1, 2, 2, 3, 32\), as x is, got"),
        ({"residual_bias": torch.ones(32)}, r"residual_bias needs a residual"),
        ({"padding": Padding(before=-1)}, r"before must not be negative, got -1"),
        ({"padding": Padding(border=2, pixel_mode="reflect")}, r"a border of 2 by reflect needs pictures of 3 x 3"),
        ({"padding": Padding(frame_mode="wrap")}, r"frame_mode must be one of zeros, replicate, got 'wrap'"),
        ({"padding": Padding(pixel_mode="wrap")}, r"pixel_mode must be one of zeros, replicate, reflect, got 'wrap'"),
        ({"kind": "max"}, r"kind must be one of normalize, mean, none, got 'max'"),
        ({"scale": torch.ones(1, 32)}, r"scale and shift come together"),
        ({"scale": torch.ones(32), "shift": torch.ones(32)}, r"scale must be \[1, 32\], got \(32,\)"),
        ({"halo": torch.ones(1, 2, 2, 3, 32)}, r"halo must be \(1, 0, 2, 3, 32\), got \(1, 2, 2, 3, 32\)"),
        ({"padding": CAUSAL, "halo": torch.ones(1, 1, 2, 3, 32)}, r"halo must be \(1, 2, 2, 3, 32\), got"),
        ({"out_dtype": torch.float64}, r"out_dtype must be one of .*, got torch.float64"),
        ({"impl": "cuda"}, r"impl must be one of triton, torch, got 'cuda'"),
    ],
)
def test_rejects(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.ones(1, 2, 2, 3, 32), "gamma": torch.ones(32)}
    with pytest.raises(ValueError, match=f"rms_norm_silu: {message}"):
        rms_norm_silu(**{**arguments, **change})


def test_rejects_integers() -> None:
    with pytest.raises(TypeError, match=r"rms_norm_silu: gamma must be floating-point, got torch\.int64"):
        rms_norm_silu(torch.ones(1, 2, 2, 3, 32), torch.ones(32, dtype=torch.int64))


@pytest.mark.parametrize("names", ADDENDS)
def test_registration(names: tuple[str, ...], device: torch.device) -> None:
    x, gamma, given = draw((1, 2, 2, 3, 42), torch.float32, device, names)
    tensors = map(given.get, ("bias", "residual", "residual_bias", "scale", "shift", "halo"))
    arguments = (x, gamma, *tensors, None, 0, 0, *CAUSAL, "normalize", 1e-12, True, True, False, None)
    torch.library.opcheck(RMS_NORM_SILU.registered["triton"], arguments)


def test_registration_behind_an_upsampler(device: torch.device) -> None:
    cells, gamma, given = draw_enlarged((1, 3, 2, 4, 42), 2, 2, 1, torch.float32, device)
    sums = given["bias"], given["residual"], *[None] * 5, 2, 1
    arguments = (cells, gamma, *sums, *CAUSAL, "normalize", 1e-12, True, True, False, None)
    torch.library.opcheck(RMS_NORM_SILU.registered["triton"], arguments)


def test_compiles_fullgraph(device: torch.device) -> None:
    x, gamma, given = draw((1, 2, 2, 3, 42), torch.float32, device, ("bias", "residual", "halo"))

    def combine(x: Tensor) -> Tensor:
        z, y = rms_norm_silu(x, gamma, **given, padding=CAUSAL, inplace=True, impl="triton")
        return z.sum() + 2 * y

    assert torch.equal(torch.compile(combine, fullgraph=True, backend="aot_eager")(x), combine(x.clone()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most", [2**23, 700, 100], ids=["whole", "in-frames", "in-rows"])
@pytest.mark.parametrize("names", ADDENDS)
@torch.no_grad()
def test_a_right_result_is_found_right(
    names: tuple[str, ...], most: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    x, gamma, given = draw((2, 3, 2, 3, 64), dtype, device, names, centre=3.0)
    kept = x.clone()
    with listening(checks=True) as events:
        z, _ = rms_norm_silu(x, gamma, **given, padding=CAUSAL, inplace=True)
    assert [(event.implementation, event.problem) for event in events] == [("triton", "")]
    frame = x.nbytes // 3
    sums = "bias" in names or "residual" in names
    passes = 2 + ("residual" in names) + sums
    assert events[0].costs.bytes == x.nbytes * passes + 2 * frame * (1 + ("halo" in names))
    assert torch.equal(z, rms_norm_silu_ref(kept, gamma, **given)[0])


@pytest.mark.parametrize("most", [2**23, 768], ids=["whole", "in-frames"])
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@torch.no_grad()
def test_a_right_padding_is_found_right(
    padding: Padding, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    names = ("bias", "residual", "scale", "shift", *(("halo",) if padding.before else ()))
    x, gamma, given = draw((2, 2, 4, 3, 64), torch.float32, device, names, before=padding.before)
    with listening(checks=True) as events:
        rms_norm_silu(x, gamma, **given, padding=padding, kind="mean", inplace=True)
    assert [(event.implementation, event.problem) for event in events] == [("triton", "")]


@pytest.mark.parametrize("most", [2**23, 700], ids=["whole", "in-frames"])
@pytest.mark.parametrize("at", [(0, 0, 2), (2, 0, 2), (4, 5, 2), (3, 2, -1)], ids=["front", "top", "behind", "side"])
def test_a_fault_of_the_padding_is_found(
    at: tuple[int, ...], most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    x, gamma, _ = draw((1, 3, 4, 4, 64), torch.float32, device)
    padding = Padding(1, 1, 1, "replicate", "reflect")

    def spoil(outputs: list[Tensor]) -> None:
        outputs[0][(0, *at)] = 0

    with planted(RMS_NORM_SILU, "triton", spoil), listening(checks=True) as events:
        rms_norm_silu(x, gamma, padding=padding)
    assert events[0].problem


@pytest.mark.parametrize("most", [2**23, 700], ids=["whole", "in-parts"])
@pytest.mark.parametrize("output", [0, 1], ids=["sum", "norm"])
@pytest.mark.parametrize("fault", [*FAULTS, "frames-before"])
def test_a_fault_is_found(
    fault: str, output: int, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    x, gamma, given = draw((2, 3, 2, 3, 64), torch.float16, device, ("bias", "residual", "halo"))

    def spoil(outputs: list[Tensor]) -> None:
        if fault == "frames-before":
            outputs[1][1, 0, -1, -1] = 0
        else:
            FAULTS[fault](outputs[output])

    with planted(RMS_NORM_SILU, "triton", spoil), listening(checks=True) as events:
        outputs = rms_norm_silu(x, gamma, **given, padding=CAUSAL)
    assert events[0].problem
    assert all(map(torch.equal, outputs, rms_norm_silu_ref(x, gamma, **given, padding=CAUSAL)))


@pytest.mark.slow
@pairwise(
    {
        "target": list(TARGETS),
        "channels": [96, 384],
        "names, dtype, padding, kind": [
            pytest.param(("gamma", *SUM, "halo"), "mixed", CAUSAL, "normalize", id="everything-mixed"),
            pytest.param(("gamma", "bias"), "bf16", CAUSAL, "normalize", id="bias"),
            pytest.param(("gamma", *SUM, "halo"), "bf16", CAUSAL, "normalize", id="everything"),
            pytest.param(("gamma", *SUM, "halo"), "fp32", CAUSAL, "normalize", id="everything-fp32"),
            pytest.param(("gamma", *SUM, "halo"), "bf16", PADDINGS[0], "normalize", id="hunyuan"),
            pytest.param(("scale", "shift", "bias", "residual"), "bf16", PADDINGS[1], "mean", id="ltx2"),
        ],
        "upsampled": [
            pytest.param(None, id="in-place"),
            pytest.param((2, 1), id="shortcut"),
            pytest.param((1, 2), id="shortcut-of-more-channels"),
        ],
    }
)
def test_accesses_are_16_bytes_wide_and_prefetched(
    target: str,
    channels: int,
    names: tuple[str, ...],
    dtype: str,
    padding: Padding,
    kind: str,
    upsampled: tuple[int, int] | None,
) -> None:
    factor_t, step = upsampled if upsampled and "residual" in names else (0, 1)
    pointers = ["x_ptr", "y_ptr", *(f"{name}_ptr" for name in names), *["z_ptr"] * ("residual" in names)]
    every = {f"{name}_ptr" for name in ("gamma", *SUM, "scale", "shift", "halo", "x_scale", "z")}
    mixed, dtype = dtype == "mixed", "fp32" if dtype == "mixed" else dtype
    half = dict.fromkeys(["x_ptr", "y_ptr", "halo_ptr"], "*fp16:16") if mixed else {}
    pairs = {"residual_ptr": "*i32:16" if dtype == "bf16" else "*i64:16"} if step == 2 else {}
    tiling = choose_tiling(channels, 2 if dtype == "bf16" else 4, "residual" in names)
    flags = ("gamma", *SUM, "shift", "halo")
    asm = compile_for(
        target,
        op._rms_norm_silu_kernel,
        {
            **dict.fromkeys(pointers, f"*{dtype}:16"),
            **half,
            **pairs,
            **dict.fromkeys(["samples", "before", "frames", "padded_frames", "height", "width"], "i32"),
            **dict.fromkeys(["residual_frames", "skip"], "i32"),
            **{"channels": "i32:16", "gain": "fp32", "eps": "fp32"},
        },
        {
            **dict.fromkeys(every.difference(pointers)),
            **{f"HAS_{name.upper()}": name in names for name in flags},
            **{"HAS_X_SCALE": False, "CELLS": upsampled is not None, "FACTOR_T": factor_t, "STEP": step},
            **{"BORDER": padding.border, "FRAME_MODE": padding.frame_mode, "PIXEL_MODE": padding.pixel_mode},
            **{"KIND": kind, "KEEP": "residual" in names, "SILU": True, "WIDE": mixed},
            **{"BLOCK_M": tiling.block_m, "BLOCK_C": tiling.block_c, "PARTS": tiling.parts, "STAGES": tiling.stages},
        },
        num_warps=tiling.num_warps,
    )
    assert_no_spills(asm)
    # the vectors, read once by a program or a tile, may be too short to give every thread 16 bytes
    narrow = narrow_accesses(asm)
    vectors = sum(name in names for name in ("gamma", "bias", "residual_bias"))
    vectors += 4 * ("scale" in names)  # once for each tile: the first, and those that are fetched ahead
    vectors *= tiling.parts
    if target == "gfx942" and mixed:  # a wave of AMD's is 64 threads, which read 8 bytes each of so small a tile
        return
    assert len(narrow) <= vectors and all("LDG" in access or "load" in access for access in narrow)
    if "sass" in asm:
        assert "LDGSTS" in asm["sass"], "the next pixels are to be on their way while these are worked on"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", REAL_SHAPES)
@pytest.mark.parametrize("names", [("bias",), ("bias", "residual"), ("bias", "residual", "residual_bias", "halo")])
@torch.no_grad()
def test_real_shapes(shape: tuple[int, ...], names: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Frame by frame, for the reference needs more memory than the kernel."""
    x, gamma, given = draw(shape, dtype, device, names, centre=3.0)
    assert shape[-1] == 384 or x.numel() > 2**31
    z, y = rms_norm_silu(x, gamma, **given, padding=CAUSAL, impl="triton")
    assert torch.equal(y[:, :2], given.get("halo", torch.zeros_like(y[:, :2])))
    for frame in (0, 1, shape[1] // 2, shape[1] - 1):
        some = slice(frame, frame + 1)
        part = {name: t[:, some] if name == "residual" else t for name, t in given.items() if name != "halo"}
        assert_matches_reference((z[:, some], y[:, 2:][:, some]), x[:, some], gamma, **part)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "step", "factor_t", "skip"),
    [((1, 13, 352, 640, 512), 2, 1, 0), ((1, 13, 176, 320, 1024), 1, 2, 1)],
    ids=["wan2.2-top", "wan2.2-middle"],
)
@torch.no_grad()
def test_real_shapes_behind_an_upsampler(
    shape: tuple[int, ...], step: int, factor_t: int, skip: int, dtype: torch.dtype, device: torch.device
) -> None:
    cells, gamma, given = draw_enlarged(shape, step, factor_t, skip, dtype, device)
    z, y = rms_norm_silu(cells, gamma, **given, padding=CAUSAL, impl="triton")
    assert not y[:, :2].any()
    for frame in (0, 1, shape[1] // 2, shape[1] - 1):
        small, skipped = divmod(frame + skip, factor_t)
        part = given | {"residual": given["residual"][:, small : small + 1], "skip": skipped}
        some = slice(frame, frame + 1)
        assert_matches_reference((z[:, some], y[:, 2:][:, some]), cells[:, some], gamma, **part)
