from __future__ import annotations

import math
import re

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoUpsampler3d
from kernel_checks import DTYPES, FAULTS, TARGETS, assert_no_spills, compile_for, narrow_accesses, planted
from torch import Tensor

from vidaccel.kernels import check
from vidaccel.kernels.conv import pixel_shuffle as op
from vidaccel.kernels.conv.pixel_shuffle import PIXEL_SHUFFLE, pixel_shuffle, pixel_shuffle_ref
from vidaccel.kernels.op import listening

Cell = tuple[int, int, int]
STRIDES = ("stride_source_sample", "stride_source_frame", "stride_source_row", "stride_source_pixel")
CELLS = [(2, 2, 2), (1, 2, 2), (2, 1, 1), (3, 1, 2)]
SHAPES = [
    pytest.param((1, 1, 1, 1, 128), id="one-pixel"),
    pytest.param((2, 3, 2, 5, 6), id="odd-width"),
    pytest.param((1, 2, 3, 4, 128), id="ltx-top"),
]


def draw(
    shape: tuple[int, ...], cell: Cell, dtype: torch.dtype, device: torch.device, repeats: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """x, bias, source of results that are as wide as ``shape`` says, from so many pixels."""
    torch.manual_seed(0)
    *pixels, channels = shape
    wide = math.prod(cell) * channels
    x, source = (torch.randn(*pixels, width, device=device).to(dtype) for width in (wide, wide // repeats))
    return x, torch.randn(wide, device=device).to(dtype), source


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_of_the_reference(
    shape: tuple[int, ...], cell: Cell, dtype: torch.dtype, device: torch.device
) -> None:
    x, bias, source = draw(shape, cell, dtype, device)
    for addend in (None, source):
        for drop in range(cell[0]):
            out = pixel_shuffle(x, bias, addend, cell=cell, drop=drop, impl="triton")
            assert torch.equal(out, pixel_shuffle_ref(x, bias, addend, cell=cell, drop=drop))
            assert out.is_contiguous()
        if min(cell[1:]) > 1 and min(x.shape[2:4]) > 1:
            out = pixel_shuffle(x, bias, addend, cell=cell, crop=1, impl="triton")
            assert torch.equal(out, pixel_shuffle_ref(x, bias, addend, cell=cell)[:, :, 1:-1, 1:-1])


@pytest.mark.parametrize("residual", [False, True])
def test_the_upsampler_of_diffusers(residual: bool, device: torch.device) -> None:
    upsampler = LTXVideoUpsampler3d(32, stride=(2, 2, 2), residual=residual, upscale_factor=2).to(device)
    clip = torch.randn(2, 32, 3, 4, 5, device=device)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        expected, made = upsampler(clip), upsampler.conv(clip)
        rows = made.permute(0, 2, 3, 4, 1).unflatten(-1, (-1, 8)).transpose(-1, -2).flatten(-2)
        source = clip.permute(0, 2, 3, 4, 1).contiguous() if residual else None
        out = pixel_shuffle(rows, rows.new_zeros(rows.shape[-1]), source, cell=(2, 2, 2), drop=1)
    assert torch.equal(out.permute(0, 4, 1, 2, 3), expected)


def test_strided_input(device: torch.device) -> None:
    x, bias, source = draw((2, 3, 2, 5, 8), (2, 2, 2), torch.float32, device)
    expected = pixel_shuffle_ref(x, bias, source, cell=(2, 2, 2))
    x, bias = (torch.stack([t, t], dim=-1)[..., 0] for t in (x, bias))
    inner = torch.nn.functional.pad(source, (0, 0, 1, 2, 1, 1, 1, 1))[:, 1:-1, 1:-1, 1:-2]  # of a padded clip
    assert torch.equal(pixel_shuffle(x, bias, inner, cell=(2, 2, 2), impl="triton"), expected)
    with pytest.raises(ValueError, match="a last stride of 1"):
        pixel_shuffle(x, bias, torch.stack([source, source], dim=-1)[..., 0], cell=(2, 2, 2), impl="triton")


def test_lines_of_source_that_are_too_long_to_count_in_32_bits(device: torch.device) -> None:
    x, bias, source = draw((2, 3, 2, 4, 8), (2, 2, 2), torch.float32, device)
    for pixel, served in ((2**29 - 1, True), (2**29, False)):
        wide = torch.empty_strided(source.shape, (1, 1, 1, pixel, 1), device="meta")
        reason = PIXEL_SHUFFLE.unserved(x, bias, wide, 2, 2, 2, 0, 0, impl="triton")
        assert reason is None if served else "lines span less than 2**31 numbers" in reason


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", 200)  # parts
    x, bias, source = draw((2, 3, 4, 3, 8), (2, 2, 2), torch.float32, device)

    def spoil(y: Tensor) -> None:
        FAULTS[fault](y.flatten(0, 1))

    with listening(checks=True) as events:
        out = pixel_shuffle(x, bias, source, cell=(2, 2, 2), drop=1, crop=1, impl="triton")
    assert not events[0].problem
    with planted(PIXEL_SHUFFLE, "triton", spoil), listening(checks=True) as events:
        assert torch.equal(pixel_shuffle(x, bias, source, cell=(2, 2, 2), drop=1, crop=1, impl="triton"), out)
    assert events[0].problem


def test_opcheck(device: torch.device) -> None:
    x, bias, source = draw((1, 2, 2, 3, 8), (2, 2, 2), torch.float32, device)
    torch.library.opcheck(PIXEL_SHUFFLE.registered["triton"], (x, bias, source, 2, 2, 2, 1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 2, 3, 16)}, "x must be [B, F, H, W, 8 * C], got (1, 2, 3, 16)"),
        ({"x": torch.zeros(1, 1, 2, 3, 12)}, "x must be [B, F, H, W, 8 * C], got (1, 1, 2, 3, 12)"),
        ({"bias": torch.zeros(8)}, "bias must be [32], got (8,)"),
        ({"source": torch.zeros(1, 1, 2, 3, 24)}, "source must be [B, F, H, W, 8 * C'] where C' divides C"),
        ({"source": torch.zeros(1, 1, 2, 2, 16)}, "source must be [B, F, H, W, 8 * C'] where C' divides C"),
        ({"drop": 2}, "drop must be less than the 2 frames of a cell, got 2"),
        ({"crop": 2}, "crop must be less than the sides of a cell (2, 2, 2), got 2"),
        ({"cell": (2, 0, 2)}, "cell must be positive, got (2, 0, 2)"),
    ],
    ids=["rank", "channels", "bias", "source", "source-size", "drop", "crop", "cell"],
)
def test_raises(change: dict[str, object], message: str) -> None:
    given = {"x": torch.zeros(1, 1, 2, 3, 32), "bias": torch.zeros(32), "cell": (2, 2, 2), **change}
    with pytest.raises(ValueError, match=re.escape(f"pixel_shuffle: {message}")):
        pixel_shuffle(**given)  # type: ignore[arg-type]


def test_numbers_only() -> None:
    with pytest.raises(TypeError, match="pixel_shuffle: bias"):
        pixel_shuffle(torch.zeros(1, 1, 1, 1, 8), torch.zeros(8, dtype=torch.int32), cell=(2, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("source", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target: str, source: bool) -> None:
    pointers = dict.fromkeys(("x_ptr", "bias_ptr", "source_ptr", "y_ptr"), "*bf16:16")
    sizes = dict.fromkeys(("rows", "drop", "crop", "frames", "out_frames", "height", "width", *STRIDES), "i32")
    widths = dict.fromkeys(("channels", "source_channels"), "i32:16")
    constants = {"HAS_SOURCE": source, "T": 2, "U": 2, "V": 2, "BLOCK_M": 16, "BLOCK_C": 128}
    asm = compile_for(target, op._pixel_shuffle_kernel, pointers | sizes | widths, constants)
    assert_no_spills(asm)
    if not source:  # whose channels lie a cell apart
        assert not narrow_accesses(asm)
