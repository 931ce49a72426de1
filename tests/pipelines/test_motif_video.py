"""Motif-Video: tiny pipelines of the whole structure, patched against unpatched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_checks import relative_error
from diffusers import MotifVideoImage2VideoPipeline, MotifVideoPipeline, MotifVideoTransformer3DModel
from family_checks import check_clip, check_compiled, check_kernels
from tiny_models import tiny_video
from tiny_pipelines import MOTIF, motif_video
from torch import Tensor, nn
from transformer_checks import (
    CACHES,
    ORDERS,
    TELLING_ROWS_APART,
    Shifted,
    check_attention_backend,
    check_cache,
    check_changed,
    check_corner,
    check_each_op_off,
    check_error_in_bfloat16,
    check_error_on_a_gpu,
    check_hooks,
    check_lora,
    check_same,
    fallback_reasons,
    telling_rows_apart,
    telling_transformer,
    turning_channels_apart,
)

from vidaccel import patch_module, patch_pipeline
from vidaccel.blocks.dit.transformer_hunyuan_video import ONE_STREAM_OPS
from vidaccel.blocks.dit.transformer_motif_video import (
    FusedMotifVideoSingleTransformerBlock,
    FusedMotifVideoTransformerBlock,
    MotifBlock,
)

PLAIN = {"enable_text_cross_attention_dual": False, "enable_text_cross_attention_single": False}
TEXT, IMAGE = 7, 4  # tokens


def build(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return telling_transformer(MotifVideoTransformer3DModel, MOTIF | options).to(dtype)


@torch.no_grad()
def call(model: Any, *, valid: tuple[int, ...] | None = (3, 3), image: bool = True) -> Tensor:
    """One call of ``model`` with texts of which so many tokens are ``valid``; None: with no mask."""
    generator = torch.Generator().manual_seed(1)
    batch = len(valid or "two")

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(model.device, model.dtype)

    out: Tensor = model(
        noise(33, 3, 4, 6),
        torch.full((batch,), 500.0, device=model.device),
        noise(TEXT, 12),
        None if valid is None else (torch.arange(TEXT) < torch.tensor(valid)[:, None]).to(model.device),
        noise(IMAGE, 8) if image else None,
    ).sample
    return out.float()


@pytest.mark.parametrize(
    ("pipeline_class", "given"),
    [(MotifVideoPipeline, {}), (MotifVideoImage2VideoPipeline, {"image": tiny_video(1, 32, 48)[0]})],
)
def test_same_clip_and_exact_restore(pipeline_class: type[Any], given: dict[str, Any]) -> None:
    pipe, arguments = motif_video(pipeline_class)
    with patch_pipeline(pipe, strict=True) as report:
        assert {site.op for site in report.sites if site.path.startswith("transformer.")} >= {*ONE_STREAM_OPS}
    check_clip(pipe, arguments | given)


@pytest.mark.parametrize("options", [{}, PLAIN], ids=["texts", "joint"])
@pytest.mark.parametrize("given", [{"image": False}, {"valid": None}, {}], ids=str)
def test_same_output(options: dict[str, Any], given: dict[str, Any]) -> None:
    report = check_same(build(**options), lambda model: call(model, **given))
    assert fallback_reasons(report) == set()


@pytest.mark.parametrize(
    ("valid", "reason"),
    [((3, 5), "the texts of the batch have different lengths"), ((0, 0), "no token of the text is valid")],
)
@pytest.mark.parametrize("image", [True, False])
def test_padding_that_stays(valid: tuple[int, ...], reason: str, image: bool) -> None:
    report = check_same(build(), lambda model: call(model, valid=valid, image=image))
    # the tokens of an image are never padding: with one, all texts may be empty
    assert fallback_reasons(report) == (set() if image and valid == (0, 0) else {reason})


@torch.no_grad()
def test_one_text_for_all_samples() -> None:
    """What the pipeline gives, of the negative prompt, for several videos of a prompt."""
    model = build()
    block, tables = model.transformer_blocks[0], model.rope(torch.zeros(1, 33, 1, 4, 6))
    arguments = torch.randn(2, 6, 32), torch.randn(1, TEXT, 32), torch.randn(2, 32), None, tables
    expected = block(*arguments)
    with patch_module(model) as report:
        assert torch.equal(block(*arguments)[0], expected[0])
    assert fallback_reasons(report) == {"video, text and timestep embedding differ in batch size"}


@torch.no_grad()
def test_one_mask_for_all_samples() -> None:
    """What the pipeline gives for several videos of a prompt."""
    block, tables = build().transformer_blocks[0], build().rope(torch.zeros(1, 33, 1, 4, 6))
    mask = (torch.arange(6 + TEXT) < 9)[None, None, None]
    arguments = torch.randn(2, 6, 32), torch.randn(2, TEXT, 32), torch.randn(2, 32), mask, tables
    expected = block(*arguments)
    model = build()
    with patch_module(model) as report:
        out = model.transformer_blocks[0](*arguments)
    assert relative_error(out[0], expected[0]) <= 1e-5 and relative_error(out[1][:, :3], expected[1][:, :3]) <= 1e-5
    assert fallback_reasons(report) == set()


@torch.no_grad()
def test_a_text_of_an_image_alone() -> None:
    model = build()
    block = model.transformer_blocks[0]
    x, text, temb = torch.randn(1, 6, 32), torch.randn(1, IMAGE, 32), torch.randn(1, 32)
    arguments = x, text, temb, None, model.rope(torch.zeros(1, 33, 1, 4, 6)), IMAGE
    expected = block(*arguments)
    with patch_module(model) as report:
        assert relative_error(block(*arguments)[0], expected[0]) <= 1e-5
    assert fallback_reasons(report) == {"no text stands behind the tokens of the image"}


def test_norms_of_another_kind() -> None:
    report = check_same(build(qk_norm="layer_norm"), call)
    assert any("LayerNorm" in reason for reason in fallback_reasons(report))


@torch.no_grad()
def test_a_long_call_is_checked_on_a_corner() -> None:
    model = build()
    tables = torch.randn(70_000, 16), torch.randn(70_000, 16)
    arguments = torch.randn(1, 70_000, 32), torch.randn(1, 300, 32), torch.randn(1, 32), None, tables, 200
    check_corner(model.transformer_blocks[0], FusedMotifVideoTransformerBlock, arguments)
    check_corner(model.single_transformer_blocks[0], FusedMotifVideoSingleTransformerBlock, arguments)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["transformer_blocks", "single_transformer_blocks"])
def test_error_in_bfloat16(kind: str) -> None:
    model = build(torch.bfloat16)
    fused = {
        "transformer_blocks": FusedMotifVideoTransformerBlock,
        "single_transformer_blocks": FusedMotifVideoSingleTransformerBlock,
    }[kind]
    x, text, temb = (torch.randn(2, *shape).bfloat16() for shape in ((18, 32), (TEXT + IMAGE, 32), (32,)))
    tables = model.rope(torch.zeros(1, 33, 3, 4, 6))
    check_error_in_bfloat16(getattr(model, kind)[0], fused, (x, text, temb, None, tables, IMAGE))


@pytest.mark.parametrize("kind", ["transformer_blocks", "single_transformer_blocks"])
def test_a_wrong_second_attention_is_found_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(num_decoder_layers=0)
    expected = call(model)
    right = MotifBlock.beside_attention
    monkeypatch.setattr(MotifBlock, "beside_attention", lambda self, x, *args: 1.01 * right(self, x, *args))
    with patch_module(model) as report:
        assert relative_error(call(model), expected) <= 1e-5
        assert {site.state for site in report.sites if site.path.startswith(f"{kind}.0")} == {"failed"}


# what a user may change


def test_each_op_off() -> None:
    check_each_op_off(build(), call)


def test_attention_backend() -> None:
    check_attention_backend(build(), call)


def test_lora() -> None:
    targets = "to_q", "add_k_proj", "to_out.0", "proj_out", "proj_mlp", "net.0.proj", "norm1.linear", "norm.linear"
    check_lora(build(), call, *targets)


def test_hooks() -> None:
    check_hooks(build(), call, "0.attn.to_k", "1.cross_attn.norm_q", "0.ff.net.0", "1.proj_mlp", "0.norm2")


def foreign_processors(model: Any) -> None:
    first, second = model.transformer_blocks
    for attn in (first.attn, second.cross_attn, model.single_transformer_blocks[0].cross_attn):
        attn.processor = Shifted(attn.processor)


def other_norms(model: Any) -> None:
    for block in model.transformer_blocks:
        block.attn.norm_added_k = nn.Tanh()
        block.cross_attn.norm_q = nn.Tanh()


@pytest.mark.parametrize("change", [foreign_processors, other_norms, turning_channels_apart])
@pytest.mark.parametrize("first", ORDERS)
def test_a_changed_model(change: Callable[[Any], None], first: str) -> None:
    check_changed(build, call, change, first)


@pytest.mark.parametrize("way", TELLING_ROWS_APART)
def test_layers_that_tell_rows_apart_find_the_padding(way: Callable[[nn.Module], None]) -> None:
    change = telling_rows_apart(way, "proj_mlp", "ff_context.net.2", "to_add_out")
    check_changed(build, call, change, "patched first")


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("first", ORDERS)
def test_a_step_cache(name: str, first: str) -> None:
    # with decoder layers, FirstBlockCache does not work with the stock model
    check_cache(functools.partial(build, num_decoder_layers=0), call, name, first)


@pytest.mark.slow
def test_compiled() -> None:
    check_compiled(build(), call)


@pytest.mark.parametrize("options", [{"num_single_layers": 0}, {"num_layers": 0, "num_single_layers": 1}], ids=str)
def test_with_the_kernels(options: dict[str, int], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "linear_gelu=torch,spatial_attention=torch,residual_projection=torch")
    model = build(num_decoder_layers=0, **options).to(device)
    check_kernels(model, call, {"gated_residual_norm", "qk_norm_rope"})


@pytest.mark.gpu
def test_error_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDACCEL_IMPL")
    check_error_on_a_gpu(build, call)
