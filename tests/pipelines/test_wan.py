"""Wan 2.1, 2.2, VACE and Animate: tiny pipelines of the whole structure, patched against unpatched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from block_checks import fused, relative_error
from diffusers import (
    FirstBlockCacheConfig,
    LucyEditPipeline,
    PyramidAttentionBroadcastConfig,
    WanAnimatePipeline,
    WanImageToVideoPipeline,
    WanVideoToVideoPipeline,
)
from family_checks import check_clip, check_compiled, check_kernels
from tiny_models import tiny_relative, tiny_synthetic_pipeline, tiny_video
from torch import Tensor
from transformer_checks import (
    TELLING_ROWS_APART,
    check_attention_backend,
    check_changed,
    check_corner,
    check_each_op_off,
    check_error_in_bfloat16,
    check_foreign_processors,
    check_hooks,
    check_lora,
    check_same,
    fallback_reasons,
    halve,
    telling_rows_apart,
    tiny_transformer,
)

from vidaccel import patch_module, patch_pipeline
from vidaccel.bench.synthetic import specification
from vidaccel.blocks.dit.modulation_rows import MOST_ROWS
from vidaccel.blocks.dit.transformer_wan import FusedWanTransformerBlock
from vidaccel.blocks.dit.transformer_wan_vace import FusedWanVACETransformerBlock
from vidaccel.clips.generation import generate

OPS = {"gated_residual_norm", "qk_norm_rope", "spatial_attention", "linear_gelu"}
ANIMATE = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "image_dim": 32,
    "added_kv_proj_dim": 24,
    "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 1,
}


def transformer(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    class_name, config = specification(name, "tiny")["components"]["transformer"]
    return tiny_transformer(class_name, config | options, dtype)


@torch.no_grad()
def call(model: Any, *, size: tuple[int, int, int] = (3, 4, 6), batch: int = 1, timestep: Any = 500.0) -> Tensor:
    """``timestep``: one for all tokens, or one for each, ``[B, S]``."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(model.dtype)

    timestep = timestep if isinstance(timestep, Tensor) else torch.full((batch,), timestep)
    inputs = {
        "hidden_states": random(batch, model.config.in_channels, *size),
        "timestep": timestep.expand(batch, *timestep.shape[1:]),
        "encoder_hidden_states": random(batch, 512 if model.config.image_dim else 7, 16),
    }
    if model.config.image_dim:
        inputs["encoder_hidden_states_image"] = random(batch, 17, model.config.image_dim)
    if hasattr(model, "vace_blocks"):
        inputs["control_hidden_states"] = random(batch, 96, *size)
        inputs["control_hidden_states_scale"] = torch.tensor([0.5, 2.0])[: len(model.vace_blocks)]
    if hasattr(model, "face_adapter"):
        inputs["pose_hidden_states"] = random(batch, 16, size[0] - 1, *size[1:])
        inputs["face_pixel_values"] = random(batch, 3, 4 * (size[0] - 1) - 3, 16, 16)
    return model(**{name: x.to(model.device) for name, x in inputs.items()}).sample


def first_frame(batch: int = 1) -> Tensor:
    """Timesteps of an image to video: the first of three latent frames is clean."""
    return torch.cat([torch.zeros(batch, 6), torch.full((batch, 12), 700.0)], dim=1)


MODELS = {
    "t2v": lambda: transformer("wan2.1-t2v-1.3b"),
    "i2v": lambda: transformer("wan2.1-i2v-14b"),
    "ti2v": lambda: transformer("wan2.2-ti2v-5b"),
    "vace": lambda: transformer("wan2.1-vace-1.3b"),
    "animate": lambda: tiny_transformer("WanAnimateTransformer3DModel", ANIMATE),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("wan2.1-t2v-1.3b", ["transformer.blocks.0", "transformer.blocks.1"]),
        ("wan2.1-i2v-14b", ["transformer.blocks.0", "transformer.blocks.1"]),
        ("wan2.2-t2v-a14b", ["transformer.blocks.1", "transformer_2.blocks.1"]),
        ("wan2.2-ti2v-5b", ["transformer.blocks.0", "transformer.blocks.1"]),
        ("wan2.1-vace-1.3b", ["transformer.blocks.1", "transformer.vace_blocks.0", "transformer.vace_blocks.1"]),
    ],
)
def test_same_clip_and_exact_restore(name: str, paths: list[str]) -> None:
    report = check_clip(*tiny_synthetic_pipeline(name), reorders_sums=False)
    for path in paths:
        assert {site.op for site in report.sites if site.path == path} == OPS
    embeddings = [site.path for site in report.sites if site.op == "modulation_rows"]
    assert embeddings == sorted({f"{path.split('.')[0]}.condition_embedder" for path in paths if "vace" not in name})


