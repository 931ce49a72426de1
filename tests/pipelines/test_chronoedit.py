"""ChronoEdit: a tiny pipeline of the whole structure, patched against unpatched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_checks import check_clip, check_compiled
from tiny_pipelines import CHRONOEDIT, chronoedit
from torch import Tensor
from transformer_checks import (
    check_each_op_off,
    check_error_in_bfloat16,
    check_relative_of_wan,
    check_same,
    tiny_transformer,
)

from vidaccel.blocks.dit.transformer_chronoedit import FusedChronoEditTransformerBlock


def transformer(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return tiny_transformer("ChronoEditTransformer3DModel", CHRONOEDIT | options, dtype)


@torch.no_grad()
def call(model: Any, *, size: tuple[int, int, int] = (3, 4, 6)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, *shape, generator=generator) for shape in ((36, *size), (512, 16), (17, 32))]
    return model(inputs[0], torch.full((2,), 500.0), *inputs[1:]).sample


@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_frames": 29, "enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 1}],
    ids=["clip", "temporal-reasoning"],
)
def test_same_clip_and_exact_restore(arguments: dict[str, Any]) -> None:
    pipe, defaults = chronoedit()
    report = check_clip(pipe, defaults | arguments, reorders_sums=False)
    assert {site.path for site in report.sites if site.path.startswith("transformer.")} == {
        "transformer.blocks.0",
        "transformer.blocks.1",
    }


def test_each_op_off() -> None:
    check_each_op_off(transformer(), call)


@pytest.mark.slow
def test_patched_model_compiles_in_one_graph() -> None:
    check_compiled(transformer(num_layers=1), call)


@pytest.mark.parametrize("size", [(2, 6, 2), (5, 6, 10)])
def test_sizes(size: tuple[int, int, int]) -> None:
    assert not check_same(transformer(), lambda model: call(model, size=size)).fallbacks


def test_what_users_put_in() -> None:
    check_relative_of_wan(transformer, call)


@torch.no_grad()
def test_error_of_a_block() -> None:
    torch.manual_seed(0)
    model = transformer(torch.bfloat16)
    x, context, temb = (torch.randn(2, rows, 24).bfloat16() for rows in (18, 17 + 512, 6))
    arguments = x, context, temb, model.rope(torch.empty(2, 16, 3, 4, 6))
    check_error_in_bfloat16(model.blocks[0], FusedChronoEditTransformerBlock, arguments)
