"""Ctrl-C at any line of a patch or a restore: nothing is left half done, and doing it again does it."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from quick_and_slow import first_is_quick
from tiny_models import tiny_motion_unet, tiny_synthetic_pipeline
from torch import nn

import vidaccel.patching.patch as patching
from vidaccel import patch_module, patch_pipeline
from vidaccel.parallel.asked import CALL_SLOT
from vidaccel.patching.report import PatchReport
from vidaccel.sites.memo import preparations
from vidaccel.sites.rules import Rule, patches_of

pytestmark = pytest.mark.usefixtures("plain_pytorch")

Act = Callable[[], Any]
FOLDERS = ("/vidaccel/patching/", "/vidaccel/sites/")
ONE_LEVEL = {  # with attention in the middle
    "down_block_types": ("DownBlockMotion",),
    "up_block_types": ("UpBlockMotion",),
    "block_out_channels": (64,),
}
Subject = tuple[list[nn.Module], Callable[..., PatchReport]]


def wan() -> Subject:
    pipe, _ = tiny_synthetic_pipeline("wan2.1-t2v-1.3b")
    return [pipe.vae, pipe.transformer], lambda **options: patch_pipeline(pipe, **options)


def motion_unet() -> Subject:
    unet = tiny_motion_unet(**ONE_LEVEL)
    return [unet], lambda **options: patch_module(unet, **options)


def run_to_line(act: Act, stop: int | None) -> list[tuple[str, int]]:
    """Run ``act`` up to the line of ours that is reached as number ``stop``, where Ctrl-C comes; the lines so far."""
    reached: list[tuple[str, int]] = []

    def at_line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            reached.append((frame.f_code.co_filename, frame.f_lineno))
            if len(reached) == stop:
                raise KeyboardInterrupt
        return at_line

    def at_call(frame: FrameType, *_: Any) -> Any:
        ours = any(folder in frame.f_code.co_filename for folder in FOLDERS)
        return at_line if ours or isinstance(frame.f_locals.get("self"), Rule) else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        act()
    except KeyboardInterrupt:
        assert len(reached) == stop
    finally:
        sys.settrace(before)
    return reached


def every_nth_line(act: Act, nth: int) -> list[int]:
    """When ``act`` reaches each nth of its lines: one of the times, in the middle of them."""
    times = defaultdict(list)
    for number, line in enumerate(run_to_line(act, None), start=1):
        times[line].append(number)
    return sorted(numbers[len(numbers) // 2] for numbers in times.values())[::nth]


def traces(models: list[nn.Module]) -> list[Any]:
    """What patching could leave behind."""
    found: list[Any] = []
    for model in models:
        found.append((len(preparations(model)), {name: x.stride() for name, x in model.state_dict().items()}))
        for module in model.modules():
            own = {name: type(x) for name, x in vars(module).items()}
            found.append((type(module), own, {patch.rule for patch in patches_of(module)}))
    return found


def numbers(models: list[nn.Module]) -> list[torch.Tensor]:
    return [x.clone() for model in models for x in model.state_dict().values()]


def states(report: PatchReport) -> set[str]:
    return {site.state for site in report.sites}


@pytest.mark.parametrize("nth", first_is_quick([16, 6]))
@pytest.mark.parametrize("make", [wan, motion_unet])
@pytest.mark.parametrize("only", [[], ["channels_last", "gated_residual_norm", "spatial_attention", "geglu"]], ids=len)
def test_a_patch_that_is_interrupted(make: Callable[[], Subject], only: list[str], nth: int) -> None:
    """Of what is stock, or of what an earlier call has patched in part."""
    models, patch = make()
    stock, weights = traces(models), numbers(models)
    with patch() as report:
        patched, ops = traces(models), {site.op for site in report.sites}
    assert traces(models) == stock != patched
    chosen = [op for op in only if op in ops]
    lines = every_nth_line(patch, nth)
    patch().restore()
    for stop in lines:
        earlier = patch(only=chosen) if chosen else PatchReport()
        before = traces(models)
        run_to_line(patch, stop)
        assert traces(models) in (before, patched)
        assert states(earlier) <= {"active"}
        with patch() as report:
            assert traces(models) == patched and states(report) == {"active"}
        earlier.restore()
        assert traces(models) == stock
    assert all(map(torch.equal, numbers(models), weights))


@pytest.mark.parametrize("nth", first_is_quick([16, 6]))
@pytest.mark.parametrize("make", [wan, motion_unet])
def test_a_restore_that_is_interrupted(make: Callable[[], Subject], nth: int) -> None:
    models, patch = make()
    stock, weights = traces(models), numbers(models)
    with patch():
        patched = traces(models)
    for stop in every_nth_line(patch().restore, nth):
        for again in (False, True):
            report = patch()
            run_to_line(report.restore, stop)
            if again:
                with patch() as other:
                    assert traces(models) == patched and states(other) == {"active"}
            report.restore()
            assert traces(models) == stock and states(report) == {"restored"}
    assert all(map(torch.equal, numbers(models), weights))


def test_a_second_patch_that_fails_changes_nothing_about_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    (unet,), patch = motion_unet()

    def fail(*args: Any) -> None:
        raise MemoryError

    with patch(allow="bit-exact", cuda_graph=False):
        before = dict(vars(vars(unet)[CALL_SLOT]))
        with monkeypatch.context() as changed, pytest.raises(MemoryError):
            changed.setattr(patching, "compile_first_calls", fail)
            patch()
        assert vars(vars(unet)[CALL_SLOT]) == before
