"""Kernels that fail in the ways that real ones do: the clip is right, one warning says it, the report has a row."""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from block_checks import relative_error
from kernel_checks import pairwise
from tiny_models import tiny_motion_unet
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from vidaccel import patch_module
from vidaccel.kernels.check import Verdicts
from vidaccel.kernels.op import Implementation, Op, ops
from vidaccel.patching.report import PatchReport

ERRORS = {
    "does-not-compile": CompilationError("def kernel():\n  a b", ast.parse("a").body[0], "invalid syntax"),
    "shared-memory": OutOfResources(300_000, 232_448, "shared memory"),
    "launch": RuntimeError("Triton Error [CUDA]: invalid argument"),
    "library": OSError(28, "No space left on device"),
}


@pytest.fixture(autouse=True)
def planted_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VIDACCEL_IMPL", "planted,torch")
    yield
    for op in ops().values():
        op.implementations.pop("planted", None)  # type: ignore[attr-defined]
        op.forget()


def plant(make: Callable[[Op], Implementation]) -> None:
    """Let every op prefer another implementation."""
    for op in ops().values():
        op.implementations["planted"] = make(op)  # type: ignore[index]
        op.forget()


class Raises:
    """Does what the reference does, and raises in one call."""

    def __init__(self, op: Op, error: Exception, at_call: int) -> None:
        self.op, self.error, self.at_call, self.calls = op, error, at_call, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls >= self.at_call:
            raise self.error
        return self.op.reference(*args)


def called(unet: nn.Module, seed: int = 0) -> Tensor:
    torch_random = torch.Generator().manual_seed(seed)
    sample = torch.randn(2, 4, 3, 8, 8, generator=torch_random)
    return unet(sample, torch.tensor(5.0), torch.randn(6, 7, 32, generator=torch_random)).sample


def with_gradients(unet: nn.Module) -> Any:
    """Weights without gradients, as of a user who has forgotten ``torch.no_grad``."""
    unet.requires_grad_(False)
    return torch.enable_grad()


def under_a_hook(unet: nn.Module) -> Any:
    """A hook of the user's on every layer, so that no block may run twice."""
    for module in unet.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *args: None)
    return torch.no_grad()


def as_ever(unet: nn.Module) -> Any:
    return torch.no_grad()


def rows(report: PatchReport) -> set[str]:
    """Why calls fell back, but for what the hooks are the reason of."""
    return {reason for _, _, reason in report.fallbacks if not reason.startswith("somebody looks at the rows")}


@pairwise(
    {
        "error": [pytest.param(error, id=name) for name, error in ERRORS.items()],
        "when": ["first", "later", "bound"],
        "mode": [pytest.param(mode, id=mode.__name__) for mode in (as_ever, with_gradients, under_a_hook)],
    }
)
def test_an_implementation_that_raises(
    error: Exception, when: str, mode: Callable[[nn.Module], Any], caplog: pytest.LogCaptureFixture
) -> None:
    unet = tiny_motion_unet()

    def bind(*args: Any) -> Any:
        raise error

    def make(op: Op) -> Implementation:
        run = Raises(op, error, 1 if when == "first" else 3)
        return Implementation(run, bind=bind if when == "bound" else None)

    with mode(unet):
        expected = called(unet)
        plant(make)
        with patch_module(unet) as report, caplog.at_level(logging.WARNING, "vidaccel"):
            for _ in range(5):
                assert relative_error(called(unet), expected) <= 1e-5
            assert rows(report) and all("planted: " in reason for reason in rows(report)), str(report)
            assert "fell back in" in str(report) and "planted: " in str(report)
    assert caplog.records
    assert len(caplog.records) == len({record.args[0] for record in caplog.records}), "one warning for each op"


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_implementation_that_returns_what_is_not_finite(value: float, caplog: pytest.LogCaptureFixture) -> None:
    unet = tiny_motion_unet()
    expected = called(unet)

    def spoilt(x: Tensor) -> Tensor:
        x = x.clone()
        x[(-1,) * x.ndim] = value
        return x

    def make(op: Op) -> Implementation:
        return Implementation(lambda *args: tree_map(spoilt, op.reference(*args)))

    plant(make)
    with patch_module(unet) as report, caplog.at_level(logging.WARNING, "vidaccel"):
        for _ in range(2):
            assert relative_error(called(unet), expected) <= 1e-5
        failed = [site for site in report.sites if site.state == "failed"]
        assert failed and all("not finite" in site.reason for site in failed)
        assert len(caplog.records) == len(failed)


def planted_with(change: Callable[[str, Any], Any]) -> None:
    """Let every op do what its reference does, and then ``change`` what that has returned."""

    def make(op: Op) -> Implementation:
        return Implementation(lambda *args: change(op.name, op.reference(*args)))

    plant(make)


@torch.no_grad()
def test_the_host_waits_once_for_a_block_and_all_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, waits = tiny_motion_unet(), []
    doubted = Verdicts.doubted
    monkeypatch.setattr(Verdicts, "doubted", lambda self: (waits.append(1), doubted(self))[1])
    planted_with(lambda name, out: out)
    block = unet.down_blocks[0].attentions[0]
    with patch_module(unet) as report:
        block(torch.randn(2, 64, 8, 8), torch.randn(2, 7, 32))
        assert len(waits) == 1
        assert all(site.state != "failed" for site in report.sites)


@torch.no_grad()
def test_a_fault_that_comes_and_goes_fails_the_block_inside_that_has_it() -> None:
    """A block in a block is wrong in the run whose verdicts are awaited together, and right in the next."""
    unet = tiny_motion_unet()
    expected, calls = called(unet), []

    def wrong_once(name: str, out: Any) -> Any:
        calls.append(name)
        return tree_map(lambda x: 1.05 * x, out) if name == at_fault and calls.count(name) == 1 else out

    at_fault = "linear_geglu"  # in the feed-forwards of transformer blocks
    planted_with(wrong_once)
    with patch_module(unet) as report:
        assert relative_error(called(unet), expected) <= 1e-5
        failed = {site.op for site in report.sites if site.state == "failed"}
        assert at_fault in failed, str(report)
        assert relative_error(called(unet), expected) <= 1e-5
