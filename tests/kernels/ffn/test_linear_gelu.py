from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import FAULTS, assert_close_to_gold, planted
from torch import Tensor

from vidaccel.kernels import check
from vidaccel.kernels.ffn.linear_gelu import LINEAR_GELU, linear_gelu, linear_gelu_ref
from vidaccel.kernels.op import listening

SHAPES = [
    pytest.param((7, 16), 32, id="rows"),
    pytest.param((2, 5, 16), 24, id="tokens"),
    pytest.param((2, 3, 5, 16), 7, id="frames"),
]
REAL_SHAPES = [
    pytest.param((1, 32760, 1536), 8960, id="wan-1.3b"),
    pytest.param((2, 7392, 2048), 8192, id="ltx"),
    pytest.param((2, 17776, 1920), 7680, id="cogvideox-2b"),
]


def draw(
    shape: tuple[int, ...], width: int, dtype: torch.dtype, device: torch.device, *, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias; the sums that GELU sees are about ``spread`` from 0."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).to(dtype)
    weight = (torch.randn(width, shape[-1], device=device) * spread * shape[-1] ** -0.5).to(dtype)
    return x, weight, torch.randn(width, device=device).to(dtype)


def gold_of(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str = "tanh") -> Tensor:
    return linear_gelu_ref(x.double(), weight.double(), None if bias is None else bias.double(), approximate)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "width"), SHAPES)
def test_is_linear_then_gelu(
    shape: tuple[int, ...], width: int, dtype: torch.dtype, has_bias: bool, approximate: str
) -> None:
    x, weight, bias = draw(shape, width, dtype, torch.device("cpu"))
    given = bias if has_bias else None
    with listening() as events:
        y = linear_gelu(x, weight, given, approximate=approximate)
    assert torch.equal(y, F.gelu(F.linear(x, weight, given), approximate=approximate))
    assert y.shape == (*shape[:-1], width) and y.dtype == dtype
    assert [event.implementation for event in events] == ["torch"]
    assert_close_to_gold(y, gold_of(x, weight, given, approximate), y)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_reference_is_the_formula_in_float64(approximate: str) -> None:
    x, weight, bias = draw((3, 8), 6, torch.float64, torch.device("cpu"), spread=3.0)
    h = (x[:, None] * weight[None]).sum(-1) + bias
    if approximate == "tanh":
        expected = h / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    else:
        expected = h / 2 * (1 + torch.erf(h / 2**0.5))
    torch.testing.assert_close(linear_gelu(x, weight, bias, approximate=approximate), expected)


def test_takes_any_strides() -> None:
    x, weight, bias = draw((2, 5, 16), 24, torch.float32, torch.device("cpu"))
    every_other = x.repeat_interleave(2, 1)[:, ::2]
    y = linear_gelu(every_other, weight.t().contiguous().t(), bias)
    torch.testing.assert_close(y, linear_gelu(x, weight, bias))


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=["no-rows", "no-tokens"])
def test_empty_input(shape: tuple[int, ...]) -> None:
    x, weight, bias = draw(shape, 24, torch.float16, torch.device("cpu"))
    with listening(checks=True) as events:
        assert linear_gelu(x, weight, bias).shape == (*shape[:-1], 24)
    assert not events[0].problem


X, WEIGHT, BIAS = torch.ones(2, 3, 16), torch.ones(8, 16), torch.ones(8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(16)}, r"x must be \[..., K\], weight \[N, K\], got \(16,\), \(8, 16\)"),
        ({"x": torch.ones(3, 8)}, r"x must be \[..., K\], weight \[N, K\], got \(3, 8\), \(8, 16\)"),
        ({"weight": torch.ones(16)}, r"x must be \[..., K\], weight \[N, K\], got \(2, 3, 16\), \(16,\)"),
        ({"bias": torch.ones(16)}, r"bias must be \[8\], got \(16,\)"),
        ({"bias": torch.ones(8, 1)}, r"bias must be \[8\], got \(8, 1\)"),
        ({"approximate": "erf"}, r"approximate must be 'tanh' or 'none', got 'erf'"),
        ({"impl": "triton"}, r"impl must be one of addmm, torch, got 'triton'"),
        ({"impl": "addmm"}, r"impl='addmm' cannot run: the epilogue is cuBLASLt's, which needs an NVIDIA GPU"),
    ],
)
def test_rejects(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, "weight": WEIGHT, "bias": BIAS}
    with pytest.raises(ValueError, match=f"linear_gelu: {message}"):
        linear_gelu(**arguments | change)


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def on_gpu(dtype: torch.dtype = torch.float16, **options: Any) -> list[Tensor]:
    tensors = (torch.ones(shape, dtype=dtype, **options) for shape in ((3, 16), (8, 16), (8,)))
    return [x.as_subclass(OnGpu) for x in tensors]


@pytest.mark.skipif(torch.version.hip is not None, reason="the epilogue is cuBLASLt's")
def test_reasons() -> None:
    x, weight, bias = on_gpu()
    served = {"x": x, "weight": weight, "bias": bias, "approximate": "tanh"}
    wide, _, _ = on_gpu(torch.float32)
    for change, reason in (
        ({}, None),
        ({"approximate": "none"}, "the epilogue's GELU is the tanh approximation"),
        ({"bias": None}, "the epilogue needs a bias"),
        ({"x": wide}, "x, weight and bias differ in dtype"),
        (dict(zip(served, on_gpu(torch.float32), strict=False)), "it is for float16 and bfloat16, x is torch.float32"),
        (dict(zip(served, on_gpu(requires_grad=True), strict=False)), "it has no backward pass"),
    ):
        told = LINEAR_GELU.unserved(*(served | change).values(), impl="addmm")  # type: ignore[attr-defined]
        assert told is None if reason is None else told is not None and told.startswith(reason)


