"""CogVideoX 1.0 and 1.5: tiny pipelines of the whole structure, patched against unpatched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_checks import all_fused, relative_error
from diffusers import CogVideoXFunControlPipeline, CogVideoXVideoToVideoPipeline
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from family_checks import check_clip, check_compiled
from tiny_models import tiny_relative, tiny_synthetic_pipeline, tiny_video
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformer_checks import (
    CACHES,
    ORDERS,
    Shifted,
    check_autocast,
    check_cache,
    check_changed,
    check_corner,
    check_deaf_to_attention_backends,
    check_each_op_off,
    check_error_in_bfloat16,
    check_full_size,
    check_hooks,
    check_lora,
    check_same,
    fallback_reasons,
    tiny_transformer,
)

from vidaccel import patch_module, patch_pipeline
from vidaccel.blocks.dit import cogvideox_transformer_3d as blocks
from vidaccel.blocks.dit.cogvideox_transformer_3d import COGVIDEOX_OPS, FusedCogVideoXBlock
from vidaccel.blocks.dit.joint_streams import joined

SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "in_channels": 4, "out_channels": 4,
         "time_embed_dim": 8, "text_embed_dim": 12, "max_text_seq_length": 5, "sample_width": 6, "sample_height": 4,
         "sample_frames": 9, "attention_bias": True, "use_rotary_positional_embeddings": True}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "2b": {"use_rotary_positional_embeddings": False},
    "5b": {},
    "5b-i2v": {"use_learned_positional_embeddings": True},
    "1.5": {"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 8},
    "without weights": {"norm_elementwise_affine": False},
}
TEXT = 5


def build(name: str = "5b", dtype: torch.dtype = torch.float32) -> Any:
    return tiny_transformer("CogVideoXTransformer3DModel", SIZES | MODELS[name], dtype)


@torch.no_grad()
def call(model: Any, *, batch: int = 2, size: tuple[int, int, int] = (3, 4, 6), **options: Any) -> Tensor:
    """``size``: frames, height, width."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    patch = config.patch_size_t or 1
    frames, height, width = -(-size[0] // patch) * patch, *size[1:]
    inputs = {
        "hidden_states": torch.randn(batch, frames, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, 12, generator=generator),
        "timestep": torch.full((batch,), 500),
    }
    if config.ofs_embed_dim:
        inputs["ofs"] = torch.full((1,), 2.0)
    if config.use_rotary_positional_embeddings and "image_rotary_emb" not in options:
        inputs["image_rotary_emb"] = rotary(frames // patch, height // 2, width // 2)
    return model(**inputs, **options).sample


def rotary(*grid: int) -> tuple[Tensor, Tensor]:
    frames, *sides = grid
    return get_3d_rotary_pos_embed(16, ((0, 0), tuple(sides)), tuple(sides), frames)


# whole clips


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v", "cogvideox1.5-5b"])
def test_same_clip_and_exact_restore(name: str) -> None:
    report = check_clip(*tiny_synthetic_pipeline(name), reorders_sums=False)
    assert {site.op for site in report.sites if site.path.startswith("transformer.")} == {*COGVIDEOX_OPS}


@pytest.mark.parametrize(
    ("pipeline_class", "name", "given"),
    [
        (CogVideoXVideoToVideoPipeline, "cogvideox-5b", {"video": tiny_video(9, 32, 48), "strength": 1.0}),
        (CogVideoXFunControlPipeline, "cogvideox-5b-i2v", {"control_video": tiny_video(9, 32, 48)}),
    ],
)
def test_of_a_video(pipeline_class: type[Any], name: str, given: dict[str, Any]) -> None:
    pipe, arguments = tiny_relative(name, pipeline_class)
    arguments = {key: value for key, value in arguments.items() if key not in ("num_frames", "image")}
    check_clip(pipe, arguments | given, reorders_sums=False)
    with patch_pipeline(pipe, strict=True) as report:
        assert {site.op for site in report.sites if site.path.startswith("transformer.")} == {*COGVIDEOX_OPS}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cogvideox-2b", 1_693_783_872),
        ("cogvideox-5b", 5_570_283_072),
        ("cogvideox-5b-i2v", 5_570_479_680),
        ("cogvideox1.5-5b", 5_570_676_352),
    ],
)
def test_the_full_model_has_the_size_of_the_released_one(name: str, parameters: int) -> None:
    check_full_size(name, parameters)


