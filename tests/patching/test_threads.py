"""Two threads at once: each hears of its own calls only, and gets its own output."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from block_checks import relative_error
from tiny_models import tiny_motion_unet
from torch import Tensor

from vidaccel import patch_module
from vidaccel.kernels.ffn.geglu import GEGLU
from vidaccel.kernels.op import Implementation, listening

pytestmark = pytest.mark.usefixtures("plain_pytorch")

ROUNDS = 30


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """What ``jobs`` return, each in a thread of its own, begun at the same time."""
    barrier = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


@torch.no_grad()
def called(unet: Any, seed: int) -> Tensor:
    torch_random = torch.Generator().manual_seed(seed)
    sample = torch.randn(2, 4, 3, 8, 8, generator=torch_random)
    return unet(sample, torch.tensor(5.0), torch.randn(6, 7, 32, generator=torch_random)).sample


def test_overlapping_first_calls_of_two_models() -> None:
    for seed in range(3):
        unets = [tiny_motion_unet(seed), tiny_motion_unet(seed + 10)]
        expected = [called(unet, seed) for unet in unets]
        reports = [patch_module(unets[0], only="geglu"), patch_module(unets[1], only="group_norm_silu")]
        outputs = together(lambda: called(unets[0], seed), lambda: called(unets[1], seed))  # noqa: B023
        for out, right, report in zip(outputs, expected, reports, strict=True):
            assert relative_error(out, right) <= 1e-5
            assert {(site.state, site.implementation) for site in report.sites} == {("active", "torch")}
            assert not report.fallbacks


def test_two_threads_call_one_patched_model() -> None:
    unet = tiny_motion_unet()
    expected = [called(unet, seed) for seed in range(2)]
    report = patch_module(unet)

    def caller(seed: int) -> Callable[[], list[Tensor]]:
        return lambda: [called(unet, seed) for _ in range(5)]

    for outputs, right in zip(together(caller(0), caller(1)), expected, strict=True):
        assert all(relative_error(out, right) <= 1e-5 for out in outputs)
    assert not report.fallbacks and {site.state for site in report.sites} == {"active"}


def test_a_fault_in_one_thread_is_told_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other thread's model runs the same op at another shape, at which it is right."""
    monkeypatch.setenv("VIDACCEL_IMPL", "geglu=planted,torch")
    faulty = Implementation(lambda x: GEGLU.reference(x) * (1.01 if x.shape[1] == 16 else 1))
    monkeypatch.setitem(GEGLU.implementations, "planted", faulty)
    GEGLU.forget()

    def caller(size: int) -> Callable[[], list[Any]]:
        def call() -> list[Any]:
            heard = []
            for _ in range(ROUNDS):
                x = torch.randn(2, size, 8)
                with torch.no_grad(), listening(checks=True) as events:
                    assert torch.equal(GEGLU(x), GEGLU.reference(x))
                heard.append([(event.costs, bool(event.problem)) for event in events])
            return heard

        return call

    for size, heard in zip((16, 24), together(caller(16), caller(24)), strict=True):
        costs = GEGLU.costs(torch.randn(2, size, 8))
        assert heard == ROUNDS * [[(costs, size == 16)]]
