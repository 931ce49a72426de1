"""That a direct launch runs the very kernel, with the very arguments, that Triton's own launch would.

Without a GPU, Triton is given a driver and a compiler that do nothing but record what they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import JITFunction

from vidaccel.kernels import launch as launching
from vidaccel.kernels.attention.temporal_attention import temporal_attention
from vidaccel.kernels.conv.conv_epilogue import conv_epilogue
from vidaccel.kernels.ffn.geglu import geglu
from vidaccel.kernels.launch import Launch, prepared
from vidaccel.kernels.norm.add_layer_norm import add_layer_norm
from vidaccel.kernels.norm.group_norm_silu import group_norm_silu
from vidaccel.kernels.settings import constants_overridden

pytestmark = pytest.mark.skipif(not launching.DIRECT, reason="this version of Triton launches by itself")

GLOBAL: tl.constexpr = tl.constexpr(3)


class Driver:
    """GPUs that are not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return torch.cuda.current_device()

    def get_current_stream(self, device: int) -> int:
        return 77 + device


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU."""

    device_index = 0
    is_cuda = True  # type: ignore[assignment]

    def get_device(self) -> int:
        return self.device_index


class Run(NamedTuple):
    """One launch of a compiled kernel."""

    kernel: Compiled
    grid: tuple[int, ...]
    stream: int
    function: tuple[Any, ...]
    arguments: list[Any]


class Compiled:
    """What Triton's compiler would return; its launches are added to ``runs``."""

    function, packed_metadata = 11, (4, 1, 0)

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in args[9:]]
        self.runs.append(Run(self, args[:3], args[3], args[4:6], addresses))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    current = [0]

    class Device(nullcontext):  # type: ignore[type-arg]
        def __init__(self, device: int) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)


def function(x_ptr, y_ptr, size, width, eps, BLOCK: tl.constexpr, FLAG: tl.constexpr):  # type: ignore[no-untyped-def]
    pass


