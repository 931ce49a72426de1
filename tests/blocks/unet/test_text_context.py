"""A text is projected once for all frames that share it, whoever repeats it: the pipeline, or the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_checks import relative_error
from diffusers import I2VGenXLUNet, UNet3DConditionModel
from tiny_models import tiny_motion_unet
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from vidaccel import patch_module

pytestmark = pytest.mark.usefixtures("plain_pytorch")

BATCH, FRAMES, TEXT = 2, 3, 32


def sample(step: int) -> Tensor:
    return torch.randn(BATCH, 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(step))


def text_of(seed: int) -> Tensor:
    return torch.randn(BATCH, 7, TEXT, generator=torch.Generator().manual_seed(seed))


def repeated(seed: int) -> Tensor:
    return text_of(seed).repeat_interleave(FRAMES, dim=0)


def unet_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    unet = kind(
        down_block_types=("CrossAttnDownBlock3D",),
        up_block_types=("CrossAttnUpBlock3D",),
        block_out_channels=(64,),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=32,
    )
    return unet.eval().requires_grad_(False)


@torch.no_grad()
def call(unet: Any, step: int, text: Tensor) -> Tensor:
    if not isinstance(unet, I2VGenXLUNet):
        return unet(sample(step), step, text).sample
    image = {"image_latents": sample(9), "image_embeddings": text_of(9)[:, :1]}
    return unet(sample(step), step, torch.full((BATCH,), 8), encoder_hidden_states=text, **image).sample


class Projected(TorchFunctionMode):
    """Notes how many texts a text block in the middle of a UNet makes keys of."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.weight = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
        self.texts: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and args[1] is self.weight:
            self.texts.add(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [UNet3DConditionModel, I2VGenXLUNet], ids=lambda kind: kind.__name__)
def test_what_the_model_repeats_is_projected_once(kind: type[nn.Module]) -> None:
    unet = unet_of(kind)
    texts = [text_of(0), text_of(0), text_of(1)]
    expected = [call(unet, step, text) for step, text in enumerate(texts)]
    with patch_module(unet) as report:
        call(unet, 0, texts[0])  # checks itself
        with Projected(unet) as projected:
            for step, text in enumerate(texts):
                assert relative_error(call(unet, step, text), expected[step]) <= 1e-5
        assert projected.texts == {BATCH}
    assert not report.fallbacks
    assert torch.equal(call(unet, 0, texts[0]), expected[0])


def test_what_the_pipeline_repeats_is_projected_once() -> None:
    unet = tiny_motion_unet()
    texts = [repeated(0), repeated(1)]
    expected = [call(unet, step, text) for step, text in enumerate(texts)]
    with patch_module(unet):
        call(unet, 0, texts[0])
        with Projected(unet) as projected:
            for step, text in enumerate(texts):
                assert relative_error(call(unet, step, text), expected[step]) <= 1e-5
        assert projected.texts == {BATCH}
        texts[0][1] += 1  # the same tensor, and another text for one frame
        with Projected(unet) as projected:
            out = call(unet, 0, texts[0])
        assert projected.texts == {BATCH * FRAMES}
    assert relative_error(out, expected[0]) > 1e-3
    assert relative_error(out, call(unet, 0, texts[0])) <= 1e-5


@pytest.mark.parametrize("text", [text_of(0)[:, :1], None], ids=["one-token", "a-text-for-each-frame"])
def test_other_texts(text: Tensor | None) -> None:
    unet = tiny_motion_unet()
    frames = torch.randn(BATCH * FRAMES, 7, TEXT) if text is None else text.repeat_interleave(FRAMES, dim=0)
    expected = call(unet, 0, frames)
    with patch_module(unet):
        assert relative_error(call(unet, 0, frames), expected) <= 1e-5


def test_a_hook_that_changes_the_text_is_heeded() -> None:
    unet = unet_of(UNet3DConditionModel)

    def other_text(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        context = kwargs["encoder_hidden_states"]
        scales = torch.arange(1, len(context) + 1).view(-1, 1, 1)
        return args, kwargs | {"encoder_hidden_states": context * scales}  # every frame has its own now

    plain = call(unet, 0, text_of(0))
    with patch_module(unet):
        call(unet, 0, text_of(0))
        hook = unet.mid_block.attentions[0].register_forward_pre_hook(other_text, with_kwargs=True)
        out = call(unet, 0, text_of(0))
    expected = call(unet, 0, text_of(0))
    hook.remove()
    assert relative_error(expected, plain) > 1e-3
    assert relative_error(out, expected) <= 1e-5


def test_a_text_that_was_written_to_through_data_is_heeded() -> None:
    unet = tiny_motion_unet()
    text = repeated(0)
    expected = call(unet, 0, repeated(1))
    with patch_module(unet):
        call(unet, 0, text)
        text.data.copy_(repeated(1))
        assert relative_error(call(unet, 0, text), expected) <= 1e-5


def test_a_wrapper_of_the_models_forward_may_pass_another_text() -> None:
    unet = unet_of(UNet3DConditionModel)
    expected = call(unet, 0, text_of(1))
    with patch_module(unet):
        call(unet, 0, text_of(0))  # checks itself
        forward = unet.forward
        unet.forward = lambda sample, step, text: forward(sample, step, text_of(1))
        assert relative_error(call(unet, 0, text_of(0)), expected) <= 1e-5


class FramesApart(TorchFunctionMode):
    """Gives each frame a text of its own where a model repeats one for all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        of_text = func is Tensor.repeat_interleave and out.shape[1:] == (7, TEXT)
        return out * torch.arange(1, len(out) + 1).view(-1, 1, 1) if of_text else out


def test_a_forward_of_the_models_own_may_repeat_the_text_otherwise() -> None:
    unet = unet_of(UNet3DConditionModel)
    stock, plain = unet.forward, call(unet, 0, text_of(0))

    def forward(*args: Any) -> Any:
        with FramesApart():
            return stock(*args)

    with patch_module(unet):
        call(unet, 0, text_of(0))  # checks itself
        unet.forward = forward
        out = call(unet, 0, text_of(0))
    expected = call(unet, 0, text_of(0))
    assert relative_error(expected, plain) > 1e-3
    assert relative_error(out, expected) <= 1e-5


@torch.no_grad()
def test_texts_without_numbers_are_not_looked_at() -> None:
    unet = tiny_motion_unet()
    with patch_module(unet), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = [mode.from_tensor(x) for x in (sample(0), torch.tensor(1), repeated(0))]
        assert unet(*given).sample.shape == given[0].shape
