"""LTX-Video, LTX-2 and LTX-2.3: tiny pipelines of the whole structure, patched against unpatched."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from block_checks import frozen, relative_error
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    LTX2ConditionPipeline,
    LTX2DFRPipeline,
    LTX2DFRTemporalRefinePipeline,
    LTX2HDRPipeline,
    LTX2ImageToVideoPipeline,
    LTX2InContextPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXConditionPipeline,
    LTXEulerAncestralRFScheduler,
    LTXI2VLongMultiPromptPipeline,
    LTXImageToVideoPipeline,
    LTXVideoTransformer3DModel,
    PyramidAttentionBroadcastConfig,
)
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
from family_checks import check_clip, check_compiled, check_kernels
from PIL import Image
from tiny_models import tiny_synthetic_pipeline
from torch import Tensor, nn
from transformer_checks import (
    ORDERS,
    TELLING_ROWS_APART,
    check_attention_backend,
    check_changed,
    check_each_op_off,
    fallbacks_of,
    halve,
    patched,
    telling_rows_apart,
    telling_transformer,
    turning_channels_apart,
)

from vidaccel import patch_module, patch_pipeline
from vidaccel.bench.synthetic import specification
from vidaccel.blocks.dit import (
    modulation_rows,
    normalization,
    text_attention,
    transformer_ltx,
    transformer_ltx2,
)
from vidaccel.blocks.dit.transformer_ltx import LTX_OPS
from vidaccel.sites import block

TEXT = 6  # tokens, of which some are valid
CAPTION = 12
OF_LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": CAPTION,
}
OF_LTX2 = OF_LTX | {
    "audio_in_channels": 3,
    "audio_out_channels": 3,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 6,
    "audio_cross_attention_dim": 12,
    "rope_type": "split",
}
OF_2_3 = {"gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True,
          "use_prompt_embeddings": False, "perturbed_attn": True}  # fmt: skip
MODELS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "ltx": (LTXVideoTransformer3DModel, OF_LTX),
    "ltx, weighted norms": (LTXVideoTransformer3DModel, OF_LTX | {"norm_elementwise_affine": True}),
    "ltx2": (LTX2VideoTransformer3DModel, OF_LTX2),
    "ltx2.3": (LTX2VideoTransformer3DModel, OF_LTX2 | OF_2_3),
    "ltx2.5": (
        LTX2VideoTransformer3DModel,
        OF_LTX2 | OF_2_3 | {"ff_bias": False, "use_prompt_adaln_single": False},
    ),
    "ltx2, interleaved": (LTX2VideoTransformer3DModel, OF_LTX2 | {"rope_type": "interleaved"}),
}
THREE = "ltx", "ltx2", "ltx2.3"


def build(name: str, **options: Any) -> Any:
    model_class, config = MODELS[name]
    return telling_transformer(model_class, config | options)


def arguments(
    model: Any,
    valid: tuple[int, ...] = (3, 5),
    size: tuple[int, int, int] = (3, 2, 3),
    timesteps: str = "of samples",
    **options: Any,
) -> dict[str, Any]:
    """One call of ``model`` with texts of which so many tokens are ``valid``."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(len(valid), *shape, generator=generator)

    frames, height, width = size
    tokens, image = frames * height * width, height * width
    timestep = torch.linspace(500.0, 600.0, len(valid))
    sigma = timestep
    if timesteps == "of an image and a video":
        timestep = timestep[:, None] * (torch.arange(tokens) >= image)
    elif timesteps == "of tokens":
        timestep = timestep[:, None] + torch.arange(tokens) % 7
    elif timesteps == "all the same":
        timestep = timestep[:, None].repeat(1, tokens)
    mask = (torch.arange(TEXT) < torch.tensor(valid)[:, None]).long()
    call = {
        "hidden_states": noise(tokens, 4),
        "timestep": timestep,
        "encoder_attention_mask": mask,
        "num_frames": frames,
        "height": height,
        "width": width,
    }
    if "audio_in_channels" not in model.config:
        call |= {"encoder_hidden_states": noise(TEXT, CAPTION), "rope_interpolation_scale": (0.32, 32, 32)}
        return call | options
    embeds_caption = model.config.use_prompt_embeddings
    return call | {
        "audio_hidden_states": noise(5, 3),
        "encoder_hidden_states": noise(TEXT, CAPTION if embeds_caption else 16),
        "audio_encoder_hidden_states": noise(TEXT, 12),
        "audio_timestep": sigma,
        "sigma": sigma,
        "audio_encoder_attention_mask": mask,
        "audio_num_frames": 5,
        "use_cross_timestep": True,
    } | options  # fmt: skip


