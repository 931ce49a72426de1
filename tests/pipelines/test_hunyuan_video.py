"""HunyuanVideo and HunyuanVideo 1.5: tiny pipelines of the whole structure, patched against unpatched."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from block_checks import relative_error
from diffusers import (
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)
from family_checks import check_clip, check_compiled, check_kernels
from tiny_models import tiny_synthetic_pipeline
from tiny_pipelines import FRAMEPACK, hunyuan_image_to_video
from torch import Tensor, nn
from transformer_checks import (
    ORDERS,
    TELLING_ROWS_APART,
    check_attention_backend,
    check_cache,
    check_changed,
    check_each_op_off,
    check_full_size,
    fallbacks_of,
    halve,
    patched,
    sites_of,
    telling_rows_apart,
    telling_transformer,
    turning_channels_apart,
)

from vidaccel import patch_module, patch_pipeline
from vidaccel.blocks.dit import padded_text
from vidaccel.blocks.dit import transformer_hunyuan_video as blocks
from vidaccel.blocks.dit.transformer_hunyuan_video import TWO_STREAM_OPS

SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_refiner_layers": 1,
         "text_embed_dim": 12, "rope_axes_dim": (4, 6, 6)}  # fmt: skip
OF_1_0 = SIZES | {"in_channels": 4, "out_channels": 4, "num_single_layers": 2, "pooled_projection_dim": 10}
OF_1_5 = SIZES | {"in_channels": 3, "out_channels": 2, "text_embed_2_dim": 6, "image_embed_dim": 8}
MODELS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "1.5": (HunyuanVideo15Transformer3DModel, OF_1_5),
    "1.0": (HunyuanVideoTransformer3DModel, OF_1_0),
    "token_replace": (HunyuanVideoTransformer3DModel, OF_1_0 | {"image_condition_type": "token_replace"}),
    "framepack": (
        HunyuanVideoFramepackTransformer3DModel,
        OF_1_0 | {"has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
    ),
}
TEXT = 7  # tokens, of which some are valid


def build(name: str, **options: Any) -> Any:
    """A model with weights of its own, the same at every call."""
    return copy.deepcopy(built(name, **options))


@functools.cache
def built(name: str, **options: Any) -> Any:
    model_class, config = MODELS[name]
    return telling_transformer(model_class, config | options)


def arguments(model: Any, valid: tuple[int, ...] = (3,), size: tuple[int, ...] = (3, 4, 6)) -> dict[str, Any]:
    """One call of ``model`` with texts of which so many tokens are ``valid``."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(len(valid), *shape, generator=generator)

    mask = (torch.arange(TEXT) < torch.tensor(valid)[:, None]).float()
    call = {
        "hidden_states": noise(model.config.in_channels, *size),
        "timestep": torch.full((len(valid),), 500.0),
        "encoder_hidden_states": noise(TEXT, 12),
        "encoder_attention_mask": mask,
    }
    if "text_embed_2_dim" in model.config:
        glyphs = {"encoder_hidden_states_2": noise(5, 6), "encoder_attention_mask_2": torch.zeros(len(valid), 5)}
        return call | glyphs | {"image_embeds": torch.zeros(len(valid), 4, 8)}
    call |= {"pooled_projections": noise(10), "guidance": torch.full((len(valid),), 6000.0)}
    if "has_image_proj" not in model.config:
        return call
    frames, height, width = size
    for name, places, kept in (("clean", "clean", 2), ("history_2x", "history_2x", 2), ("history_4x", "history_4x", 4)):
        call |= {f"latents_{name}": noise(4, kept, height, width), f"indices_latents_{places}": torch.arange(kept)}
    return call | {"image_embeds": noise(4, 8), "indices_latents": torch.arange(frames)}


@torch.no_grad()
def run(model: Any, **options: Any) -> Tensor:
    call = {name: x.to(model.device) for name, x in arguments(model, **options).items()}
    return model(**call, return_dict=False)[0]


# whole clips


@pytest.mark.parametrize("name", ["hunyuanvideo1.5-480p", "hunyuanvideo"])
def test_same_clip_and_exact_restore(name: str) -> None:
    report = check_clip(*tiny_synthetic_pipeline(name))
    assert {site.op for site in report.sites if "transformer_blocks.0" in site.path} >= {*TWO_STREAM_OPS}


@pytest.mark.parametrize(
    ("name", "parameters"), [("hunyuanvideo1.5-480p", 8_326_608_160), ("hunyuanvideo", 12_821_012_544)]
)
def test_the_full_model_has_the_size_of_the_released_one(name: str, parameters: int) -> None:
    check_full_size(name, parameters)


