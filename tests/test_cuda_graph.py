"""CUDA graphs: what is captured, what makes a graph stale, what is refused, and what the report says of it.

Without a GPU a tape takes the place of the graph. Like a graph it holds on to the memory of every tensor and to every
Python value of the call it recorded, so whatever a replay ought to notice and does not shows up as wrong numbers.
"""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from peft import LoraConfig
from PIL import Image
from tiny_models import tiny_svd_pipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from vidaccel import cuda_graph, patch_module, patch_pipeline
from vidaccel.cuda_capture import Captured, CaptureError, CudaCapture
from vidaccel.errors import UsageError
from vidaccel.report import PatchReport

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))


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


class TapeCapture(CudaCapture):
    """Does for the CPU what CudaCapture does for a GPU, and counts it."""

    device_type = "cpu"
    captures = replays = 0
    pools: set[int]

    @staticmethod
    def why_unavailable() -> None:
        return None

    def capturing(self) -> bool:
        return False

    def rehearse(self, run: Callable[[], Any]) -> Any:
        return run()

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

    def follow_last_stream(self, device: torch.device) -> None:
        pass

    def milliseconds(self, run: Callable[[], Any], device: torch.device) -> float:
        run()
        return 1.0

    def wait(self) -> None:
        pass

    def give_back_memory(self) -> None:
        pass


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> type[TapeCapture]:
    """In place of the GPU."""
    monkeypatch.setattr(cuda_graph, "CudaCapture", TapeCapture)
    TapeCapture.captures = TapeCapture.replays = 0
    TapeCapture.pools = set()
    return TapeCapture


@pytest.fixture
def pipe() -> StableVideoDiffusionPipeline:
    return tiny_svd_pipeline()


@pytest.fixture
def unet(pipe: StableVideoDiffusionPipeline) -> UNetSpatioTemporalConditionModel:
    return pipe.unet


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


def graph_site(report: PatchReport) -> Any:
    return next(site for site in report.sites if site.op == "cuda_graph")


def clip(pipe: StableVideoDiffusionPipeline, steps: int = 4) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32, "num_frames": 2}
    out = pipe(IMAGE, **size, num_inference_steps=steps, generator=generator, output_type="np")
    return out.frames[0]


def test_replays_have_the_bits_of_the_patched_call(
    unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture]
) -> None:
    report = patch_module(unet, cuda_graph=True)
    assert graph_site(report).implementation == "not captured yet"
    assert_right(unet, range(5))
    assert (tape.captures, tape.replays) == (1, 4), "three calls, and the check of the graph"
    assert not report.fallbacks
    site = graph_site(report)
    assert (site.state, site.fidelity, site.implementation) == ("active", "bit-exact", "cuda graph")
    assert "cuda graph" in str(report)
    assert report.summary()["ops"]["cuda_graph"]["implementations"] == ["cuda graph"]


def test_same_clip(pipe: StableVideoDiffusionPipeline, tape: type[TapeCapture]) -> None:
    with patch_pipeline(pipe):
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
        with torch.inference_mode(i % 2 == 0), torch.no_grad():
            inputs["sample"] = inputs["sample"] + 1
            assert torch.equal(unet(**inputs).sample, unet._call_impl(**inputs).sample)
    assert tape.captures == 1


def _new_weights(unet: Any) -> None:
    unet.load_state_dict({name: 1.1 * x for name, x in unet.state_dict().items()})


def _weights_elsewhere(unet: Any) -> None:
    unet.mid_block.resnets[0].spatial_res_block.conv1.weight.data = (
        1.1 * unet.mid_block.resnets[0].spatial_res_block.conv1.weight
    )


def _weights_in_place_of_data(unet: Any) -> None:
    for weight in unet.parameters():
        weight.data.mul_(1.1)


def _other_processor(unet: Any) -> None:
    attn = next(module for module in unet.modules() if isinstance(module, Attention))
    attn.scale *= 2
    attn.set_processor(AttnProcessor())


def _lora(unet: Any) -> None:
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


def _attribute(unet: Any) -> None:
    unet.mid_block.resnets[0].time_mixer.merge_strategy = "fixed"
    unet.mid_block.resnets[0].time_mixer.register_buffer("mix_factor", torch.tensor([0.9]))


def _broken_site(unet: Any) -> None:
    block = next(module for module in unet.modules() if hasattr(module, "_vidaccel"))
    block._vidaccel.fail("found wrong by another shape")


def _restored(unet: Any) -> None:
    patch_module(unet, only="group_norm_silu").restore()


CHANGES = (
    _new_weights,
    _weights_elsewhere,
    _weights_in_place_of_data,
    _other_processor,
    _lora,
    _broken_site,
)


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
    in_place = change is _weights_in_place_of_data
    assert tape.captures == (1 if in_place else 2)
    assert reasons(report) == ({} if in_place else {cuda_graph.CHANGED: 1})


def test_lora_scale_and_removal_are_seen(unet: UNetSpatioTemporalConditionModel, tape: type[TapeCapture]) -> None:
    _lora(unet)
    patch_module(unet, cuda_graph=True)
    outputs = []
    for change in (lambda: None, lambda: unet.set_adapters("default", 0.5), unet.disable_adapters):
        change()
        assert_right(unet, range(3))
        outputs.append(called(unet, 0))
    assert not any(torch.equal(outputs[i], outputs[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert tape.captures == 3