def test_image_to_video_of_a_model_with_a_timestep_for_each_token() -> None:
    pipe, arguments = tiny_relative("wan2.2-ti2v-5b", WanImageToVideoPipeline, expand_timesteps=True)
    check_clip(pipe, arguments | {"image": tiny_video(1, 64, 96)[0]}, reorders_sums=False)


def test_image_to_video_without_an_image_encoder() -> None:
    experts = {name: transformer("wan2.2-t2v-a14b", in_channels=36) for name in ("transformer", "transformer_2")}
    pipe, arguments = tiny_relative("wan2.2-t2v-a14b", WanImageToVideoPipeline, boundary_ratio=0.875, **experts)
    report = check_clip(pipe, arguments | {"image": tiny_video(1, 32, 48)[0]}, reorders_sums=False)
    assert {site.path.split(".")[0] for site in report.sites} == {"transformer", "transformer_2", "vae"}


@pytest.mark.parametrize("shared", ["the model", "a block"])
def test_experts_that_share(shared: str) -> None:
    """A pipeline with one model for both levels of noise, or with experts that differ in some blocks alone."""
    pipe, arguments = tiny_synthetic_pipeline("wan2.2-t2v-a14b")
    if shared == "the model":
        pipe.register_modules(transformer_2=pipe.transformer)
    else:
        pipe.transformer_2.blocks[0] = pipe.transformer.blocks[0]
    report = check_clip(pipe, arguments, reorders_sums=False)
    of_block = [site.op for site in report.sites if site.path.endswith(".blocks.0")]
    assert sorted(of_block) == sorted(OPS)


def test_video_to_video() -> None:
    pipe, arguments = tiny_relative("wan2.1-t2v-1.3b", WanVideoToVideoPipeline)
    del arguments["num_frames"]
    check_clip(pipe, arguments | {"video": tiny_video(9, 32, 48), "strength": 1.0}, reorders_sums=False)


def test_lucy_edit() -> None:
    model = transformer("wan2.1-t2v-1.3b", in_channels=32)
    pipe, arguments = tiny_relative("wan2.1-t2v-1.3b", LucyEditPipeline, transformer=model)
    check_clip(pipe, arguments | {"video": tiny_video(9, 32, 48)}, reorders_sums=False)


def test_animate() -> None:
    pipe, arguments = tiny_relative("wan2.1-i2v-14b", WanAnimatePipeline, transformer=MODELS["animate"]())
    del arguments["num_frames"]
    clips = {"pose_video": tiny_video(9, 32, 48), "face_video": tiny_video(9, 16, 16), "segment_frame_length": 9}
    report = check_clip(pipe, arguments | clips, reorders_sums=False)
    assert {site.op for site in report.sites if site.path.startswith("transformer.")} == OPS


def test_each_op_off(model: Any) -> None:
    check_each_op_off(model, call)


def test_with_the_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "linear_gelu=torch,spatial_attention=torch")
    model = transformer("wan2.1-t2v-1.3b", num_layers=1).to(device)
    check_kernels(model, lambda model: call(model, size=(3, 4, 4)), {"gated_residual_norm", "qk_norm_rope"})


@pytest.mark.parametrize("name", ["wan2.1-i2v-14b", "wan2.1-vace-1.3b"])
@pytest.mark.slow
def test_patched_model_compiles_in_one_graph(name: str) -> None:
    options = {"vace_layers": [0]} if "vace" in name else {}
    check_compiled(transformer(name, num_layers=1, **options), call)


@pytest.mark.slow
def test_animate_compiles_in_one_graph() -> None:
    check_compiled(tiny_transformer("WanAnimateTransformer3DModel", ANIMATE | {"num_layers": 1}), call)


@pytest.mark.slow
def test_compiled_for_more_than_one_size() -> None:
    model = transformer("wan2.1-t2v-1.3b", num_layers=1)
    sizes: list[dict[str, Any]] = [{}, {"size": (3, 6, 6)}, {"size": (5, 6, 8)}, {"size": (5, 6, 8), "batch": 2}]
    expected = [call(model, **size) for size in sizes]
    with patch_module(model):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for size, out in zip(sizes, expected, strict=True):
            assert relative_error(call(compiled, **size), out) <= 1e-5


