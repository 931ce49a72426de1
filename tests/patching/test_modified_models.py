"""Whatever somebody does to a model, before it is patched or after, a patched one does what the unpatched one does."""

from __future__ import annotations

import copy
import functools
import itertools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_checks import relative_error
from coexistence.families import build
from diffusers.models.attention_processor import AttnProcessor
from quick_and_slow import first_is_quick
from tiny_models import tiny_motion_unet, tiny_synthetic_pipeline
from torch import Tensor, nn

from vidaccel import patch_module

pytestmark = pytest.mark.usefixtures("plain_pytorch")

Change = Callable[[Any], None]
Family = Callable[[], tuple[Any, dict[str, Any]]]


class QuantisedLinear(nn.Linear):
    """As of quanto or loralib: a subclass of Linear whose forward makes something else of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, (self.weight * 8).round() / 8, self.bias)


class CausalConv3d(nn.Conv3d):
    """Sees no later frame."""

    def forward(self, input: Tensor) -> Tensor:
        padded = F.pad(input, (0, 0, 0, 0, 2 * self.padding[0], 0))
        return F.conv3d(padded, self.weight, self.bias)


def first(model: nn.Module, kind: type[nn.Module], name: str = "") -> Any:
    return next(m for path, m in model.named_modules() if isinstance(m, kind) and path.endswith(name))


def as_class(kind: type[nn.Module], path_end: str) -> Change:
    def change(unet: Any) -> None:
        for path, module in unet.named_modules():
            if path.endswith(path_end):
                module.__class__ = kind

    change.__name__ = f"{kind.__name__} for {path_end}"
    return change


def gelu_resnets(unet: Any) -> None:
    for module in unet.modules():
        if hasattr(module, "nonlinearity"):
            module.nonlinearity = nn.GELU()


def seamless_tiling(unet: Any) -> None:
    def forward(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding == (0, 0):
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias, self.stride)

    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module._conv_forward = types.MethodType(forward, module)


def circular_padding(unet: Any) -> None:
    for module in unet.modules():
        if isinstance(module, nn.Conv2d) and module.padding == (1, 1):
            module.padding_mode, module._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


def no_last_norm(unet: Any) -> None:
    unet.conv_norm_out = nn.Identity()


def last_activation_is_tanh(unet: Any) -> None:
    unet.conv_act = nn.Tanh()


def hook_that_doubles(unet: Any) -> None:
    first(unet, nn.GroupNorm, "norm2").register_forward_hook(lambda module, args, out: 2 * out)


def hook_that_writes(unet: Any) -> None:
    def halve(module: nn.Module, args: Any, out: Tensor) -> None:
        out.data.mul_(0.5)

    first(unet, nn.Conv2d, "conv2").register_forward_hook(halve)


def pre_hook_on_the_text(unet: Any) -> None:
    def other_text(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        text = kwargs["encoder_hidden_states"]
        return args, kwargs | {"encoder_hidden_states": text + torch.arange(len(text)).view(-1, 1, 1)}

    unet.register_forward_pre_hook(other_text, with_kwargs=True)


def pre_hook_on_a_blocks_text(unet: Any) -> None:
    def other_text(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        text = kwargs["encoder_hidden_states"]
        return args, kwargs | {"encoder_hidden_states": text + torch.arange(len(text)).view(-1, 1, 1)}

    unet.down_blocks[0].attentions[0].register_forward_pre_hook(other_text, with_kwargs=True)


def other_processors(unet: Any) -> None:
    class Processor(AttnProcessor):
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return 0.5 * super().__call__(attn, hidden_states, *args, **kwargs)

    unet.set_attn_processor(Processor())


def rescaled_attention(unet: Any) -> None:
    for module in unet.modules():
        if hasattr(module, "rescale_output_factor"):
            module.rescale_output_factor = 2.0


def residual_of_an_attention(unet: Any) -> None:
    for path, module in unet.named_modules():
        if path.endswith("attn1"):
            module.residual_connection = True


def activations_in_place(unet: Any) -> None:
    """Each block changes the time embedding for those behind it."""
    for module in unet.modules():
        if isinstance(module, nn.SiLU):
            module.inplace = True


def eps_of_a_norm(unet: Any) -> None:
    first(unet, nn.GroupNorm).eps = 0.5


def weights_through_data(unet: Any) -> None:
    for parameter in unet.parameters():
        parameter.data.mul_(0.9)


def forward_of_a_block(unet: Any) -> None:
    block = unet.mid_block.resnets[0]
    stock = block.forward
    block.forward = lambda *args, **kwargs: 1.5 * stock(*args, **kwargs)  # as DeepCache wraps it


def dropped_cross_attention(unet: Any) -> None:
    for module in unet.modules():
        if hasattr(module, "attn2") and module.attn2 is not None and module.attn2.is_cross_attention:
            module.attn2.to_out[0].weight.data.zero_()


CHANGES = [
    as_class(QuantisedLinear, "to_q"),
    as_class(QuantisedLinear, "net.0.proj"),
    gelu_resnets,
    seamless_tiling,
    circular_padding,
    no_last_norm,
    last_activation_is_tanh,
    hook_that_doubles,
    hook_that_writes,
    pre_hook_on_the_text,
    pre_hook_on_a_blocks_text,
    other_processors,
    rescaled_attention,
    residual_of_an_attention,
    activations_in_place,
    eps_of_a_norm,
    weights_through_data,
    forward_of_a_block,
    dropped_cross_attention,
]


def animatediff() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(1)
    text = torch.randn(2, 7, 32).repeat_interleave(3, dim=0)
    return tiny_motion_unet(), {
        "sample": torch.randn(2, 4, 3, 8, 8), "timestep": torch.tensor(5.0), "encoder_hidden_states": text,
    }  # fmt: skip


def modelscope() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(1)
    pipe, _ = tiny_synthetic_pipeline("modelscope")
    return pipe.unet, {
        "sample": torch.randn(2, 4, 3, 8, 8),
        "timestep": torch.tensor(5.0),
        "encoder_hidden_states": torch.randn(2, 7, 32),
    }


def svd() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(1)
    pipe, _ = tiny_synthetic_pipeline("svd")
    unet = pipe.unet
    return unet, {
        "sample": torch.randn(2, 3, 8, 8, 8),
        "timestep": torch.tensor(5.0),
        "encoder_hidden_states": torch.randn(2, 1, unet.config.cross_attention_dim),
        "added_time_ids": torch.ones(2, 3),
    }


FAMILIES = [svd, animatediff, modelscope]


@torch.no_grad()
def call(unet: Any, arguments: dict[str, Any]) -> Tensor:
    return unet(**arguments).sample


@functools.cache
def made(family: Family) -> tuple[Any, dict[str, Any]]:
    """A model that stays as it is, and what to call it with."""
    return family()


@functools.cache
def stock(family: Family, change: Change | None = None) -> Tensor:
    """What the model gives unpatched, once it has been changed."""
    unet, arguments = made(family)
    if change is None:
        return call(unet, arguments)
    unet = copy.deepcopy(unet)
    change(unet)
    return call(unet, arguments)


# the orders are next to one another: what they share is found in one process
@pytest.mark.parametrize("order", ["change, then patch", "patch, call, then change"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", first_is_quick(FAMILIES), ids=lambda family: family.__name__)
def test_changed_models(family: Family, change: Change, order: str) -> None:
    if family is svd and change in (pre_hook_on_the_text, pre_hook_on_a_blocks_text):
        pytest.skip("SVD has one token and no text")
    expected = stock(family, change)
    assert relative_error(expected, stock(family)) > 1e-4, "the change does something"
    unet, arguments = made(family)
    unet = copy.deepcopy(unet)
    if order == "change, then patch":
        change(unet)
        report = patch_module(unet)
    else:
        report = patch_module(unet)
        call(unet, arguments)
        change(unet)
    assert relative_error(call(unet, arguments), expected) <= 2e-5
    assert relative_error(call(unet, arguments), expected) <= 2e-5, "nor in the next call"
    assert not any(site.state == "failed" for site in report.sites), "the check is for faults"


def test_causal_temporal_convolutions() -> None:
    unet, arguments = modelscope()
    unpatched = copy.deepcopy(unet)
    patch_module(unet)
    call(unet, arguments)
    for model in (unpatched, unet):
        for module in model.modules():
            if type(module) is nn.Conv3d:
                module.__class__ = CausalConv3d
    assert relative_error(call(unet, arguments), call(unpatched, arguments)) <= 2e-5


def test_what_cannot_be_compiled_beforehand_is_patched() -> None:
    class Stage(nn.Module):
        """Somebody's own: it has no norm to be found in it."""

        def __init__(self, stage: nn.Module) -> None:
            super().__init__()
            self.stage = stage

        def forward(self, x: Tensor) -> Tensor:
            return self.stage(x)

    unet, arguments = modelscope()
    expected = call(unet, arguments)
    convolutions = unet.mid_block.temp_convs[0]
    convolutions.conv2 = Stage(convolutions.conv2)
    patch_module(unet)
    assert relative_error(call(unet, arguments), expected) <= 2e-5