def test_autocast_runs_in_torch() -> None:
    x, weight, bias = on_gpu()
    with torch.autocast("cpu", torch.bfloat16):
        reason = LINEAR_GELU.unserved(x, weight, bias, "tanh", impl="addmm")
    assert reason == "x, weight and bias differ in dtype"


def test_costs() -> None:
    x, weight, bias = draw((2, 5, 16), 24, torch.float16, torch.device("cpu"))
    with listening() as events:
        y = linear_gelu(x, weight, bias)
    assert events[0].costs == (x.nbytes + weight.nbytes + y.nbytes, 2 * 10 * 16 * 24)


PARTS = pytest.mark.parametrize("most", [2**23, 100, 1], ids=["whole", "some-rows", "one-row"])


@PARTS
@pytest.mark.parametrize(("shape", "width"), SHAPES)
def test_parts_are_the_whole(shape: tuple[int, ...], width: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    arguments = (*draw(shape, width, torch.float64, torch.device("cpu")), "tanh")
    y = linear_gelu_ref(*arguments)
    assert LINEAR_GELU.parts is not None
    parts = list(LINEAR_GELU.parts(*arguments))
    assert (len(parts) > 1) == (most < 2**23)
    rows = [part.of((y,))[0] for part in parts]
    assert torch.equal(torch.cat([some.flatten(0, -2) for some in rows]), y.flatten(0, -2))
    for part, expected in zip(parts, rows, strict=True):
        torch.testing.assert_close(linear_gelu_ref(*part.args), expected)


def epilogue(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the epilogue gives: GELU of a sum that is not rounded."""
    return linear_gelu_ref(x.float(), weight.float(), bias.float(), "tanh").to(x.dtype)


@PARTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_right_result_is_found_right(dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    x, weight, bias = draw((2, 5, 64), 24, dtype, torch.device("cpu"), spread=3.0)
    problem = check.disagreement(LINEAR_GELU, (x, weight, bias, "tanh"), epilogue(x, weight, bias), "math-exact")
    assert problem is None


def _relu(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> None:
    y.copy_(F.linear(x, weight, bias).relu())


def _no_bias(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> None:
    y.copy_(linear_gelu_ref(x, weight, None, "tanh"))


def _planted(fault: str) -> Callable[..., None]:
    return lambda x, weight, bias, y: FAULTS[fault](y)


@PARTS
@pytest.mark.parametrize(
    "spoil",
    [*(pytest.param(_planted(fault), id=fault) for fault in FAULTS), _relu, _no_bias],
)
def test_a_fault_is_found(spoil: Callable[..., None], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    x, weight, bias = draw((2, 5, 64), 24, torch.float16, torch.device("cpu"), spread=3.0)
    y = epilogue(x, weight, bias)
    spoil(x, weight, bias, y)
    assert check.disagreement(LINEAR_GELU, (x, weight, bias, "tanh"), y, "math-exact")


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
def test_compiles_fullgraph(has_bias: bool) -> None:
    x, weight, bias = draw((2, 5, 16), 24, torch.float32, torch.device("cpu"))

    def twice(x: Tensor) -> Tensor:
        return 2 * linear_gelu(x, weight, bias if has_bias else None)

    assert torch.equal(torch.compile(twice, fullgraph=True, backend="aot_eager")(x), twice(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 10.0])
@pytest.mark.parametrize(("shape", "width"), [pytest.param((3, 40, 64), 128, id="small"), *REAL_SHAPES])
def test_epilogue(shape: tuple[int, ...], width: int, spread: float, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = draw(shape, width, dtype, device, spread=spread)
    y = linear_gelu(x, weight, bias, impl="addmm")
    rows = slice(None, None, max(shape[-2] // 64, 1))  # float64 products take their time
    few = x[..., rows, :]
    assert_close_to_gold(y[..., rows, :], gold_of(few, weight, bias), linear_gelu(few, weight, bias, impl="torch"))
    with torch.no_grad(), listening(checks=True) as events:
        assert torch.equal(linear_gelu(x, weight, bias), y)
    assert [(event.implementation, event.problem) for event in events] == [("addmm", "")]


@pytest.mark.gpu
def test_epilogue_takes_any_strides(device: torch.device) -> None:
    x, weight, bias = draw((2, 40, 64), 128, torch.float16, device)
    packed = torch.cat([x, x], dim=-1)[..., :64]
    torch.testing.assert_close(
        linear_gelu(packed, weight, bias, impl="addmm"), linear_gelu(x, weight, bias, impl="addmm")
    )


@pytest.mark.gpu
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_epilogue_is_found(fault: str, device: torch.device) -> None:
    x, weight, bias = draw((3, 40, 64), 128, torch.float16, device)
    with torch.no_grad(), planted(LINEAR_GELU, "addmm", FAULTS[fault]), listening(checks=True) as events:
        y = linear_gelu(x, weight, bias)
    assert events[0].problem
    assert torch.equal(y, linear_gelu(x, weight, bias, impl="torch"))


@pytest.mark.gpu
def test_epilogue_compiles_fullgraph(device: torch.device) -> None:
    x, weight, bias = draw((3, 40, 64), 128, torch.float16, device)

    def twice(x: Tensor) -> Tensor:
        return 2 * linear_gelu(x, weight, bias, impl="addmm")

    assert torch.equal(torch.compile(twice, fullgraph=True, backend="aot_eager")(x), twice(x))
