from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_checks import FAULTS, assert_close_to_gold, assert_no_spills, compile_for, planted
from torch import Tensor

from vidaccel.kernels import check, choice
from vidaccel.kernels.ffn.geglu import geglu
from vidaccel.kernels.ffn.linear_geglu import LINEAR_GEGLU, TWO_STEP, linear_geglu, linear_geglu_ref
from vidaccel.kernels.hopper import GLUON
from vidaccel.kernels.op import listening


class Shape(NamedTuple):
    rows: int
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


SMALL = Shape(37, 16, 24)
GPU_SHAPES = [
    Shape(258048, 320, 1280),
    Shape(64512, 640, 2560),
    Shape(65, 64, 64),
    Shape(127, 320, 1280),
    Shape(1000, 640, 192),
    Shape(8200, 384, 128),
    Shape(20001, 320, 1280),
]


@pytest.fixture(autouse=True)
def fresh_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path))
    forget()


def forget() -> None:
    """As in another process."""
    choice.drop()
    LINEAR_GEGLU.forget()


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, device=device)
    rows, in_features, out_features = shape
    x = normal(1, rows, in_features)
    weight = normal(2 * out_features, in_features) * (2 / math.sqrt(in_features))
    return x.to(dtype), weight.to(dtype), normal(2 * out_features).to(dtype)


def assert_matches_reference(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    gold = linear_geglu_ref(x.double(), weight.double(), bias.double())
    assert_close_to_gold(out, gold, linear_geglu_ref(x, weight, bias))
    assert out.is_contiguous()


def test_reference_is_value_times_gelu_of_gate(device: torch.device) -> None:
    x, weight, bias = draw(SMALL, torch.float64, device)
    value, gate = (x @ part.T + b for part, b in zip(weight.chunk(2), bias.chunk(2), strict=True))
    torch.testing.assert_close(linear_geglu_ref(x, weight, bias), value * F.gelu(gate))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_two_steps_are_linear_and_geglu(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = draw(SMALL, dtype, device)
    with listening() as events:
        out = linear_geglu(x, weight, bias)
    assert torch.equal(out, geglu(F.linear(x, weight, bias)))
    assert [event[:2] for event in events] == [("geglu", "triton"), ("linear_geglu", TWO_STEP)]
    assert events[1].costs.flops == 2 * 37 * 16 * 48
    assert events[1].costs.bytes == dtype.itemsize * (37 * 16 + 48 * 16 + 48 + 37 * 24)
    assert_matches_reference(out, x, weight, bias)


@pytest.mark.parametrize("wish", ["torch", "linear_geglu=torch"])
def test_a_wish_for_torch(wish: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", wish)
    with listening() as events:
        linear_geglu(*draw(SMALL, torch.float32, device))
    assert [event[:3] for event in events] == [("linear_geglu", "torch", "")]


@pytest.mark.parametrize("impl", [None, TWO_STEP, "torch"])
@pytest.mark.parametrize(
    "shape", [(0, 16), (3, 0, 16), (3, 0), (2, 5, 16), (16,)], ids=["no-rows", "no-pixels", "K=0", "3-D", "one-row"]
)
@pytest.mark.parametrize("dim", [0, 24])
def test_shapes_at_the_edge(shape: tuple[int, ...], dim: int, impl: str | None, device: torch.device) -> None:
    x, weight, bias = torch.ones(shape), torch.ones(2 * dim, shape[-1]), torch.ones(2 * dim)
    out = linear_geglu(x.to(device), weight.to(device), bias.to(device), impl=impl)
    assert out.shape == (*shape[:-1], dim)
    torch.testing.assert_close(out.cpu(), linear_geglu_ref(x, weight, bias))


@pytest.mark.parametrize("change", ["strided", "expanded", "unaligned"])
def test_takes_any_strides(change: str, device: torch.device) -> None:
    x, weight, bias = draw(SMALL, torch.float16, device)
    restride = {
        "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "expanded": lambda x: x[..., :1].expand(x.shape),
        "unaligned": lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape),
    }[change]
    x, weight, bias = map(restride, (x, weight, bias))
    assert_matches_reference(linear_geglu(x, weight, bias), x, weight, bias)


def test_gradients_flow(device: torch.device) -> None:
    x, weight, bias = draw(SMALL, torch.float32, device)
    linear_geglu(x, weight.requires_grad_(), bias).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"x": torch.ones(3, 15)}, r"x must be \[..., K\], .* got x \(3, 15\), weight \(48, 16\)"),
        (ValueError, {"x": torch.tensor(1.0)}, r"x must be \[..., K\], .* got x \(\), weight \(48, 16\)"),
        (ValueError, {"weight": torch.ones(47, 16)}, r".* weight \[2 \* D, K\], .* weight \(47, 16\)"),
        (ValueError, {"bias": torch.ones(24)}, r".* bias \[2 \* D\], .* bias \(24,\)"),
        (ValueError, {"impl": "fast"}, r"impl must be one of gluon, two-step, torch, got 'fast'"),
        (
            TypeError,
            {"bias": torch.ones(48).half()},
            r"bias must be torch.float32, as x is, got torch.float16",
        ),
        (TypeError, {"x": torch.ones(3, 16).int()}, "x must be floating-point, got torch.int32"),
    ],
)
@pytest.mark.parametrize("impl", [None, "torch"])
def test_rejects(impl: str | None, error: type[Exception], change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.ones(3, 16), "weight": torch.ones(48, 16), "bias": torch.ones(48), "impl": impl}
    with pytest.raises(error, match=f"linear_geglu: {message}"):
        linear_geglu(**{**arguments, **change})


