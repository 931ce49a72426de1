"""Cosmos 1, 2 and 2.5: tiny pipelines of the whole structure, patched against unpatched.

The released models join a padding mask with torchvision, and their pipelines want a guardrail, neither of which is
installed here: the models go without the mask, and a stand-in for the guardrail lets everything pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from block_checks import all_fused, relative_error
from diffusers import (
    CosmosControlNetModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers.transformer_cosmos import CosmosEmbedding
from family_checks import check_clip, check_compiled
from tiny_models import tiny_video
from tiny_pipelines import COSMOS, cosmos, cosmos_vae, wide_vae_of_wan
from torch import Tensor, nn
from transformer_checks import (
    ORDERS,
    TELLING_ROWS_APART,
    Shifted,
    check_attention_backend,
    check_autocast,
    check_changed,
    check_corner,
    check_each_op_off,
    check_error_in_bfloat16,
    check_hooks,
    check_lora,
    check_same,
    fallback_reasons,
    telling_rows_apart,
    tiny_transformer,
)

from vidaccel import patch_module, patch_pipeline
from vidaccel.blocks.dit import modulation_rows
from vidaccel.blocks.dit import transformer_cosmos as blocks
from vidaccel.blocks.dit.transformer_cosmos import COSMOS_OPS, FusedCosmosTransformerBlock

IMAGE = {"img_context_dim_in": 6, "img_context_dim_out": 32, "controlnet_block_every_n": 1}
MODELS: dict[str, dict[str, Any]] = {
    "1.0": {"extra_pos_embed_type": "learnable"},
    "2.0": {"extra_pos_embed_type": None},
    "2.5": {"extra_pos_embed_type": None, "use_crossattn_projection": True, "crossattn_proj_in_channels": 9,
            "encoder_hidden_states_channels": 12},
    "transfer": {"extra_pos_embed_type": None, "text_embed_dim": 32, **IMAGE},
}  # fmt: skip
FRAMES, HEIGHT, WIDTH = 3, 4, 6
GIVEN = torch.tensor([[0.1, 0.5, 0.5]]).view(1, 1, FRAMES, 1, 1)  # timesteps where the first frame is given


def build(name: str = "2.0", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return tiny_transformer("CosmosTransformer3DModel", COSMOS | MODELS[name] | options, dtype)


@torch.no_grad()
def call(model: Any, *, batch: int = 1, given: bool = True, **options: Any) -> Tensor:
    """``given``: each frame has a timestep of its own."""
    generator = torch.Generator().manual_seed(1)
    config = model.config

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    context: Any = noise(5, 9 if config.use_crossattn_projection else config.text_embed_dim)
    if config.img_context_dim_in:
        context = context, noise(4, 6)
        residual = noise(FRAMES * HEIGHT * WIDTH // 4, 32)
        options["block_controlnet_hidden_states"] = [residual, residual]
    timestep = GIVEN.repeat(batch, 1, 1, 1, 1) if given else torch.full((batch,), 0.5)
    latents = noise(config.in_channels, FRAMES, HEIGHT, WIDTH)
    return model(latents, timestep, context, fps=16, **options).sample


# whole clips


CLIP = tiny_video(9, 32, 48)
PIPELINES: dict[str, tuple[str, str, Callable[[], Any], Any, dict[str, Any], dict[str, Any]]] = {
    "1.0 text": ("cosmos_text2world", "CosmosTextToWorldPipeline", cosmos_vae, EDMEulerScheduler,
                 MODELS["1.0"], {}),
    "1.0 video": ("cosmos_video2world", "CosmosVideoToWorldPipeline", cosmos_vae, EDMEulerScheduler,
                  MODELS["1.0"] | {"in_channels": 5}, {"video": CLIP}),
    "2.0 video": ("cosmos2_video2world", "Cosmos2VideoToWorldPipeline", wide_vae_of_wan,
                  FlowMatchEulerDiscreteScheduler,
                  MODELS["2.0"] | {"in_channels": 17, "out_channels": 16}, {"image": CLIP[0]}),
    "2.5": ("cosmos2_5_predict", "Cosmos2_5_PredictBasePipeline", wide_vae_of_wan, UniPCMultistepScheduler,
            MODELS["2.0"] | {"in_channels": 17, "out_channels": 16}, {}),
}  # fmt: skip


def pipeline(name: str) -> tuple[Any, dict[str, Any]]:
    module, class_name, vae, scheduler, config, given = PIPELINES[name]
    sigmas = {"use_karras_sigmas": True} if scheduler is FlowMatchEulerDiscreteScheduler else {}
    sigmas = {"use_flow_sigmas": True, "flow_shift": 5.0} if scheduler is UniPCMultistepScheduler else sigmas
    return cosmos(module, class_name, vae(), scheduler(**sigmas), config, given)


@pytest.mark.parametrize("name", PIPELINES)
def test_same_clip_and_exact_restore(name: str) -> None:
    pipe, call = pipeline(name)
    check_clip(pipe, call, reorders_sums=False, rounds=True)  # for the guardrail
    with patch_pipeline(pipe, strict=True) as report:
        assert {site.op for site in report.sites} >= {*COSMOS_OPS}


def test_two_videos_of_one_prompt_that_the_pipeline_gives_once() -> None:
    pipe, given = pipeline("2.0 video")

    def clip() -> Tensor:
        torch_random = torch.Generator().manual_seed(0)
        return pipe(**given, num_videos_per_prompt=2, generator=torch_random, output_type="latent").frames

    expected = clip()
    with patch_pipeline(pipe) as report:
        assert relative_error(clip(), expected) <= 1e-5
        assert fallback_reasons(report) == {"its text and its video differ in batch size"}


# blocks


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_same_output(name: str, batch: int, given: bool) -> None:
    assert not check_same(build(name), lambda model: call(model, batch=batch, given=given)).fallbacks


def test_the_modulation_is_made_once_for_each_timestep(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    rows: list[int] = []
    modulation = blocks._modulation
    monkeypatch.setattr(
        blocks, "_modulation", lambda norm, steps: rows.append(steps.embedded.shape[1]) or modulation(norm, steps)
    )
    expected = call(model)
    with patch_module(model, strict=True) as report:
        assert relative_error(call(model), expected) <= 1e-5
        assert set(rows) == {2}
        rows.clear()
        monkeypatch.setattr(modulation_rows, "MOST_ROWS", 1)
        assert relative_error(call(model), expected) <= 1e-5
        assert set(rows) == {18}
        assert not report.fallbacks


def test_the_control_net_has_the_same_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    as_it_is = SimpleNamespace(resize=lambda mask, size, interpolation: mask)
    torchvision = SimpleNamespace(functional=as_it_is, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(controlnet_cosmos, "transforms", torchvision, raising=False)
    sizes = {"in_channels": 8, "latent_channels": 6, "model_channels": 32, "n_controlnet_blocks": 2}
    shared = {name: COSMOS[name] for name in COSMOS.keys() & {*CosmosControlNetModel.__init__.__annotations__}}
    model = tiny_transformer("CosmosControlNetModel", shared | sizes)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, FRAMES, HEIGHT, WIDTH, generator=generator)
    text = torch.randn(1, 5, 12, generator=generator)
    masks = {"condition_mask": torch.ones_like(latents[:, :1]), "padding_mask": torch.zeros(1, 1, HEIGHT, WIDTH)}

    @torch.no_grad()
    def controls(model: Any) -> Tensor:
        return torch.stack(model(latents + 1, latents, GIVEN, text, **masks, return_dict=False)[0])

    assert not check_same(model, controls).fallbacks
    check_each_op_off(model, controls)


@pytest.mark.parametrize("whole", [True, False])
def test_a_wrong_block_is_found_out(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:
        monkeypatch.setattr(blocks, "MOST_WHOLE", 0)
        monkeypatch.setattr(blocks, "CORNER_ROWS", 8)
    model = build()
    expected = call(model)
    check_same(model, call)
    right = FusedCosmosTransformerBlock.add
    monkeypatch.setattr(FusedCosmosTransformerBlock, "add", lambda self, x, *args: right(self, 1.01 * x, *args))
    with patch_module(model) as report:
        assert relative_error(call(model), expected) <= 1e-5
        assert {site.state for site in report.sites} == {"failed"}


def block_arguments(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """A block's, with a timestep and a positional embedding for each token."""
    x, embedded, position, residual = (torch.randn(1, tokens, 32, dtype=dtype) for _ in range(4))
    text = torch.randn(1, 5, 12, dtype=dtype)
    temb = torch.randn(1, tokens, 96, dtype=dtype)
    rotary = tuple(torch.randn(2, tokens, 8).repeat(1, 1, 2))
    return x, text, embedded, temb, rotary, position, None, residual, None, None