@torch.no_grad()
def run(model: Any, **options: Any) -> Tensor:
    """The video, and the audio if there is one, in one tensor ``[B, N]``."""
    call = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in arguments(model, **options).items()}
    return torch.cat([x.flatten(1) for x in model(**call, return_dict=False)], dim=1)


# whole clips


@pytest.mark.parametrize("name", ["ltx-video-2b", "ltx-video-13b", "ltx-2", "ltx-2.3"])
def test_same_clip_and_exact_restore(name: str) -> None:
    report = check_clip(*tiny_synthetic_pipeline(name), reorders_sums=False)
    assert {site.op for site in report.sites if "transformer_blocks.0" in site.path} == {*LTX_OPS}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("ltx-video-2b", 1_923_385_472), ("ltx-video-13b", 13_042_569_344), ("ltx-2", 18_876_174_592), ("ltx-2.3", None)],
)
def test_the_full_model_has_the_size_of_the_released_one(name: str, parameters: int | None) -> None:
    components = specification(name)["components"]
    with torch.device("meta"):
        models = {
            part: getattr(diffusers, kind)(**config)
            for part, (kind, config) in components.items()
            if hasattr(diffusers, kind)
        }
    assert parameters in (None, sum(p.numel() for p in models["transformer"].parameters()))
    assert {"vae", "scheduler"} <= models.keys()


def image(size: tuple[int, int] = (96, 64)) -> Image.Image:
    return Image.effect_noise(size, 80).convert("RGB")