# blocks


@pytest.mark.parametrize("name", MODELS)
def test_same_output(name: str) -> None:
    assert not check_same(build(name), call).fallbacks


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(1, 2, 2), (3, 6, 10)])
def test_sizes(batch: int, size: tuple[int, int, int]) -> None:
    assert not check_same(build(), lambda model: call(model, batch=batch, size=size)).fallbacks


def test_blocks_hand_on_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[bool] = []

    def counting(first: Tensor, second: Tensor) -> Tensor:
        whole = joined(first, second)
        copies.append(whole.data_ptr() != first.data_ptr())
        return whole

    model = build()
    with patch_module(model, strict=True):
        call(model)
        monkeypatch.setattr(blocks, "joined", counting)
        call(model)
    assert copies == [False, False, False]


def test_streams_are_joined_without_a_copy_where_they_lie_one_behind_the_other() -> None:
    whole = torch.randn(2, 7, 3)
    text, video = whole.split([2, 5], dim=1)
    assert joined(text, video).data_ptr() == whole.data_ptr() and torch.equal(joined(text, video), whole)
    others = [(video, text), (text, video.clone()), (text, whole[:, 3:]), (text.double(), video), (text, video[:, ::2])]
    for first, second in others:
        found = joined(first, second)
        assert torch.equal(found, torch.cat([first, second], dim=1))
        assert found.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
    text, video = torch.empty(2, 7, 3, device="meta").split([2, 5], dim=1)
    assert joined(text, video).shape == (2, 7, 3)


