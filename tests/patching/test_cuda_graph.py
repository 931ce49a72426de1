"""CUDA graphs: what is captured, what makes a graph stale, what is refused, and what the report says of it.

Without a GPU a tape takes the place of the graph. Like a graph it holds on to the memory of every tensor and to every
Python value of the call it recorded, so whatever a replay ought to notice and does not shows up as wrong numbers.
"""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import re
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_capture import CpuCapture
from diffusers import StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from PIL import Image
from tiny_models import tiny_svd_pipeline, tiny_svd_unet, tiny_synthetic_pipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from vidaccel import patch_module, patch_pipeline
from vidaccel.blocks.unet import resnet
from vidaccel.errors import UsageError
from vidaccel.patching import cuda_graph, patch
from vidaccel.patching.cuda_capture import Captured, CaptureError
from vidaccel.patching.cuda_graph import Graphs, GraphSite
from vidaccel.patching.model_call import wrap_call
from vidaccel.patching.report import PatchReport

pytestmark = pytest.mark.usefixtures("plain_pytorch")

ONE_LEVEL = {  # with attention in the middle
    "down_block_types": ("DownBlockSpatioTemporal",),
    "up_block_types": ("UpBlockSpatioTemporal",),
    "block_out_channels": (64,),
    "num_attention_heads": (2,),
}
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))