PIPELINES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "1.5": (HunyuanVideo15ImageToVideoPipeline, {}),
    "token_replace": (HunyuanVideoImageToVideoPipeline, {"image_condition_type": "token_replace"}),
    "latent_concat": (
        HunyuanVideoImageToVideoPipeline,
        {"image_condition_type": "latent_concat", "in_channels": 9, "guidance_embeds": False},
    ),
    "skyreels": (HunyuanSkyreelsImageToVideoPipeline, {"in_channels": 8}),
    "framepack": (HunyuanVideoFramepackPipeline, FRAMEPACK),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_makes_the_same_clip(name: str) -> None:
    pipeline_class, config = PIPELINES[name]
    pipe, call = hunyuan_image_to_video(pipeline_class, **config)
    if name == "framepack":
        call |= {"latent_window_size": 2}
    check_clip(pipe, call)
    with patch_pipeline(pipe, strict=True) as report:
        assert report.sites


# text without its padding


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("valid", "size"), [((3,), (3, 4, 6)), ((7,), (1, 2, 2)), ((1, 1), (2, 6, 2))], ids=["cut", "whole", "batch"]
)
def test_same_output(name: str, valid: tuple[int, ...], size: tuple[int, ...]) -> None:
    model = build(name)
    expected = run(model, valid=valid, size=size)
    with patched(model) as report:
        assert relative_error(run(model, valid=valid, size=size), expected) <= 1e-5
        assert relative_error(run(model, valid=valid, size=size), expected) <= 1e-5
        assert not report.fallbacks, str(report)


@pytest.mark.parametrize("name", ["1.5", "1.0", "token_replace"])
def test_stock_blocks_may_stand_between(name: str) -> None:
    model = build(name, num_layers=4)
    expected = run(model)
    for block in model.transformer_blocks[1:3]:
        block.forward = functools.partial(block.forward)  # somebody's own
    with patch_module(model):
        assert relative_error(run(model), expected) <= 1e-5
        assert type(model.transformer_blocks[0]).original is type(model.transformer_blocks[1])


@pytest.mark.parametrize("name", MODELS)
def test_the_mask_stays_where_lengths_differ(name: str) -> None:
    model = build(name)
    expected = run(model, valid=(3, 5))
    with patched(model) as report:
        run(model, valid=(3, 3))  # so that the plan is to cut
        sites = sites_of(report, "padded_text")
        assert not any(site.fallbacks for site in sites)
        assert relative_error(run(model, valid=(3, 5)), expected) <= 1e-5
        assert relative_error(run(model, valid=(3, 5)), expected) <= 1e-5
        reason = "the texts of the batch have different lengths"
        assert {tuple(site.fallbacks.items()) for site in sites} == {((reason, 2),)}, str(report)


@pytest.mark.parametrize(
    ("mask", "before", "found"),
    [
        ([[1, 1, 0]], 0, 2),
        ([[1, 1, 1]], 0, 3),
        ([[1, 1, 0], [1, 1, 0]], 1, 1),
        ([[1, 0, 1]], 0, "padding stands between valid tokens"),
        ([[0, 1, 1]], 0, "padding stands between valid tokens"),
        ([[1, 1, 0], [1, 0, 0]], 0, "the texts of the batch have different lengths"),
        ([[0, 0, 0]], 0, "no token of the text is valid"),
        ([[1, 1, 0]], 2, "no token of the text is valid"),
    ],
)
def test_valid_length(mask: list[list[int]], before: int, found: int | str) -> None:
    assert padded_text.valid_length(torch.tensor(mask, dtype=torch.bfloat16)[:, None, None], before) == found


@pytest.mark.parametrize("name", ["1.5", "1.0"])
def test_the_length_is_found_once_in_a_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    found = padded_text._valid_length
    monkeypatch.setattr(padded_text, "_valid_length", lambda mask, before: asked.append(1) or found(mask, before))
    model = build(name)
    with patched(model):
        run(model)
        asked.clear()
        run(model)
        assert len(asked) == 1
        assert relative_error(run(model, valid=(5,)), run(model, valid=(6,))) > 1e-4  # nothing is kept


def block_call(block: nn.Module, model: Any) -> list[Any]:
    """The arguments of a call of ``block`` in ``model``."""
    calls: list[Any] = []
    hook = block.register_forward_pre_hook(lambda module, args: calls.append(list(args)))
    run(model)
    hook.remove()
    return calls[0]


@pytest.mark.parametrize("name", ["1.5", "1.0"])
@torch.no_grad()
def test_what_a_block_hands_on_is_as_long_as_before(name: str) -> None:
    model = build(name)
    block = model.transformer_blocks[0]
    args = block_call(block, model)
    expected = block(*args)[1]
    with patched(model):
        text = block(*args)[1]
    assert text.shape == expected.shape and relative_error(text[:, :3], expected[:, :3]) <= 1e-5
    assert not text[:, 3:].any() and expected[:, 3:].any()


