"""What holds for every video transformer: whatever a user puts in or turns on, a patched model does as a stock one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from block_checks import all_fused, frozen, relative_error, tensor_of
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from vidaccel import patch_module
from vidaccel.bench.synthetic import build_component, specification
from vidaccel.kernels.check import in_float64
from vidaccel.patching.report import PatchReport
from vidaccel.sites.block import FusedBlock

__all__ = [
    "CACHES",
    "ORDERS",
    "TELLING_ROWS_APART",
    "Shifted",
    "check_attention_backend",
    "check_autocast",
    "check_cache",
    "check_changed",
    "check_corner",
    "check_deaf_to_attention_backends",
    "check_each_op_off",
    "check_error_in_bfloat16",
    "check_error_on_a_gpu",
    "check_foreign_processors",
    "check_full_size",
    "check_hooks",
    "check_lora",
    "check_relative_of_wan",
    "check_same",
    "fallback_reasons",
    "fallbacks_of",
    "halve",
    "patched",
    "sites_of",
    "telling_rows_apart",
    "telling_transformer",
    "tiny_transformer",
    "turning_channels_apart",
    "with_injected_lora",
]

Call = Callable[[Any], Tensor]

ORDERS = ["patched first", "changed first"]


def tiny_transformer(class_name: str, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The model with the same random weights each time, what it keeps in float32 in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_component(class_name, config, torch.device("cpu"), dtype)
        return frozen(model)


def telling_transformer(model_class: type[Any], config: dict[str, Any]) -> Any:
    """The same of a class, with weights so large that what attention finds shows in the output."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = frozen(model_class(**config))
    for parameter in model.parameters():
        parameter.data *= 2 if parameter.ndim > 1 else 1
    return model


@contextmanager
def patched(model: Any) -> Iterator[PatchReport]:
    """``model`` patched inside the ``with`` block, and no site of it left alone or failed."""
    with patch_module(model, strict=True) as report:
        yield report
        assert {site.state for site in report.sites} <= {"active", "off"}, str(report)


def sites_of(report: PatchReport, op: str) -> list[Any]:
    return [site for site in report.sites if site.op == op]


def fallbacks_of(report: PatchReport, op: str) -> set[str]:
    return {reason for site in sites_of(report, op) for reason in site.fallbacks}


def check_same(model: Any, call: Call) -> PatchReport:
    """The patched model gives what it gave before, at its first call, which is checked, and at the next."""
    expected = call(model)
    with patch_module(model, strict=True) as report:
        for _ in range(2):
            assert relative_error(call(model), expected) <= 1e-5, str(report)
        assert {site.state for site in report.sites} == {"active"}, str(report)
    assert torch.equal(call(model), expected)
    return report


def check_each_op_off(model: Any, call: Call) -> None:
    """Any op of all blocks can be off by itself, and all can."""
    expected = call(model)
    with patch_module(model, strict=True) as report:
        ops = {site.op for site in report.sites}
        for off in [*({op} for op in ops), ops]:
            for site in report.sites:
                site.on = site.op not in off
            assert relative_error(call(model), expected) <= 1e-5, off
        assert not any(site.state == "failed" for site in report.sites), str(report)


def check_attention_backend(model: Any, call: Call) -> None:
    """A user's choice of a backend wins, that of a model as well as that of a context."""
    with attention_backend("_native_math"):
        expected = call(model)
        with patch_module(model) as report:
            assert relative_error(call(model), expected) <= 1e-5
    _only_ran_attention(report, "_native_math")
    try:
        model.set_attention_backend("_native_math")
        _only_ran_attention(check_same(model, call), "_native_math")
    finally:
        model.set_attention_backend("native")  # it sets the one of all models too


def _only_ran_attention(report: PatchReport, name: str) -> None:
    ran = [site.implementations for site in report.sites if site.op == "spatial_attention"]
    assert ran and all(implementations == {name} for implementations in ran), str(report)


def check_deaf_to_attention_backends(model: Any, call: Call) -> None:
    """Stock code asks PyTorch itself for its attention, whatever backend is chosen; so does the patched model."""
    expected = call(model)
    try:
        model.set_attention_backend("_native_math")
        with patch_module(model, strict=True) as report, attention_backend("_native_math"):
            assert relative_error(call(model), expected) <= 1e-5
    finally:
        model.set_attention_backend("native")  # it sets the one of all models too
    _only_ran_attention(report, "torch")