class Tape(TorchDispatchMode):
    """Every operation with the memory it reads and writes, to be run again on that very memory."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, *tree_map_only(Tensor, torch.ops.aten.detach.default, (args, kwargs or {}, out))))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.steps:
            for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(out), strict=True):
                if isinstance(new, Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class TapeCapture(CpuCapture):
    """Does for the CPU what CudaCapture does for a GPU, and counts it."""

    captures = replays = 0
    pools: set[int]

    def capture(self, run: Callable[[], Any], device: torch.device, pool: Any) -> Captured:
        with Tape() as tape:
            outputs = run()
        TapeCapture.captures += 1

        def replay() -> None:
            TapeCapture.replays += 1
            tape.replay()

        pool = pool or object()
        TapeCapture.pools.add(id(pool))
        return Captured(replay, outputs, pool)


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> type[TapeCapture]:
    """In place of the GPU."""
    for module in (cuda_graph, patch):
        monkeypatch.setattr(module, "CudaCapture", TapeCapture)
    TapeCapture.captures = TapeCapture.replays = 0
    TapeCapture.pools = set()
    return TapeCapture


@pytest.fixture
def pipe() -> StableVideoDiffusionPipeline:
    return tiny_svd_pipeline()


@pytest.fixture
def unet() -> UNetSpatioTemporalConditionModel:
    return tiny_svd_unet(**ONE_LEVEL)


def arguments(seed: int, side: int = 4, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "sample": torch.randn(2, 2, 8, side, side, generator=generator),
        "timestep": torch.tensor(1.0 + seed),
        "encoder_hidden_states": torch.randn(2, 1, 32, generator=generator),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02 * seed]] * 2),
    }
    return {name: x.to(device) for name, x in inputs.items()}


@torch.no_grad()
def called(unet: nn.Module, seed: int, **options: Any) -> Tensor:
    return unet(**arguments(seed, **options)).sample


@torch.no_grad()
def without_graph(unet: nn.Module, seed: int, **options: Any) -> Tensor:
    return unet._call_impl(**arguments(seed, **options)).sample


def assert_right(unet: nn.Module, seeds: range, **options: Any) -> None:
    for seed in seeds:
        assert torch.equal(called(unet, seed, **options), without_graph(unet, seed, **options)), seed


def reasons(report: PatchReport) -> dict[str, int]:
    return {reason: calls for (_, op, reason), calls in report.fallbacks.items() if op == "cuda_graph"}


def graphed(model: nn.Module) -> GraphSite:
    """The site of a model that no adapter serves, whose calls are captured."""
    site = GraphSite("model", "cuda_graph", "bit-exact")
    site.put_in_place(lambda: None)
    call = wrap_call(model, "math-exact")
    assert call is not None
    call.graphs = Graphs(site, checks=True, only_if_faster=False)
    return site


def graph_site(report: PatchReport) -> Any:
    return next(site for site in report.sites if site.op == "cuda_graph")


def clip(pipe: StableVideoDiffusionPipeline, steps: int = 4) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    size = {"height": 16, "width": 16, "num_frames": 2}
    out = pipe(IMAGE, **size, num_inference_steps=steps, generator=generator, output_type="np")
    return out.frames[0]


def test_replays_have_the_bits_of_the_patched_call(
    unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture]
) -> None:
    report = patch_module(unet, cuda_graph=True)
    assert graph_site(report).implementation == "not captured yet"
    assert_right(unet, range(5))
    assert (tape.captures, tape.replays) == (1, 5), "four calls, and the check of the graph"
    assert not report.fallbacks
    site = graph_site(report)
    assert (site.state, site.fidelity, site.implementation) == ("active", "bit-exact", "cuda graph")
    assert "cuda graph" in str(report)
    assert report.summary()["ops"]["cuda_graph"]["implementations"] == ["cuda graph"]


def test_same_clip(pipe: StableVideoDiffusionPipeline, tape: type[TapeCapture]) -> None:
    with patch_pipeline(pipe, cuda_graph=False):
        expected = clip(pipe)
    with patch_pipeline(pipe, cuda_graph=True) as report:
        assert np.array_equal(clip(pipe), expected)
        assert np.array_equal(clip(pipe), expected)
        assert [site.path for site in report.sites if site.op == "cuda_graph"] == ["unet"], "none for the VAE"
    assert tape.captures == 1 and not report.fallbacks
    assert "_compiled_call_impl" not in vars(pipe.unet) and graph_site(report).state == "restored"


def test_what_is_returned_is_the_callers(unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture]) -> None:
    patch_module(unet, cuda_graph=True)
    with torch.no_grad():
        for _ in range(3):
            first, second = unet(**arguments(1)), unet(**arguments(2))
            assert type(first) is type(unet._call_impl(**arguments(1)))
            assert first.sample.data_ptr() != second.sample.data_ptr()
            first.sample.zero_()
            assert torch.equal(second.sample, without_graph(unet, 2))
        for _ in range(3):
            (out,) = unet(*arguments(3).values(), return_dict=False)
            assert torch.equal(out, without_graph(unet, 3))
    assert tape.captures == 2


def test_every_kind_of_call_has_its_graph_and_all_share_one_pool(
    unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture]
) -> None:
    patch_module(unet, cuda_graph=True)
    for _ in range(2):
        assert_right(unet, range(3), side=4)
        assert_right(unet, range(3), side=6)
    assert tape.captures == 2 and len(tape.pools) == 1


def test_expanded_and_inference_tensors(unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture]) -> None:
    """Pipelines expand the time step over the batch, and run under no_grad or inference_mode."""
    patch_module(unet, cuda_graph=True)
    for i in range(6):
        inputs = arguments(i)
        inputs["timestep"] = torch.tensor(float(i)).expand(2)
        with torch.inference_mode(i % 2 == 1), torch.no_grad():  # captured in it, replayed in and out of it
            inputs["sample"] = inputs["sample"] + 1
            assert torch.equal(unet(**inputs).sample, unet._call_impl(**inputs).sample)
    assert tape.captures == 1


def _new_weights(unet: Any) -> None:
    unet.load_state_dict({name: 1.1 * x for name, x in unet.state_dict().items()})


def _weights_elsewhere(unet: Any) -> None:
    convolution = unet.mid_block.resnets[0].spatial_res_block.conv1
    convolution.weight.data = 1.1 * convolution.weight.data


def _weights_in_place_of_data(unet: Any) -> None:
    for weight in unet.parameters():
        weight.data.mul_(1.1)


def _other_processor(unet: Any) -> None:
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attn.set_processor(DoublingProcessor())


def _attribute(unet: Any) -> None:
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.rescale_output_factor = 2.0


def _lora(unet: Any) -> None:
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), unet).eval()


def _broken_site(unet: Any) -> None:
    block = next(module for module in unet.modules() if hasattr(module, "_vidaccel"))
    block._vidaccel.fail("found wrong at another shape")


class DoublingProcessor(AttnProcessor):
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(*args, **kwargs)


CHANGES = (
    _new_weights,
    _weights_elsewhere,
    _weights_in_place_of_data,
    _other_processor,
    _attribute,
    _lora,
    _broken_site,
)

IN_PLACE = (_new_weights, _weights_in_place_of_data)  # a graph reads the memory that they write to


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_what_changes_on_the_model_is_seen(
    unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture], change: Callable[[Any], None]
) -> None:
    report = patch_module(unet, cuda_graph=True)
    assert_right(unet, range(3))
    before = called(unet, 3)
    change(unet)
    with torch.no_grad():
        assert change is _broken_site or not torch.equal(without_graph(unet, 3), before)
    assert_right(unet, range(3, 7))
    in_place = change in IN_PLACE
    assert tape.captures == (1 if in_place else 2)
    assert reasons(report) == ({} if in_place else {cuda_graph.CHANGED: 1})


def test_scale_and_switch_of_a_lora_are_seen(unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture]) -> None:
    _lora(unet)
    layers = [module for module in unet.modules() if isinstance(module, LoraLayer)]
    patch_module(unet, cuda_graph=True)
    outputs = []
    changes = (
        lambda layer: None,
        lambda layer: layer.set_scale("default", 0.5),
        lambda layer: layer.enable_adapters(False),
    )
    for change in changes:
        for layer in layers:
            change(layer)
        assert_right(unet, range(3))
        outputs.append(called(unet, 0))
    assert not any(torch.equal(outputs[i], outputs[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert tape.captures == 3


def test_a_graph_takes_the_text_of_every_call(tape: type[TapeCapture]) -> None:
    """The model repeats it for every frame, and its blocks look for the distinct rows of that."""
    pipe, _ = tiny_synthetic_pipeline("modelscope")
    unet = pipe.unet
    patch_module(unet, cuda_graph=True)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        sample, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 2, 8, 8), (1, 5, 32)))
        with torch.no_grad():
            assert torch.equal(unet(sample, 1, text).sample, unet._call_impl(sample, 1, text).sample), seed
    assert tape.captures == 1 and tape.replays == 3


def test_two_pipelines_share_a_denoiser(pipe: StableVideoDiffusionPipeline, tape: type[TapeCapture]) -> None:
    other = StableVideoDiffusionPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    first = patch_pipeline(pipe, cuda_graph=True)
    expected = clip(pipe)
    second = patch_pipeline(other)
    assert graph_site(second) is graph_site(first)
    assert np.array_equal(clip(other), expected) and tape.captures == 1
    second.restore()
    assert graph_site(first).state == "restored" and "_compiled_call_impl" not in vars(pipe.unet)


def test_blocks_restored_under_a_graph(unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture]) -> None:
    expected = called(unet, 2)
    blocks = patch_module(unet, only="geglu", cuda_graph=False)
    report = patch_module(unet, only="unit_division", cuda_graph=True)
    assert_right(unet, range(3))
    blocks.restore()
    assert_right(unet, range(3))
    assert torch.equal(called(unet, 2), expected)
    assert tape.captures == 2 and graph_site(report).state == "active"


def test_first_sight_of_another_shape_may_break_a_site(
    unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph of the shape seen before has the broken kernel in it."""
    patch_module(unet, only="group_norm_silu", cuda_graph=True)
    assert_right(unet, range(3))
    right = resnet.group_norm_module
    monkeypatch.setattr(resnet, "group_norm_module", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    assert_right(unet, range(3), side=6)
    assert_right(unet, range(3), side=4)


def test_python_values_that_keep_changing(unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture]) -> None:
    report = patch_module(unet, cuda_graph=True)
    inputs = {name: x for name, x in arguments(0).items() if name != "timestep"}
    for _ in range(2):
        for timestep in range(10):
            with torch.no_grad():
                out = unet(timestep=float(timestep), **inputs).sample
                assert torch.equal(out, unet._call_impl(timestep=float(timestep), **inputs).sample)
    assert tape.captures == cuda_graph.MAX_VALUES_PER_SHAPE
    assert reasons(report) == {cuda_graph.VALUES_CHANGE: 12}


