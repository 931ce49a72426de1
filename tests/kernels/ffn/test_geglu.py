from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DTYPES, TARGETS, assert_close_to_gold, assert_no_spills, compile_for, narrow_accesses
from torch import Tensor

from vidaccel.kernels.ffn import geglu as op
from vidaccel.kernels.ffn.geglu import GEGLU, geglu, geglu_ref
from vidaccel.kernels.op import listening

SHAPES = [
    pytest.param((1, 2), id="one-number"),
    pytest.param((3, 7, 42), id="odd-width"),
    pytest.param((2, 5, 2560), id="svd-width"),
    pytest.param((2, 10240), id="several-blocks-to-a-row"),
    pytest.param((4096,), id="one-row-one-block"),
]
REAL_SHAPES = [
    pytest.param((28, 9216, 2560), id="svd-level-0"),
    pytest.param((28, 2304, 5120), id="svd-level-1"),
    pytest.param((28, 576, 10240), id="svd-level-2"),
]


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, centre: float = 0.0) -> Tensor:
    torch.manual_seed(0)
    return (3 * torch.randn(shape, device=device) + centre).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centre", [0.0, 30.0, -30.0], ids=["centred", "large", "large-negative"])
def test_matches_reference(shape: tuple[int, ...], centre: float, dtype: torch.dtype, device: torch.device) -> None:
    x = draw(shape, dtype, device, centre)
    out = geglu(x, impl="triton")
    assert_close_to_gold(out, geglu_ref(x.double()), geglu_ref(x))
    assert out.is_contiguous()


def test_rounds_the_gelu_where_eager_does(device: torch.device) -> None:
    """Gates far from zero leave erf no say in the last place, so that only the two roundings decide the bits."""
    x = draw((64, 256), torch.float16, device)
    x[:, 128:] = x[:, 128:].abs() + 1
    value, gate = x.float().chunk(2, dim=-1)
    once_rounded = (value * F.gelu(gate)).half()
    eager = geglu_ref(x)
    assert (once_rounded == eager).float().mean() < 0.9
    assert (geglu(x, impl="triton") == eager).float().mean() > 0.999


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.repeat_interleave(2, -1)[..., ::2], id="strided-row"),
        pytest.param(lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]], id="padded-rows"),
        pytest.param(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), id="transposed"),
    ],
)
def test_takes_any_strides(layout: object, device: torch.device) -> None:
    x = draw((3, 5, 84), torch.float16, device)
    laid_out = layout(x)
    assert torch.equal(laid_out, x) and not laid_out.is_contiguous()
    assert torch.equal(geglu(laid_out, impl="triton"), geglu(x, impl="triton"))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=["no-rows", "no-channels"])
def test_empty_input(shape: tuple[int, ...], device: torch.device) -> None:
    out = geglu(torch.empty(shape, dtype=torch.float16, device=device))
    assert out.shape == (shape[0], shape[1] // 2) and out.dtype == torch.float16


@pytest.mark.parametrize(
    ("dtype", "requires_grad", "reason"),
    [(torch.float64, False, "x is torch.float64"), (torch.float32, True, "no backward pass")],
)
def test_unserved_input_runs_in_torch(
    dtype: torch.dtype, requires_grad: bool, reason: str, device: torch.device
) -> None:
    x = draw((3, 42), dtype, device).requires_grad_(requires_grad)
    with listening() as events:
        out = geglu(x)
    assert [event.implementation for event in events] == ["torch"]
    assert reason in events[0].reason or device.type == "cpu"
    assert torch.equal(out, geglu_ref(x))
    with pytest.raises(ValueError, match=f"geglu: impl='triton' cannot run: .*{re.escape(reason)}"):
        geglu(x, impl="triton")


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.ones(2, 7), {}, r"x must be \[..., 2 \* D\], got \(2, 7\)"),
        (torch.tensor(1.0), {}, r"x must be \[..., 2 \* D\], got \(\)"),
        (torch.ones(2, 8), {"impl": "cuda"}, r"impl must be one of triton, torch, got 'cuda'"),
    ],
)
def test_rejects(x: Tensor, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=f"geglu: {message}"):
        geglu(x, **arguments)


def test_registration(device: torch.device) -> None:
    x = draw((3, 5, 42), torch.float32, device)
    for laid_out in (x, x.transpose(0, 1)):
        torch.library.opcheck(GEGLU.registered["triton"], (laid_out,))


def test_compiles_fullgraph(device: torch.device) -> None:
    x = draw((3, 5, 42), torch.float32, device)

    def double(x: Tensor) -> Tensor:
        return 2 * geglu(x, impl="triton")

    assert torch.equal(torch.compile(double, fullgraph=True, backend="aot_eager")(x), double(x))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_accesses_are_16_bytes_wide(target: str, activation: str) -> None:
    signature = {"x_ptr": "*fp16:16", "y_ptr": "*fp16:16", "dim": "i32:16", "size": "i32:16"}
    asm = compile_for(
        target, op._geglu_kernel, signature, {"ACTIVATION": activation, "BLOCK": op.BLOCK}, num_warps=op.NUM_WARPS
    )
    assert_no_spills(asm)
    assert not narrow_accesses(asm)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", REAL_SHAPES)
def test_real_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = draw(shape, dtype, device)
    assert_close_to_gold(geglu(x, impl="triton"), geglu_ref(x.double()), geglu_ref(x))


@pytest.mark.gpu
def test_offsets_beyond_int32(device: torch.device) -> None:
    x = draw((2**20 + 1, 2560), torch.float16, device)
    assert x.numel() > 2**31
    tail = x[-3:].clone()
    assert torch.equal(geglu(x, impl="triton")[-3:], geglu(tail, impl="triton"))