@pytest.mark.slow
def test_timesteps_of_tokens_compile_in_one_graph() -> None:
    check_compiled(transformer("wan2.2-ti2v-5b", num_layers=1), lambda model: call(model, timestep=first_frame()))


@pytest.mark.parametrize("size", [(1, 2, 2), (5, 6, 10), (2, 14, 2)])
def test_sizes(size: tuple[int, int, int], model: Any) -> None:
    if hasattr(model, "face_adapter") and size[0] == 1:
        pytest.skip("a pose needs a second frame")
    assert not check_same(model, lambda model: call(model, size=size, batch=2)).fallbacks


def test_attention_backend(model: Any) -> None:
    check_attention_backend(model, call)


def test_lora(model: Any) -> None:
    report = check_lora(model, call, "to_q", "to_v", "to_out.0", "proj_out")
    assert not report.fallbacks


def test_lora_on_the_feed_forward() -> None:
    report = check_lora(MODELS["t2v"](), call, "net.0.proj", "net.2")
    assert all(site.fallbacks for site in report.sites if site.op == "linear_gelu")
    assert not any(site.fallbacks for site in report.sites if site.op != "linear_gelu")


@pytest.mark.parametrize("tokens", [512, 500])
def test_no_image_for_a_model_that_takes_one(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(1, *shape, generator=generator) for shape in ((36, 3, 4, 6), (tokens, 16)))

    @torch.no_grad()
    def call_without(model: Any) -> Tensor:
        return model(x, torch.tensor([500.0]), text).sample

    report = check_same(MODELS["i2v"](), call_without)
    assert fallback_reasons(report) == {"there is no image before the 512 tokens of its text"}


def test_fused_projections() -> None:
    model = MODELS["i2v"]()
    model.fuse_qkv_projections()
    assert not check_same(model, call).fallbacks


def test_foreign_processors(model: Any) -> None:
    check_foreign_processors(model, call, "attn1", "attn2")


@pytest.mark.parametrize("names", [("attn1",), ("attn2", "ffn"), ("norm2",), ("norm_q", "net.0"), ("to_k", "to_out.0")])
def test_hooks(names: tuple[str, ...]) -> None:
    check_hooks(MODELS["i2v"](), call, *names)


FIRST_BLOCK = FirstBlockCacheConfig(threshold=10.0)
PYRAMID = PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2,
    cross_attention_block_skip_range=3,
    spatial_attention_timestep_skip_range=(-1, 1001),
    cross_attention_timestep_skip_range=(-1, 1001),
    current_timestep_callback=lambda: 500,
)


@pytest.mark.parametrize("first", ["cache", "patch"])
@pytest.mark.parametrize(
    ("name", "config"),
    [("wan2.1-t2v-1.3b", FIRST_BLOCK), ("wan2.1-t2v-1.3b", PYRAMID), ("wan2.1-vace-1.3b", PYRAMID)],
    ids=["first-block", "pyramid-attention-broadcast", "pyramid-attention-broadcast-vace"],
)
def test_step_caches(name: str, config: Any, first: str) -> None:
    pipe, arguments = tiny_synthetic_pipeline(name)
    arguments["num_inference_steps"] = 4
    uncached = clip(pipe, arguments)
    pipe.transformer.enable_cache(config)
    expected = clip(pipe, arguments)
    pipe.transformer.disable_cache()
    assert not torch.equal(expected, uncached)
    if first == "cache":
        pipe.transformer.enable_cache(config)
    with patch_pipeline(pipe):
        if first == "patch":
            pipe.transformer.enable_cache(config)
        out = clip(pipe, arguments)
        pipe.transformer.disable_cache()
    assert relative_error(out, expected) <= 1e-5


def clip(pipe: Any, arguments: dict[str, Any]) -> Tensor:
    return torch.from_numpy(generate(pipe, arguments, seed=0).frames)


SEVERAL = torch.cat([torch.zeros(2, 6), torch.tensor([[300.0] * 6 + [700.0] * 6, [700.0] * 12])], dim=1)
MANY = torch.arange(2 * MOST_ROWS)[None] * 7.0


