"""What somebody does to a whole class, or to all modules, holds in a patched model as it does in the unpatched one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_checks import relative_error
from coexistence.families import build
from coexistence.feature import Subject
from diffusers.models import embeddings
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers import transformer_wan
from quick_and_slow import first_is_quick
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_map
from transformer_checks import fallback_reasons

from vidaccel import patch_module
from vidaccel.sites.block import FusedBlock, fuses

pytestmark = pytest.mark.usefixtures("plain_pytorch")

Change = Callable[[Subject], Any]
FAMILIES = ["Wan 2.1", "HunyuanVideo", "CogVideoX", "AnimateDiff"]


def shifted(out: Any) -> Any:
    """Other in each place of a row, or a norm behind it would take it away."""
    return tree_map(lambda x: x + torch.linspace(-0.1, 0.1, x.shape[-1]) if isinstance(x, Tensor) else x, out)


@contextmanager
def replaced(kind: Any, name: str) -> Iterator[None]:
    stock, own = getattr(kind, name), name in vars(kind)

    @functools.wraps(stock)
    def method(*args: Any, **kwargs: Any) -> Any:
        return shifted(stock(*args, **kwargs))

    setattr(kind, name, method)
    try:
        yield
    finally:
        setattr(kind, name, stock) if own else delattr(kind, name)


def _class_of(path_end: str, *attributes: str) -> Callable[[Subject], type]:
    def find(subject: Subject) -> type:
        modules: Any = subject.denoiser.named_modules()
        found = next(module for path, module in modules if path.endswith(path_end))
        found = functools.reduce(getattr, attributes, found)
        return getattr(type(found), "original", type(found))

    return find


ATTENTION = {"AnimateDiff": "attn1", "HunyuanVideo": "transformer_blocks.0.attn"}
NORM = {"AnimateDiff": ".norm1", "HunyuanVideo": ".norm2"}
FEED_FORWARD = {"Wan 2.1": ".ffn"}
BLOCK = {"HunyuanVideo": "transformer_blocks.0", "CogVideoX": "transformer_blocks.0", "AnimateDiff": "resnets.0"}


def forward_of_blocks(subject: Subject) -> Any:
    return replaced(_class_of(BLOCK.get(subject.family, "blocks.0"))(subject), "forward")


def forward_of_feed_forwards(subject: Subject) -> Any:
    return replaced(_class_of(FEED_FORWARD.get(subject.family, ".ff"))(subject), "forward")


def forward_of_norms(subject: Subject) -> Any:
    return replaced(_class_of(NORM.get(subject.family, "norm_q"))(subject), "forward")


def processors(subject: Subject) -> Any:
    return replaced(_class_of(ATTENTION.get(subject.family, "attn1"), "processor")(subject), "__call__")


def method_of_activations(subject: Subject) -> Any:
    """Not their forward, but what that calls."""
    return replaced(GEGLU if subject.family == "AnimateDiff" else GELU, "gelu")


def functions_of_modules(subject: Subject) -> Any:
    """What processors call: by a name of their module, or imported when they run."""
    if subject.family == "AnimateDiff":
        return replaced(torch.nn.functional, "group_norm")
    if subject.family == "Wan 2.1":
        return replaced(transformer_wan, "dispatch_attention_fn")
    return replaced(embeddings, "apply_rotary_emb")


@contextmanager
def backend_of_diffusers(subject: Subject) -> Iterator[None]:
    """As somebody registers another function by the name of the default backend."""
    backends: Any = _AttentionBackendRegistry._backends
    stock = backends[AttentionBackendName.NATIVE]

    @functools.wraps(stock)
    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return stock(query / 2, *args, **kwargs)

    backends[AttentionBackendName.NATIVE] = attention
    try:
        yield
    finally:
        backends[AttentionBackendName.NATIVE] = stock


@contextmanager
def hook_on_all_modules(subject: Subject) -> Iterator[None]:
    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        return shifted(out) if type(module).__name__ in ("LayerNorm", "FP32LayerNorm", "GELU") else None

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def attention_of_pytorch(subject: Subject, by_name: frozenset[str] = frozenset(["is_causal"])) -> Iterator[None]:
    """As SageAttention asks for; it takes no more than stock processors give, some of it ``by_name``."""
    stock: Any = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert by_name <= kwargs.keys()
        return stock(query / 2, key, value, *args, **kwargs)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = stock


CHANGES = [
    forward_of_blocks,
    forward_of_feed_forwards,
    forward_of_norms,
    processors,
    method_of_activations,
    functions_of_modules,
    backend_of_diffusers,
    hook_on_all_modules,
    attention_of_pytorch,
]


@torch.no_grad()
@pytest.mark.parametrize("first", ["changed", "patched"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", first_is_quick(FAMILIES))
def test_changed_classes(family: str, change: Change, first: str) -> None:
    if change is backend_of_diffusers and family in ("AnimateDiff", "CogVideoX"):
        pytest.skip("its attention does not go through diffusers' backends")
    subject = build(family)
    plain = subject.noise()
    with change(subject):
        expected = subject.noise()
        if first == "changed":
            report = patch_module(subject.denoiser)
            assert relative_error(subject.noise(), expected) <= 1e-5
    if first == "patched":
        report = patch_module(subject.denoiser)
        subject.noise()
        with change(subject):
            for _ in range(2):
                assert relative_error(subject.noise(), expected) <= 1e-5
            reasons = " ".join(fallback_reasons(report))
            # of AnimateDiff's feed-forward no site stands for more than a layer
            uncounted = family == "AnimateDiff" or change is backend_of_diffusers  # which a user may choose
            assert uncounted or "somebody replaced" in reasons or "hook on all modules" in reasons
    assert relative_error(expected, plain) > 1e-3
    assert relative_error(subject.noise(), plain) <= 1e-5
    assert not any(site.state == "failed" for site in report.sites), str(report)
    report.restore()
    assert torch.equal(subject.noise(), plain)


@torch.no_grad()
@pytest.mark.parametrize("family", ["SVD", "Wan 2.1", "HunyuanVideo", "HunyuanVideo 1.5"])
def test_attention_of_pytorch_in_decoders(family: str) -> None:
    subject = build(family)
    vae = subject.pipe.vae
    latents = torch.randn(1, vae.config.get("latent_channels") or vae.config.z_dim, 3, 4, 4)
    image, frames = (latents.transpose(1, 2).flatten(0, 1), {"num_frames": 3}) if family == "SVD" else (latents, {})

    def decoded() -> Tensor:
        pixels: Tensor = vae.decode(image, **frames).sample
        return pixels

    plain = decoded()
    replaced_attention = partial(attention_of_pytorch, subject, frozenset())
    with replaced_attention():
        expected = decoded()
    assert relative_error(expected, plain) > 1e-4
    report = patch_module(vae)
    for _ in range(2):
        assert relative_error(decoded(), plain) <= 1e-5
        with replaced_attention():
            assert relative_error(decoded(), expected) <= 1e-5
    assert "somebody replaced" in " ".join(fallback_reasons(report))


def test_a_class_replaced_before_its_fused_one_is_made() -> None:
    """Also with other parameters: it is no diffusers that we do not know."""

    class Block(nn.Module):
        def forward(self, x: Tensor, more: Any = None) -> Tensor:
            return x

    @fuses(Block, {"gated_residual_norm": "math-exact"})
    class Fused(FusedBlock, Block):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert Fused.original is Block
