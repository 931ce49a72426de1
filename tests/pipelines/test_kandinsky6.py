"""Kandinsky 6: a tiny pipeline and models of the whole structure, patched against unpatched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_checks import relative_error
from family_checks import check_clip, check_compiled, check_kernels
from tiny_models import tiny_video
from tiny_pipelines import KANDINSKY_6, kandinsky_6
from torch import Tensor, nn
from transformer_checks import (
    ORDERS,
    Shifted,
    check_attention_backend,
    check_changed,
    check_corner,
    check_each_op_off,
    check_error_in_bfloat16,
    check_error_on_a_gpu,
    check_hooks,
    check_lora,
    check_same,
    fallback_reasons,
    tiny_transformer,
)

from vidaccel import patch_module, patch_pipeline
from vidaccel.blocks.dit.transformer_kandinsky import KANDINSKY_OPS
from vidaccel.blocks.dit.transformer_kandinsky6 import (
    FusedKandinsky6FusedTransformerDecoderBlock,
    FusedKandinsky6TransformerEncoderBlock,
)

TEXT, SOUND = 5, 7  # tokens

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # in stock code


def build(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return tiny_transformer("Kandinsky6Transformer3DModel", KANDINSKY_6 | options, dtype)


@torch.no_grad()
def call(
    model: Any, *, batch: int = 1, sound: bool = True, mask: Tensor | None = None, size: tuple[int, ...] = (3, 4, 6)
) -> Tensor:
    """Video and sound in one row."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(model.device, model.dtype)

    outputs = model(
        noise(*size, 9),
        noise(TEXT, 12),
        noise(6),
        torch.full((batch,), 500.0, device=model.device),
        noise(SOUND, 3) if sound else None,
        encoder_attention_mask=mask,
        visual_token_type_ids=torch.tensor([[0, 0, 1]] * batch, device=model.device)[:, : size[0]],
        return_dict=False,
    )
    return torch.cat([out.flatten() for out in outputs]).float()