@pytest.mark.parametrize(
    ("holes", "reason"),
    [(slice(0, 2), "padding stands between valid tokens"), (slice(None), "no token of the text is valid")],
    ids=["a hole", "padding alone"],
)
@torch.no_grad()
def test_a_block_may_be_given_any_mask(holes: slice, reason: str) -> None:
    model = build("1.5")
    block = model.transformer_blocks[0]
    args = block_call(block, model)
    args[3] = args[3].clone()
    args[3][:, holes] = False
    expected = block(*args)[0]
    with patched(model) as report:
        assert relative_error(block(*args)[0], expected) <= 1e-5
        assert fallbacks_of(report, "padded_text") == {reason}


def test_no_length_is_known_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_a_gpu: Any = SimpleNamespace(is_cuda=True)
    assert "is being captured" in str(padded_text._valid_length(on_a_gpu, 0))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["1.5", "token_replace"])
def test_a_wrong_block_is_found_out(name: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:
        monkeypatch.setattr(blocks, "MOST_WHOLE", 0)
        monkeypatch.setattr(blocks, "CORNER_ROWS", 2)
    model = build(name)
    expected = run(model)
    with patched(model):
        run(model)
    right = blocks.HunyuanBlock.add
    monkeypatch.setattr(blocks.HunyuanBlock, "add", lambda self, x, *args: right(self, 1.01 * x, *args))
    with patch_module(model) as report:
        assert relative_error(run(model), expected) <= 1e-5
        assert {site.state for site in report.sites} == {"failed"}


# what a user may change


@pytest.mark.parametrize("name", ["1.5", "token_replace"])
def test_every_op_can_be_off(name: str) -> None:
    check_each_op_off(build(name), run)


def with_lora(model: Any) -> None:
    peft = pytest.importorskip("peft")
    layers = ["to_q", "add_k_proj", "to_out.0", "proj_out", "proj_mlp", "net.0.proj", "norm1.linear", "norm.linear"]
    targets = [path for path, _ in model.named_modules() if path.endswith(tuple(layers)) and "blocks" in path]
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    model.requires_grad_(False)


class Doubled(nn.Module):
    """A processor of somebody's own, with the original inside."""

    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        video, text = self.processor(*args, **kwargs)
        return 2 * video, 3 * text


def foreign_processor(model: Any) -> None:
    for attn in (model.transformer_blocks[1].attn, *[b.attn for b in getattr(model, "single_transformer_blocks", [])]):
        attn.processor = Doubled(attn.processor)


def processor_that_knows_no_mask(model: Any) -> None:
    attn = model.transformer_blocks[1].attn

    class NoMask(type(attn.processor)):  # type: ignore[misc]
        def __call__(
            self,
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor,
            attention_mask: Tensor,
            image_rotary_emb: Any,
        ) -> Any:
            every = torch.ones_like(attention_mask)
            return super().__call__(attn, hidden_states, encoder_hidden_states, every, image_rotary_emb)

    attn.processor = NoMask()


class Pooled(nn.Module):
    """A layer with a global branch: the mean of all tokens is added to each."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out + out.mean(1, keepdim=True)


def global_branch(model: Any) -> None:
    model.transformer_blocks[0].ff_context = Pooled(model.transformer_blocks[0].ff_context)


def hooks(model: Any) -> None:
    for path, module in model.named_modules():
        if path.endswith(("to_k", "norm_q", "ff.net.0", "act_mlp", "norm2", "norm.norm", "proj_out")) and "1" in path:
            module.register_forward_hook(lambda module, args, out: 1.1 * out)


def other_norm(model: Any) -> None:
    for block in model.transformer_blocks:
        block.attn.norm_added_k = nn.LayerNorm(16)


@pytest.mark.parametrize("name", ["1.5", "1.0"])
@pytest.mark.parametrize(
    "change", [with_lora, foreign_processor, processor_that_knows_no_mask, global_branch, hooks, other_norm]
)
@pytest.mark.parametrize("first", ORDERS)
def test_a_changed_model(name: str, change: Callable[[Any], None], first: str) -> None:
    check_changed(functools.partial(build, name), run, change, first)


def smoothed_energy_guidance(model: Any) -> None:
    config = SmoothedEnergyGuidanceConfig(indices=[0, 1], fqn="single_transformer_blocks")
    _apply_smoothed_energy_guidance_hook(model, config, blur_sigma=1.0)


def half_the_sine(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    cos, sin = args[4]
    return *args[:4], (cos, 0.5 * sin), *args[5:]


def write_to_the_table(module: nn.Module, args: tuple[Any, ...]) -> None:
    halve(args[4][1])


@pytest.mark.parametrize("name", ["1.5", "1.0"])
@pytest.mark.parametrize("hook", [half_the_sine, write_to_the_table])
def test_another_rotary_table_for_a_block(name: str, hook: Callable[..., Any]) -> None:
    def change(model: Any) -> None:
        model.transformer_blocks[1].register_forward_pre_hook(hook)

    check_changed(functools.partial(build, name), run, change, "patched first")


@pytest.mark.parametrize("name", ["1.5", "1.0"])
def test_a_table_of_two_angles_for_a_pair_of_channels(name: str) -> None:
    check_changed(functools.partial(build, name), run, turning_channels_apart, "patched first")


@pytest.mark.parametrize("first", ORDERS)
def test_guidance_that_changes_rows_finds_the_padding(first: str) -> None:
    check_changed(functools.partial(build, "1.0"), run, smoothed_energy_guidance, first)


@pytest.mark.parametrize("name", ["1.5", "1.0"])
@pytest.mark.parametrize("way", TELLING_ROWS_APART)
def test_layers_that_tell_rows_apart_find_the_padding(name: str, way: Callable[[nn.Module], None]) -> None:
    change = telling_rows_apart(way, "proj_mlp", "ff_context.net.2", "to_add_out")
    check_changed(functools.partial(build, name), run, change, "patched first")


@torch.no_grad()
def test_layers_that_tell_rows_apart_where_a_forward_is_called_as_such() -> None:
    """As PEFT's wrapper of a model does."""
    change = telling_rows_apart(TELLING_ROWS_APART[0], "proj_mlp", "ff_context.net.2")

    def call(model: Any) -> Tensor:
        return model.forward(**arguments(model), return_dict=False)[0]  # type: ignore[no-any-return]

    check_changed(functools.partial(build, "1.0"), call, change, "patched first")


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("1.0", "first block"),
        ("1.0", "pyramid attention broadcast"),
        ("token_replace", "first block"),
        ("1.5", "pyramid attention broadcast"),
    ],
)
@pytest.mark.parametrize("first", ORDERS)
def test_step_caches(name: str, cache: str, first: str) -> None:
    check_cache(functools.partial(build, name), run, cache, first)


