from __future__ import annotations

import re

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
    planted,
)
from torch import Tensor

from vidaccel.kernels.conv import alpha_blend as op
from vidaccel.kernels.conv.alpha_blend import ALPHA_BLEND, alpha_blend, alpha_blend_ref
from vidaccel.kernels.op import listening

SHAPES = [
    pytest.param((1, 1, 1, 1, 1), id="one-number"),
    pytest.param((2, 6, 3, 5, 7), id="prime-frames"),
    pytest.param((1, 320, 2, 3, 3), id="several-blocks-to-a-frame"),
    pytest.param((6, 35, 24), id="rows"),
]


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both branches (5-D ones in channels-last memory), mix_factor, and image_only with the first frame a still."""
    torch.manual_seed(0)
    spatial, temporal = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    image_only = torch.zeros(1, shape[0], device=device)
    if len(shape) == 5:
        image_only = torch.zeros(shape[0], shape[2], device=device)
        spatial, temporal = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (spatial, temporal))
    image_only[0, 0] = 1
    return spatial, temporal, torch.tensor([0.7], device=device).to(dtype), image_only


def assert_matches_reference(
    out: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    mix_factor: Tensor,
    image_only: Tensor | None,
    *,
    residual: Tensor | None = None,
    spatial_is_second: bool = False,
) -> None:
    wide = (spatial.double(), temporal.double(), mix_factor.double())
    wide_residual = None if residual is None else residual.double()
    gold = alpha_blend_ref(*wide, image_only, residual=wide_residual, spatial_is_second=spatial_is_second)
    narrow = (spatial, temporal, mix_factor)
    eager = alpha_blend_ref(*narrow, image_only, residual=residual, spatial_is_second=spatial_is_second)
    assert_close_to_gold(out, gold, eager)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stills", [True, False], ids=["image-only", "no-image-only"])
@pytest.mark.parametrize("second", [True, False], ids=["spatial-second", "spatial-first"])
def test_matches_reference(
    shape: tuple[int, ...], stills: bool, second: bool, dtype: torch.dtype, device: torch.device
) -> None:
    spatial, temporal, mix_factor, image_only = draw(shape, dtype, device)
    stills_of = image_only if stills else None
    out = alpha_blend(spatial, temporal, mix_factor, stills_of, spatial_is_second=second, impl="triton")
    assert_matches_reference(out, spatial, temporal, mix_factor, stills_of, spatial_is_second=second)
    assert out.stride() == spatial.stride()


@pytest.mark.parametrize("with_residual", [False, True], ids=["no-residual", "residual"])
def test_has_the_bits_of_eager(with_residual: bool, device: torch.device) -> None:
    spatial, temporal, mix_factor, image_only = draw((2, 32, 3, 5, 7), torch.float16, device)
    residual = torch.randn_like(temporal) if with_residual else None
    out = alpha_blend(spatial, temporal, mix_factor, image_only, residual=residual, impl="triton")
    assert torch.equal(out, alpha_blend_ref(spatial, temporal, mix_factor, image_only, residual=residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_joins_the_temporal_branch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    spatial, temporal, mix_factor, image_only = draw(shape, dtype, device)
    residual = 3 * torch.randn_like(temporal)
    out = alpha_blend(spatial, temporal, mix_factor, image_only, residual=residual, impl="triton")
    assert_matches_reference(out, spatial, temporal, mix_factor, image_only, residual=residual)


@pytest.mark.parametrize("shape", [(2, 6, 3, 5, 7), (6, 35, 24)], ids=["5d", "rows"])
def test_a_still_frame_is_the_spatial_branch(shape: tuple[int, ...], device: torch.device) -> None:
    spatial, temporal, mix_factor, image_only = draw(shape, torch.float16, device)
    out = alpha_blend(spatial, temporal, mix_factor, image_only, impl="triton")
    still, moving = (0, slice(None), 0) if len(shape) == 5 else 0, (0, slice(None), 1) if len(shape) == 5 else 1
    assert torch.equal(out[still], spatial[still]) and not torch.equal(out[moving], spatial[moving])


def test_strided_image_only_and_mix_factor_of_another_dtype(device: torch.device) -> None:
    spatial, temporal, mix_factor, image_only = draw((2, 6, 3, 5, 7), torch.float16, device)
    strided = image_only.bool().repeat_interleave(2, 1)[:, ::2]
    out = alpha_blend(spatial, temporal, mix_factor.float(), strided, impl="triton")
    assert_matches_reference(out, spatial, temporal, mix_factor.float(), image_only)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 8, 3, 0, 4)], ids=["no-frames", "no-pixels"])
def test_empty_input(shape: tuple[int, ...], device: torch.device) -> None:
    spatial = torch.empty(shape, dtype=torch.float16, device=device)
    out = alpha_blend(spatial, spatial, torch.ones(1, dtype=torch.float16, device=device))
    assert out.shape == shape and out.dtype == spatial.dtype


def test_one_frame_may_have_any_stride(device: torch.device) -> None:
    *tensors, image_only = draw((1, 6, 1, 5, 7), torch.float32, device)
    spatial, temporal, mix_factor = tensors
    restrided = temporal.as_strided(temporal.shape, (7, *temporal.stride()[1:2], 1, *temporal.stride()[3:]))
    assert restrided.stride() != spatial.stride()
    with listening() as events:
        out = alpha_blend(spatial, restrided, mix_factor, image_only)
    assert [event.implementation for event in events] == ["triton"]
    assert torch.equal(out, alpha_blend(spatial, temporal, mix_factor, image_only))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s, t, m: (s.double(), t.double(), m), "x is torch.float64"),
        (lambda s, t, m: (s, t.half(), m), "temporal differs from spatial in dtype: torch.float16, torch.float32"),
        (lambda s, t, m: (s, t.contiguous(), m), "temporal differs from spatial in strides"),
        (lambda s, t, m: (s.contiguous(), t.contiguous(), m), "frames are not dense runs of memory"),
        (lambda s, t, m: (s, t, m.requires_grad_()), "no backward pass"),
    ],
    ids=["float64", "mixed-dtypes", "mixed-strides", "channels-first", "gradient"],
)
def test_unserved_input_runs_in_torch(change: object, reason: str, device: torch.device) -> None:
    *tensors, image_only = draw((2, 6, 3, 5, 7), torch.float32, device)
    tensors = change(*tensors)
    with listening() as events:
        out = alpha_blend(*tensors, image_only)
    assert [event.implementation for event in events] == ["torch"] and reason in events[0].reason
    assert torch.equal(out, alpha_blend_ref(*tensors, image_only))
    assert out.requires_grad == tensors[2].requires_grad
    with pytest.raises(ValueError, match=f"alpha_blend: impl='triton' cannot run: .*{re.escape(reason)}"):
        alpha_blend(*tensors, image_only, impl="triton")


X = torch.ones(2, 4, 3, 2, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"spatial": X.int()}, TypeError, r"spatial must be floating-point, got torch.int32"),
        ({"mix_factor": torch.ones(1).long()}, TypeError, r"mix_factor must be floating-point, got torch.int64"),
        ({"residual": X.to("meta")}, ValueError, r"residual must be on cpu, as spatial is, got meta"),
        ({"spatial": X[0, 0, 0], "temporal": X[0, 0, 0]}, ValueError, r"spatial must be \[B, .*, got \(2, 2\)"),
        ({"temporal": X[..., :1]}, ValueError, r"temporal must be \(2, 4, 3, 2, 2\), .* got \(2, 4, 3, 2, 1\)"),
        ({"residual": X[..., :1]}, ValueError, r"residual must be \(2, 4, 3, 2, 2\), .* got \(2, 4, 3, 2, 1\)"),
        ({"mix_factor": torch.ones(2)}, ValueError, r"mix_factor must be \[1\], got \(2,\)"),
        ({"mix_factor": torch.ones(1, 1)}, ValueError, r"mix_factor must be \[1\], got \(1, 1\)"),
        ({"image_only": torch.ones(1, 3)}, ValueError, r"image_only must have \(2, 3\) entries.*, got \(1, 3\)"),
        ({"image_only": torch.ones(6)}, ValueError, r"image_only must have \(2, 3\) entries.*, got \(6,\)"),
        ({"image_only": torch.ones(2, 3, device="meta")}, ValueError, r"image_only must be on cpu, .* got meta"),
        (
            {"spatial": X[0], "temporal": X[0], "image_only": torch.ones(2, 2)},
            ValueError,
            r"with image_only, spatial must be .*, got \(4, 3, 2, 2\)",
        ),
        ({"impl": "cuda"}, ValueError, r"impl must be one of triton, torch, got 'cuda'"),
    ],
)
def test_rejects(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"alpha_blend: {message}"):
        alpha_blend(**{"spatial": X, "temporal": X, "mix_factor": torch.ones(1), **change})


@pytest.mark.parametrize("shape", [(2, 6, 3, 5, 7), (6, 35, 24)], ids=["5d", "rows"])
@pytest.mark.parametrize("stills", [True, False], ids=["image-only", "no-image-only"])
def test_registration(shape: tuple[int, ...], stills: bool, device: torch.device) -> None:
    spatial, temporal, mix_factor, image_only = draw(shape, torch.float32, device)
    for residual in (None, torch.randn_like(temporal)):
        arguments = (spatial, temporal, mix_factor, image_only if stills else None, residual, False)
        torch.library.opcheck(ALPHA_BLEND.registered["triton"], arguments)


@pytest.mark.parametrize("stills", [True, False], ids=["image-only", "no-image-only"])
def test_compiles_fullgraph(stills: bool, device: torch.device) -> None:
    spatial, temporal, mix_factor, image_only = draw((2, 6, 3, 5, 7), torch.float32, device)

    def double(spatial: Tensor) -> Tensor:
        return 2 * alpha_blend(spatial, temporal, mix_factor, image_only if stills else None, impl="triton")

    out = torch.compile(double, fullgraph=True, backend="aot_eager")(spatial)
    assert torch.equal(out, double(spatial)) and out.stride() == double(spatial).stride()


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 6, 3, 5, 7), (3, 6, 5, 7), (6, 35, 24)], ids=["5d", "4d", "rows"])
def test_the_check(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    spatial, temporal, mix_factor, image_only = draw(shape, dtype, device)
    stills = None if len(shape) == 4 else image_only
    residual = torch.randn_like(temporal)

    def problem() -> str:
        with listening(checks=True) as events:
            out = alpha_blend(spatial, temporal, mix_factor, stills, residual=residual)
        assert [event.implementation for event in events] == ["triton"]
        if events[0].problem:
            assert torch.equal(out, alpha_blend_ref(spatial, temporal, mix_factor, stills, residual))
        return events[0].problem

    def frames(out: Tensor) -> Tensor:
        rows = out if out.ndim == 3 else out.movedim(1, -1)
        return rows.flatten(0, 1) if out.ndim == 5 else rows

    assert not problem()
    for fault, spoil in FAULTS.items():
        with planted(ALPHA_BLEND, "triton", lambda out, spoil=spoil: spoil(frames(out))):
            assert problem(), fault


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_accesses_are_16_bytes_wide(target: str) -> None:
    pointers = ("spatial_ptr", "temporal_ptr", "residual_ptr", "mix_factor_ptr", "image_only_ptr", "out_ptr")
    asm = compile_for(
        target,
        op._alpha_blend_kernel,
        {**dict.fromkeys(pointers, "*fp16:16"), "frame_size": "i32:16"},
        {"HAS_RESIDUAL": True, "HAS_IMAGE_ONLY": True, "SPATIAL_IS_SECOND": False, "BLOCK": op.BLOCK},
        num_warps=op.NUM_WARPS,
    )
    assert_no_spills(asm)
    assert len(narrow_accesses(asm)) == 2, "all but mix_factor and image_only, which are scalars"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 320, 14, 72, 128), (28, 9216, 320)], ids=["svd-5d", "svd-rows"])
def test_real_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    spatial, temporal, mix_factor, image_only = draw(shape, dtype, device)
    for residual in (None, torch.randn_like(temporal)):
        out = alpha_blend(spatial, temporal, mix_factor, image_only, residual=residual, impl="triton")
        assert_matches_reference(out, spatial, temporal, mix_factor, image_only, residual=residual)


@pytest.mark.gpu
def test_offsets_beyond_int32(device: torch.device) -> None:
    spatial, temporal, mix_factor, image_only = draw((17, 2**20, 128), torch.float16, device)
    assert spatial.numel() > 2**31
    out = alpha_blend(spatial, temporal, mix_factor, image_only, impl="triton")
    assert torch.equal(out[-1:], alpha_blend(spatial[-1:], temporal[-1:], mix_factor, impl="triton"))