def in_a_hook_of_the_model(model: Any, change: Callable[[], None]) -> None:
    model.register_forward_pre_hook(lambda module, args: change())


def in_a_forward_of_the_models_own(model: Any, change: Callable[[], None]) -> None:
    stock = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        change()
        return stock(*args, **kwargs)

    model.forward = forward


def in_a_hook_of_a_block(model: Any, change: Callable[[], None]) -> None:
    model.blocks[0].register_forward_pre_hook(lambda module, args: change())


@torch.no_grad()
@pytest.mark.parametrize("place", [in_a_hook_of_the_model, in_a_forward_of_the_models_own, in_a_hook_of_a_block])
def test_what_changes_within_a_call_is_heeded_in_it(place: Callable[[Any, Callable[[], None]], None]) -> None:
    """As somebody gives attention another processor from some step on."""
    runs = []
    for patched in (False, True):
        subject, calls = build("Wan 2.1"), itertools.count()
        transformer = subject.denoiser
        attention, norm = transformer.blocks[1].attn1, transformer.blocks[1].norm3

        class Halving(type(attention.processor)):  # type: ignore[misc]
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return super().__call__(*args, **kwargs) / 2

        def change(calls: Any = calls, attention: Any = attention, norm: Any = norm, kind: Any = Halving) -> None:
            call = next(calls)
            if call == 2:
                attention.set_processor(kind())
            if call == 4:
                norm.register_forward_hook(lambda module, args, out: out / 2)

        if patched:
            patch_module(transformer)
        place(transformer, change)
        runs.append([subject.noise() for _ in range(6)])
    expected, found = runs
    assert all(relative_error(now, before) > 1e-3 for before, now in ((expected[1], expected[2]), expected[3:5]))
    for out, stock in zip(found, expected, strict=True):
        assert relative_error(out, stock) <= 1e-5