@pytest.mark.parametrize(
    ("timestep", "size", "rows"),
    [
        (torch.full((1, 18), 700.0), (3, 4, 6), 1),
        (torch.full((2, 18), 700.0), (3, 4, 6), 1),
        (torch.tensor([[700.0], [300.0]]).expand(2, 18), (3, 4, 6), 1),
        (first_frame(), (3, 4, 6), 2),
        (first_frame(2), (3, 4, 6), 2),
        (SEVERAL, (3, 4, 6), 3),
        (MANY, (2, 16, 16), None),
        (torch.full((1, 1), 700.0), (1, 2, 2), 1),
    ],
    ids=["one", "one-of-two", "one-each", "two", "two-of-two", "samples-differ", "many", "one-token"],
)
def test_timesteps_of_tokens(timestep: Tensor, size: tuple[int, int, int], rows: int | None) -> None:
    model = transformer("wan2.2-ti2v-5b")
    embedded: list[int] = []

    class Counting(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            embedded.append(input.shape[1])
            return super().forward(input)

    Counting.__module__ = "peft.tuners.lora.layer"  # of a library whose layers treat all rows alike; a hook may not
    model.condition_embedder.time_proj.__class__ = Counting
    report = check_same(model, lambda model: call(model, size=size, batch=len(timestep), timestep=timestep))
    assert not report.fallbacks
    stock, *_, patched, _ = embedded
    assert (stock, patched) == (timestep.shape[1], rows or timestep.shape[1])


def test_timesteps_of_tokens_where_the_embedding_is_not_patched() -> None:
    model = transformer("wan2.2-ti2v-5b")

    def call_two(model: Any) -> Tensor:
        return call(model, timestep=first_frame())

    expected = call_two(model)
    with patch_module(model) as report:
        next(site for site in report.sites if site.op == "modulation_rows").on = False
        assert relative_error(call_two(model), expected) <= 1e-5


@pytest.mark.parametrize("way", TELLING_ROWS_APART)
def test_an_embedding_of_timesteps_that_tells_tokens_apart(way: Callable[[torch.nn.Module], None]) -> None:
    change = telling_rows_apart(way, "time_embedder.linear_1", "time_proj")
    check_changed(MODELS["ti2v"], partial(call, timestep=first_frame()), change, "patched first")


def write_behind_the_embedding(model: Any) -> None:
    model.condition_embedder.register_forward_hook(lambda module, args, out: halve(out[1]))


def write_to_the_timestep(model: Any) -> None:
    model.blocks[1].register_forward_pre_hook(lambda module, args: halve(args[2]))


def write_to_the_rotary_table(model: Any) -> None:
    model.blocks[1].register_forward_pre_hook(lambda module, args: halve(args[3][0]))


@pytest.mark.parametrize("change", [write_behind_the_embedding, write_to_the_timestep, write_to_the_rotary_table])
@pytest.mark.parametrize("timestep", [first_frame(), torch.full((1, 18), 700.0)], ids=["of a frame", "alike"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_hook_that_writes_to_what_blocks_share(
    change: Callable[[Any], None], timestep: Tensor, inference: bool
) -> None:
    with torch.inference_mode(inference):
        check_changed(MODELS["ti2v"], partial(call, timestep=timestep), change, "patched first")


def test_norms_that_differ_in_eps() -> None:
    model = MODELS["t2v"]()
    model.blocks[1].attn1.norm_k.eps = 1.0
    expected = call(model)
    with patch_module(model, self_check=False) as report:
        assert relative_error(call(model), expected) <= 1e-5
    assert fallback_reasons(report) == {"its norms differ in eps"}


def test_more_timesteps_than_tokens() -> None:
    """Stock code broadcasts the only token; no site fails for it."""
    block = MODELS["ti2v"]().blocks[0]
    generator = torch.Generator().manual_seed(0)
    x, text, temb = (torch.randn(shape, generator=generator) for shape in ((1, 1, 24), (1, 7, 24), (1, 1, 6, 24)))
    tables = torch.ones(1, 1, 1, 12), torch.zeros(1, 1, 1, 12)
    arguments = x, text, temb.repeat(1, 2, 1, 1), tables
    expected = block(*arguments)
    with fused(block, FusedWanTransformerBlock) as sites:
        assert torch.equal(block(*arguments), expected)
        assert {site.state for site in sites.values()} == {"active"}


def test_rotary_table_in_half_precision() -> None:
    model = MODELS["t2v"]().to(torch.bfloat16)
    expected = call(model)
    with patch_module(model) as report:
        assert relative_error(call(model), expected) <= 1e-2
    assert fallback_reasons(report) == {"its rotary table is not float32"}
    assert {site.op for site in report.sites if site.fallbacks} == {"qk_norm_rope", "spatial_attention"}


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.1-vace-1.3b"])
def test_without_a_norm_before_the_cross_attention(name: str) -> None:
    model = transformer(name, cross_attn_norm=False)
    assert not check_same(model, call).fallbacks
    check_each_op_off(model, call)
    check_hooks(model, call, "norm2")


@pytest.mark.parametrize("norm", ["norm1", "norm3"])
@pytest.mark.parametrize("name", ["t2v", "vace"])
def test_a_norm_that_somebody_has_taken_away(name: str, norm: str) -> None:
    model = MODELS[name]()
    setattr(model.blocks[0], norm, torch.nn.Identity())
    if name == "vace":
        setattr(model.vace_blocks[0], norm, torch.nn.Identity())
    assert fallback_reasons(check_same(model, call)) == {"a FP32LayerNorm was replaced by Identity"}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # stock's norms
def test_autocast_goes_the_original_way() -> None:
    model = MODELS["t2v"]()

    def call_autocast(model: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(model)

    assert fallback_reasons(check_same(model, call_autocast)) == {"autocast is on"}


def block_arguments(
    model: Any, size: tuple[int, int, int], text: int, timesteps: int | None, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Of a block of ``model``: tokens, text, an embedding of one timestep or ``timesteps``, rotary tables."""
    torch.manual_seed(0)
    frames, height, width = size
    x, context = (torch.randn(2, tokens, 24).to(dtype) for tokens in (frames * height * width // 4, text))
    temb = torch.randn(2, *([timesteps] if timesteps else []), 6, 24).to(dtype)
    return x, context, temb, model.rope(torch.empty(2, 16, *size))


@pytest.mark.parametrize("timesteps", [None, 18])
@torch.no_grad()
def test_error_of_a_block(timesteps: int | None) -> None:
    model = transformer("wan2.1-i2v-14b", torch.bfloat16)
    arguments = block_arguments(model, (3, 4, 6), 17 + 512, timesteps, torch.bfloat16)
    check_error_in_bfloat16(model.blocks[0], FusedWanTransformerBlock, arguments)


@pytest.mark.parametrize("timesteps", [None, 64 * 768])
@torch.no_grad()
def test_corner_of_a_long_call(timesteps: int | None) -> None:
    model = transformer("wan2.1-vace-1.3b")
    x, *rest = block_arguments(model, (3, 256, 256), 7, timesteps, torch.float32)
    check_corner(model.blocks[0], FusedWanTransformerBlock, (x, *rest))
    if timesteps is None:
        check_corner(model.vace_blocks[0], FusedWanVACETransformerBlock, (x, rest[0], x + 1, *rest[1:]))


def fused_calls(monkeypatch: pytest.MonkeyPatch, added: float = 0.0) -> list[int]:
    """A list that grows at each run of a fused block, corners included, to whose result ``added`` is added."""
    calls: list[int] = []
    right = FusedWanTransformerBlock.fused_forward

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return right(self, *args, **kwargs) + added

    monkeypatch.setattr(FusedWanTransformerBlock, "fused_forward", run)
    return calls


def test_of_blocks_that_are_alike_one_corner_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer("wan2.1-t2v-1.3b", num_layers=4)
    calls = fused_calls(monkeypatch)
    with patch_module(model, strict=True):
        call(model)
        assert len(calls) == 4 + 1
        call(model)
        assert len(calls) == 2 * 4 + 1
        model.blocks[2].ffn.net[2].weight.data = model.blocks[2].ffn.net[2].weight.data.mT.contiguous().mT
        call(model)
        assert len(calls) == 3 * 4 + 2, "a weight in another order is another kind of block"


def test_a_fault_between_the_ops_of_a_block_is_found_in_all_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer("wan2.1-t2v-1.3b", num_layers=4)
    expected = call(model)
    fused_calls(monkeypatch, added=0.01)
    with patch_module(model, strict=True) as report:
        assert torch.equal(call(model), expected)
        failed = {site.path for site in report.sites if site.state == "failed"}
        assert failed >= {f"blocks.{number}" for number in range(4)}