def of_parts(pipeline_class: type[Any], name: str, **changed: Any) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline of the parts of the synthetic one called ``name``, and the call of that one."""
    pipe, call = tiny_synthetic_pipeline(name)
    taken = pipeline_class.__init__.__annotations__
    parts: dict[str, Any] = dict.fromkeys(taken) | {k: v for k, v in pipe.components.items() if k in taken}
    parts = {k: v for k, v in (parts | changed).items() if k not in ("return", "hdr_transform")}
    pipe = pipeline_class(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def image_to_video() -> tuple[Any, dict[str, Any]]:
    pipe, call = of_parts(LTXImageToVideoPipeline, "ltx-video-2b")
    return pipe, call | {"image": image()}


def conditions() -> tuple[Any, dict[str, Any]]:
    pipe, call = of_parts(LTXConditionPipeline, "ltx-video-13b")
    given = [LTXVideoCondition(image=image()), LTXVideoCondition(image=image(), frame_index=8, strength=0.5)]
    return pipe, call | {"conditions": given}


def long_clip() -> tuple[Any, dict[str, Any]]:
    pipe, call = of_parts(LTXI2VLongMultiPromptPipeline, "ltx-video-13b")
    texts = [call.pop(f"{sign}prompt_{part}") for sign in ("", "negative_") for part in ("embeds", "attention_mask")]
    pipe.encode_prompt = lambda **kwargs: texts
    more = {"prompt": "one|two", "cond_image": image(), "temporal_tile_size": 16, "temporal_overlap": 8,
            "guidance_scale": 3.0, "skip_steps_sigma_threshold": None, "num_frames": 33, "num_inference_steps": 3,
            "decode_horizontal_tiles": 1, "decode_vertical_tiles": 1, "decode_overlap": 0}  # fmt: skip
    call.pop("image_cond_noise_scale")
    return pipe, call | more


def image_to_video_2() -> tuple[Any, dict[str, Any]]:
    pipe, call = of_parts(LTX2ImageToVideoPipeline, "ltx-2")
    return pipe, call | {"image": image(), "image_crf": 0, "use_cross_timestep": False}


def text_to_video_2() -> tuple[Any, dict[str, Any]]:
    """As LTX-2.0 was trained: its modulation between streams is that of tokens."""
    pipe, call = of_parts(LTX2Pipeline, "ltx-2")
    return pipe, call | {"use_cross_timestep": False}


def conditions_2() -> tuple[Any, dict[str, Any]]:
    pipe, call = of_parts(LTX2ConditionPipeline, "ltx-2.3")
    return pipe, call | {"conditions": [LTX2VideoCondition(frames=image(), index=0, strength=0.7, crf=0)]}


def in_context() -> tuple[Any, dict[str, Any]]:
    pipe, call = of_parts(LTX2InContextPipeline, "ltx-2.3")
    reference = LTX2ReferenceCondition(frames=[image()] * 9, strength=0.8)
    return pipe, call | {"reference_conditions": [reference], "conditioning_attention_strength": 0.5}


def high_dynamic_range() -> tuple[Any, dict[str, Any]]:
    pipe, call = of_parts(LTX2HDRPipeline, "ltx-2")
    call = {name: value for name, value in call.items() if name not in ("spatio_temporal_guidance_blocks",)}
    return pipe, call | {"reference_conditions": [LTX2HDRReferenceCondition(frames=[image()] * 9)]}


def keyframes() -> tuple[Any, dict[str, Any]]:
    """LTX-2.5, with the transformer of 2.3 but for the mark of keyframes."""
    pipe, call = of_parts(LTX2DFRPipeline, "ltx-2.3")
    config = dict(pipe.transformer.config) | {"use_keyframes_abs_pos_embedding": True}
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.register_modules(transformer=frozen(LTX2VideoTransformer3DModel(**config)), scheduler=scheduler)
    taken = "prompt_embeds", "prompt_attention_mask", "height", "width"
    return pipe, {name: call[name] for name in taken} | {"num_frames": 25, "sigmas": [1.0, 0.5]}


def refined_keyframes() -> tuple[Any, dict[str, Any]]:
    first, call = keyframes()
    made = first(**call, generator=torch.Generator().manual_seed(0), output_type="latent")
    upsampler = LTX2LatentUpsamplerModel(
        in_channels=8, mid_channels=32, num_blocks_per_stage=1, spatial_upsample=False, temporal_upsample=True
    )
    scheduler = LTXEulerAncestralRFScheduler(eta=0.5)
    pipe, _ = of_parts(LTX2DFRTemporalRefinePipeline, "ltx-2.3", transformer=first.transformer, scheduler=scheduler,
                       temporal_latent_upsampler=frozen(upsampler))  # fmt: skip
    more = {"latents": made.frames, "keyframes_latents": made.keyframes, "audio_latents": made.audio,
            "keyframe_positions": made.keyframe_positions}  # fmt: skip
    return pipe, call | more


PIPELINES = [image_to_video, conditions, long_clip, image_to_video_2, text_to_video_2, conditions_2, in_context,
             high_dynamic_range, keyframes, refined_keyframes]  # fmt: skip


@pytest.mark.parametrize("make", PIPELINES, ids=lambda make: make.__name__)
def test_every_pipeline_makes_the_same_clip(make: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
    pipe, call = make()
    check_clip(pipe, call, reorders_sums=False)
    with patch_pipeline(pipe, strict=True) as report:
        assert report.sites


# a call of the model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("valid", "size", "timesteps"),
    [
        ((3, 5), (3, 2, 3), "of samples"),
        ((6,), (1, 1, 1), "of samples"),
        ((4, 4, 4), (2, 1, 5), "of an image and a video"),
        ((2, 6), (2, 3, 3), "of tokens"),
        ((1,), (2, 3, 1), "all the same"),
    ],
    ids=["unequal texts", "one token", "image and video", "timesteps of tokens", "equal timesteps"],
)
def test_same_output(name: str, valid: tuple[int, ...], size: tuple[int, int, int], timesteps: str) -> None:
    model = build(name)
    options = {"valid": valid, "size": size, "timesteps": timesteps}
    expected = run(model, **options)
    with patched(model) as report:
        assert relative_error(run(model, **options), expected) <= 1e-5
        assert relative_error(run(model, **options), expected) <= 1e-5
        assert not report.fallbacks, str(report)


OTHER_CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "legacy": ("ltx2", {"use_cross_timestep": False, "timesteps": "of an image and a video"}),
    "legacy, of tokens": ("ltx2.3", {"use_cross_timestep": False, "timesteps": "of tokens"}),
    "streams apart": ("ltx2.3", {"isolate_modalities": True}),
    "guided": ("ltx2.3", {"spatio_temporal_guidance_blocks": [1]}),
    "one sample guided": (
        "ltx2.3", {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": torch.tensor([1.0, 0.0])},
    ),
    "masked": ("ltx2", {"video_self_attention_mask": torch.rand(2, 18, 18)}),
    "no mask of texts": ("ltx2", {"encoder_attention_mask": None, "audio_encoder_attention_mask": None}),
    "own mask for the audio": ("ltx2", {"audio_encoder_attention_mask": torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])}),
    "no mask": ("ltx", {"encoder_attention_mask": None}),
    "coordinates": ("ltx", {"video_coords": torch.rand(2, 3, 18)}),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_CALLS)
def test_other_calls(case: str) -> None:
    name, options = OTHER_CALLS[case]
    model = build(name)
    expected = run(model, **options)
    with patched(model) as report:
        assert relative_error(run(model, **options), expected) <= 1e-5
        assert relative_error(run(model, **options), expected) <= 1e-5
        assert not report.fallbacks, str(report)
    assert relative_error(run(build(name)), expected) > 1e-4  # the option shows


@pytest.mark.parametrize(("name", "options"), [
    ("ltx", {}), ("ltx2.3", {}), ("ltx2", OTHER_CALLS["masked"][1]), ("ltx2, interleaved", {}),
])  # fmt: skip
def test_a_corner_of_a_large_call_is_checked(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (transformer_ltx, transformer_ltx2, normalization):
        for setting, value in (("MOST_WHOLE", 0), ("CORNER_ROWS", 7)):
            monkeypatch.setattr(file, setting, value, raising=False)
    checked: list[Any] = []
    near = block.near
    monkeypatch.setattr(block, "near", lambda out, expected, *gold: checked.append(out.shape) or near(out, expected))
    model = build(name)
    with patched(model):
        run(model, timesteps="of an image and a video", **options)
    assert (2, 7, 16) in checked and (2, 18, 16) not in checked


@pytest.mark.parametrize("name", ["ltx", "ltx2.3"])
@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ([1, 1, 0, 1, 0, 0], "padding stands between valid tokens"),
        ([0, 0, 0, 0, 0, 0], "no token of a text is valid"),
        ([1, 1, 0.5, 0, 0, 0], "the mask of a text weighs tokens"),
    ],
)
def test_a_mask_that_stays(name: str, mask: list[float], reason: str) -> None:
    model = build(name)
    rows = torch.tensor([mask, [1] * 6])
    options: dict[str, Any] = {"encoder_attention_mask": rows}
    if name != "ltx":
        options["audio_encoder_attention_mask"] = rows
    expected = run(model, **options)
    with patched(model) as report:
        run(model)  # this one is planned without its mask
        assert not report.fallbacks
        out = run(model, **options)
        assert relative_error(out, expected) <= 1e-5
        assert fallbacks_of(report, "padded_text") == {reason}
        assert {site.op for site in report.sites if site.fallbacks} == {"padded_text"}


@pytest.mark.parametrize("name", ["ltx", "ltx2.3"])
@pytest.mark.parametrize("cut", [(slice(None), slice(4)), (slice(1),)], ids=["fewer tokens", "fewer samples"])
def test_a_mask_of_another_text_raises_what_stock_raises(name: str, cut: tuple[slice, ...]) -> None:
    """Also where a hook is below, so that no check would run the original block."""
    model = build(name)
    options = {"encoder_attention_mask": arguments(model)["encoder_attention_mask"][cut]}
    for path, layer in model.named_modules():
        if path.endswith("to_v"):
            layer.register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError) as expected:
        run(model, **options)
    with patched(model), pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
        run(model, **options)


@pytest.mark.parametrize("name", THREE)
def test_the_host_waits_once_for_masks_and_once_for_timesteps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    found, stretches = text_attention._found, modulation_rows.stretches_of
    monkeypatch.setattr(text_attention, "_found", lambda masks: asked.append("masks") or found(masks))
    monkeypatch.setattr(modulation_rows, "stretches_of", lambda x: asked.append("timesteps") or stretches(x))
    model = build(name)
    with patched(model):
        run(model)
        asked.clear()
        run(model)
        assert asked == ["masks"]
        run(model, timesteps="of an image and a video")
        asked.clear()
        run(model, timesteps="of an image and a video")
        assert sorted(asked) == ["masks", "timesteps"]
        assert relative_error(run(model, valid=(3, 4)), run(model, valid=(3, 5))) > 1e-4  # nothing is kept


def test_samples_share_a_rotary_table() -> None:
    model = build("ltx")
    tables = []
    model.rope.register_forward_hook(lambda rope, args, out: tables.extend(out))
    with patch_module(model):
        pass  # hooked: left alone
    model.rope._forward_hooks.clear()
    with patched(model), torch.no_grad():
        stock = type(model.rope).original.forward
        arguments_of_rope = (torch.zeros(3, 12, 4), 2, 2, 3, (0.3, 32, 32), None)
        for table, expected in zip(model.rope(*arguments_of_rope), stock(model.rope, *arguments_of_rope), strict=True):
            assert table.stride(0) == 0 and torch.equal(table, expected)


# what a user may change


@pytest.mark.parametrize("name", THREE)
def test_every_op_can_be_off(name: str) -> None:
    check_each_op_off(build(name), functools.partial(run, timesteps="of an image and a video"))


def with_lora(model: Any) -> None:
    peft = pytest.importorskip("peft")
    layers = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "to_gate_logits", "time_embed.linear")
    targets = [path for path, _ in model.named_modules() if path.endswith(layers)]
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    model.requires_grad_(False)


class Doubled:
    """A processor of somebody's own, with the original inside."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.__call__ = processor.__call__  # whose parameters diffusers looks at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * self.processor(*args, **kwargs)


