"""Kandinsky 5: tiny pipelines of the whole structure, patched against unpatched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import Kandinsky5I2VPipeline, Kandinsky5T2VPipeline
from family_checks import check_clip, check_compiled
from tiny_models import tiny_video
from tiny_pipelines import KANDINSKY, kandinsky
from torch import Tensor, nn
from transformer_checks import (
    ORDERS,
    Shifted,
    check_attention_backend,
    check_autocast,
    check_cache,
    check_changed,
    check_corner,
    check_each_op_off,
    check_error_in_bfloat16,
    check_hooks,
    check_lora,
    check_same,
    fallback_reasons,
    tiny_transformer,
)

from vidaccel import patch_pipeline
from vidaccel.blocks.dit.transformer_kandinsky import (
    KANDINSKY_OPS,
    FusedKandinsky5TransformerDecoderBlock,
    FusedKandinsky5TransformerEncoderBlock,
)

ROUNDED = "its rotary embedding is rounded to bfloat16, or its table is not float32"

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # in stock code


def build(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return tiny_transformer("Kandinsky5Transformer3DModel", KANDINSKY | options, dtype)


@torch.no_grad()
def call(
    model: Any, *, batch: int = 2, size: tuple[int, int, int] = (3, 4, 6), sparse_params: dict[str, Any] | None = None
) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text, pooled = (
        torch.randn(batch, *shape, generator=generator).to(model.dtype) for shape in ((*size, 4), (5, 12), (6,))
    )
    places = tuple(torch.arange(length // patch) for length, patch in zip(size, (1, 2, 2), strict=True))
    return model(
        latents, text, torch.full((batch,), 500.0), pooled, places, torch.arange(5), sparse_params=sparse_params
    ).sample.float()  # fmt: skip


@pytest.mark.parametrize(
    ("pipeline_class", "given"),
    [(Kandinsky5T2VPipeline, {}), (Kandinsky5I2VPipeline, {"image": tiny_video(1, 32, 48)[0]})],
)
def test_same_clip_and_exact_restore(pipeline_class: type[Any], given: dict[str, Any]) -> None:
    pipe, arguments = kandinsky(pipeline_class)
    with patch_pipeline(pipe, strict=True) as report:
        assert {site.op for site in report.sites if site.path.startswith("transformer.")} == {*KANDINSKY_OPS}
    check_clip(pipe, arguments | given, reorders_sums=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(3, 4, 6), (1, 2, 2)])
def test_same_output(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    report = check_same(build(dtype), lambda model: call(model, size=size))
    assert fallback_reasons(report) == ({ROUNDED} if dtype == torch.float32 else set())


def test_sparse_attention_stays_as_it_is() -> None:
    calls: list[Any] = []

    class Sparse:
        _attention_backend = _parallel_config = None

        def __call__(self, attn: Any, x: Tensor, sparse_params: Any = None, **options: Any) -> Tensor:
            calls.append(sparse_params)
            return attn.to_value(x)

    model = build(torch.bfloat16)
    for block in model.visual_transformer_blocks:
        block.self_attention.processor = Sparse()
    report = check_same(model, lambda model: call(model, sparse_params={"to_fractal": False}))
    assert "its attention is sparse" in fallback_reasons(report) and all(calls)


@torch.no_grad()
def test_a_long_call_is_checked_on_a_corner() -> None:
    block = build().visual_transformer_blocks[0]
    arguments = torch.randn(1, 70_000, 32), torch.randn(1, 5, 32), torch.randn(1, 8), torch.randn(1, 70_000, 1, 8, 2, 2)
    check_corner(block, FusedKandinsky5TransformerDecoderBlock, (*arguments, None))
    x, _, *others = arguments
    check_corner(build().text_transformer_blocks[0], FusedKandinsky5TransformerEncoderBlock, (x, *others))


# what a user may change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_op_off(dtype: torch.dtype) -> None:
    check_each_op_off(build(dtype), call)


def test_attention_backend() -> None:
    check_attention_backend(build(torch.bfloat16), call)


def test_lora() -> None:
    check_lora(build(), call, "to_query", "self_attention.out_layer", "feed_forward.in_layer")


def test_hooks() -> None:
    check_hooks(build(), call, "1.self_attention.to_key", "1.cross_attention.query_norm", "0.feed_forward.in_layer")


def foreign_processors(model: Any) -> None:
    first, second = model.visual_transformer_blocks
    for attn in (first.self_attention, second.cross_attention):
        attn.processor = Shifted(attn.processor)


def other_norms(model: Any) -> None:
    for block in model.visual_transformer_blocks:
        block.self_attention.key_norm = nn.Tanh()
        block.cross_attention.query_norm = nn.Tanh()


@pytest.mark.parametrize("change", [foreign_processors, other_norms])
@pytest.mark.parametrize("first", ORDERS)
def test_a_changed_model(change: Callable[[Any], None], first: str) -> None:
    check_changed(build, call, change, first)


@pytest.mark.parametrize("first", ORDERS)
def test_a_step_cache(first: str) -> None:
    """FirstBlockCache does not work with the stock model."""
    check_cache(build, call, "pyramid attention broadcast", first)


# torch.compile, half precision


@pytest.mark.slow
def test_a_patched_model_compiles_in_one_graph() -> None:
    check_compiled(build(torch.bfloat16), call)


@torch.no_grad()
def test_error_in_bfloat16() -> None:
    block = build(torch.bfloat16).visual_transformer_blocks[0].bfloat16()
    x, text, time = (torch.randn(1, *size, dtype=torch.bfloat16) for size in ((40, 32), (5, 32), (8,)))
    angle = torch.rand(1, 40, 1, 8)
    rope = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).unflatten(-1, (2, 2))
    check_error_in_bfloat16(block, FusedKandinsky5TransformerDecoderBlock, (x, text, time, rope, None))


def test_a_call_under_autocast_goes_the_original_way() -> None:
    check_autocast(build(), call)