def test_autocast_decides_the_dtype() -> None:
    x, weight, bias = draw(SMALL, torch.float32, torch.device("cpu"))
    with torch.autocast("cpu", torch.float16):
        out = linear_geglu(x.half(), weight, bias)
    assert out.dtype == torch.float16


def test_gluon_is_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error if it was forced, two steps and the reason if it was only wished for."""
    x, weight, bias = draw(SMALL, torch.float16, torch.device("cpu"))
    with pytest.raises(ValueError, match="linear_geglu: impl='gluon' cannot run: the kernel is for Hopper GPUs"):
        linear_geglu(x, weight, bias, impl="gluon")
    monkeypatch.setenv("VIDACCEL_IMPL", "linear_geglu=gluon")
    with listening() as events:
        linear_geglu(x, weight, bias)
    assert events[-1][:3] == ("linear_geglu", TWO_STEP, "the kernel is for Hopper GPUs")


def test_compiles_fullgraph(device: torch.device) -> None:
    x, weight, bias = draw(SMALL, torch.float16, device)
    compiled = torch.compile(lambda x: linear_geglu(x, weight, bias) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), linear_geglu(x, weight, bias) + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("most", [2**23, 200], ids=["whole", "in-parts"])
def test_a_right_result_is_found_right(
    most: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    with listening(checks=True) as events:
        linear_geglu(*draw(SMALL, dtype, device))
    assert len(events) == 2 and not any(event.problem for event in events), events


@pytest.mark.parametrize("most", [2**23, 200], ids=["whole", "in-parts"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    x, weight, bias = draw(Shape(36, 16, 24), torch.float16, device)
    x = x.view(4, 9, 16)
    with planted(LINEAR_GEGLU, TWO_STEP, FAULTS[fault]), listening(checks=True) as events:
        out = linear_geglu(x, weight, bias)
    assert events[-1].problem
    assert torch.equal(out, linear_geglu_ref(x, weight, bias))


# the kernel for Hopper


def gluon_module() -> Any:
    return pytest.importorskip("vidaccel.kernels.ffn.linear_geglu_gluon")


def test_gelu_formula() -> None:
    """In float32, against float64: far below float16's rounding, and exact where ``1 + erf`` has lost the tail."""
    kernel = gluon_module()
    end, *coefficients = (
        np.float32(getattr(kernel, name).value) for name in ("TAIL_END", "C6", "C5", "C4", "C3", "C2", "C1", "C0")
    )
    gate = np.concatenate([np.linspace(-40, 40, 400_001), [1e4, -1e4, 65504, -65504, 0.0]]).astype(np.float32)
    gate = np.concatenate([gate, np.float32([np.inf, -np.inf, np.nan])])
    x = np.fmin(np.abs(gate), end)
    exponent = np.zeros_like(gate)
    for coefficient in coefficients:
        exponent = exponent * x + coefficient
    out = torch.from_numpy(np.maximum(gate, np.float32(0)) - x * np.exp2(exponent))
    torch.testing.assert_close(out[-3:], torch.tensor([math.inf, 0.0, math.nan]), equal_nan=True)
    out, gate = out[:-3], torch.from_numpy(gate[:-3])
    gold, eager = F.gelu(gate.double()), F.gelu(gate)
    half_a_step = (gold.abs() * 2**-12).clamp(min=2**-25)  # of float16, at the least
    error, own = ((y.double() - gold).abs() / half_a_step for y in (out, eager))
    assert error.max() <= min(1 / 32, own.max())
    error, own = ((y.half().double() - gold).abs() / half_a_step for y in (out, eager))
    assert error.max() <= own.max() and error.mean() <= own.mean()