def function_of_a_global(x_ptr, y_ptr, size, width, eps, BLOCK: tl.constexpr, FLAG: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.static_assert(BLOCK > GLOBAL)


def jit(fn: Callable[..., None] = function) -> Any:
    """A kernel that is compiled to a :class:`Compiled`; its ``runs`` are all launches."""
    kernel: Any = JITFunction(fn, do_not_specialize=["width"])
    kernel.runs = []
    for device in (0, 1):
        assert kernel.device_caches[device]  # asking for them sets the compiler that is replaced here

    def compile(src: Any, **kwargs: Any) -> Compiled:
        assert src.fn.cache_key  # the walk through the source that finds globals
        return Compiled(kernel.runs)

    kernel.compile = compile
    return kernel


def tensor(dtype: torch.dtype = torch.float16, offset: int = 0) -> Tensor:
    return torch.zeros(64, dtype=dtype)[offset:].as_subclass(OnGpu)


ARGUMENTS: dict[str, Any] = {
    "x": tensor(),
    "y": tensor(),
    "size": 32,
    "width": 32,
    "eps": 1e-5,
    "BLOCK": 64,
    "FLAG": True,
    "num_warps": 4,
    "enable_fp_fusion": True,
}
CHANGES = [
    pytest.param({"x": tensor(torch.float32)}, id="dtype"),
    pytest.param({"y": tensor(torch.bfloat16)}, id="dtype-of-the-second"),
    pytest.param({"x": tensor(offset=1)}, id="alignment"),
    pytest.param({"y": tensor(offset=8)}, id="other-address-as-aligned"),
    pytest.param({"y": None}, id="no-pointer"),
    pytest.param({"size": 33}, id="divisibility"),
    pytest.param({"size": 48}, id="other-value-as-divisible"),
    pytest.param({"size": 1}, id="one"),
    pytest.param({"size": 0}, id="zero"),
    pytest.param({"size": 2**31}, id="64-bits"),
    pytest.param({"size": 2**63}, id="unsigned"),
    pytest.param({"size": -(2**31) - 1}, id="negative-64-bits"),
    pytest.param({"size": 32.0}, id="float-for-integer"),
    pytest.param({"width": 33}, id="unspecialised"),
    pytest.param({"width": 1}, id="unspecialised-one"),
    pytest.param({"width": 2**31}, id="unspecialised-64-bits"),
    pytest.param({"eps": 1e-6}, id="float"),
    pytest.param({"eps": 1}, id="integer-for-float"),
    pytest.param({"BLOCK": 128}, id="constexpr"),
    pytest.param({"FLAG": False}, id="flag"),
    pytest.param({"FLAG": None}, id="none-for-flag"),
    pytest.param({"num_warps": 8}, id="warps"),
    pytest.param({"enable_fp_fusion": False}, id="option"),
]


def prepare(kernel: Any, arguments: dict[str, Any]) -> tuple[Launch, Callable[[], None]]:
    """A launch, and the same by Triton."""
    x, y, *numbers = list(arguments.values())[:5]
    constants = dict(list(arguments.items())[5:])
    launch = Launch(kernel, (5, 6), *numbers, **constants)
    return launch, lambda: kernel[(5, 6)](x, x if y is None else y, *numbers, **constants)


def run_directly(launch: Launch, tensors: tuple[Tensor | None, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch after a first launch, without Triton's help."""
    launch(*tensors)
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda *args, **kwargs: pytest.fail("went through Triton again"))
        launch(*tensors)


@pytest.mark.parametrize("change", CHANGES)
def test_runs_the_kernel_that_triton_would(
    change: dict[str, Any], driver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = jit()
    ways = [(prepare(kernel, arguments), arguments) for arguments in (ARGUMENTS, ARGUMENTS | change)]
    for (launch, by_triton), arguments in (*ways, *ways):
        by_triton()
        run_directly(launch, (arguments["x"], arguments["y"]), monkeypatch)
        expected, ran = kernel.runs[-3], kernel.runs[-1]
        assert ran == expected
        assert [*map(type, ran.arguments)] == [*map(type, expected.arguments)]  # True == 1 == 1.0


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    "x", [tensor(torch.float32), tensor(offset=1), tensor(offset=8)], ids=["dtype", "misaligned", "aligned"]
)
def test_one_launch_serves_any_tensors(x: Tensor, first: int, driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = jit()
    usual, y = tensor(), tensor()
    launch, _ = prepare(kernel, ARGUMENTS)
    ran = []
    for each in [(usual, x), (x, usual)][first] * 2:
        _, by_triton = prepare(kernel, ARGUMENTS | {"x": each, "y": y})
        by_triton()
        run_directly(launch, (each, y), monkeypatch)
        assert kernel.runs[-1] == kernel.runs[-3]
        ran.append(kernel.runs[-1].kernel)
    aligned_alike = x.dtype == usual.dtype and x.data_ptr() % 16 == 0
    assert (ran[0] is ran[1]) == aligned_alike


def test_many_alignments_push_out_one_another(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidaccel.kernels.launch.MOST_COMPILED", 1)
    kernel = jit()
    usual, other = tensor(), tensor(offset=1)
    launch, _ = prepare(kernel, ARGUMENTS)
    for each in (usual, other) * 2:
        run_directly(launch, (each, usual), monkeypatch)
    assert kernel.runs[0] == kernel.runs[-4] and kernel.runs[2] == kernel.runs[-2]


def test_launches_on_the_device_of_its_tensors(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = jit()
    launch, _ = prepare(kernel, ARGUMENTS)
    here, there = tensor(), tensor()
    there.device_index = 1  # type: ignore[attr-defined]
    for x in (here, there) * 2:
        run_directly(launch, (x, x), monkeypatch)
    assert [run.stream for run in kernel.runs] == [77, 77, 78, 78] * 2
    assert len({run.kernel for run in kernel.runs}) == 2


def hook(*args: Any, **kwargs: Any) -> None:
    pass


def observe_by_hook(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [hook])


def observe_by_exit_hook(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime.launch_exit_hook, "calls", [hook])


def observe_by_another_chain(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "launch_exit_hook", hook)


def observe_before_the_run(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.add_pre_run_hook(hook)


def debug(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)


def another_version(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "DIRECT", False)


@pytest.mark.parametrize(
    "disturb",
    [observe_by_hook, observe_by_exit_hook, observe_by_another_chain, observe_before_the_run, debug, another_version],
)
def test_goes_through_triton_where_it_must(
    disturb: Callable[[Any, pytest.MonkeyPatch], None], driver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = jit()
    disturb(kernel, monkeypatch)
    through_triton = mock.Mock(wraps=kernel.run)
    kernel.run = through_triton
    launch, _ = prepare(kernel, ARGUMENTS)
    for _ in range(3):
        launch(tensor(), tensor())
    assert through_triton.call_count == len(kernel.runs) == 3


def test_an_observer_that_comes_later_sees_the_launch(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = jit()
    launch, _ = prepare(kernel, ARGUMENTS)
    launch(tensor(), tensor())
    launch(tensor(), tensor())
    seen: list[Any] = []
    kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(args))
    launch(tensor(), tensor())
    assert len(seen) == 1


def test_globals_are_compared_at_every_launch(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, _ = prepare(jit(function_of_a_global), ARGUMENTS)
    launch(tensor(), tensor())
    monkeypatch.setitem(globals(), "GLOBAL", tl.constexpr(5))
    with pytest.raises(RuntimeError, match="has changed since we compiled"):
        launch(tensor(), tensor())


def test_numbers_of_another_type_are_prepared_apart() -> None:
    @prepared
    def kind(x: float) -> type:
        return type(x)

    assert [kind(0), kind(0.0), kind(False), kind(0)] == [int, float, bool, int]


def test_overridden_constants_reach_the_launches(driver: None) -> None:
    kernel = jit()

    @prepared
    def launch(flag: int) -> Launch:
        return Launch(kernel, (1,), 1, 1, 1.0, BLOCK=64, FLAG=flag)

    def flag_of_a_launch() -> int:
        launch(3)(tensor(), tensor())
        return kernel.runs[-1].arguments[-1]

    assert flag_of_a_launch() == 3
    with constants_overridden(FLAG=1, OTHER=2), ThreadPoolExecutor(1) as another_thread:
        assert flag_of_a_launch() == 1
        assert another_thread.submit(flag_of_a_launch).result() == 3
        with constants_overridden(FLAG=2):
            assert flag_of_a_launch() == 2
    assert flag_of_a_launch() == 3
    assert all(run.arguments[-2] == 64 for run in kernel.runs)


@pytest.mark.parametrize("scratch", [0, 16])
def test_asks_of_the_launcher_what_triton_asks(scratch: int, driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own call allocates scratch memory first, if the kernel wants some."""
    allocator = mock.Mock(get=lambda: lambda *args: "scratch")
    monkeypatch.setattr(triton.runtime._allocation, "_profile_allocator", allocator)
    launches: list[list[Any]] = []

    def record(*args: Any) -> None:
        but_hooks = (*args[:10], *args[13:])
        launches.append([x.data_ptr() if isinstance(x, Tensor) else x for x in but_hooks])

    run = CudaLauncher.__new__(CudaLauncher)
    run.num_ctas, run.launch_cooperative_grid, run.launch_pdl = 1, "cooperative", "pdl"
    run.global_scratch_size, run.global_scratch_align = 0, 1
    run.profile_scratch_size, run.profile_scratch_align = scratch, 1
    run.launch = record
    kernel = jit()
    monkeypatch.setattr(Compiled, "run", run)
    run_directly(prepare(kernel, ARGUMENTS)[0], (tensor(), None), monkeypatch)
    assert launches[0] == launches[1]
    assert ("scratch" in launches[1]) == bool(scratch)


def draw(*shape: int, offset: int = 0) -> Tensor:
    """Random numbers whose first does not lie at a multiple of 16 bytes, if ``offset`` is odd."""
    size = torch.Size(shape).numel()
    return torch.randn(size + offset, device="cuda", dtype=torch.float16)[offset:].view(shape)


def run_everything() -> list[Tensor]:
    """Ops in sizes and alignments of all kinds, the same sizes more than once."""
    outputs = []
    for offset in (0, 1, 8, 0):
        for channels, rows in ((32, 1), (64, 17), (320, 48), (32, 16)):
            x, weight = draw(4, rows, channels, offset=offset), draw(channels, offset=offset)
            image = x.unflatten(1, (1, rows)).permute(0, 3, 1, 2)
            outputs += [geglu(x), *add_layer_norm(x, weight, weight, 1e-5, residual=x)]
            outputs += [group_norm_silu(image, weight, weight, 8, 1e-5), conv_epilogue(image, weight, image)]
            outputs += [temporal_attention(x, x, x, 2, 2 if channels > 32 else 1)]
    return outputs


@pytest.mark.gpu
@torch.no_grad()
def test_direct_launches_compute_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [hook])  # sends every launch through Triton
        expected = run_everything()
    for attempt in range(2):
        torch.manual_seed(0)
        with monkeypatch.context() as patch:
            if attempt:
                patch.setattr(JITFunction, "run", lambda *args, **kwargs: pytest.fail("went through Triton again"))
            for out, wanted in zip(run_everything(), expected, strict=True):
                assert torch.equal(out, wanted)


@pytest.mark.gpu
@torch.no_grad()
def test_direct_launches_are_captured() -> None:
    x, weight = draw(4, 320, 8, 8), draw(320)
    for _ in range(2):
        expected = group_norm_silu(x, weight, weight, 32, 1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = group_norm_silu(x, weight, weight, 32, 1e-5)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    x.mul_(-3)
    graph.replay()
    assert torch.equal(out, group_norm_silu(x, weight, weight, 32, 1e-5))


@pytest.mark.gpu
@torch.no_grad()
def test_launches_on_the_current_stream() -> None:
    x = draw(4096, 4096)
    expected = geglu(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = geglu(x)
    stream.synchronize()
    assert torch.equal(out, expected)