def attentions(model: Any, *names: str) -> list[Any]:
    return [getattr(model.transformer_blocks[1], name) for name in names if hasattr(model.transformer_blocks[1], name)]


def foreign_self_attention(model: Any) -> None:
    for attn in attentions(model, "attn1", "audio_attn1"):
        attn.processor = Doubled(attn.processor)


def foreign_text_attention(model: Any) -> None:
    for attn in attentions(model, "attn2"):
        attn.processor = Doubled(attn.processor)


def one_foreign_attention_of_a_pair(model: Any) -> None:
    for attn in attentions(model, "video_to_audio_attn") or attentions(model, "attn2"):
        attn.processor = Doubled(attn.processor)


def hooks(model: Any) -> None:
    last = "to_k", "norm_q", "ff.net.0", "norm2", "audio_norm3", "to_out.0", "silu", "rope", "scale_shift"
    for path, module in model.named_modules():
        if path.endswith(last) and not path.startswith("transformer_blocks.0"):
            module.register_forward_hook(
                lambda module, args, out: 1.1 * out if isinstance(out, Tensor) else tuple(1.1 * x for x in out)
            )


def other_norm(model: Any) -> None:
    for attn in attentions(model, "attn1", "audio_to_video_attn"):
        attn.norm_k = nn.LayerNorm(attn.inner_dim)