@pytest.mark.parametrize("name", ["1.5", "1.0"])
def test_the_chosen_attention_backend_runs(name: str) -> None:
    check_attention_backend(build(name), run)


# torch.compile, half precision


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        pytest.param("1.5", {"num_layers": 1}, (3, 2, 2), id="1.5"),
        pytest.param("1.0", {"num_layers": 0, "num_single_layers": 1}, (3, 4, 4), id="1.0, one stream"),
    ],
)
def test_with_the_kernels(
    name: str, options: dict[str, int], size: tuple[int, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "linear_gelu=torch,spatial_attention=torch,residual_projection=torch")
    call = functools.partial(run, size=size)
    check_kernels(build(name, **options).to(device), call, {"gated_residual_norm", "qk_norm_rope"})


@pytest.mark.parametrize("name", ["1.0", "token_replace"])
@pytest.mark.slow
def test_a_patched_model_compiles_in_one_graph(name: str) -> None:
    check_compiled(build(name), run)


@pytest.mark.slow
def test_patched_blocks_of_1_5_compile() -> None:
    """The model itself does not: stock code asks whether the image is zero."""
    model = build("1.5")
    expected = run(model)
    with patched(model):
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, backend="eager")
        assert relative_error(run(model, valid=(3,)), expected) <= 1e-5


@pytest.mark.parametrize("name", ["1.5", "1.0", "token_replace"])
def test_half_precision_is_as_exact_as_stock(name: str) -> None:
    model = build(name).bfloat16()
    call = {key: x.bfloat16() if x.is_floating_point() else x for key, x in arguments(model).items()}
    with torch.no_grad():
        wide = copy.deepcopy(model).double()
        gold = wide(**{key: x.double() for key, x in call.items()}, return_dict=False)[0]
        stock = model(**call, return_dict=False)[0].double()
        with patched(model) as report:
            out = model(**call, return_dict=False)[0].double()
            assert not report.fallbacks
    assert relative_error(out, gold) <= 2 * relative_error(stock, gold)


def test_a_call_under_autocast_goes_the_original_way() -> None:
    model = build("1.0")
    with patched(model) as report, torch.autocast("cpu", torch.bfloat16):
        run(model)
        assert fallbacks_of(report, "padded_text") == {"autocast is on"}
