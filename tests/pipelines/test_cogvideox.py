"""CogVideoX 1.0 and 1.5: tiny pipelines of the whole structure, patched against unpatched."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_checks import relative_error
from diffusers import (
    CogVideoXFunControlPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
    attention_backend,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from family_checks import check_clip, check_compiled
from PIL import Image
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
from vidaccel.blocks.dit import cogvideox_transformer_3d as blocks
from vidaccel.blocks.dit.cogvideox_transformer_3d import COGVIDEOX_OPS
from vidaccel.blocks.dit.joint_streams import joined

SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "in_channels": 4, "out_channels": 4,
         "time_embed_dim": 8, "text_embed_dim": 12, "max_text_seq_length": 5, "sample_width": 6, "sample_height": 4,
         "sample_frames": 9, "use_rotary_positional_embeddings": True}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "2b": {"use_rotary_positional_embeddings": False, "attention_bias": True},
    "5b": {"attention_bias": True},
    "5b-i2v": {"use_learned_positional_embeddings": True},
    "1.5": {"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 8},
    "without weights": {"norm_elementwise_affine": False},
}
TEXT = 5


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")


def build(name: str) -> Any:
    return copy.deepcopy(built(name))


@functools.cache
def built(name: str) -> Any:
    return seeded(CogVideoXTransformer3DModel, **SIZES | MODELS[name])


def arguments(model: Any, batch: int = 2, size: tuple[int, ...] = (3, 4, 6)) -> dict[str, Any]:
    """One call of ``model`` with latents of ``size``: frames, height, width."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    frames, height, width = size
    patches = -(-frames // (config.patch_size_t or 1))
    frames = patches * (config.patch_size_t or 1)
    call = {
        "hidden_states": torch.randn(batch, frames, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, 12, generator=generator),
        "timestep": torch.full((batch,), 500),
    }
    if config.ofs_embed_dim:
        call["ofs"] = torch.full((1,), 2.0)
    if config.use_rotary_positional_embeddings:
        grid = height // 2, width // 2
        call["image_rotary_emb"] = get_3d_rotary_pos_embed(16, ((0, 0), grid), grid, patches)
    return call


@torch.no_grad()
def run(model: Any, **options: Any) -> Tensor:
    return model(**arguments(model, **options), return_dict=False)[0]


# whole clips


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v", "cogvideox1.5-5b"])
def test_same_clip_and_exact_restore(name: str) -> None:
    report = check_clip(*tiny_synthetic_pipeline(name), reorders_sums=False)
    assert {site.op for site in report.sites} == {*COGVIDEOX_OPS}


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


CLIP = [Image.effect_noise((48, 32), 80).convert("RGB")] * 9
PIPELINES: dict[str, tuple[type[Any], str, dict[str, Any]]] = {
    "video to video": (CogVideoXVideoToVideoPipeline, "cogvideox-5b", {"video": CLIP, "strength": 1.0}),
    "control": (CogVideoXFunControlPipeline, "cogvideox-5b-i2v", {"control_video": CLIP}),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_makes_the_same_clip(name: str) -> None:
    pipeline_class, parts_of, given = PIPELINES[name]
    pipe, call = tiny_synthetic_pipeline(parts_of)
    pipe = pipeline_class(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    del call["num_frames"]
    call.pop("image", None)
    check_clip(pipe, call | given, reorders_sums=False)
    with patch_pipeline(pipe, strict=True) as report:
        assert report.sites


# blocks


@pytest.mark.parametrize("name", MODELS)
def test_same_output(name: str) -> None:
    check_same_output(lambda: build(name), run)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(1, 2, 2), (3, 6, 10)])
def test_odd_sizes(batch: int, size: tuple[int, ...]) -> None:
    check_same_output(lambda: build("5b"), lambda model: run(model, batch=batch, size=size))


def test_blocks_hand_on_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[bool] = []

    def counting(first: Tensor, second: Tensor) -> Tensor:
        whole = joined(first, second)
        copies.append(whole.data_ptr() != first.data_ptr())
        return whole

    model = build("5b")
    with patched(model):
        run(model)
        monkeypatch.setattr(blocks, "joined", counting)
        run(model)
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
    model = build("5b")
    expected = run(model)
    with patched(model):
        run(model)
    right = blocks.JointBlock.add
    monkeypatch.setattr(blocks.JointBlock, "add", lambda self, x, *args: right(self, 1.01 * x, *args))
    with patch_module(model) as report:
        assert relative_error(run(model), expected) <= 1e-5
        assert {site.state for site in report.sites} == {"failed"}


# what a user may change


@pytest.mark.parametrize("name", ["2b", "5b"])
def test_every_op_can_be_off(name: str) -> None:
    check_ops_off(lambda: build(name), run, COGVIDEOX_OPS)


def with_lora(model: Any) -> None:
    add_lora(model, "to_q", "to_out.0", "norm1.linear", "ff.net.0.proj", "ff.net.2")


def foreign_processor(model: Any) -> None:
    attn = model.transformer_blocks[1].attn1
    attn.processor = Shifted(attn.processor)


def hooks(model: Any) -> None:
    for path, module in model.named_modules():
        if path.endswith(("1.attn1.to_k", "1.attn1.norm_q", "1.ff.net.0", "2.norm2", "0.norm1.norm", "0.attn1")):
            module.register_forward_hook(
                lambda module, args, out: 1.1 * out if isinstance(out, Tensor) else (1.1 * out[0], *out[1:])
            )


def other_norm(model: Any) -> None:
    for block in model.transformer_blocks:
        block.attn1.norm_k = nn.RMSNorm(16)


def fused_projections(model: Any) -> None:
    model.fuse_qkv_projections()
    for block in model.transformer_blocks:
        block.attn1.to_qkv.weight.data *= 2


def unfused_projections(model: Any) -> None:
    fused_projections(model)
    model.unfuse_qkv_projections()
    foreign_processor(model)


CHANGES = [with_lora, foreign_processor, hooks, other_norm, fused_projections, unfused_projections]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("first", ORDERS)
def test_a_changed_model(change: Callable[[Any], None], first: str) -> None:
    check_changed(lambda: build("5b"), run, change, first)


@pytest.mark.parametrize("cache", [first_block_cache, pyramid_attention_broadcast])
@pytest.mark.parametrize("first", ORDERS)
def test_step_caches(cache: Callable[[Any], None], first: str) -> None:
    check_cache(lambda: build("5b"), run, cache, first)


def test_a_foreign_attention_is_told_and_the_rest_is_fused() -> None:
    model = build("5b")
    foreign_processor(model)
    with patched(model) as report:
        run(model)
        assert fallbacks_of(report, "qk_norm_rope") == {"it has a processor of its own, Shifted"}
        assert not any(site.fallbacks for site in sites_of(report, "gated_residual_norm"))


def test_arguments_for_the_attention_go_there() -> None:
    model = build("5b")
    options = {"attention_kwargs": {"attention_mask": torch.zeros(2, TEXT + 18)}}
    call = arguments(model) | options
    call["attention_kwargs"]["attention_mask"][:, -4:] = -1e4
    with torch.no_grad():
        expected = model(**call).sample
        with patched(model) as report:
            assert relative_error(model(**call).sample, expected) <= 1e-5
            assert fallbacks_of(report, "spatial_attention") == {"its attention takes attention_mask"}


def test_stock_code_knows_no_attention_backend() -> None:
    """``set_attention_backend`` does nothing to this model, nor does the context: so it is with the patched one."""
    model = build("5b")
    expected = run(model)
    with patched(model) as report:
        model.set_attention_backend("_native_math")
        with attention_backend("_native_math"):
            assert relative_error(run(model), expected) <= 1e-5
        assert {site.implementation for site in sites_of(report, "spatial_attention")} == {"torch"}


# torch.compile, half precision


def test_a_patched_model_compiles_in_one_graph() -> None:
    check_compiled(build("5b"), run)


def test_half_precision_is_as_exact_as_stock() -> None:
    model = build("5b")
    check_half_precision(model, arguments(model))


def test_a_call_under_autocast_goes_the_original_way() -> None:
    model = build("5b")
    with patched(model) as report, torch.autocast("cpu", torch.bfloat16):
        run(model)
        assert fallbacks_of(report, "qk_norm_rope") == {"autocast is on"}