@pytest.mark.parametrize("whole", [True, False])
def test_a_wrong_block_is_found_out(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:
        monkeypatch.setattr(blocks, "MOST_WHOLE", 0)
        monkeypatch.setattr(blocks, "CORNER_ROWS", 2)
    model = build()
    expected = call(model)
    check_same(model, call)
    right = blocks.JointBlock.add
    monkeypatch.setattr(blocks.JointBlock, "add", lambda self, x, *args: right(self, 1.01 * x, *args))
    with patch_module(model) as report:
        assert relative_error(call(model), expected) <= 1e-5
        assert {site.state for site in report.sites} == {"failed"}


@torch.no_grad()
def test_a_long_call_is_checked_on_a_corner() -> None:
    block = build().transformer_blocks[0]
    x = torch.randn(1, 70_000, 32)
    tables = torch.randn(2, 70_000, 8).repeat_interleave(2, dim=2)
    arguments = x, torch.randn(1, 226, 32), torch.randn(1, 8), tuple(tables)
    check_corner(block, FusedCogVideoXBlock, (*arguments, None))
    with all_fused(block, FusedCogVideoXBlock):
        assert block.corner((*arguments, {"attention_mask": torch.zeros(1, 70_226)}), {}) is None


# what a user may change


@pytest.mark.parametrize("name", ["2b", "5b"])
def test_each_op_off(name: str) -> None:
    check_each_op_off(build(name), call)


def test_deaf_to_attention_backends() -> None:
    check_deaf_to_attention_backends(build(), call)


def test_lora() -> None:
    report = check_lora(build(), call, "to_q", "to_out.0", "norm1.linear", "ff.net.2")
    assert not report.fallbacks


def test_lora_on_the_feed_forward() -> None:
    report = check_lora(build(), call, "net.0.proj")
    assert fallback_reasons(report) == {"a Linear was replaced by Linear of peft"}


def test_hooks() -> None:
    check_hooks(build(), call, "attn1.to_k", "1.attn1.norm_q", "0.ff.net.0", "1.ff", "2.norm1.norm")


def foreign_processor(model: Any) -> None:
    attn = model.transformer_blocks[1].attn1
    attn.processor = Shifted(attn.processor)


def other_norm(model: Any) -> None:
    for block in model.transformer_blocks:
        block.attn1.norm_k = nn.Tanh()


def fused_projections(model: Any) -> None:
    model.fuse_qkv_projections()
    for block in model.transformer_blocks:
        block.attn1.to_qkv.bias.data += 0.5


def unfused_projections(model: Any) -> None:
    fused_projections(model)
    model.unfuse_qkv_projections()
    foreign_processor(model)


class DoublingProcessor(CogVideoXAttnProcessor2_0):
    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Any:
        return tree_map(lambda out: 2 * out, super().__call__(attn, hidden_states, encoder_hidden_states, **options))


def processor_of_another_class(model: Any) -> None:
    model.transformer_blocks[1].attn1.processor.__class__ = DoublingProcessor


def cross_attention(model: Any) -> None:
    for block in model.transformer_blocks:
        block.attn1.is_cross_attention = True
        block.ff.net[2].register_forward_hook(lambda *_: None)  # no check, which would find it out


CHANGES = [
    foreign_processor, other_norm, fused_projections, unfused_projections, processor_of_another_class, cross_attention,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("first", ORDERS)
def test_a_changed_model(change: Callable[[Any], None], first: str) -> None:
    check_changed(build, call, change, first)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("first", ORDERS)
def test_step_caches(name: str, first: str) -> None:
    check_cache(build, call, name, first)


def test_a_foreign_attention_is_told_and_the_rest_is_fused() -> None:
    model = build()
    foreign_processor(model)
    report = check_same(model, call)
    told = {site.op for site in report.sites if site.fallbacks}
    assert told == {"qk_norm_rope", "spatial_attention"}
    assert fallback_reasons(report) == {"it has a processor of its own, Shifted"}


def test_arguments_for_the_attention_go_there() -> None:
    mask = torch.zeros(2, TEXT + 18)
    mask[:, -4:] = -1e4
    options = {"attention_kwargs": {"attention_mask": mask}}
    report = check_same(build(), lambda model: call(model, **options))
    assert fallback_reasons(report) == {"its attention takes attention_mask"}


@torch.no_grad()
def test_one_video_for_several_timesteps() -> None:
    block = build("2b").transformer_blocks[0]
    block.ff.net[2].register_forward_hook(lambda *_: None)
    video, text, temb = torch.randn(1, 18, 32), torch.randn(2, TEXT, 32), torch.randn(2, 8)
    expected = block(video, text, temb)
    with all_fused(block, FusedCogVideoXBlock):
        assert all(map(torch.equal, block(video, text, temb), expected))


def test_one_row_of_angles_for_all_tokens() -> None:
    table = tuple(angles[1:2] for angles in rotary(3, 2, 3))
    model = build()
    model.transformer_blocks[1].ff.net[2].register_forward_hook(lambda *_: None)
    report = check_same(model, lambda model: call(model, image_rotary_emb=table))
    assert "its rotary table has not one row for each token" in fallback_reasons(report)


@pytest.mark.parametrize("first", ["an ordinary one first", "it first"])
def test_a_table_of_two_angles_for_a_pair_of_channels(first: str) -> None:
    generator = torch.Generator().manual_seed(2)
    table = tuple(torch.randn(angles.shape, generator=generator) for angles in rotary(3, 2, 3))
    model = build()
    expected, ordinary = call(model, image_rotary_emb=table), call(model)
    with patch_module(model) as report:
        if first == "an ordinary one first":
            assert relative_error(call(model), ordinary) <= 1e-5
        assert relative_error(call(model, image_rotary_emb=table), expected) <= 1e-5
        assert not any(site.state == "failed" for site in report.sites)
        assert "its rotary table has two angles for a pair of channels" in fallback_reasons(report)


# torch.compile, half precision


@pytest.mark.slow
def test_a_patched_model_compiles_in_one_graph() -> None:
    check_compiled(build(), call)


@torch.no_grad()
def test_error_in_bfloat16() -> None:
    block = build(dtype=torch.bfloat16).transformer_blocks[0]
    x, text, temb = (torch.randn(2, *size, dtype=torch.bfloat16) for size in ((48, 32), (TEXT, 32), (8,)))
    check_error_in_bfloat16(block, FusedCogVideoXBlock, (x, text, temb, rotary(4, 3, 4)))


def test_a_call_under_autocast_goes_the_original_way() -> None:
    check_autocast(build(), call)
