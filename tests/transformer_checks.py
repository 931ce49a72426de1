"""What holds for every patched video transformer, whatever a user does with it: the same output as the unpatched one.

``build`` makes a model, the same at every call; ``run`` calls one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from block_checks import frozen, relative_error
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from torch import Tensor, nn

from vidaccel import patch_module
from vidaccel.bench.synthetic import specification
from vidaccel.patching.report import PatchReport

__all__ = [
    "ORDERS",
    "Shifted",
    "add_lora",
    "check_cache",
    "check_changed",
    "check_full_size",
    "check_half_precision",
    "check_ops_off",
    "check_same_output",
    "fallbacks_of",
    "first_block_cache",
    "patched",
    "pyramid_attention_broadcast",
    "seeded",
    "sites_of",
]

Build = Callable[[], Any]
Run = Callable[[Any], Tensor]

ORDERS = ["patched first", "changed first"]


def seeded(model_class: type[Any], **config: Any) -> Any:
    """A model for inference with random weights, the same at every call, wide enough that attention shows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = frozen(model_class(**config))
    for parameter in model.parameters():
        parameter.data *= 2 if parameter.ndim > 1 else 1
    return model


@contextmanager
def patched(model: Any) -> Iterator[PatchReport]:
    with patch_module(model, strict=True) as report:
        yield report
        assert {site.state for site in report.sites} <= {"active", "off"}, str(report)


def sites_of(report: PatchReport, op: str) -> list[Any]:
    return [site for site in report.sites if site.op == op]


def fallbacks_of(report: PatchReport, op: str) -> set[str]:
    return {reason for site in sites_of(report, op) for reason in site.fallbacks}


def check_same_output(build: Build, run: Run) -> None:
    """Twice, without a fallback: checked, and as planned."""
    model = build()
    expected = run(model)
    with patched(model) as report:
        for _ in range(2):
            assert relative_error(run(model), expected) <= 1e-5
        assert not report.fallbacks, str(report)


def check_ops_off(build: Build, run: Run, ops: Iterable[str]) -> None:
    """Each op alone can be off."""
    model = build()
    expected = run(model)
    with patched(model) as report:
        for op in ops:
            for site in sites_of(report, op):
                site.on = False
            assert relative_error(run(model), expected) <= 1e-5, op
            for site in sites_of(report, op):
                site.on = True


def check_changed(build: Build, run: Run, change: Callable[[Any], None], first: str) -> None:
    """A user's ``change`` of a model shows in the output of the patched one, made before or after it was patched."""
    model, changed = build(), build()
    torch.manual_seed(0)
    change(changed)
    expected = run(changed)
    torch.manual_seed(0)
    if first == "changed first":
        change(model)
    with patch_module(model):
        if first == "patched first":
            run(model)
            change(model)
        for _ in range(2):
            assert relative_error(run(model), expected) <= 1e-5
    assert relative_error(run(build()), expected) > 1e-3  # the change shows


def check_cache(build: Build, run: Run, cache: Callable[[Any], None], first: str) -> None:
    """diffusers' step caches do the same, enabled before or after patching."""

    def three_calls(model: Any) -> Tensor:
        with model.cache_context("cond"):
            return torch.stack([run(model) for _ in range(3)])

    model, stock = build(), build()
    cache(stock)
    expected = three_calls(stock)
    if first == "changed first":
        cache(model)
    with patch_module(model):
        if first == "patched first":
            cache(model)
        assert relative_error(three_calls(model), expected) <= 1e-5
        model.disable_cache()
        assert relative_error(run(model), run(build())) <= 1e-5


def first_block_cache(model: Any) -> None:
    model.enable_cache(FirstBlockCacheConfig(threshold=0.5))


def pyramid_attention_broadcast(model: Any) -> None:
    model.enable_cache(
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    )


def add_lora(model: Any, *layers: str) -> None:
    """LoRA on all modules below the blocks whose paths end like that."""
    peft = pytest.importorskip("peft")
    targets = [path for path, _ in model.named_modules() if path.endswith(layers) and "blocks" in path]
    assert targets
    model.add_adapter(peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    model.requires_grad_(False)


class Shifted(nn.Module):
    """A processor of somebody's own, with the original inside."""

    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.processor(*args, **kwargs)
        return out + 0.5 if isinstance(out, Tensor) else tuple(part + 0.5 for part in out)


@torch.no_grad()
def check_half_precision(model: Any, arguments: dict[str, Any]) -> None:
    """In bfloat16, the error against float64 is no worse than twice that of the unpatched model."""
    model = model.bfloat16()
    call = {name: _cast(value, torch.bfloat16) for name, value in arguments.items()}
    wide = copy.deepcopy(model).double()
    gold = wide(**{name: _cast(value, torch.float64) for name, value in call.items()}, return_dict=False)[0]
    stock = model(**call, return_dict=False)[0].double()
    with patched(model) as report:
        out = model(**call, return_dict=False)[0].double()
        assert not report.fallbacks, str(report)
    assert relative_error(out, gold) <= 2 * relative_error(stock, gold)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    # tuples are rotary tables, which stay as they are
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def check_full_size(name: str, parameters: int) -> None:
    """Every component of the configuration ``name`` can be made, and its denoiser has so many ``parameters``."""
    components = specification(name)["components"]
    with torch.device("meta"):
        made = {part: getattr(diffusers, kind)(**config) for part, (kind, config) in components.items()}
    assert sum(p.numel() for p in made["transformer"].parameters()) == parameters