@torch.no_grad()
def test_a_long_call_is_checked_on_a_corner() -> None:
    check_corner(build().transformer_blocks[0], FusedCosmosTransformerBlock, block_arguments(70_000))


@pytest.mark.parametrize(
    "sizes", [((2, 32), (2, 96)), ((1, 20, 32), (1, 1, 96)), ((2, 20, 32), (1, 20, 96)), ((1, 1, 32), (2, 20, 96))]
)
@torch.no_grad()
def test_timesteps_of_other_sizes_than_the_video(sizes: tuple[tuple[int, ...], ...]) -> None:
    block = build().transformer_blocks[0]
    block.ff.net[2].register_forward_hook(lambda *_: None)
    x, text, _, _, rotary, *others = block_arguments(20)
    arguments = x, text, *(torch.randn(size) for size in sizes), rotary, *others
    expected = block(*arguments)
    with all_fused(block, FusedCosmosTransformerBlock):
        assert relative_error(block(*arguments), expected) <= 1e-5


# what a user may change


@pytest.mark.parametrize("name", ["1.0", "2.0"])
def test_each_op_off(name: str) -> None:
    check_each_op_off(build(name), call)


def test_attention_backend() -> None:
    check_attention_backend(build(), call)


def test_lora() -> None:
    report = check_lora(build(), call, "to_q", "to_out.0", "norm1.linear_1", "norm3.linear_2", "ff.net.0.proj")
    assert not report.fallbacks


