"""That a direct launch runs the very kernel, with the very arguments, that Triton's own launch would.

Without a GPU, Triton is given a driver and a compiler that do nothing but tell what they are asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from tiny_models import tiny_svd_pipeline
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import JITFunction

from vidaccel import patch_module
from vidaccel.kernels import launch as launching
from vidaccel.kernels.attention.temporal_attention import temporal_attention
from vidaccel.kernels.conv.conv_epilogue import conv_epilogue
from vidaccel.kernels.ffn.geglu import geglu
from vidaccel.kernels.launch import Launch, constants_overridden, prepared
from vidaccel.kernels.norm.add_layer_norm import add_layer_norm
from vidaccel.kernels.norm.group_norm_silu import group_norm_silu

pytestmark = pytest.mark.skipif(not launching.DIRECT, reason="launches go through this version of Triton as ever")

GLOBAL: tl.constexpr = tl.constexpr(3)


class Driver:
    """A GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 77


class Compiled:
    """What Triton's compiler would return; remembers what it was launched with."""

    function, packed_metadata = 11, (4, 1, 0)

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        grid, stream, kernel, arguments = args[:3], args[3], args[4:6], args[9:]
        self.launches.append((grid, stream, kernel, arguments))


@pytest.fixture(params=[GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)], ids=["cuda", "hip"])
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(request.param))
    launching._runtime.cache_clear()
    yield
    launching._runtime.cache_clear()


def function(x_ptr, y_ptr, size, width, eps, BLOCK: tl.constexpr, FLAG: tl.constexpr):  # type: ignore[no-untyped-def]
    pass


def function_of_a_global(x_ptr, y_ptr, size, width, eps, BLOCK: tl.constexpr, FLAG: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.static_assert(BLOCK > GLOBAL)


def jit(fn: Callable[..., None] = function) -> Any:
    """A kernel that is compiled to a :class:`Compiled`."""
    kernel = JITFunction(fn, do_not_specialize=["width"])
    assert kernel.device_caches[0]  # asking for them sets the compiler that is replaced here

    def compile(src: Any, **kwargs: Any) -> Compiled:
        assert src.fn.cache_key  # the walk through the source that finds globals
        return Compiled()

    kernel.compile = compile
    return kernel


def tensor(dtype: torch.dtype = torch.float16, offset: int = 0) -> Tensor:
    return torch.zeros(64, dtype=dtype)[offset:]


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


def prepare(kernel: Any, arguments: dict[str, Any]) -> tuple[Launch, tuple[Tensor | None, ...]]:
    x, y, size, width, eps, *_ = arguments.values()
    constants = dict(list(arguments.items())[5:])
    return Launch(kernel, (5, 6), size, width, eps, **constants), (x, y)


def launched_by_triton(launch: Launch, tensors: tuple[Tensor | None, ...]) -> tuple[Compiled, tuple[Any, ...]]:
    compiled = launch._through_triton(tensors)
    return compiled, compiled.launches[-1]


def launched_directly(
    launch: Launch, tensors: tuple[Tensor | None, ...], monkeypatch: pytest.MonkeyPatch
) -> tuple[Compiled, tuple[Any, ...]]:
    launch._here(0, tensors)
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda *args, **kwargs: pytest.fail("went through Triton again"))
        launch._here(0, tensors)
    kernels = [k for k in launch._kernel.device_caches[0][0].values() if k.launches]
    (ran,) = [k for k in kernels if len(k.launches) > 1]
    return ran, ran.launches[-1]


def forget_launches(kernel: Any) -> None:
    for compiled in kernel.device_caches[0][0].values():
        compiled.launches.clear()