def test_the_kind_not_used_for_longest_goes(
    unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, "MAX_KINDS", 2)
    patch_module(unet, cuda_graph=True)
    for side in (2, 4, 2, 6, 2):
        assert_right(unet, range(2), side=side)
    assert tape.captures == 3, "side 2 stayed"
    assert_right(unet, range(2), side=4)
    assert tape.captures == 4


def test_a_switch_of_pytorch_is_part_of_the_kind(
    unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_module(unet, cuda_graph=True)
    assert_right(unet, range(3))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert_right(unet, range(3))
    assert tape.captures == 2


def _failing(*args: Any) -> None:
    raise CaptureError("AcceleratorError: operation not permitted when stream is capturing")


def test_a_failed_capture_costs_nothing_but_the_graph(
    unet: UNetSpatioTemporalConditionModel,
    tape: type[TapeCapture],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(TapeCapture, "capture", _failing)
    report = patch_module(unet, cuda_graph=True)
    with caplog.at_level(logging.WARNING, "vidaccel"):
        assert_right(unet, range(5))
    assert reasons(report) == {"AcceleratorError: operation not permitted when stream is capturing": 5}
    assert len(caplog.records) == 1, "tried once"
    assert graph_site(report).implementation == "not captured yet"


def test_a_failed_call_before_the_capture_costs_nothing_but_the_graph(tape: type[TapeCapture]) -> None:
    calls = itertools.count(1)  # not the model's own, which would have changed by them

    class Hungry(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if next(calls) == 2:  # on the static buffers, before the capture
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
            return 2 * x

    model = Hungry().eval()
    site = graphed(model)
    with torch.no_grad():
        assert all(model(torch.full((2,), value)).eq(2 * value).all() for value in (1.0, 2.0, 3.0))
    assert site.fallbacks == {"OutOfMemoryError: CUDA out of memory.": 3}


@pytest.mark.parametrize("self_check", [True, False])
def test_a_graph_with_other_bits_is_found_out(
    unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture], monkeypatch: pytest.MonkeyPatch, self_check: bool
) -> None:
    right = TapeCapture.capture

    def wrong(self: TapeCapture, run: Callable[[], Any], device: torch.device, pool: Any) -> Captured:
        graph = right(self, run, device, pool)
        return graph._replace(replay=lambda: (graph.replay(), graph.outputs.sample.mul_(1 + 1e-6)))

    monkeypatch.setattr(TapeCapture, "capture", wrong)
    report = patch_module(unet, cuda_graph=True, self_check=self_check)
    if self_check:
        assert_right(unet, range(4))
        assert reasons(report) == {"a replay differs in some bits from the call that was captured": 4}
    else:
        called(unet, 0), called(unet, 0)
        assert not torch.equal(called(unet, 0), without_graph(unet, 0)) and not report.fallbacks


@pytest.mark.parametrize(("replay", "kept"), [(0.5, True), (0.99, False)])
def test_auto_keeps_what_is_faster(
    unet: UNetSpatioTemporalConditionModel,
    tape: type[TapeCapture],
    monkeypatch: pytest.MonkeyPatch,
    replay: float,
    kept: bool,
) -> None:
    times = iter((100.0, 100 * replay))
    monkeypatch.setattr(TapeCapture, "milliseconds", lambda *args: next(times))
    report = patch_module(unet, cuda_graph="auto")
    assert_right(unet, range(4))
    assert reasons(report) == ({} if kept else {"it is no faster: 99.0 ms, separate launches 100.0 ms": 4})
    assert graph_site(report).implementation == ("cuda graph" if kept else "not captured yet")


def test_auto_leaves_alone_what_does_not_wait_for_its_launches(
    unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TapeCapture, "queueing_milliseconds", lambda self, run, device: (run(), 5.0, 10.0))
    report = patch_module(unet)
    assert_right(unet, range(3))
    assert reasons(report) == {"the GPU is the slower one: launching takes 5.0 ms of 10.0": 3}
    assert tape.captures == 0


@pytest.mark.parametrize("queueing", [5.0, 10.0])
def test_auto_times_a_call_of_much_work_when_it_comes_again(
    queueing: float, unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by a call of its own: what was timed is what is returned."""
    runs, given = [], []

    def timed(self: TapeCapture, run: partial[Any], device: torch.device) -> tuple[Any, float, float]:
        runs.append(run())
        given.append(run.keywords["sample"])
        return runs[-1], queueing, 10.0

    monkeypatch.setattr(cuda_graph, "MANY_FLOPS", 1)
    monkeypatch.setattr(TapeCapture, "queueing_milliseconds", timed)
    times = iter((10.0, 5.0))  # the call, its graph
    monkeypatch.setattr(TapeCapture, "milliseconds", lambda *args: next(times))
    report = patch_module(unet)
    assert_right(unet, range(1))
    assert not runs
    assert graph_site(report).implementation == "not captured yet"
    inputs = arguments(1)
    with torch.no_grad():
        out = unet(**inputs).sample
    assert len(runs) == 1
    assert given[0] is inputs["sample"]  # of buffers a block may know less, and round otherwise
    slower = "the GPU is the slower one: launching takes 5.0 ms of 10.0"
    assert reasons(report) == ({slower: 1} if queueing < 10 else {})
    assert out is runs[0].sample
    assert tape.captures == (queueing == 10)
    assert_right(unet, range(3))
    assert len(runs) == 1


def test_what_keeps_changing_is_captured_when_it_comes_again(
    unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture]
) -> None:
    patch_module(unet, cuda_graph=True)
    called(unet, 0)
    for _ in range(3):
        _weights_elsewhere(unet)
        assert_right(unet, range(1))
    assert tape.captures == 1
    assert_right(unet, range(1))
    assert tape.captures == 2


def test_a_later_replay_that_differs_is_found(
    unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, "FIRST_AUDIT", 4)
    right = TapeCapture.capture

    def wrong_later(self: TapeCapture, run: Callable[[], Any], device: torch.device, pool: Any) -> Captured:
        graph = right(self, run, device, pool)

        def replay() -> None:
            graph.replay()
            if tape.replays > 4:
                graph.outputs.sample.mul_(1 + 1e-6)

        return graph._replace(replay=replay)

    monkeypatch.setattr(TapeCapture, "capture", wrong_later)
    report = patch_module(unet, cuda_graph=True)
    assert_right(unet, range(8))
    assert reasons(report) == {"a later replay differs in some bits from the call": 4}


def test_an_audit_takes_the_way_that_was_captured(tape: type[TapeCapture], monkeypatch: pytest.MonkeyPatch) -> None:
    """A text block multiplies other matrices where it knows the very tensor that it is given."""
    monkeypatch.setattr(cuda_graph, "FIRST_AUDIT", 2)

    class Denoiser(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 3 if any(x is given for given in known) else x * (1 / 3)

    model = Denoiser().eval()
    known = [torch.full((1,), 5.0), torch.full((1,), 7.0)]
    assert not torch.equal(model(known[0]), model(known[0].clone()))
    site = graphed(model)
    with torch.no_grad():
        for x in [*known, *known, *known]:
            model(x)
    assert not site.fallbacks and tape.replays == 6


def call_from_threads(unet: nn.Module, device: str = "cpu", calls: int = 20) -> None:
    """Each of two threads calls with arguments of its own, and gets what a single thread gets."""
    expected = [without_graph(unet, seed, device=device) for seed in range(2)]
    wrong, together = [], threading.Barrier(2)

    def caller(seed: int) -> None:
        together.wait()
        wrong.extend(i for i in range(calls) if not torch.equal(called(unet, seed, device=device), expected[seed]))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(caller, range(2)))
    assert not wrong


def test_two_threads_each_get_their_own_output(unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture]) -> None:
    report = patch_module(unet, cuda_graph=True)
    call_from_threads(unet)
    assert tape.captures == 1 and not report.fallbacks


class Interrupt(TorchDispatchMode):
    """Ctrl-C at the operation of this number; counts them."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("calls_before", [0, 1])
def test_nothing_is_stale_after_an_interrupt(tape: type[TapeCapture], calls_before: int) -> None:
    """In the call itself, in what captures and checks it, in a replay."""

    def interrupted(at: int) -> int:
        unet = tiny_svd_unet(**ONE_LEVEL)
        report = patch_module(unet, cuda_graph=True)
        assert_right(unet, range(calls_before))
        with Interrupt(at) as interrupt, suppress(KeyboardInterrupt):
            called(unet, 3)
        assert_right(unet, range(4, 7))
        assert not reasons(report) and graph_site(report).implementation == "cuda graph"
        return interrupt.count

    operations = interrupted(0)
    for share in (0.05, 0.25, 0.5, 0.75, 0.99):
        assert interrupted(int(share * operations)) == int(share * operations), share


def _offloaded(unet: nn.Module) -> None:
    unet.mid_block.forward = partial(unet.mid_block.forward)


def _observed(unet: nn.Module) -> None:
    unet.mid_block.resnets[0].register_forward_hook(lambda *_: None)


def _trained(unet: nn.Module) -> None:
    unet.train()


def _compiled(unet: nn.Module) -> None:
    unet.compile(backend="eager")


def _quantised(unet: nn.Module) -> None:
    unet.conv_in.weight = type("PackedParameter", (nn.Parameter,), {})(unet.conv_in.weight.data)


PROBLEMS = {
    _offloaded: "a hook replaced the forward",
    _observed: "forward hooks",
    _trained: "training mode",
    _quantised: "PackedParameter",
}


@pytest.mark.parametrize(("make", "reason"), [*PROBLEMS.items(), (_compiled, "compiled with module.compile()")])
def test_what_cannot_be_captured_is_refused_at_once(
    unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture], make: Callable[[nn.Module], None], reason: str
) -> None:
    make(unet)
    with pytest.raises(UsageError, match=rf"cuda_graph: UNetSpatioTemporalConditionModel: .*{re.escape(reason)}"):
        patch_module(unet, cuda_graph=True)
    assert not any("_vidaccel" in key for module in unet.modules() for key in vars(module)), "nothing was patched"
    report = patch_module(unet, cuda_graph="auto")
    site = graph_site(report)
    assert site.state == "left alone" and reason in site.reason
    assert any(site.state == "active" for site in report.sites)


@pytest.mark.parametrize(("make", "reason"), PROBLEMS.items())
def test_what_comes_later_is_noticed_and_counted(
    unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture], make: Callable[[nn.Module], None], reason: str
) -> None:
    report = patch_module(unet, cuda_graph=True)
    assert_right(unet, range(3))
    make(unet)
    assert_right(unet, range(3))
    assert tape.captures == 1
    (counted,) = (calls for why, calls in reasons(report).items() if reason in why)
    assert counted == 3


def test_no_gpu_is_a_reason(unet: UNetSpatioTemporalConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="there is no CUDA device"):
        patch_module(unet, cuda_graph=True)
    report = patch_module(unet, cuda_graph="auto")
    assert not any(site.op == "cuda_graph" for site in report.sites), "nobody expects one there"


def test_nonsense_is_refused(pipe: StableVideoDiffusionPipeline, tape: type[TapeCapture]) -> None:
    with pytest.raises(UsageError, match="cuda_graph must be True, False or 'auto', got 'yes'"):
        patch_pipeline(pipe, cuda_graph="yes")
    with pytest.raises(UsageError, match="there is no denoiser"):
        patch_module(pipe.vae, cuda_graph=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap
def test_calls_that_are_not_served(unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture]) -> None:
    report = patch_module(unet, only="unit_division", self_check=False, cuda_graph=True)
    unet(**arguments(0))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            unet(**arguments(0))
        given = arguments(0)
        torch.func.vmap(lambda sample: unet(**given | {"sample": sample}).sample)(given["sample"][None])
        unet.to("meta")(**{name: x.to("meta") for name, x in arguments(0).items()})
    counted = reasons(report)
    assert tape.captures == 0
    for words in ("gradients", "autocast", "torch.func", "on meta"):
        assert any(words in reason for reason in counted), words


class Twice(nn.Module):
    """Not a denoiser, but called like one."""

    def forward(self, x: Tensor, write: bool = False, strange: object = None) -> Any:
        return {"x": x.mul_(2) if write else 2 * x, "strange": strange}


def test_models_that_write_to_their_arguments_or_take_and_return_anything(tape: type[TapeCapture]) -> None:
    model = Twice().eval()
    site = graphed(model)
    with torch.no_grad():
        for _ in range(3):
            x = torch.ones(2)
            assert model(x, write=True)["x"] is x and x.eq(2).all()
            model(torch.ones(2), strange=object())
    assert site.fallbacks == {"it writes to its arguments": 2, "an argument is a object": 3}
    assert tape.captures == 0


def test_copies_have_no_graph_and_may_get_one(
    pipe: StableVideoDiffusionPipeline, tape: type[TapeCapture], tmp_path: Path
) -> None:
    patch_pipeline(pipe, cuda_graph=True)
    expected = clip(pipe)
    twin = copy.deepcopy(pipe)
    assert "_compiled_call_impl" not in vars(twin.unet)
    assert np.abs(clip(twin) - expected).max() < 1e-4 and tape.captures == 1, "a copy is a stock model"
    report = patch_pipeline(twin, cuda_graph=True)
    assert np.array_equal(clip(twin), expected) and tape.captures == 2
    assert graph_site(report).implementation == "cuda graph"
    pipe.unet.save_pretrained(tmp_path)
    loaded = UNetSpatioTemporalConditionModel.from_pretrained(tmp_path)
    report.restore()
    patch_module(loaded, skip="channels_last")
    assert set(loaded.state_dict()) == set(pipe.unet.state_dict())


def test_a_model_that_is_no_longer_used_goes_at_once(tape: type[TapeCapture]) -> None:
    unet = tiny_svd_unet(**ONE_LEVEL)
    patch_module(unet, only="geglu", cuda_graph=True)
    called(unet, 0), called(unet, 0), called(unet, 0)
    assert tape.captures == 1
    gone = weakref.ref(unet)
    gc.disable()
    try:
        del unet
        assert gone() is None
    finally:
        gc.enable()


def test_torch_compile_sees_through_it(tape: type[TapeCapture]) -> None:
    model = Twice().eval()
    graphed(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            assert compiled(torch.ones(2))["x"].eq(2).all()
    assert tape.captures == 0


@pytest.fixture
def gpu_pipe(monkeypatch: pytest.MonkeyPatch) -> StableVideoDiffusionPipeline:
    monkeypatch.delenv("VIDACCEL_IMPL")  # the Triton kernels are to be in the graphs
    return tiny_svd_pipeline().to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gpu_same_bits(gpu_pipe: StableVideoDiffusionPipeline, dtype: torch.dtype) -> None:
    unet = gpu_pipe.unet.to(dtype)
    report = patch_module(unet, cuda_graph=True)
    with torch.no_grad():
        for side in (4, 8, 4):
            for seed in range(5):
                inputs = arguments(seed, side, "cuda")
                inputs |= {name: inputs[name].to(dtype) for name in ("sample", "encoder_hidden_states")}
                inputs["timestep"] = inputs["timestep"].expand(2)
                assert torch.equal(unet(**inputs).sample, unet._call_impl(**inputs).sample), (side, seed)
    assert graph_site(report).implementation == "cuda graph" and not reasons(report)


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_gpu_changes_are_seen(gpu_pipe: StableVideoDiffusionPipeline, change: Callable[[Any], None]) -> None:
    unet = gpu_pipe.unet
    report = patch_module(unet, cuda_graph=True)
    assert_right(unet, range(3), device="cuda")
    change(unet)
    assert_right(unet, range(3, 7), device="cuda")
    in_place = change in IN_PLACE
    assert reasons(report) == ({} if in_place else {cuda_graph.CHANGED: 1})


@pytest.mark.gpu
def test_gpu_same_clip_also_of_copies(gpu_pipe: StableVideoDiffusionPipeline, tmp_path: Path) -> None:
    pipe = gpu_pipe
    with patch_pipeline(pipe, cuda_graph=False):
        expected = clip(pipe)
    with patch_pipeline(pipe, cuda_graph=True) as report:
        assert np.array_equal(clip(pipe), expected) and np.array_equal(clip(pipe), expected)
        assert graph_site(report).implementation == "cuda graph" and not reasons(report)
        assert np.abs(clip(copy.deepcopy(pipe)) - expected).max() < 1e-2, "a copy is a stock model"
        pipe.save_pretrained(tmp_path)
    loaded = StableVideoDiffusionPipeline.from_pretrained(tmp_path).to("cuda")
    loaded.set_progress_bar_config(disable=True)
    with patch_pipeline(loaded, cuda_graph="auto"):
        assert np.array_equal(clip(loaded), expected)


@pytest.mark.gpu
def test_gpu_restore_gives_the_memory_back(gpu_pipe: StableVideoDiffusionPipeline) -> None:
    unet = gpu_pipe.unet

    def reserved_with_graph() -> int:
        with patch_module(unet, only="geglu", cuda_graph=True):
            assert_right(unet, range(3), device="cuda", side=16)
            torch.cuda.empty_cache()
            return torch.cuda.memory_reserved()

    reserved_with_graph()  # workspaces of libraries stay
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    assert reserved_with_graph() > before
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.gpu
def test_gpu_calls_on_several_streams(gpu_pipe: StableVideoDiffusionPipeline) -> None:
    unet = gpu_pipe.unet
    patch_module(unet, cuda_graph=True)
    expected = [without_graph(unet, seed, device="cuda") for seed in range(8)]
    outputs = []
    for seed in range(8):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs.append(called(unet, seed, device="cuda"))
    torch.cuda.synchronize()
    assert all(map(torch.equal, outputs, expected))


@pytest.mark.gpu
def test_gpu_two_threads_each_get_their_own_output(gpu_pipe: StableVideoDiffusionPipeline) -> None:
    report = patch_module(gpu_pipe.unet, cuda_graph=True)
    call_from_threads(gpu_pipe.unet, "cuda", calls=200)
    assert graph_site(report).implementation == "cuda graph" and not reasons(report)


@pytest.mark.gpu
def test_gpu_offload_is_refused(gpu_pipe: StableVideoDiffusionPipeline) -> None:
    gpu_pipe.to("cpu").enable_model_cpu_offload()
    with pytest.raises(UsageError, match="offload"):
        patch_pipeline(gpu_pipe, cuda_graph=True)


class Waiting(nn.Module):
    """Its host waits for the GPU in every call."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.sum())


@pytest.mark.gpu
def test_gpu_is_left_clean_by_what_cannot_be_captured() -> None:
    stream = torch.cuda.current_stream()
    waiting, working = Waiting().eval(), Twice().eval()
    sites = [graphed(model) for model in (waiting, working)]
    with torch.no_grad():
        for value in range(1, 6):
            x = torch.full((2,), float(value), device="cuda")
            assert waiting(x).eq(2 * value**2).all()
            assert torch.randn(2, device="cuda").isfinite().all(), "random numbers are drawn as ever"
            assert working(x)["x"].eq(2 * value).all()
    assert torch.cuda.current_stream() == stream
    ((reason, calls),) = sites[0].fallbacks.items()
    assert calls == 5 and "captur" in reason
    assert not sites[1].fallbacks and sites[1].implementation == "cuda graph"


@pytest.mark.gpu
def test_other_threads_may_wait_for_the_gpu_while_a_call_is_captured() -> None:
    ended = threading.Event()

    def wait() -> int:
        x, count = torch.ones(4, device="cuda"), 0
        while not ended.is_set():
            count += float(x.sum()) == 4
        return count

    model = Twice().eval()
    site = graphed(model)
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        waits = pool.submit(wait)
        try:
            for value in range(5):  # each shape is another graph
                x = torch.full((2 + value,), float(value), device="cuda")
                assert model(x)["x"].eq(2 * value).all()
        finally:
            ended.set()
        assert waits.result() > 0
    assert site.implementation == "cuda graph"
