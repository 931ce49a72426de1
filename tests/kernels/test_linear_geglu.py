from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
from kernel_checks import assert_close_to_gold, assert_no_spills, compile_for
from torch import Tensor

from vidaccel.kernels import tuning_cache
from vidaccel.kernels.dispatch import record_choices
from vidaccel.kernels.ffn import linear_geglu as op
from vidaccel.kernels.ffn.geglu import geglu
from vidaccel.kernels.ffn.linear_geglu import TWO_STEP, linear_geglu, linear_geglu_ref


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
    monkeypatch.setattr(op, "_chosen", {})


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
    with record_choices() as choices:
        out = linear_geglu(x, weight, bias)
    assert torch.equal(out, geglu(F.linear(x, weight, bias)))
    assert [(choice.op, choice.reason) for choice in choices] == [("geglu", "")]
    assert_matches_reference(out, x, weight, bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 15)}, r"x must be \[..., K\], .* got x \(3, 15\), weight \(48, 16\), bias \(48,\)"),
        ({"weight": torch.ones(47, 16)}, r".* weight \[2 \* D, K\], .* weight \(47, 16\)"),
        ({"bias": torch.ones(24)}, r".* bias \[2 \* D\], .* bias \(24,\)"),
        ({"impl": "fast"}, r"impl must be one of gluon, two-step, got 'fast'"),
    ],
)
def test_rejects(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.ones(3, 16), "weight": torch.ones(48, 16), "bias": torch.ones(48), **change}
    with pytest.raises(ValueError, match=f"linear_geglu: {message}"):
        linear_geglu(**arguments)


def test_gluon_is_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error if it was forced, two steps and the reason if it was only wished for."""
    x, weight, bias = draw(SMALL, torch.float16, torch.device("cpu"))
    with pytest.raises(ValueError, match="linear_geglu: impl='gluon' cannot run: the kernel is for Hopper GPUs"):
        linear_geglu(x, weight, bias, impl="gluon")
    monkeypatch.setenv("VIDACCEL_IMPL", "linear_geglu=gluon")
    with record_choices() as choices:
        linear_geglu(x, weight, bias)
    assert choices[0] == ("geglu", TWO_STEP, "the kernel is for Hopper GPUs")


def test_what_the_kernel_declines() -> None:
    gluon_module()
    x, weight, bias = draw(Shape(128, 64, 64), torch.float16, torch.device("cpu"))
    assert op._layout_problem(x, weight, bias) is None and op._shape_problem(x, weight) is None
    assert "x is torch.float32" in str(op._layout_problem(x.float(), weight, bias))
    assert "one dtype" in str(op._layout_problem(x, weight, bias.float()))
    assert "contiguous" in str(op._layout_problem(x, weight.T.contiguous().T, bias))
    assert "contiguous" in str(op._layout_problem(F.pad(x, (4, 4))[..., 4:-4], weight, bias))
    assert "more than 64 rows" in str(op._shape_problem(x[:, :64], weight))
    assert "got D=64, K=1280" in str(op._shape_problem(torch.ones(128, 1280), torch.ones(128, 1280)))
    assert "got D=32, K=64" in str(op._shape_problem(x, weight[:64]))


def test_compiles_fullgraph(device: torch.device) -> None:
    x, weight, bias = draw(SMALL, torch.float16, device)
    compiled = torch.compile(lambda x: linear_geglu(x, weight, bias) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), linear_geglu(x, weight, bias) + 1)


def test_a_compiled_graph_takes_the_choice_made_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of what decides traces, too, but for the questions about the GPU."""
    gluon_module()
    x, weight, bias = draw(Shape(128, 64, 64), torch.float16, torch.device("cpu"))

    def problem(*tensors: Tensor) -> str | None:
        return op._layout_problem(*tensors) or op._shape_problem(*tensors[:2])

    monkeypatch.setattr(op, "_gluon_problem", problem)
    monkeypatch.setattr(op, "_large", lambda *args: True)
    op._chosen[op._shape(x, weight)] = "gluon", ""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return lambda *args: (linear_geglu_ref(x, weight, bias),)

    torch.compile(lambda x: linear_geglu(x, weight, bias), fullgraph=True, backend=backend)(x)
    assert "linear_geglu_gluon" in graphs[0].code


