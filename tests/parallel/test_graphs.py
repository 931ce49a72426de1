"""CUDA graphs of calls that ranks make together: all capture and replay the same call, or none does.

Without a GPU the call itself takes the place of its graph: on the same buffers, into the same outputs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cpu_capture import CpuCapture
from denoiser_calls import denoised, first_call
from ranks import Team
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vidaccel import patch_pipeline
from vidaccel.parallel.layout import layout
from vidaccel.patching import cuda_graph, patch
from vidaccel.patching.cuda_capture import Captured, CaptureError, CudaCapture
from vidaccel.patching.report import PatchReport

pytestmark = pytest.mark.slow


class AgainCapture(CpuCapture):
    """Does for the CPU what CudaCapture does for a GPU."""

    replays = 0
    fails_on: int | None = None  # the rank
    launches_are_slow_on: int | None = None

    def capture(self, run: Callable[[], Any], device: torch.device, pool: Any) -> Captured:
        outputs = run()
        if self.fails_on == dist.get_rank():
            raise CaptureError("out of memory")

        def replay() -> None:
            AgainCapture.replays += 1
            over = layout()
            sent = over.ranks.sent if over else 0
            for old, new in zip(tree_leaves(outputs), tree_leaves(run()), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)
            if over:  # a graph does not count
                over.ranks.sent = sent

        return Captured(replay, outputs, pool or object())

    def milliseconds(self, run: Callable[[], Any], device: torch.device) -> float:
        run()
        return 1.0 if isinstance(run, cuda_graph.partial) else 0.5  # the call; its graph

    def queueing_milliseconds(self, run: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
        return run(), (1.0 if self.launches_are_slow_on == dist.get_rank() else 0.1), 1.0


def nothing(report: PatchReport) -> None:
    pass


def changes_on_one(report: PatchReport) -> None:
    if dist.get_rank() == 1:
        site = next(site for site in report.sites if site.op == "conv_epilogue")
        site.on = False
        site.on = True


def off_on_one(report: PatchReport) -> None:
    if dist.get_rank() == 1:
        next(site for site in report.sites if site.op == "cuda_graph").on = False


def several(
    pipe: Any, calls: list[dict[str, Any]], report: PatchReport, before_third: Callable[[PatchReport], None] = nothing
) -> tuple[list[Tensor], list[int]]:
    """The results, and how many bytes each call has sent."""
    found, sent = [], []
    for number, call in enumerate(calls):
        if number == 2:
            before_third(report)
        before = report.bytes_sent
        found.append(denoised(pipe, call))
        sent.append(report.bytes_sent - before)
    return found, sent


def graphed(
    before_third: Callable[[PatchReport], None] = nothing, cuda_graph_option: Any = True, **capture: Any
) -> dict[str, Any]:
    """Five calls with graphs beside the same ones without."""
    pipe, given = first_call("svd", 5)
    calls = [given | {"sample": given["sample"] + call} for call in range(5)]
    with patch_pipeline(pipe, only="unet", parallel="frames", cuda_graph=False) as report:
        expected, sent = several(pipe, calls, report)
    AgainCapture.replays = 0
    with mock.patch.multiple(AgainCapture, **{"fails_on": None, "launches_are_slow_on": None} | capture):
        for module in (cuda_graph, patch):
            mock.patch.object(module, "CudaCapture", AgainCapture).start()
        report = patch_pipeline(pipe, only="unet", parallel="frames", cuda_graph=cuda_graph_option)
        try:
            found, sent_with_graphs = several(pipe, calls, report, before_third)
        finally:
            mock.patch.stopall()
    site = next(site for site in report.sites if site.op == "cuda_graph")
    outcome = {
        "right": [bool((a == b).all()) for a, b in zip(found, expected, strict=True)],
        "replays": AgainCapture.replays,
        "implementation": site.implementation,
        "fallbacks": dict(site.fallbacks),
        "sent by the last": (sent_with_graphs[-1], sent[-1]),
    }
    report.restore()
    return outcome


def test_a_replay_sends_what_the_call_sends(two_ranks: Team) -> None:
    for outcome in two_ranks.run(graphed):
        assert outcome["right"] == [True] * 5
        assert outcome["replays"] == 5  # one to be checked
        assert outcome["implementation"] == "cuda graph" and not outcome["fallbacks"]
        assert outcome["sent by the last"][0] == outcome["sent by the last"][1] > 0


def test_the_slowest_host_decides(two_ranks: Team) -> None:
    for rank in range(2):
        for outcome in two_ranks.run(graphed_as_it_pays, rank):
            assert outcome["right"] == [True] * 5 and outcome["implementation"] == "cuda graph"
    for outcome in two_ranks.run(graphed_as_it_pays, None):
        assert outcome["right"] == [True] * 5 and outcome["replays"] == 0
        assert "the GPU is the slower one: launching takes 0.1 ms of 1.0" in outcome["fallbacks"]


def graphed_as_it_pays(rank: int | None) -> dict[str, Any]:
    return graphed(cuda_graph_option="auto", launches_are_slow_on=rank)


def test_what_one_cannot_capture_none_replays(two_ranks: Team) -> None:
    first, second = two_ranks.run(graphed_but_one_fails)
    for outcome in (first, second):
        assert outcome["right"] == [True] * 5 and outcome["replays"] == 0
    assert set(first["fallbacks"]) == {cuda_graph.ELSEWHERE} and set(second["fallbacks"]) == {"out of memory"}


def graphed_but_one_fails() -> dict[str, Any]:
    return graphed(fails_on=1)


def graphed_but_one_changes() -> dict[str, Any]:
    return graphed(changes_on_one)


def graphed_but_one_off() -> dict[str, Any]:
    return graphed(off_on_one)


def test_what_changes_on_one_is_captured_anew_on_all(two_ranks: Team) -> None:
    first, second = two_ranks.run(graphed_but_one_changes)
    for outcome in (first, second):
        assert outcome["right"] == [True] * 5 and outcome["fallbacks"][cuda_graph.APART] == 1
        assert outcome["implementation"] == "cuda graph"
    assert cuda_graph.CHANGED in second["fallbacks"] and cuda_graph.CHANGED not in first["fallbacks"]
    assert first["replays"] == second["replays"] >= 3  # again after the change


def test_one_without_graphs_takes_them_from_all(two_ranks: Team) -> None:
    first, second = two_ranks.run(graphed_but_one_off)
    for outcome in (first, second):
        assert outcome["right"] == [True] * 5 and outcome["replays"] == 2
    assert first["fallbacks"] == {cuda_graph.APART: 3} and cuda_graph.APART not in second["fallbacks"]


def whole_and_in_part() -> list[bool]:
    """A clip of one frame, which none shares, and one of two, of which each rank has one."""
    pipe, given = first_call("svd", 2)
    short = {name: x[:, :1] if name == "sample" else x for name, x in given.items()}
    kinds = [given, short, given, short]
    expected = [denoised(pipe, call) for call in kinds]
    for module in (cuda_graph, patch):
        mock.patch.object(module, "CudaCapture", AgainCapture).start()
    try:
        with patch_pipeline(pipe, only="unet", parallel="frames", cuda_graph=True):
            found = [denoised(pipe, call) for call in kinds]
    finally:
        mock.patch.stopall()
    return [torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, expected, strict=True)]


def test_a_part_is_not_taken_for_a_whole_clip(two_ranks: Team) -> None:
    assert two_ranks.run(whole_and_in_part) == [[True] * 4] * 2


@pytest.mark.parametrize("end", ["dist.destroy_process_group()", "dist.distributed_c10d.destroy_process_group()", ""])
def test_graphs_go_before_the_process_group(end: str, tmp_path: Path) -> None:
    program = f"""
import torch.distributed as dist
from vidaccel.parallel.farewell import forget_before_groups_end

class Graphs:
    def forget(self):
        print("forgotten in a group" if dist.is_initialized() else "forgotten too late")

dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
graphs, gone = Graphs(), Graphs()
forget_before_groups_end(graphs)
forget_before_groups_end(gone)
del gone
{end}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "forgotten in a group\n"


@pytest.mark.gpu
def test_collectives_are_captured() -> None:
    """On one GPU: an all-to-all with itself, a gather, and an exchange with nobody, in a graph."""
    if not dist.is_initialized():
        device = torch.device("cuda", 0)
        dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29577", rank=0, world_size=1, device_id=device)
    from vidaccel.parallel.ranks import axes_of

    ranks = axes_of([1])[0]
    x = torch.randn(2, 6, 4, device="cuda")

    def run() -> Tensor:
        ranks.exchange(x[:, 0], x[:, -1])()
        return ranks.gather(ranks.swap(x, split=2, join=1, total=6), 1, 6) * 2

    run()
    captured = CudaCapture().capture(run, x.device, None)
    x.normal_()
    captured.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured.outputs, 2 * x)
