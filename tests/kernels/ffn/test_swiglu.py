"""What differs from ``test_geglu.py``, whose kernel this is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DTYPES, assert_close_to_gold
from torch import Tensor

from vidaccel.kernels.ffn.swiglu import SWIGLU, swiglu, swiglu_ref

SHAPES = [
    pytest.param((1, 2), id="one-number"),
    pytest.param((3, 7, 42), id="odd-width"),
    pytest.param((2, 10240), id="several-blocks-to-a-row"),
]


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, centre: float = 0.0) -> Tensor:
    torch.manual_seed(0)
    return (3 * torch.randn(shape, device=device) + centre).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centre", [0.0, 30.0, -30.0, -120.0], ids=["centred", "large", "negative", "exp-overflows"])
def test_matches_reference(shape: tuple[int, ...], centre: float, dtype: torch.dtype, device: torch.device) -> None:
    x = draw(shape, dtype, device, centre)
    out = swiglu(x, impl="triton")
    assert_close_to_gold(out, swiglu_ref(x.double()), swiglu_ref(x))
    assert out.is_contiguous()


def test_rounds_the_silu_where_eager_does(device: torch.device) -> None:
    x = draw((64, 256), torch.float16, device)
    value, gate = x.float().chunk(2, dim=-1)
    once_rounded = (value * F.silu(gate)).half()
    eager = swiglu_ref(x)
    assert (once_rounded == eager).float().mean() < 0.9
    assert (swiglu(x, impl="triton") == eager).float().mean() > 0.999


def test_strides_and_no_rows(device: torch.device) -> None:
    x = draw((3, 5, 84), torch.float16, device).transpose(0, 1)
    assert torch.equal(swiglu(x, impl="triton"), swiglu(x.contiguous(), impl="triton"))
    assert swiglu(x[:0]).shape == (0, 3, 42)


@pytest.mark.parametrize("x", [torch.ones(2, 7), torch.tensor(1.0)])
def test_rejects(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"swiglu: x must be \[..., 2 \* D\]"):
        swiglu(x)
    with pytest.raises(TypeError, match="swiglu: x must be floating-point"):
        swiglu(torch.ones(2, 8, dtype=torch.int64))


def test_registration_and_compile(device: torch.device) -> None:
    x = draw((3, 5, 42), torch.float32, device)
    torch.library.opcheck(SWIGLU.registered["triton"], (x,))

    def double(x: Tensor) -> Tensor:
        return 2 * swiglu(x, impl="triton")

    assert torch.equal(torch.compile(double, fullgraph=True, backend="aot_eager")(x), double(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_real_shape(dtype: torch.dtype, device: torch.device) -> None:
    x = draw((2, 6360, 2 * 8192), dtype, device)  # of Mochi
    assert_close_to_gold(swiglu(x, impl="triton"), swiglu_ref(x.double()), swiglu_ref(x))