# the choice, with made-up clocks


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Every shape is measured, as on a GPU, by a clock that the test sets: milliseconds by implementation."""
    times = {"gluon": 1.0, TWO_STEP: 2.0}
    monkeypatch.setattr(op, "IMPLEMENTATIONS", {name: functools.partial(named_run, name) for name in times})
    monkeypatch.setattr(op, "_gluon_problem", lambda *args: None)
    monkeypatch.setattr(op, "_large", lambda *args: True)
    monkeypatch.setattr(op, "_cache_key", lambda *args: {"shape": str(op._shape(*args))})
    monkeypatch.setattr(tuning_cache, "cuda_milliseconds", lambda run: times[run.args[0]])
    return times


def named_run(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_geglu_ref(x, weight, bias)


def ran() -> tuple[str, str]:
    with record_choices() as choices:
        linear_geglu(*draw(SMALL, torch.float32, torch.device("cpu")))
    return "+".join(choice.impl for choice in choices), choices[0].reason


TWO_STEPS_RAN = "torch"  # what geglu, the second step, says on a CPU


@pytest.fixture(autouse=True)
def geglu_in_torch(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "measuring" in request.fixturenames:
        monkeypatch.setattr("vidaccel.kernels.dispatch.INTERPRETED", False)


def test_ours_has_to_win_by_a_margin(measuring: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran() == ("gluon", "")
    measuring["gluon"] = 3.0
    assert ran() == ("gluon", ""), "a shape is measured once"
    monkeypatch.setattr(op, "_chosen", {})  # as in another process
    assert ran() == ("gluon", ""), "and remembered on disk"


def test_a_tie_goes_to_two_steps(measuring: dict[str, float]) -> None:
    measuring["gluon"] = 1.98
    assert ran() == (TWO_STEPS_RAN, "")


@pytest.mark.parametrize("wish", ["torch", "geglu=triton", "geglu=torch", "linear_geglu=two-step"])
def test_a_wish_for_geglu_is_one_for_two_steps(
    wish: str, measuring: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", wish)
    assert ran()[0] == TWO_STEPS_RAN


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda out: out * 1.01, id="off-by-a-percent"),
        pytest.param(lambda out: torch.full_like(out, float("nan")), id="nan"),
        pytest.param(lambda out: out.index_fill(1, torch.tensor([3]), 0.0), id="one-row-missing"),
    ],
)
def test_a_wrong_result_never_wins(wrong: Callable[[Tensor], Tensor], measuring: dict[str, float]) -> None:
    op.IMPLEMENTATIONS["gluon"] = lambda *args: wrong(linear_geglu_ref(*args))
    impl, reason = ran()
    assert impl == f"{TWO_STEP}+{TWO_STEPS_RAN}" and reason.startswith("gluon: its result is not that of two steps")


def test_a_kernel_that_fails_is_reported(measuring: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_shared_memory(*args: object) -> Tensor:
        raise RuntimeError("out of resource: shared memory\nand more")

    expected = (f"{TWO_STEP}+{TWO_STEPS_RAN}", "gluon: RuntimeError: out of resource: shared memory")
    assert ran()[0] == "gluon"
    op.IMPLEMENTATIONS["gluon"] = out_of_shared_memory
    assert [ran(), ran()] == [expected, expected], "a choice that fails later gives way"
    monkeypatch.setattr(op, "_chosen", {})
    for file in Path(op.tuning_cache._path(op.OP, {})).parent.iterdir():
        file.unlink()
    assert ran() == expected, "so does one that fails while it is measured"


def test_small_shapes_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda = True

        def __init__(self, *shape: int) -> None:
            self.shape = shape

        def numel(self) -> int:
            return math.prod(self.shape)

    large, weight = OnGpu(28, 9216, 320), OnGpu(2560, 320)
    assert op._large(large, weight)
    assert not op._large(OnGpu(1, 9216, 320), weight)
    assert not op._large(torch.ones(2**20, 320, device="meta"), weight), "nothing is measured on a CPU"
    monkeypatch.setenv("VIDACCEL_TUNE", "0")
    assert not op._large(large, weight)


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


def test_a_tile_for_each_consumer() -> None:
    x, weight, bias = draw(Shape(64, 320, 1280), torch.float16, torch.device("cpu"))
    with pytest.raises(ValueError, match="does not serve M=64, K=320, D=1280"):
        gluon_module().launch(x[0], weight, bias, torch.empty(64, 1280))


def test_programs_are_a_multiple_of_the_columns_where_aligned() -> None:
    programs = gluon_module()._programs
    assert [programs(columns, 132, True) for columns in (10, 40, 200)] == [130, 120, 132]
    assert programs(40, 132, False) == 132


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


@pytest.mark.skipif(not triton.__version__.startswith(op.GLUON_VERSIONS), reason="another Gluon")
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
    if problem := op._gluon_problem(x, weight, bias):
        pytest.skip(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gluon_on_a_gpu(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = draw(shape, dtype, device)
    skip_unless_served(x, weight, bias)
    out = linear_geglu(x, weight, bias, impl="gluon")
    assert out.shape == (1, shape.rows, shape.out_features) and out.is_contiguous()
    assert op._why_wrong((x, weight, bias), linear_geglu(x, weight, bias, impl=TWO_STEP), out) is None


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [Shape(1000, 320, 1280), Shape(129, 320, 2560), Shape(5003, 640, 1280)], ids=str)
def test_every_gluon_configuration(shape: Shape, device: torch.device) -> None:
    """Against a race the same input many times: every run has the same bits."""
    x, weight, bias = draw(shape, torch.float16, device)
    skip_unless_served(x, weight, bias)
    kernel = gluon_module()
    for config in kernel.gluon_configs(shape.out_features, shape.in_features):
        first, again = torch.empty(2, shape.rows, shape.out_features, dtype=x.dtype, device=device)
        kernel.launch(x[0], weight, bias, first, config=config)
        assert_matches_reference(first[None], x, weight, bias)
        for _ in range(20):
            again.fill_(float("nan"))
            kernel.launch(x[0], weight, bias, again, config=config)
            assert torch.equal(again, first), config


@pytest.mark.gpu
def test_nothing_is_written_beyond_the_output(device: torch.device) -> None:
    x, weight, bias = draw(Shape(301, 320, 1280), torch.float16, device)
    skip_unless_served(x, weight, bias)
    kernel = gluon_module()
    for config in kernel.gluon_configs(1280, 320):
        memory = torch.full((3, 301, 1280), 77.0, dtype=x.dtype, device=device)
        kernel.launch(x[0], weight, bias, memory[1], config=config)
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
def test_the_choice_on_a_gpu(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = draw(Shape(65536, 320, 1280), torch.float16, device)
    with record_choices() as choices:
        out = linear_geglu(x, weight, bias)
    assert_matches_reference(out, x, weight, bias)
    assert choices[0].reason == "", "a kernel of ours that fails is said here"
    if op._gluon_problem(x, weight, bias) is None:
        assert len(list(tmp_path.rglob("*.json"))) == 1
    monkeypatch.setattr(op, "_chosen", {})
    monkeypatch.setattr(op, "_measure", None)  # nothing is to be measured again
    with record_choices() as again:
        assert torch.equal(linear_geglu(x, weight, bias), out)
    assert again == choices


@pytest.mark.gpu
def test_nothing_is_measured_during_capture(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = draw(Shape(65536, 320, 1280), torch.float16, device)
    monkeypatch.setattr(op, "_measure", None)
    expected = linear_geglu(x, weight, bias, impl=TWO_STEP)  # warms the library up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear_geglu(x, weight, bias)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_registration(device: torch.device) -> None:
    x, weight, bias = draw(Shape(128, 64, 64), torch.float16, device)
    skip_unless_served(x, weight, bias)
    torch.library.opcheck(op._linear_geglu_gluon, (x, weight, bias))