def check_lora(model: Any, call: Call, *targets: str) -> PatchReport:
    """LoRA on layers of these names, put in after patching and before."""
    with patch_module(model, strict=True):
        plain = call(model)
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=list(targets)))
        model.requires_grad_(False)
        patched = call(model)
    assert relative_error(patched, plain) > 1e-3
    assert relative_error(call(model), patched) <= 1e-5
    return check_same(model, call)


def with_injected_lora(model: Any) -> None:
    """A change for :func:`check_changed`, where the model knows of no adapters: random ones, always the same."""
    torch.manual_seed(0)
    config = LoraConfig(init_lora_weights=False, target_modules=["to_q", "to_v", "net.0.proj"])
    inject_adapter_in_model(config, model)
    model.requires_grad_(False)


def check_foreign_processors(model: Any, call: Call, *names: str) -> None:
    """A processor of a user's own on the attentions of the first block, one after the other."""
    block = next(module for module in model.modules() if hasattr(module, names[0]))
    for name in names:
        attn = getattr(block, name)
        kept = attn.processor
        attn.set_processor(_doubled(type(kept))())
        report = check_same(model, call)
        attn.set_processor(kept)
        assert any("a processor of its own" in reason for reason in fallback_reasons(report)), str(report)


def _doubled(kind: type) -> type:
    class Doubled(kind):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().__call__(*args, **kwargs)

    return Doubled


def check_relative_of_wan(build: Callable[[], Any], call: Call) -> None:
    """What users put into models whose blocks are Wan's with other attentions."""
    check_attention_backend(build(), call)
    check_foreign_processors(build(), call, "attn1", "attn2")
    check_hooks(build(), call, "attn1", "net.0", "norm3")
    assert not check_lora(build(), call, "to_q", "to_out.0").fallbacks


class Shifted(nn.Module):
    """A processor of a user's own, with the original inside; it shows also where a norm follows."""

    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return tree_map(lambda out: out + torch.linspace(-0.5, 0.5, out.shape[-1]), self.processor(*args, **kwargs))


def check_changed(build: Callable[[], Any], call: Call, change: Callable[[Any], None], first: str) -> None:
    """A user's ``change`` of a model, made after patching or before, shows in what the patched model gives.

    ``build`` makes the same model each time.
    """
    model, changed = build(), build()
    change(changed)
    expected = call(changed)
    if first == "changed first":
        change(model)
    with patch_module(model):
        if first == "patched first":
            call(model)
            change(model)
        for _ in range(2):
            assert relative_error(call(model), expected) <= 1e-5
    assert relative_error(call(build()), expected) > 1e-3


def _by_place(out: Any) -> Any:
    """Every row of a layer's output times another number."""
    if not isinstance(out, Tensor):
        return out
    rows = min(out.ndim - 2, 1)
    return out * torch.linspace(0.5, 1.5, out.shape[rows]).view(-1, *[1] * (out.ndim - rows - 1))


class _ByPlace(ModelHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return _by_place(output)


def _by_forward_hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, out: _by_place(out))


def _by_hook_of_diffusers(layer: nn.Module) -> None:
    HookRegistry.check_if_exists_or_initialize(layer).register_hook(_ByPlace(), "by place")