def test_hooks() -> None:
    check_hooks(build(), call, "1.attn1.to_k", "1.attn2.norm_q", "0.attn1.norm_q", "1.ff.net.0", "0.norm1.norm")


def foreign_processors(model: Any) -> None:
    for attn in (model.transformer_blocks[0].attn1, model.transformer_blocks[1].attn2):
        attn.processor = Shifted(attn.processor)


def other_norms(model: Any) -> None:
    for block in model.transformer_blocks:
        block.attn1.norm_k = nn.Tanh()
        block.attn2.norm_q = nn.Tanh()


@pytest.mark.parametrize("change", [foreign_processors, other_norms])
@pytest.mark.parametrize("first", ORDERS)
def test_a_changed_model(change: Callable[[Any], None], first: str) -> None:
    check_changed(build, call, change, first)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("way", TELLING_ROWS_APART)
def test_layers_that_tell_rows_apart(way: Callable[[nn.Module], None], given: bool) -> None:
    change = telling_rows_apart(way, "norm1.linear_1", "norm3.linear_2", "attn2.norm_q", "attn2.norm_k")
    check_changed(build, partial(call, batch=2, given=given), change, "patched first")


def test_an_embedding_of_timesteps_that_tells_tokens_apart() -> None:
    change = telling_rows_apart(TELLING_ROWS_APART[0], "t_embedder.linear_2")
    check_changed(build, call, change, "patched first")


class OwnEmbedding(CosmosEmbedding):
    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Any:
        temb, embedded = super().forward(hidden_states, timestep)
        return temb + torch.arange(len(temb))[:, None], embedded


def test_an_embedding_of_timesteps_of_another_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(model: Any) -> None:
        model.time_embed.__class__ = OwnEmbedding

    monkeypatch.setattr(blocks, "MOST_WHOLE", 0)  # tokens of one frame: a check that sees no other
    monkeypatch.setattr(blocks, "CORNER_ROWS", HEIGHT * WIDTH // 4)
    for first in ORDERS:
        check_changed(build, call, change, first)


class OtherTimestep(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, text: Tensor, embedded: Tensor, temb: Tensor, *others: Any) -> Tensor:
        out: Tensor = self.block(x, text, embedded, temb + 1, *others)
        return out


def in_another_module(model: Any) -> None:
    model.transformer_blocks[1] = OtherTimestep(model.transformer_blocks[1])


@pytest.mark.parametrize("first", ORDERS)
def test_a_block_may_be_given_another_timestep_than_the_one_before(first: str) -> None:
    check_changed(build, call, in_another_module, first)


def test_a_mask_of_the_text() -> None:
    model, mask = build(), torch.arange(5)[None] < 3
    report = check_same(model, lambda model: call(model, attention_mask=mask))
    assert not report.fallbacks and relative_error(call(model, attention_mask=mask), call(model)) > 1e-3


# torch.compile, half precision


@pytest.mark.slow
def test_a_patched_model_compiles_in_one_graph() -> None:
    check_compiled(build("1.0"), call)


@torch.no_grad()
def test_error_in_bfloat16() -> None:
    block = build(dtype=torch.bfloat16).transformer_blocks[0]
    check_error_in_bfloat16(block, FusedCosmosTransformerBlock, block_arguments(40, torch.bfloat16))


def test_a_call_under_autocast_goes_the_original_way() -> None:
    check_autocast(build(), call)