@pytest.mark.parametrize(
    ("out_features", "in_features", "columns"),
    [(1280, 320, {64, 128}), (2560, 640, {64}), (192, 320, {64}), (64, 64, {64}), (1280, 384, {64})],
)
def test_configurations_fit_in_shared_memory(out_features: int, in_features: int, columns: set[int]) -> None:
    configs = gluon_module().gluon_configs(out_features, in_features)
    assert configs[0].columns == max(columns) and {config.columns for config in configs} == columns
    for config in configs:
        numbers = 2 * config.columns * in_features + 64 * 64 * (config.stages + 2)
        assert 2 * numbers <= 226 * 1024 and config.stages >= 3


@pytest.mark.parametrize(
    "shape", [Shape(64, 320, 1280), Shape(128, 1280, 64), Shape(128, 64, 32), Shape(128, 0, 64), Shape(128, 64, 0)]
)
def test_what_the_kernel_declines(shape: Shape) -> None:
    rows, in_features, dim = shape
    with pytest.raises(ValueError, match=f"does not serve M={rows}, K={in_features}, D={dim}"):
        gluon_module().prepare(*shape, torch.float16, torch.device("cpu"))


def compile_gluon(in_features: int, config: Any, dtype: str) -> dict[str, str]:
    kernel = gluon_module()
    element = kernel.gl.float16 if dtype == "fp16" else kernel.gl.bfloat16

    def descriptor(*block: int) -> str:
        layout = kernel.gl.NVMMASharedLayout.get_default_for(list(block), element)
        return f"tensordesc<{dtype}{list(block)},{layout!r}>"

    return compile_for(
        "sm_90",
        kernel.linear_geglu_gluon_kernel,
        {
            "x_desc": descriptor(kernel.TILE_ROWS, kernel.BLOCK_K),
            "w_desc": descriptor(2, config.columns, kernel.BLOCK_K),
            "out_desc": descriptor(kernel.TILE_ROWS, kernel.OUT_COLUMNS),
            "bias_ptr": f"*{dtype}:16",
            "dim": "i32:16",
            **dict.fromkeys(("num_tiles", "tiles_per_column"), "i32"),
        },
        {
            "STEPS": in_features // kernel.BLOCK_K,
            "STAGES": config.stages,
            "REGISTERS": kernel.REGISTERS,
        },
    )


@pytest.mark.slow
@pytest.mark.skipif(not GLUON, reason="another Gluon")
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("out_features", "in_features"), [(1280, 320), (2560, 640)])
def test_a_consumer_computes_while_the_other_is_in_its_epilogue(
    out_features: int, in_features: int, dtype: str
) -> None:
    configs = gluon_module().gluon_configs(out_features, in_features)
    for config in (config for config in configs if config.aligned):
        asm = compile_gluon(in_features, config, dtype)
        assert_no_spills(asm)
        sass = asm["sass"]
        assert "UTMALDG" in sass and "UTMASTG" in sass and "USETMAXREG" in sass
        assert set(re.findall(r"HGMMA\.(\w+)\.", sass)) == {f"64x{2 * config.columns}x16"}
        # first step, further ones, the last wait, for each; waits beyond these would mean serialised products
        assert sass.count("WARPGROUP.DEPBAR") == 3 * 2
        outputs = config.columns // 2  # of a thread
        copies = len(re.findall(r"\bMOV R\d+, R\d+;", sass))
        assert copies < 2 * (outputs + 8), "one of the bias for the other row; sums stay where they are"
        assert sass.count("MUFU.EX2") == 2 * outputs
        epilogues = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0;(.*?)UTMASTG", sass, re.DOTALL)
        assert len(epilogues) == 2
        for epilogue in epilogues:
            assert epilogue.count(";") < (14 if dtype == "fp16" else 15) * outputs
            # barriers of more than this warpgroup's 128 threads would hold one consumer up for the other
            barriers = re.findall(r"BAR\.SYNC\S* (.*?);", epilogue)
            assert barriers and all(barrier.endswith(", 0x80") for barrier in barriers)
            assert "SYNCS.PHASECHK" not in epilogue and "LDG" not in epilogue


# on a GPU