def _by_own_forward(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: _by_place(forward(*args, **kwargs))


def _by_own_class(layer: nn.Module) -> None:
    class Own(type(layer)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return _by_place(super().forward(*args, **kwargs))

    layer.__class__ = Own


TELLING_ROWS_APART = [_by_forward_hook, _by_hook_of_diffusers, _by_own_forward, _by_own_class]


def telling_rows_apart(way: Callable[[nn.Module], None], *names: str) -> Callable[[Any], None]:
    """A change for :func:`check_changed`: each child of these names treats every row in a way of its own."""

    def change(model: Any) -> None:
        for path, layer in model.named_modules():
            if path.endswith(names):
                way(layer)

    return change


def turning_channels_apart(model: Any) -> None:
    """A change for :func:`check_changed`: both channels of a pair turn by angles of their own."""
    model.rope.register_forward_hook(
        lambda module, args, tables: tuple(table + torch.linspace(0, 0.5, table.shape[-1]) for table in tables)
    )


def halve(x: Tensor) -> None:
    """In place, for a hook that writes to what it is given."""
    x.mul_(0.5)


CACHES = {
    "first block": FirstBlockCacheConfig(threshold=0.5),
    "pyramid attention broadcast": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
}


def check_cache(build: Callable[[], Any], call: Call, name: str, first: str) -> None:
    """A step cache of diffusers', enabled after patching or before, gives what it gives in the stock model."""

    def calls(model: Any) -> Tensor:
        with model.cache_context("cond"):
            return torch.stack([call(model) for _ in range(3)])

    model, stock = build(), build()
    stock.enable_cache(CACHES[name])
    expected = calls(stock)
    if first == "changed first":
        model.enable_cache(CACHES[name])
    with patch_module(model):
        if first == "patched first":
            model.enable_cache(CACHES[name])
        assert relative_error(calls(model), expected) <= 1e-5
        model.disable_cache()
        assert relative_error(call(model), call(build())) <= 1e-5


def check_full_size(name: str, parameters: int) -> None:
    """All components of the configuration ``name`` can be made; its transformer has so many ``parameters``."""
    components = specification(name)["components"]
    with torch.device("meta"):
        made = {part: getattr(diffusers, kind)(**config) for part, (kind, config) in components.items()}
    assert sum(p.numel() for p in made["transformer"].parameters()) == parameters


def check_hooks(model: Any, call: Call, *names: str) -> None:
    """Hooks on children of all blocks run as often as in the stock model, and what they return is used."""

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        calls.append(module)
        return out + 0.1

    def hooked() -> list[Any]:
        return [m.register_forward_hook(hook) for path, m in model.named_modules() if path.endswith(tuple(names))]

    calls: list[nn.Module] = []
    handles = hooked()
    expected = call(model)
    stock = list(calls)
    with patch_module(model):
        calls.clear()
        assert relative_error(call(model), expected) <= 1e-5
        assert set(calls) == set(stock) and len(calls) == len(stock)
    for handle in handles:
        handle.remove()
    with patch_module(model) as report:
        call(model)
        handles = hooked()
        assert relative_error(call(model), expected) <= 1e-5
        assert not [site for site in report.sites if site.state == "failed"], str(report)
    for handle in handles:
        handle.remove()


def check_autocast(model: Any, call: Call) -> None:
    """A call under autocast goes the original way."""
    with patch_module(model) as report, torch.autocast("cpu", torch.bfloat16):
        call(model)
        assert fallback_reasons(report) == {"autocast is on"}


def check_corner(block: Any, fused_class: type[FusedBlock], arguments: tuple[Any, ...]) -> None:
    """The arguments that a long call is checked with are few, and valid for both forwards."""
    with all_fused(block, fused_class):
        corner, _ = block.corner(arguments, {})
        assert sum(x.numel() for x in tree_leaves(corner) if isinstance(x, Tensor)) < 2**18
        expected = fused_class.original_forward(block, *corner)
        outputs = zip(tree_leaves(block.fused_forward(*corner)), tree_leaves(expected), strict=True)
        assert all(relative_error(*pair) <= 1e-5 for pair in outputs)


def check_error_in_bfloat16(block: nn.Module, fused_class: type[FusedBlock], arguments: tuple[Any, ...]) -> None:
    """Of a block in bfloat16, against itself in float64: at most twice what the stock block's is."""
    gold = tensor_of(copy.deepcopy(block).double()(*tree_map(in_float64, arguments)))
    stock = tensor_of(block(*arguments))
    with all_fused(block, fused_class) as sites:
        out = tensor_of(block(*arguments))
    assert not any(site.fallbacks for site in sites)
    assert (out.double() - gold).norm() <= 2 * (stock.double() - gold).norm()
    assert (out.double() - gold).abs().max() <= 2 * (stock.double() - gold).abs().max()


def check_error_on_a_gpu(build: Callable[..., Any], call: Call) -> None:
    """Of a bfloat16 model with its kernels, against stock in float32, as float64 cannot be: at most twice stock's."""
    gold = call(build().to("cuda"))
    model = build(torch.bfloat16).to("cuda")
    stock = relative_error(call(model), gold)
    with patch_module(model, strict=True) as report:
        assert relative_error(call(model), gold) <= 2 * stock
        assert {site.state for site in report.sites} == {"active"}, str(report)


def fallback_reasons(report: PatchReport) -> set[str]:
    return {reason for site in report.sites for reason in site.fallbacks}