@pytest.mark.parametrize("given", [{}, {"image": tiny_video(1, 32, 48)[0]}], ids=["text", "image"])
def test_same_clip_and_exact_restore(given: dict[str, Any]) -> None:
    pipe, arguments = kandinsky_6()
    with patch_pipeline(pipe, strict=True) as report:
        assert {site.op for site in report.sites if site.path.startswith("transformer.")} == {*KANDINSKY_OPS}
    check_clip(pipe, arguments | given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("given", [{}, {"sound": False}, {"batch": 2}, {"size": (1, 2, 2)}], ids=str)
def test_same_output(dtype: torch.dtype, given: dict[str, Any]) -> None:
    model = build(dtype)
    expected = call(model, **given)
    with patch_module(model, strict=True) as report:
        for _ in range(2):
            assert relative_error(call(model, **given), expected) <= (1e-5 if dtype == torch.float32 else 2e-3)
        assert {site.state for site in report.sites} == {"active"} and not fallback_reasons(report), str(report)


@pytest.mark.parametrize("option", ["ca_rope", "cross_gates", "fix_modulation"])
def test_other_variants(option: str) -> None:
    assert fallback_reasons(check_same(build(**{option: False}), call)) == set()


def test_a_padded_text() -> None:
    report = check_same(build(), lambda model: call(model, mask=torch.arange(TEXT)[None] < 3))
    assert fallback_reasons(report) == set()


def test_sound_alone() -> None:
    model = build()
    block = model.visual_transformer_blocks[0]
    sound, text, temb = torch.randn(1, SOUND, 48), torch.randn(1, TEXT, 48), torch.randn(1, 8)
    rope = torch.randn(SOUND, 1, 8, 2, 2)
    arguments = None, sound, text, text, (temb, temb), None, rope
    with torch.no_grad():
        expected = block(*arguments)[1]
        with patch_module(model) as report:
            assert torch.equal(block(*arguments)[1], expected)
    assert "there is sound alone" in fallback_reasons(report)


@torch.no_grad()
def test_a_long_call_is_checked_on_a_corner() -> None:
    model, temb = build(), torch.randn(1, 8)
    text, sound_text, sound = torch.randn(1, TEXT, 32), torch.randn(1, TEXT, 48), torch.randn(1, 300, 48)
    arguments = (
        torch.randn(1, 70_000, 32), sound, text, sound_text, (temb, temb),
        torch.randn(70_000, 1, 8, 2, 2), torch.randn(300, 1, 8, 2, 2), None,
    )  # fmt: skip
    check_corner(model.visual_transformer_blocks[0], FusedKandinsky6FusedTransformerDecoderBlock, arguments)
    rope = torch.randn(TEXT, 1, 8, 2, 2)
    check_corner(
        model.video_text_transformer_blocks[0], FusedKandinsky6TransformerEncoderBlock, (text, temb, rope, None)
    )


@torch.no_grad()
def test_error_in_bfloat16() -> None:
    model = build(torch.bfloat16)
    x, text, temb = torch.randn(2, 18, 32).bfloat16(), torch.randn(2, TEXT, 32).bfloat16(), torch.randn(2, 8)
    sound, sound_text = torch.randn(2, SOUND, 48).bfloat16(), torch.randn(2, TEXT, 48).bfloat16()
    places = tuple(map(torch.arange, (3, 2, 3)))
    rope = model.visual_rope_embeddings(places).flatten(0, 2)
    sound_rope = model.audio_rope_embeddings(torch.arange(SOUND))
    check_error_in_bfloat16(
        model.visual_transformer_blocks[0],
        FusedKandinsky6FusedTransformerDecoderBlock,
        (x, sound, text, sound_text, (temb, temb), rope, sound_rope),
    )
    text_rope = model.video_text_rope_embeddings(torch.arange(TEXT))
    check_error_in_bfloat16(
        model.video_text_transformer_blocks[0], FusedKandinsky6TransformerEncoderBlock, (text, temb, text_rope)
    )


# what a user may change


def test_each_op_off() -> None:
    check_each_op_off(build(), call)


def test_attention_backend() -> None:
    check_attention_backend(build(), call)


def test_lora() -> None:
    check_lora(build(), call, "to_query", "self_attention.out_layer", "feed_forward.net.2", "va_modulation.out_layer")


def test_hooks() -> None:
    names = "1.video_dec_block.self_attention.to_key", "1.va_cross_attention.query_norm", "0.feed_forward.net.0"
    check_hooks(build(), call, *names)


def foreign_processors(model: Any) -> None:
    first, second = model.visual_transformer_blocks
    for attn in (
        first.video_dec_block.self_attention,
        second.audio_dec_block.cross_attention,
        first.va_cross_attention,
    ):
        attn.processor = Shifted(attn.processor)


def other_norms(model: Any) -> None:
    for block in model.visual_transformer_blocks:
        block.video_dec_block.self_attention.key_norm = nn.Tanh()
        block.av_cross_attention.query_norm = nn.Tanh()


def half_the_table(model: Any) -> None:
    """A hook on an attention finds the arguments that stock code gives it."""

    def halve(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"rotary_emb": 0.5 * kwargs["rotary_emb"]}

    block = model.visual_transformer_blocks[1].video_dec_block
    block.self_attention.register_forward_pre_hook(halve, with_kwargs=True)


def turning_channels_apart(model: Any) -> None:
    model.visual_rope_embeddings.register_forward_hook(
        lambda module, args, rope: rope + torch.linspace(0, 0.5, 4).view(2, 2)
    )


@pytest.mark.parametrize("change", [foreign_processors, other_norms, half_the_table, turning_channels_apart])
@pytest.mark.parametrize("first", ORDERS)
def test_a_changed_model(change: Callable[[Any], None], first: str) -> None:
    check_changed(build, call, change, first)


@pytest.mark.slow
def test_compiled() -> None:
    check_compiled(build(), call)


def test_with_the_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "spatial_attention=torch")
    check_kernels(build(num_visual_blocks=1).to(device), call, {"gated_residual_norm", "qk_norm_rope"})


@pytest.mark.gpu
def test_error_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDACCEL_IMPL")
    check_error_on_a_gpu(build, call)
