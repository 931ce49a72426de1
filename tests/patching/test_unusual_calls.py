"""Calls that stock diffusers serves and no clip needs: a patched model serves them, too, and says how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_checks import relative_error
from coexistence.families import build
from coexistence.feature import Subject, seeded
from peft import LoraConfig
from quick_and_slow import first_is_quick
from tiny_models import tiny_autoencoder_kl_cogvideox, tiny_autoencoder_kl_wan
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from transformer_checks import fallback_reasons

from vidaccel import patch_module
from vidaccel.sites.block import FORWARD_GRADIENTS, NO_NUMBERS

FAMILIES = ["LTX", "CogVideoX", "HunyuanVideo", "LTX-2", "Wan 2.1"]


def each_tensor(change: Any, given: Any) -> Any:
    return tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, given)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_on_the_meta_device(family: str) -> None:
    subject = build(family)
    expected = subject.noise()
    report = patch_module(subject.denoiser)
    subject.denoiser.to("meta")
    subject.call = each_tensor(lambda x: x.to("meta"), subject.call)
    assert subject.noise().shape == expected.shape
    assert fallback_reasons(report) == {NO_NUMBERS}


@torch.no_grad()
@pytest.mark.parametrize("family", first_is_quick(FAMILIES))
def test_fake_tensors(family: str) -> None:
    subject = build(family)
    expected = subject.noise()
    report = patch_module(subject.denoiser)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given, subject.call = subject.call, each_tensor(mode.from_tensor, subject.call)
        assert subject.noise().shape == expected.shape
    subject.call = given
    assert fallback_reasons(report) == {NO_NUMBERS}
    assert relative_error(subject.noise(), expected) <= 1e-5, "nor does that stay"


VAES = {"CogVideoX": tiny_autoencoder_kl_cogvideox, "Wan 2.1": tiny_autoencoder_kl_wan}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("family", VAES)
def test_a_vae_without_numbers(family: str, kind: str) -> None:
    """Its decoder, and an encoder that has sites, look beyond the frames that they are given."""
    vae, latents, clip = VAES[family](), torch.zeros(1, 4, 3, 2, 2), torch.zeros(1, 3, 5, 16, 16)

    def coded(latents: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
        return vae.decode(latents, return_dict=False)[0], vae.encode(clip, return_dict=False)[0].parameters

    shapes = [x.shape for x in coded(latents, clip)]
    report = patch_module(vae)
    if kind == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            found = coded(mode.from_tensor(latents), mode.from_tensor(clip))
    else:
        vae.to("meta")
        found = coded(latents.to("meta"), clip.to("meta"))
    assert [x.shape for x in found] == shapes
    assert NO_NUMBERS in fallback_reasons(report)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by PyTorch itself
@pytest.mark.parametrize("family", VAES)
def test_gradients_of_a_decode_taken_forwards(family: str) -> None:
    vae, latents = VAES[family]().requires_grad_(False), torch.randn(1, 4, 3, 2, 2)

    def derived() -> tuple[Tensor, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(lambda x: vae.decode(x).sample, (latents,), (torch.ones_like(latents),))

    expected = derived()
    with patch_module(vae) as report:
        assert all(map(torch.equal, derived(), expected))
        assert fallback_reasons(report)


class Noise(nn.Module):
    """What a denoiser makes of a mask."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.denoiser = subject.denoiser
        self.call = subject.call

    def forward(self, mask: Tensor) -> Tensor:
        args, kwargs = self.call
        given = kwargs | {"encoder_attention_mask": mask, "return_dict": False}
        noise: Tensor = self.denoiser(*args, **given)[0]
        return noise


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", ["LTX", "Mochi"])
def test_a_trace_keeps_no_length_of_a_text(family: str) -> None:
    subject = build(family)
    mask = subject.call[1]["encoder_attention_mask"]
    others = torch.ones_like(mask)
    expected = Noise(subject)(others)
    with patch_module(subject.denoiser) as report:
        traced = torch.jit.trace(Noise(subject), (mask,), check_trace=False)
        assert fallback_reasons(report) == {NO_NUMBERS}
    assert relative_error(traced(others), expected) <= 1e-5
    assert relative_error(traced(mask), expected) > 1e-3


def by_dual_numbers(noise: Callable[[Tensor], Tensor], latents: Tensor, direction: Tensor) -> tuple[Tensor, ...]:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(noise(forward_ad.make_dual(latents, direction))))


def by_jvp(noise: Callable[[Tensor], Tensor], latents: Tensor, direction: Tensor) -> tuple[Tensor, ...]:
    return torch.func.jvp(noise, (latents,), (direction,))  # type: ignore[no-any-return]


def by_vjp(noise: Callable[[Tensor], Tensor], latents: Tensor, direction: Tensor) -> tuple[Tensor, ...]:
    out, pull_back = torch.func.vjp(noise, latents)
    return out, pull_back(torch.ones_like(out))[0]


