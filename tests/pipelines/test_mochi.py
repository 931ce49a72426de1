"""Mochi: a tiny pipeline of the whole structure, patched against unpatched."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_checks import relative_error
from diffusers import MochiTransformer3DModel, attention_backend
from family_checks import check_clip, check_compiled
from tiny_models import tiny_synthetic_pipeline
from torch import Tensor, nn
from transformer_checks import (
    ORDERS,
    Shifted,
    add_lora,
    check_cache,
    check_changed,
    check_full_size,
    check_half_precision,
    check_ops_off,
    check_same_output,
    fallbacks_of,
    first_block_cache,
    patched,
    pyramid_attention_broadcast,
    seeded,
    sites_of,
)

from vidaccel import patch_module, patch_pipeline
from vidaccel.blocks.dit import padded_text
from vidaccel.blocks.dit import transformer_mochi as blocks
from vidaccel.blocks.dit.transformer_mochi import MOCHI_OPS

SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "pooled_projection_dim": 24,
         "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8}  # fmt: skip
TEXT = 7  # tokens, of which some are valid
VALID = [(3, 5), (3, 3), (7, 7), (0, 5), (0, 0), (2, 5, 5)]

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # stock code asks for float32


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")


def build() -> Any:
    return copy.deepcopy(built())


@functools.cache
def built() -> Any:
    model = seeded(MochiTransformer3DModel, **SIZES)
    model.pos_frequencies.data += 0.5
    return model


def arguments(valid: tuple[int, ...] = (3, 5), size: tuple[int, ...] = (2, 4, 6)) -> dict[str, Any]:
    """One call with texts of which so many tokens are ``valid``."""
    generator = torch.Generator().manual_seed(1)
    batch = len(valid)
    return {
        "hidden_states": torch.randn(batch, 4, *size, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": torch.arange(TEXT) < torch.tensor(valid)[:, None],
    }


@torch.no_grad()
def run(model: Any, **options: Any) -> Tensor:
    return model(**arguments(**options), return_dict=False)[0]


def test_same_clip_and_exact_restore() -> None:
    pipe, call = tiny_synthetic_pipeline("mochi-1")
    check_clip(pipe, call, reorders_sums=False)
    with patch_pipeline(pipe, strict=True) as report:
        assert {site.op for site in report.sites} == {*MOCHI_OPS}


def test_the_full_model_has_the_size_of_the_released_one() -> None:
    check_full_size("mochi-1", 10_027_677_744)


# text without its padding


@pytest.mark.parametrize("valid", VALID, ids=str)
def test_same_output(valid: tuple[int, ...]) -> None:
    check_same_output(build, lambda model: run(model, valid=valid))


@pytest.mark.parametrize("size", [(1, 2, 2), (3, 6, 10)])
def test_odd_sizes(size: tuple[int, ...]) -> None:
    check_same_output(build, lambda model: run(model, size=size))


def test_lengths_differ_from_call_to_call_and_are_found_once_in_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    found = padded_text._valid_lengths
    monkeypatch.setattr(padded_text, "_valid_lengths", lambda mask: asked.append(1) or found(mask))
    model = build()
    expected = {valid: run(model, valid=valid) for valid in ((3, 5), (5, 5), (0, 7))}
    with patched(model):
        for valid in [*expected, *expected]:
            assert relative_error(run(model, valid=valid), expected[valid]) <= 1e-5
        asked.clear()
        run(model)
        assert len(asked) == 1


@torch.no_grad()
def test_what_a_block_hands_on_is_as_long_as_before() -> None:
    model = build()
    block = model.transformer_blocks[0]
    calls: list[dict[str, Any]] = []
    hook = block.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    run(model)
    hook.remove()
    video, text = block(**calls[0])
    with patched(model):
        found, found_text = block(**calls[0])
    assert relative_error(found, video) <= 1e-5 and text.shape == found_text.shape
    assert relative_error(found_text[:, :5], text[:, :5]) <= 1e-5
    assert not found_text[:, 5:].any() and text[:, 5:].any()


def test_padding_between_valid_tokens_stays() -> None:
    model = build()
    call = arguments()
    call["encoder_attention_mask"][:, 1] = False
    with torch.no_grad():
        expected = model(**call).sample
        with patched(model) as report:
            for _ in range(2):
                assert relative_error(model(**call).sample, expected) <= 1e-5
            assert fallbacks_of(report, "padded_text") == {"padding stands between valid tokens"}


@pytest.mark.parametrize("whole", [True, False])
def test_a_wrong_block_is_found_out(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:
        monkeypatch.setattr(blocks, "MOST_WHOLE", 0)
        monkeypatch.setattr(blocks, "CORNER_ROWS", 2)
    model = build()
    expected = run(model)
    with patched(model):
        run(model)
    right = blocks.FusedMochiTransformerBlock._add
    monkeypatch.setattr(
        blocks.FusedMochiTransformerBlock, "_add", lambda self, x, *args: right(self, 1.01 * x, *args)
    )  # fmt: skip
    with patch_module(model) as report:
        assert relative_error(run(model), expected) <= 1e-5
        assert {site.state for site in report.sites} == {"failed"}


# what a user may change


def test_every_op_can_be_off() -> None:
    check_ops_off(build, run, MOCHI_OPS)


def with_lora(model: Any) -> None:
    add_lora(model, "to_q", "add_k_proj", "to_out.0", "norm1.linear", "norm1_context.linear_1", "ff.net.0.proj")


def foreign_processor(model: Any) -> None:
    attn = model.transformer_blocks[1].attn1
    attn.processor = Shifted(attn.processor)


def hooks(model: Any) -> None:
    for path, module in model.named_modules():
        if path.endswith(("1.attn1.to_k", "1.attn1.norm_q", "1.ff.net.0", "2.norm2", "0.norm4_context")):
            module.register_forward_hook(lambda module, args, out: 1.5 * out)


def other_norm(model: Any) -> None:
    for block in model.transformer_blocks:
        block.attn1.norm_added_k = nn.LayerNorm(16)


@pytest.mark.parametrize("change", [with_lora, foreign_processor, hooks, other_norm])
@pytest.mark.parametrize("first", ORDERS)
def test_a_changed_model(change: Callable[[Any], None], first: str) -> None:
    check_changed(build, run, change, first)


@pytest.mark.parametrize("cache", [first_block_cache, pyramid_attention_broadcast])
@pytest.mark.parametrize("first", ORDERS)
def test_step_caches(cache: Callable[[Any], None], first: str) -> None:
    check_cache(build, run, cache, first)


def test_stock_code_knows_no_attention_backend() -> None:
    """``set_attention_backend`` does nothing to this model, nor does the context: so it is with the patched one."""
    model = build()
    expected = run(model)
    with patched(model) as report:
        with attention_backend("_native_math"):
            assert relative_error(run(model), expected) <= 1e-5
        assert {site.implementation for site in sites_of(report, "spatial_attention")} == {"torch"}


# torch.compile, half precision


def test_a_patched_model_compiles_in_one_graph() -> None:
    check_compiled(build(), run)


def test_half_precision_is_as_exact_as_stock() -> None:
    check_half_precision(build(), arguments())


def test_a_call_under_autocast_goes_the_original_way() -> None:
    model = build()
    with patched(model) as report, torch.autocast("cpu", torch.bfloat16):
        run(model)
        assert fallbacks_of(report, "qk_norm_rope") == {"autocast is on"}
