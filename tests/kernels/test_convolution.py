from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_close_to_gold
from torch import Tensor

from vidaccel.kernels import tuning_cache
from vidaccel.kernels.conv import convolution as op
from vidaccel.kernels.conv.convolution import HEURISTICS, TRIED, convolve
from vidaccel.kernels.dispatch import record_choices

PLANE = ((1, 1), (1, 1), (1, 1), 1)
FRAMES = ((1, 1, 1), (1, 0, 0), (1, 1, 1), 1)


class OnGpu(Tensor):
    is_cuda = True


def draw(shape: tuple[int, ...], kernel: tuple[int, ...], channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and weight, float16, in channels-last memory."""
    torch.manual_seed(0)
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = torch.randn(shape, device=device).half()
    weight = torch.randn(channels, shape[1], *kernel, device=device).half() / (shape[1] * len(kernel)) ** 0.5
    return x.contiguous(memory_format=memory_format), weight.contiguous(memory_format=memory_format)


@pytest.fixture
def small_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every convolution is worth measuring, on a GPU that is not there; returns where answers are kept."""
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(op, "_chosen", {})
    monkeypatch.setattr(op, "MEASURED_FLOPS", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return tmp_path


@pytest.mark.parametrize(
    ("shape", "kernel", "geometry"),
    [
        pytest.param((2, 8, 5, 7), (3, 3), PLANE, id="plane"),
        pytest.param((2, 8, 5, 7), (3, 3), ((2, 2), (0, 1), (1, 2), 2), id="any-geometry"),
        pytest.param((2, 8, 3, 5, 7), (3, 1, 1), FRAMES, id="frames"),
    ],
)
def test_is_a_convolution_without_bias(
    shape: tuple[int, ...], kernel: tuple[int, ...], geometry: Any, device: torch.device
) -> None:
    x, weight = draw(shape, kernel, 16, device)
    weight = weight[:, : 8 // geometry[3]]
    convolution: Any = F.conv2d if x.ndim == 4 else F.conv3d
    assert torch.equal(convolve(x, weight, *geometry), convolution(x, weight, None, *geometry))
    compiled = torch.compile(lambda x: convolve(x, weight, *geometry), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), convolve(x, weight, *geometry))


def test_the_faster_way_is_taken(small_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw((2, 16, 5, 7), (3, 3), 16, torch.device("cpu"))
    arguments = op._Arguments(x.as_subclass(OnGpu), weight, *PLANE)
    for winner in (TRIED, HEURISTICS):
        measured = tuning_cache.Measured(winner, {}, {})
        with mock.patch.object(op, "_measure", return_value=measured) as measure:
            assert op._choose(arguments) == winner
            op._chosen.clear()  # as in another process
            assert op._choose(arguments) == winner and measure.call_count == 1
        arguments = arguments._replace(stride=(2, 2))  # another shape, another question
    assert len(list(small_gpu.rglob("*.json"))) == 2
    with mock.patch.object(op, "_measure", return_value=None):  # neither could run
        assert op._choose(arguments._replace(stride=(2, 1))) == HEURISTICS
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert op._choose(arguments._replace(stride=(1, 2))) == HEURISTICS, "it waits for a call that may be timed"
    assert (1, 2) not in {geometry[0] for _, _, _, _, *geometry in op._chosen}


def test_what_is_not_measured(small_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw((2, 16, 5, 7), (3, 3), 16, torch.device("cpu"))
    on_gpu = op._Arguments(x.as_subclass(OnGpu), weight, *PLANE)
    with mock.patch.object(op, "_measure", side_effect=AssertionError("it has measured")):
        assert op._choose(on_gpu._replace(x=x)) == HEURISTICS
        assert op._choose(on_gpu._replace(x=x.float().as_subclass(OnGpu))) == HEURISTICS
        assert op._choose(on_gpu._replace(weight=weight.float())) == HEURISTICS
        assert op._choose(on_gpu._replace(weight=weight.contiguous())) == HEURISTICS
        assert op._choose(on_gpu._replace(weight=weight.clone().requires_grad_())) == HEURISTICS
        for name in ("benchmark", "deterministic"):
            with monkeypatch.context() as context:
                context.setattr(torch.backends.cudnn, name, True)
                assert op._choose(on_gpu) == HEURISTICS
        monkeypatch.setenv("VIDACCEL_TUNE", "0")
        assert op._choose(on_gpu) == HEURISTICS
        monkeypatch.delenv("VIDACCEL_TUNE")
        monkeypatch.setattr(op, "MOST_MEASURED", x.numel() - 1)
        assert op._choose(on_gpu) == HEURISTICS


def test_a_wrong_result_cannot_win() -> None:
    expected = torch.randn(2, 8, 5, 7).half().contiguous(memory_format=torch.channels_last)
    assert op._why_wrong(expected, expected.clone()) is None
    assert op._why_wrong(expected, expected * 1.01) == "its result is not that of the heuristics"
    assert op._why_wrong(expected, expected * float("nan")) == "its result is not that of the heuristics"
    assert op._why_wrong(expected, expected.contiguous()) == "its result lies otherwise in memory"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "kernel", "geometry"),
    [
        pytest.param((32, 1280, 8, 8), (3, 3), PLANE, id="modelscope-deep"),
        pytest.param((32, 640, 16, 16), (3, 3), ((2, 2), (1, 1), (1, 1), 1), id="downsampler"),
        pytest.param((2, 1280, 16, 4, 4), (3, 1, 1), FRAMES, id="modelscope-frames"),
    ],
)
def test_both_ways_on_a_gpu(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    geometry: Any,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(op, "_chosen", {})
    monkeypatch.setattr(op, "MEASURED_FLOPS", 0)
    x, weight = draw(shape, kernel, 1280, device)
    convolution: Any = F.conv2d if x.ndim == 4 else F.conv3d
    gold, eager = convolution(x.double(), weight.double(), None, *geometry), convolution(x, weight, None, *geometry)
    measured = op._measure(op._Arguments(x, weight, *geometry))
    assert measured and set(measured.milliseconds) == {HEURISTICS, TRIED} and not measured.problems
    for winner in (TRIED, HEURISTICS):
        op._chosen.clear()
        monkeypatch.setattr(tuning_cache, "settled", lambda *_, winner=winner: measured._replace(winner=winner))
        with record_choices() as choices:
            out = convolve(x, weight, *geometry)
        assert [choice.impl for choice in choices] == [TRIED] * (winner == TRIED)
        assert_close_to_gold(out, gold, eager)
        assert out.stride() == eager.stride()