CHANGES = [with_lora, foreign_self_attention, foreign_text_attention, one_foreign_attention_of_a_pair, hooks,
           other_norm]  # fmt: skip


@pytest.mark.parametrize("name", ["ltx", "ltx2.3"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("first", ORDERS)
def test_a_changed_model(name: str, change: Callable[[Any], None], first: str) -> None:
    check_changed(functools.partial(build, name), run, change, first)


def writing_behind_the_embedding(model: Any) -> None:
    model.time_embed.register_forward_hook(lambda module, args, out: halve(out[0]))


def writing_to_the_timestep(model: Any) -> None:
    before_a_block(model, lambda kwargs: halve(kwargs["temb"]))


def writing_to_the_rotary_table(model: Any) -> None:
    name = "image_rotary_emb" if "audio_in_channels" not in model.config else "video_rotary_emb"
    before_a_block(model, lambda kwargs: halve(kwargs[name][0]))


def writing_to_the_mask(model: Any) -> None:
    before_a_block(model, lambda kwargs: kwargs["encoder_attention_mask"].zero_())


def before_a_block(model: Any, write: Callable[[dict[str, Any]], Any]) -> None:
    names = "hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "encoder_attention_mask"

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        write(dict(zip(names, args, strict=False)) | kwargs)

    model.transformer_blocks[1].register_forward_pre_hook(hook, with_kwargs=True)


WRITING = [writing_behind_the_embedding, writing_to_the_timestep, writing_to_the_rotary_table, writing_to_the_mask]


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("change", WRITING, ids=lambda change: change.__name__)
@pytest.mark.parametrize("timesteps", ["of an image and a video", "all the same"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_hook_that_writes_to_what_blocks_share(
    name: str, change: Callable[[Any], None], timesteps: str, inference: bool
) -> None:
    model, changed = build(name), build(name)
    change(changed)
    with torch.inference_mode(inference), patch_module(model):
        expected = run(changed, timesteps=timesteps)
        assert relative_error(run(model, timesteps=timesteps), expected) > 1e-3  # the change will show
        change(model)
        assert relative_error(run(model, timesteps=timesteps), expected) <= 1e-5


def test_norms_in_half_precision() -> None:
    model = build("ltx, weighted norms")
    for layer in model.transformer_blocks:
        layer.norm2.bfloat16()
    expected = run(model)
    with patch_module(model, self_check=False) as report:
        assert relative_error(run(model), expected) <= 1e-5
    assert "one of its RMSNorms has a weight of another dtype" in fallbacks_of(report, "gated_residual_norm")


@pytest.mark.parametrize("name", ["ltx", "ltx2.3"])
def test_norms_that_differ_in_eps(name: str) -> None:
    model = build(name)
    for attn in attentions(model, "attn1", "audio_attn1"):
        attn.norm_k.eps = 1.0
    expected = run(model)
    with patch_module(model, self_check=False) as report:
        assert relative_error(run(model), expected) <= 1e-5
    assert "its norms differ in eps" in fallbacks_of(report, "qk_norm_rope")


@pytest.mark.parametrize("name", ["ltx", "ltx2.3"])
@pytest.mark.parametrize("way", TELLING_ROWS_APART)
def test_an_embedding_of_timesteps_that_tells_tokens_apart(name: str, way: Callable[[nn.Module], None]) -> None:
    change = telling_rows_apart(way, "time_embed.emb.timestep_embedder.linear_1", "time_embed.linear")
    call = functools.partial(run, timesteps="of an image and a video")
    check_changed(functools.partial(build, name), call, change, "patched first")


@pytest.mark.parametrize("name", ["ltx", "ltx2, interleaved"])
def test_a_table_of_two_angles_for_a_pair_of_channels(name: str) -> None:
    check_changed(functools.partial(build, name), run, turning_channels_apart, "patched first")


@pytest.mark.parametrize("name", THREE)
def test_gradient_checkpointing_with_a_timestep_for_each_token(name: str) -> None:
    """What is asked about a call records nothing: a call made anew for its gradients must record the same."""

    def gradients(model: Any) -> Tensor:
        model.requires_grad_(True).train().enable_gradient_checkpointing()
        out = model(**arguments(model, timesteps="of an image and a video"), return_dict=False)
        sum(x.square().sum() for x in out).backward()
        found = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
        return torch.cat(found)

    expected, model = gradients(build(name)), build(name)
    with patch_module(model):
        assert torch.equal(gradients(model), expected)


@torch.no_grad()
@pytest.mark.parametrize("text", ["encoder_hidden_states", "audio_encoder_hidden_states"])
def test_one_text_for_all_samples(text: str) -> None:
    """A question about the sizes of texts fails; stock code broadcasts."""
    model = build("ltx2.3")
    call = arguments(model)
    call[text] = call[text][0]
    expected = torch.cat([x.flatten(1) for x in model(**call, return_dict=False)], dim=1)
    with patch_module(model) as report:
        out = torch.cat([x.flatten(1) for x in model(**call, return_dict=False)], dim=1)
    assert relative_error(out, expected) <= 1e-6
    assert any("ValueError" in reason for reason in fallbacks_of(report, "gated_residual_norm"))


def test_the_rest_of_a_block_with_a_foreign_attention_is_fused() -> None:
    model = build("ltx2.3")
    foreign_self_attention(model)
    with patched(model) as report:
        run(model)
        reason = {"it has a processor of its own, Doubled"}
        assert fallbacks_of(report, "qk_norm_rope") == fallbacks_of(report, "spatial_attention") == reason
        assert not fallbacks_of(report, "gated_residual_norm") | fallbacks_of(report, "padded_text")


def first_block_cache(model: Any) -> None:
    model.enable_cache(FirstBlockCacheConfig(threshold=0.5))


def pyramid_attention_broadcast(model: Any) -> None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=3,
        spatial_attention_block_identifiers=("transformer_blocks",),
        cross_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: 500,
    )
    model.enable_cache(config)


def three_calls(model: Any) -> Tensor:
    with model.cache_context("cond"):
        return torch.stack([run(model, valid=(valid, 5)) for valid in (2, 3, 4)])


CACHES = [("ltx", first_block_cache), ("ltx", pyramid_attention_broadcast), ("ltx2", pyramid_attention_broadcast),
          ("ltx2.3", pyramid_attention_broadcast)]  # fmt: skip


@pytest.mark.parametrize(("name", "cache"), CACHES)
@pytest.mark.parametrize("first", ["patched first", "cached first"])
def test_step_caches(name: str, cache: Callable[[Any], None], first: str) -> None:
    model, stock = build(name), build(name)
    cache(stock)
    expected = three_calls(stock)
    assert relative_error(expected, three_calls(build(name))) > 1e-4  # the cache shows
    if first == "cached first":
        cache(model)
    with patch_module(model):
        if first == "patched first":
            cache(model)
        assert relative_error(three_calls(model), expected) <= 1e-5
        model.disable_cache()
        assert relative_error(run(model), run(build(name))) <= 1e-5


@pytest.mark.parametrize("name", ["ltx", "ltx2.3"])
def test_the_chosen_attention_backend_runs(name: str) -> None:
    check_attention_backend(build(name), run)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # stock's own norms
def test_a_call_under_autocast_goes_the_original_way() -> None:
    model = build("ltx")
    with patched(model) as report, torch.autocast("cpu", torch.bfloat16):
        run(model)
        assert fallbacks_of(report, "gated_residual_norm") == {"autocast is on"}


# torch.compile, half precision


def test_with_the_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "linear_gelu=torch,spatial_attention=torch")
    model = build("ltx", num_layers=1).to(device)
    call = functools.partial(run, valid=(3,), size=(3, 2, 2))
    check_kernels(model, call, {"gated_residual_norm", "qk_norm_rope"})


@pytest.mark.parametrize(("name", "timesteps"), [("ltx", "of an image and a video"), ("ltx2.3", "of samples")])
@pytest.mark.slow
def test_a_patched_model_compiles_in_one_graph(name: str, timesteps: str) -> None:
    check_compiled(build(name, num_layers=1), lambda model: run(model, timesteps=timesteps))


@pytest.mark.parametrize("name", [*THREE, "ltx, weighted norms"])
@pytest.mark.parametrize("timesteps", ["of samples", "of an image and a video"])
def test_half_precision_is_as_exact_as_stock(name: str, timesteps: str) -> None:
    model = build(name).bfloat16()
    given = arguments(model, timesteps=timesteps)
    call = {key: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in given.items()}

    def of(model: Any, call: dict[str, Any]) -> Tensor:
        return torch.cat([x.flatten(1) for x in model(**call, return_dict=False)], dim=1).double()

    with torch.no_grad():
        wide = {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in call.items()}
        gold = of(copy.deepcopy(model).double(), wide)
        stock = of(model, call)
        with patched(model) as report:
            out = of(model, call)
            assert not report.fallbacks, str(report)
    assert relative_error(out, gold) <= 2 * relative_error(stock, gold)
