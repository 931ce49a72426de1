from __future__ import annotations

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

from vidaccel.kernels import check
from vidaccel.kernels.conv.conv_epilogue import conv_epilogue_and_statistics
from vidaccel.kernels.conv.padded_clip import NO_PADDING, Padding
from vidaccel.kernels.norm import padded_group_norm as op
from vidaccel.kernels.norm.group_norm_silu import choose_apply_tiling, group_norm_silu
from vidaccel.kernels.norm.padded_group_norm import PADDED_GROUP_NORM, padded_group_norm, padded_group_norm_ref
from vidaccel.kernels.op import listening

EPS = 1e-6
REPLICATE = Padding(2, 0, 1, "replicate", "replicate")  # HunyuanVideo, Mochi
FRAMES_ONLY = Padding(2, 0, 0, "replicate")  # CogVideoX


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *names: str, centre: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """x, weight, bias, and the tensors called ``names``."""
    torch.manual_seed(0)
    samples, _, *frame = shape
    x = (torch.randn(shape, device=device) + centre).to(dtype)
    weight, bias = (torch.randn(shape[-1], device=device).to(dtype) for _ in range(2))
    shapes = {"addend": (shape[-1],), "halo": (samples, 2, *frame)}
    return x, weight, bias, {name: torch.randn(shapes[name], device=device).to(dtype) for name in names}


def assert_matches_reference(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int, **given: Any) -> None:
    eager = padded_group_norm_ref(x, weight, bias, groups, EPS, **given)
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}
    if (addend := given.get("addend")) is not None:  # eager rounds the sum, which would swamp the errors of the norm
        x, wide["addend"] = x + addend, None
    gold = padded_group_norm_ref(x.double(), weight.double(), bias.double(), groups, EPS, **wide)
    assert_close_to_gold(y, gold, eager)