@pytest.mark.parametrize("change", CHANGES)
def test_runs_the_kernel_that_triton_would(
    change: dict[str, Any], driver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = jit()
    ways = [prepare(kernel, arguments) for arguments in (ARGUMENTS, ARGUMENTS | change)]
    for launch, tensors in (*ways, *ways):
        expected = launched_by_triton(launch, tensors)
        forget_launches(kernel)
        ran, arguments = launched_directly(launch, tensors, monkeypatch)
        assert ran is expected[0]
        assert arguments[:3] == expected[1][:3]
        for ours, theirs in zip(arguments[3], expected[1][3], strict=True):
            assert ours is theirs or (type(ours) is type(theirs) and ours == theirs)
        forget_launches(kernel)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    "x", [tensor(torch.float32), tensor(offset=1), tensor(offset=8)], ids=["dtype", "misaligned", "aligned"]
)
def test_one_launch_serves_any_tensors(x: Tensor, first: int, driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = jit()
    launch, (usual, y) = prepare(kernel, ARGUMENTS)
    ran = []
    for each in [(usual, x), (x, usual)][first] * 2:
        expected, _ = launched_by_triton(launch, (each, y))
        forget_launches(kernel)
        ran.append(launched_directly(launch, (each, y), monkeypatch)[0])
        assert ran[-1] is expected
        forget_launches(kernel)
    aligned_alike = x.dtype == usual.dtype and x.data_ptr() % 16 == 0
    assert (ran[0] is ran[1]) == aligned_alike


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
    launch, tensors = prepare(kernel, ARGUMENTS)
    for _ in range(3):
        launch._here(0, tensors)
    assert not launch._compiled
    (compiled,) = kernel.device_caches[0][0].values()
    assert len(compiled.launches) == 3


def test_an_observer_that_comes_later_sees_the_launch(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = jit()
    launch, tensors = prepare(kernel, ARGUMENTS)
    launch._here(0, tensors)
    launch._here(0, tensors)
    seen: list[Any] = []
    kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(args))
    launch._here(0, tensors)
    assert len(seen) == 1


def test_globals_are_compared_at_every_launch(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, tensors = prepare(jit(function_of_a_global), ARGUMENTS)
    launch._here(0, tensors)
    monkeypatch.setitem(globals(), "GLOBAL", tl.constexpr(5))
    with pytest.raises(RuntimeError, match="has changed since we compiled"):
        launch._here(0, tensors)


def test_numbers_of_another_type_are_prepared_apart() -> None:
    @prepared
    def kind(x: float) -> type:
        return type(x)

    assert [kind(0), kind(0.0), kind(False), kind(0)] == [int, float, bool, int]


def test_overridden_constants_reach_the_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[dict[str, Any]] = []
    monkeypatch.setattr(Launch, "_through_triton", lambda self, tensors: launches.append(self._constants))
    staged = Launch(JITFunction(function), (1,), BLOCK=64, FLAG=3)
    unstaged = Launch(JITFunction(function), (1,), BLOCK=64)
    for launch in (staged, unstaged):
        launch(torch.zeros(1))
        with constants_overridden(FLAG=1):
            launch(torch.zeros(1))
        launch(torch.zeros(1))
    assert [constants.get("FLAG") for constants in launches] == [3, 1, 3, None, None, None]
    assert all(constants["BLOCK"] == 64 for constants in launches)


@pytest.mark.parametrize("scratch", [0, 16])
def test_asks_of_the_launcher_what_triton_asks(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own call allocates scratch memory first, if the kernel wants some."""
    allocator = mock.Mock(get=lambda: lambda *args: "scratch")
    monkeypatch.setattr(triton.runtime._allocation, "_profile_allocator", allocator)
    launches: list[tuple[Any, ...]] = []
    run = CudaLauncher.__new__(CudaLauncher)
    run.num_ctas, run.launch_cooperative_grid, run.launch_pdl = 1, "cooperative", "pdl"
    run.global_scratch_size, run.global_scratch_align = 0, 1
    run.profile_scratch_size, run.profile_scratch_align = scratch, 1
    run.launch = lambda *args: launches.append(args)
    compiled = mock.Mock(run=run, function="function", packed_metadata="metadata")
    ours = launching._compiled(compiled)
    ours.run(1, 2, 3, "stream", *ours.head, "x", "y")
    run(1, 2, 3, "stream", "function", "metadata", None, None, None, "x", "y")
    assert launches[0] == launches[1]


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


def launch_of(kernel: Any) -> Launch:
    return Launch(kernel, (1,), 32, 33, 1e-5, BLOCK=64, FLAG=True, num_warps=4)


def test_the_first_launch_waits_for_what_is_compiled_ahead(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, go, order = jit(), threading.Event(), []
    compile = kernel.compile

    def slowly(*args: Any, **kwargs: Any) -> Compiled:
        assert go.wait(10)
        order.append(threading.current_thread().name)
        return compile(*args, **kwargs)

    kernel.compile = slowly
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    device = torch.device("cuda", 0)
    launch_of(kernel).compile_ahead(device, torch.float16, torch.float16)
    launch_of(kernel).compile_ahead(device, torch.float16, torch.float16)  # begun already
    threading.Timer(0.1, go.set).start()
    launch_of(kernel)(tensor(), tensor())
    assert len(order) == 1 and order[0].startswith("vidaccel-compile")
    assert not launching._ahead


def test_a_failure_ahead_is_left_to_the_launch(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = jit()
    kernel.compile = mock.Mock(side_effect=RuntimeError("no such instruction"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    launch_of(kernel).compile_ahead(torch.device("cuda", 0), torch.float16, torch.float16)
    with pytest.raises(RuntimeError, match="no such instruction"):
        launch_of(kernel)(tensor(), tensor())
    assert kernel.compile.call_count == 2


def test_nothing_is_compiled_ahead_without_a_gpu(driver: None) -> None:
    launch_of(jit()).compile_ahead(torch.device("cpu"), torch.float16, torch.float16)
    assert not launching._ahead


@pytest.mark.gpu
@torch.no_grad()
def test_what_is_compiled_ahead_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of a patched UNet's first call that was foretold: none is compiled twice."""
    unet = tiny_svd_pipeline().unet.to("cuda", torch.float16)
    compiled: list[tuple[str, str]] = []

    def listen(*, src: Any, metadata: dict[str, Any], times: Any, **_: Any) -> None:
        compiled.append((src.name, threading.current_thread().name.partition("_")[0]))

    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    with patch_module(unet):
        inputs = (torch.randn(1, 2, 8, 8, 8), torch.tensor(0.5), torch.randn(1, 1, 32), torch.ones(1, 3))
        unet(*(x.to("cuda", torch.float16) for x in inputs))
    norms = [thread for name, thread in compiled if name == "_add_layer_norm_kernel"]
    assert norms and all(thread == "vidaccel-compile" for thread in norms)


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