def by_vmap(noise: Callable[[Tensor], Tensor], latents: Tensor, direction: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.func.vmap(noise)(torch.stack([latents, direction])))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated", "ignore:There is a performance drop")
@pytest.mark.parametrize("family", first_is_quick(FAMILIES))
@pytest.mark.parametrize(
    ("transformed", "reason"),
    [(by_dual_numbers, FORWARD_GRADIENTS), (by_jvp, NO_NUMBERS), (by_vjp, NO_NUMBERS), (by_vmap, NO_NUMBERS)],
)
def test_transformed_calls(family: str, transformed: Callable[..., tuple[Tensor, ...]], reason: str) -> None:
    """No kernel of ours has a derivative or a rule for a further dimension; and ``requires_grad`` tells of neither."""
    subject = build(family)
    args, kwargs = subject.call
    latents = kwargs["hidden_states"]
    if family == "LTX":  # a timestep for each token, which the first block looks at
        subject.call = args, kwargs | {"timestep": kwargs["timestep"].view(-1, 1).repeat(1, latents.shape[1])}
    direction = torch.linspace(-1, 1, latents.numel()).view_as(latents)

    def derived() -> tuple[Tensor, ...]:
        with sdpa_kernel(SDPBackend.MATH):  # the other ones have no derivative forwards
            return transformed(lambda x: subject.noise(hidden_states=x), latents, direction)

    expected, plain = derived(), subject.noise()
    with patch_module(subject.denoiser) as report:
        assert all(map(torch.equal, derived(), expected))
        assert fallback_reasons(report) == {reason}
        counted = [site.fallbacks[reason] for site in report.sites]
        assert relative_error(subject.noise(), plain) <= 1e-5
        assert [site.fallbacks[reason] for site in report.sites] == counted, "nor does that stay"


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_forward_that_is_called_as_such_is_transformed() -> None:
    """As PEFT's wrapper of a model calls it."""
    subject = build("LTX")
    _, kwargs = subject.call

    def noise(mask: Tensor) -> Tensor:
        out: Tensor = subject.denoiser.forward(**kwargs | {"encoder_attention_mask": mask, "return_dict": False})[0]
        return out

    expected = by_vmap(noise, mask := kwargs["encoder_attention_mask"], torch.ones_like(mask))
    with patch_module(subject.denoiser) as report:
        assert all(map(torch.equal, by_vmap(noise, mask, torch.ones_like(mask)), expected))
        assert fallback_reasons(report) == {NO_NUMBERS}


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "one"),
    [("EasyAnimate", "encoder_hidden_states"), ("LTX-2", "audio_hidden_states"), ("Mochi", "hidden_states")],
)
def test_one_of_a_batch_is_broadcast(family: str, one: str) -> None:
    """Where a user's hook is below, a block that fails would not be run again."""
    subject = build(family)
    args, kwargs = subject.call
    subject.call = args, kwargs | {one: kwargs[one][:1]}
    for path, layer in subject.denoiser.named_modules():
        if path.endswith("to_v"):
            layer.register_forward_hook(lambda *args: None)
    expected = subject.noise()
    with patch_module(subject.denoiser) as report:
        assert relative_error(subject.noise(), expected) <= 1e-5
        assert any("differ in batch size" in reason for reason in fallback_reasons(report)), str(report)


@torch.no_grad()
@pytest.mark.parametrize("family", ["Wan 2.1", "AnyFlow"])
def test_a_text_without_tokens(family: str) -> None:
    """Where a user's hook is below, a block that fails would not be run again."""
    subject = build(family)
    args, kwargs = subject.call
    subject.call = args, kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"][:, :0]}
    for path, layer in subject.denoiser.named_modules():
        if path.endswith("to_v"):
            layer.register_forward_hook(lambda *args: None)
    expected = subject.noise()
    with patch_module(subject.denoiser) as report:
        for _ in range(2):
            assert relative_error(subject.noise(), expected) <= 1e-5
        assert not any(site.reason for site in report.sites), str(report)


@torch.no_grad()
@pytest.mark.parametrize("family", ["HunyuanVideo", "HunyuanVideo 1.5", "LTX-2", "Mochi", "Wan 2.1"])
def test_dropout_draws_the_same_numbers(family: str) -> None:
    """As of a LoRA that is validated in training mode: no text is cut, and no order of layers is changed, below it."""
    subject = build(family)
    config = LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False, target_modules=["to_q", "add_q_proj", "proj"])
    seeded(lambda: subject.denoiser.add_adapter(config))
    subject.denoiser.train()
    expected = seeded(subject.noise)
    with patch_module(subject.denoiser) as report:
        for _ in range(2):
            assert relative_error(seeded(subject.noise), expected) <= 1e-5
        assert any("dropout is on" in reason for reason in fallback_reasons(report))