def skip_unless_served(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if reason := LINEAR_GEGLU.unserved(x, weight, bias, impl="gluon"):
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gluon_on_a_gpu(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = draw(shape, dtype, device)
    skip_unless_served(x, weight, bias)
    out = linear_geglu(x, weight, bias, impl="gluon")
    assert out.shape == (1, shape.rows, shape.out_features) and out.is_contiguous()
    assert check.disagreement(LINEAR_GEGLU, (x, weight, bias), out, "math-exact") is None


@pytest.mark.gpu
def test_gluon_takes_tensors_that_start_anywhere(device: torch.device) -> None:
    x, weight, bias = draw(Shape(128, 64, 64), torch.float16, device)
    skip_unless_served(x, weight, bias)
    expected = linear_geglu(x, weight, bias, impl="gluon")
    moved = (F.pad(t.flatten(), (1, 0))[1:].view(t.shape) for t in (x, weight, bias))
    assert torch.equal(linear_geglu(*moved, impl="gluon"), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [Shape(1000, 320, 1280), Shape(129, 320, 2560), Shape(5003, 640, 1280)], ids=str)
def test_every_gluon_configuration(shape: Shape, device: torch.device) -> None:
    """Against a race the same input many times: every run has the same bits."""
    x, weight, bias = draw(shape, torch.float16, device)
    skip_unless_served(x, weight, bias)
    kernel = gluon_module()
    for config in kernel.gluon_configs(shape.out_features, shape.in_features):
        launch = kernel.prepare(*shape, x.dtype, device, config)
        first, again = torch.empty(2, shape.rows, shape.out_features, dtype=x.dtype, device=device)
        launch(x, weight, bias, first)
        assert_matches_reference(first[None], x, weight, bias)
        for _ in range(20):
            again.fill_(float("nan"))
            launch(x, weight, bias, again)
            assert torch.equal(again, first), config


@pytest.mark.gpu
def test_nothing_is_written_beyond_the_output(device: torch.device) -> None:
    shape = Shape(301, 320, 1280)
    x, weight, bias = draw(shape, torch.float16, device)
    skip_unless_served(x, weight, bias)
    kernel = gluon_module()
    for config in kernel.gluon_configs(1280, 320):
        memory = torch.full((3, 301, 1280), 77.0, dtype=x.dtype, device=device)
        kernel.prepare(*shape, x.dtype, device, config)(x, weight, bias, memory[1])
        assert (memory[::2] == 77).all(), config
        assert_matches_reference(memory[1:2], x, weight, bias)


@pytest.mark.gpu
def test_nan_stays_in_its_row(device: torch.device) -> None:
    x, weight, bias = draw(Shape(200, 320, 1280), torch.float16, device)
    skip_unless_served(x, weight, bias)
    x[0, 70, 5] = float("nan")
    rows = linear_geglu(x, weight, bias, impl="gluon").isnan()[0]
    assert rows[70].all() and not rows[:70].any() and not rows[71:].any()


@pytest.mark.gpu
@torch.no_grad()
def test_the_choice_on_a_gpu(device: torch.device, tmp_path: Path) -> None:
    x, weight, bias = draw(Shape(65536, 320, 1280), torch.float16, device)
    with listening() as events:
        out = linear_geglu(x, weight, bias)
    assert_matches_reference(out, x, weight, bias)
    assert events[-1].reason == "", "a kernel of ours that fails is said here"
    assert [event.implementation for event in events[:-1]] == ["triton"] * (events[-1].implementation == TWO_STEP)
    ((name, key, measured),) = choice.remembered()
    assert (name, key["rows"], measured.winner) == ("linear_geglu", 65536, events[-1].implementation)
    compiled = torch.compile(lambda x: linear_geglu(x, weight, bias), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), out), "a graph takes the choice made before"


@pytest.mark.gpu
@torch.no_grad()
def test_nothing_is_measured_during_capture(device: torch.device) -> None:
    x, weight, bias = draw(Shape(65536, 320, 1280), torch.float16, device)
    expected = linear_geglu(x, weight, bias, impl=TWO_STEP)  # warms the library up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear_geglu(x, weight, bias)
    graph.replay()
    assert torch.equal(out, expected)
    assert not list(choice.remembered())


@pytest.mark.gpu
def test_registration(device: torch.device) -> None:
    x, weight, bias = draw(Shape(128, 64, 64), torch.float16, device)
    skip_unless_served(x, weight, bias)
    torch.library.opcheck(LINEAR_GEGLU.registered["gluon"], (x, weight, bias))