@pairwise(
    {
        "dtype": DTYPES,
        "shape, groups": [
            pytest.param((1, 1, 1, 1, 32), 4, id="one-pixel"),
            pytest.param((2, 5, 2, 3, 64), 4, id="odd"),
            pytest.param((1, 4, 2, 3, 96), 4, id="wide-groups"),
        ],
        "padding": [
            NO_PADDING, REPLICATE, FRAMES_ONLY, Padding(2, 1, 1), Padding(2, 0, 1, "replicate", "zeros"),
            Padding(2, 1, 1, "zeros", "replicate"),
        ],
        "spans": [(0, 0), (1, 1), (0, 2), (3, 2), (2, 3)],
        "names": [(), ("addend",), ("halo",), ("addend", "halo")],
        "silu": [True, False],
    }
)  # fmt: skip
def test_matches_reference(
    shape: tuple[int, ...], groups: int, padding: Padding, spans: tuple[int, int], names: tuple[str, ...], silu: bool,
    dtype: torch.dtype, device: torch.device,
) -> None:  # fmt: skip
    names = tuple(name for name in names if name != "halo" or padding.before)
    x, weight, bias, given = draw(shape, dtype, device, *names, centre=3.0)
    given |= {"padding": padding, "first_span": spans[0], "span": spans[1], "silu": silu}
    y = padded_group_norm(x, weight, bias, groups, EPS, **given, impl="triton")
    assert y.is_contiguous() and y.shape == padding.shape(shape)
    assert_matches_reference(y, x, weight, bias, groups, **given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_span_is_normalised_as_if_alone(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias, _ = draw((2, 7, 3, 2, 64), dtype, device, centre=30.0)
    y = padded_group_norm(x, weight, bias, 8, EPS, first_span=3, span=2, impl="triton")
    for frames in (slice(0, 3), slice(3, 5), slice(5, 7)):
        alone = group_norm_silu(x[:, frames].permute(0, 4, 1, 2, 3), weight, bias, 8, EPS, impl="triton")
        assert_close_to_gold(
            y[:, frames], alone.permute(0, 2, 3, 4, 1).double(),
            padded_group_norm_ref(x[:, frames], weight, bias, 8, EPS),
        )  # fmt: skip


@pytest.mark.parametrize("spans", [(0, 0), (1, 1), (3, 2)], ids=["clip", "frames", "chunks"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_the_kernel_before(dtype: torch.dtype, spans: tuple[int, int], device: torch.device) -> None:
    h, weight, bias, given = draw((2, 5, 3, 5, 64), dtype, device, "addend")
    summed, statistics = conv_epilogue_and_statistics(
        h.permute(0, 4, 1, 2, 3), given["addend"], impl="triton"
    )  # fmt: skip
    x = summed.permute(0, 2, 3, 4, 1)
    arguments = {"padding": REPLICATE, "first_span": spans[0], "span": spans[1]}
    y = padded_group_norm(x, weight, bias, 8, EPS, **arguments, statistics=statistics, impl="triton")
    assert_matches_reference(y, x, weight, bias, 8, **arguments)


def test_any_strides(device: torch.device) -> None:
    x, weight, bias, given = draw((2, 3, 4, 5, 64), torch.float32, device, "halo")
    mixed = x.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    halo = given["halo"].expand(2, 2, 4, 5, 64).flip(0)
    for impl in ("triton", "torch"):
        y = padded_group_norm(mixed, weight, bias, 8, EPS, halo=halo, padding=REPLICATE, impl=impl)
        assert_matches_reference(y, x, weight, bias, 8, halo=halo, padding=REPLICATE)


@pytest.mark.parametrize("name", FAULTS)
def test_the_check_finds_faults(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", 500)  # in many parts
    x, weight, bias, given = draw((1, 3, 4, 5, 64), torch.float32, device, "addend", "halo")
    call = (x, weight, bias, 8, EPS)
    given |= {"padding": REPLICATE, "first_span": 1, "span": 2}
    with listening(checks=True) as events:
        padded_group_norm(*call, **given, impl="triton")
    assert not events[0].problem, events
    with planted(PADDED_GROUP_NORM, "triton", lambda y: FAULTS[name](y[0])), listening(checks=True) as events:
        y = padded_group_norm(*call, **given, impl="triton")
    assert events[0].problem
    assert torch.equal(y, padded_group_norm_ref(*call, **given))


@torch.no_grad()
def test_a_wrong_epsilon_is_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, given = draw((1, 2, 2, 2, 64), torch.float32, device, "addend", "halo")
    right = PADDED_GROUP_NORM.implementations["triton"]
    for eps, wrong in ((EPS, False), (10 * EPS, True)):
        other = right._replace(run=lambda *args, eps=eps: right.run(*args[:4], eps, *args[5:]), bind=None)
        monkeypatch.setitem(PADDED_GROUP_NORM.implementations, "triton", other)
        PADDED_GROUP_NORM.forget()
        with listening(checks=True, probes=True) as events:
            padded_group_norm(x, weight, bias, 8, EPS, **given, padding=REPLICATE)
        PADDED_GROUP_NORM.forget()
        assert bool(events[0].problem) == wrong, events


def test_registration(device: torch.device) -> None:
    x, weight, bias, given = draw((1, 3, 2, 2, 64), torch.float32, device, "addend", "halo")
    args = (x, weight, bias, 8, EPS, given["addend"], given["halo"], *REPLICATE, 1, 2, True, None, 0, 0)
    torch.library.opcheck(PADDED_GROUP_NORM.registered["triton"], args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 64)}, r"x must be \[B, F, H, W, C\]"),
        ({"groups": 5}, "groups=5 does not divide C=64"),
        ({"weight": torch.zeros(32)}, r"weight must be \[64\], got \(32,\)"),
        ({"addend": torch.zeros(32)}, r"addend must be \[64\], got \(32,\)"),
        ({"halo": torch.zeros(1, 1, 2, 2, 64), "padding": REPLICATE}, "halo must be"),
        ({"span": -1}, "spans must have frames"),
        ({"statistics": (torch.zeros(3, 1, 2, 64), 5, 4)}, "statistics must be of frames, 4 rows each"),
        ({"statistics": (torch.zeros(2, 1, 2, 64), 4, 4)}, r"must be \(3, 1, 2, 64\)"),
        ({"statistics": (torch.zeros(3, 1, 2, 64), 4, 4), "addend": torch.zeros(64)}, "do not serve with an addend"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(1, 3, 2, 2, 64), "weight": torch.ones(64), "bias": torch.ones(64), "groups": 8, "eps": EPS
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        padded_group_norm(**arguments | changes)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("everything", [False, True], ids=["replicate", "everything"])
def test_compiles_without_spills(everything: bool, target: str) -> None:
    tiling = choose_apply_tiling(128)
    pointers = ("x_ptr", "addend_ptr", "bias_ptr", "halo_ptr", "y_ptr")
    sizes = ("before", "frames", "padded_frames", "height", "width", "chunk_rows", "first_span", "span", "spans")
    asm = compile_for(
        target, op._padded_apply_kernel,
        {**dict.fromkeys(pointers, "*bf16:16"), "norm_ptr": "*fp32:16", "channels": "i32:16"}
        | dict.fromkeys(sizes, "i32"),
        {
            "BORDER": 1, "FRAME_MODE": "zeros" if everything else "replicate", "PIXEL_MODE": "replicate",
            "HAS_ADDEND": everything, "HAS_HALO": everything, "SILU": True,
            "BLOCK_R": tiling.block_r, "BLOCK_C": tiling.block_c, "STAGES": tiling.stages,
        },
        num_warps=tiling.num_warps,
    )  # fmt: skip
    assert_no_spills(asm)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "spans"),
    [((1, 17, 60, 106, 512), (0, 0)), ((1, 9, 480, 848, 128), (0, 0)), ((1, 18, 120, 212, 512), (1, 1))],
    ids=["hunyuanvideo-bottom", "hunyuanvideo-top", "mochi"],
)
def test_real_shapes(
    shape: tuple[int, ...], spans: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:  # fmt: skip
    """One group of channels is held against float64: all are too large for it."""
    x, weight, bias, given = draw(shape, dtype, device, "addend", centre=3.0)
    options = {"padding": REPLICATE, "first_span": spans[0], "span": spans[1]}
    y = padded_group_norm(x, weight, bias, 32, EPS, **given, **options, impl="triton")
    some = slice(-shape[-1] // 32, None)
    parameters = weight[some], bias[some], 1
    assert_matches_reference(y[..., some], x[..., some], *parameters, addend=given["addend"][some], **options)
