"""What holds for every family: a patched model gives the same output, leaves no trace, and runs the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from block_checks import relative_error
from torch import Tensor, nn

from vidaccel import patch_module, patch_pipeline
from vidaccel.clips.generation import generate
from vidaccel.patching.report import PatchReport

__all__ = ["check_clip", "check_compiled", "check_kernels"]

Call = Callable[[nn.Module], Tensor]


def check_clip(
    pipe: Any, arguments: dict[str, Any], *, reorders_sums: bool = True, rounds: bool = False
) -> PatchReport:
    """The patched pipeline makes the same clip, and the restored one the same bits; returns the restored report.

    ``reorders_sums``: the patched one adds in another order even on a CPU, so that equal bits mean that nothing was
    patched. ``rounds``: the pipeline rounds pixels to 8 bits, and few of them may be rounded another way.
    """
    before = _clip(pipe, arguments)
    traces = {name: _traces(model) for name, model in pipe.components.items() if isinstance(model, nn.Module)}
    with patch_pipeline(pipe) as report:
        after = _clip(pipe, arguments)
        assert {site.state for site in report.sites} == {"active"} and not report.fallbacks, str(report)
        idle = [site for site in report.sites if not site.implementations]
        # not every pipeline runs the VAE's encoder, or decodes in tiles
        assert all(".encoder." in f"{site.path}." or site.op.startswith("tile_") for site in idle), str(report)
    assert relative_error(after, before) <= (1e-3 if rounds else 1e-5)
    assert not rounds or (after - before).abs().max() <= 1.01 / 255
    assert not reorders_sums or not torch.equal(after, before), "nothing was patched: equal bits from reordered sums"
    assert torch.equal(_clip(pipe, arguments), before)
    assert traces == {name: _traces(pipe.components[name]) for name in traces}
    return report


def check_kernels(model: nn.Module, call: Call, ops: set[str]) -> None:
    """The Triton kernels of ``ops`` run in ``model``, without a fallback, and give the same output."""
    expected = call(model)
    with patch_module(model) as report:
        out = call(model)
    assert not report.fallbacks and not any(site.reason for site in report.sites), str(report)
    assert ops == {site.op for site in report.sites if "triton" in site.implementations}, str(report)
    assert relative_error(out, expected) <= 1e-5


def check_compiled(model: nn.Module, call: Call) -> None:
    """The patched model traces in one graph."""
    torch._dynamo.reset()  # or the sizes of another model's calls make those of this one dynamic
    with patch_module(model):
        expected = call(model)
        compiled = torch.compile(model, fullgraph=True, backend="eager")  # the ops themselves are compiled elsewhere
        assert relative_error(call(compiled), expected) <= 1e-5


def _clip(pipe: Any, arguments: dict[str, Any]) -> Tensor:
    return torch.from_numpy(np.asarray(generate(pipe, arguments, seed=0).frames))


def _traces(model: nn.Module) -> Any:
    """What patching could leave behind: classes, attributes, the memory order of weights."""
    modules = {name: (type(module), frozenset(vars(module))) for name, module in model.named_modules()}
    return modules, {name: tensor.stride() for name, tensor in model.state_dict().items()}
