"""AnimateDiff and its variants on tiny pipelines: the same clip, exact restore, and a text that is projected once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, MultiControlNetModel, UNetMotionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from PIL import Image
from tiny_models import tiny_animatediff_pipeline, tiny_controlnet, tiny_motion_unet, tiny_sparse_controlnet
from torch import Tensor, nn

from vidaccel import patch_module, patch_pipeline
from vidaccel.blocks.unet.text_context import distinct_rows
from vidaccel.clips.video_model import parameters_of_call
from vidaccel.patching.families import served_pipelines

FRAMES = 3
# noise: of one color, PyTorch's own channels-last GroupNorm on a CPU is wrong in the third digit (E[x^2] - mean^2)
NOISE = np.random.default_rng(0).integers(0, 256, (FRAMES, 16, 16, 3), np.uint8)
IMAGES = [Image.fromarray(frame) for frame in NOISE]


def _text(seed: int = 0, tokens: int = 77) -> Tensor:
    return torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(seed))


def _clip(pipe: Any, seed: int = 0, **arguments: Any) -> np.ndarray:
    common = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}
    if "num_frames" in parameters_of_call(type(pipe)):
        common["num_frames"] = FRAMES
    text = {"prompt_embeds": _text(seed), "negative_prompt_embeds": _text(99)}
    generator = torch.manual_seed(0)  # SparseCtrl draws from the global one, too
    return pipe(**common | text | arguments, generator=generator).frames[0]


def _relative_error(out: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.asarray(out) - np.asarray(expected)) / np.linalg.norm(np.asarray(expected)))


def _controlled(pipeline: str, controlnet: Callable[[], nn.Module], **arguments: Any) -> tuple[Any, dict[str, Any]]:
    return tiny_animatediff_pipeline(getattr(diffusers, pipeline), controlnet=controlnet()), arguments


def _sdxl() -> tuple[Any, dict[str, Any]]:
    unet = tiny_motion_unet(
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        use_motion_mid_block=False,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    pipe = tiny_animatediff_pipeline(
        diffusers.AnimateDiffSDXLPipeline, unet=unet, text_encoder_2=None, tokenizer_2=None
    )
    pooled = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    return pipe, {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled}


VARIANTS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "text": lambda: (tiny_animatediff_pipeline(), {}),
    "sdxl": _sdxl,
    "video-to-video": lambda: (
        tiny_animatediff_pipeline(diffusers.AnimateDiffVideoToVideoPipeline),
        {"video": IMAGES, "strength": 1.0},
    ),
    "pag": lambda: (
        tiny_animatediff_pipeline(diffusers.AnimateDiffPAGPipeline, pag_applied_layers="mid_block.*attn1"),
        {"pag_scale": 2.0},
    ),
    "controlnet": lambda: _controlled("AnimateDiffControlNetPipeline", tiny_controlnet, conditioning_frames=IMAGES),
    "two-controlnets": lambda: _controlled(
        "AnimateDiffControlNetPipeline",
        lambda: MultiControlNetModel([tiny_controlnet(1), tiny_controlnet(2)]),
        conditioning_frames=[IMAGES, IMAGES[::-1]],
        controlnet_conditioning_scale=[1.0, 0.5],
    ),
    "video-to-video-controlnet": lambda: _controlled(
        "AnimateDiffVideoToVideoControlNetPipeline", tiny_controlnet, video=IMAGES, conditioning_frames=IMAGES
    ),
    "sparse-controlnet": lambda: _controlled(
        "AnimateDiffSparseControlNetPipeline",
        tiny_sparse_controlnet,
        conditioning_frames=IMAGES[:1],
        controlnet_frame_indices=[1],
    ),
    "pia": lambda: (
        tiny_animatediff_pipeline(diffusers.PIAPipeline, unet=tiny_motion_unet(in_channels=9)),
        {"image": IMAGES[0]},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_clip_and_exact_restore(variant: str) -> None:
    pipe, arguments = VARIANTS[variant]()
    parts = [part for name, part in pipe.components.items() if name in ("unet", "controlnet")]
    classes = [type(module) for part in parts for module in part.modules()]
    before = _clip(pipe, **arguments)
    report = patch_pipeline(pipe, strict=True)
    after = _clip(pipe, **arguments)
    assert _relative_error(after, before) <= 1e-5
    assert not np.array_equal(after, before), "nothing was patched: equal bits from reordered sums"
    # PAG gives its processors to attentions over frames, too
    assert all("a processor of its own, PAG" in reason for _, _, reason in report.fallbacks)
    assert {"text_rows", "add_layer_norm", "channels_last"} <= {site.op for site in report.sites}
    assert {site.path.partition(".")[0] for site in report.sites} >= {"unet"} | (
        {"controlnet"} if "controlnet" in pipe.components else set()
    )
    report.restore()
    assert np.array_equal(_clip(pipe, **arguments), before)
    assert [type(module) for part in parts for module in part.modules()] == classes
    for part in parts:
        assert not part._forward_hooks and not part._forward_pre_hooks
        assert not any("_vidaccel" in key for module in part.modules() for key in vars(module))


def test_every_pipeline_with_this_unet_is_named() -> None:
    named = {name for name in dir(diffusers) if name.startswith(("AnimateDiff", "PIA")) and name.endswith("Pipeline")}
    assert named == {name for name in served_pipelines() if name.startswith(("AnimateDiff", "PIA"))}


@pytest.fixture
def unet() -> UNetMotionModel:
    return tiny_motion_unet().requires_grad_(False)


@pytest.fixture
def projected(unet: UNetMotionModel) -> Iterator[list[int]]:
    """Rows of text that the first cross-attention has projected to keys, an entry for each time."""
    rows: list[int] = []
    inner = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    forward = type(inner).forward

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            rows.append(x.shape[0])
            return forward(self, x)

    Counted.__module__ = "peft.tuners.lora.layer"  # of a library whose layers treat all rows alike
    inner.__class__ = Counted
    yield rows
    inner.__class__ = nn.Linear


def _call(unet: UNetMotionModel, text: Tensor, batch: int = 2) -> Tensor:
    sample = torch.randn(batch, 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet(sample, torch.tensor(1.0), text).sample


def _repeated(seed: int) -> Tensor:
    return torch.cat([_text(seed), _text(seed + 1)]).repeat_interleave(FRAMES, dim=0)


def test_the_text_is_projected_once_for_all_frames(unet: UNetMotionModel, projected: list[int]) -> None:
    text = _repeated(0)
    expected = _call(unet, text)
    projected.clear()
    with patch_module(unet, only="text_rows", self_check=False) as report:
        for _ in range(3):
            assert _relative_error(_call(unet, text), expected) <= 1e-5
        assert projected == [2, 2, 2] and not report.fallbacks
        assert {site.implementation for site in report.sites} == {"torch"}
    assert torch.equal(_call(unet, text), expected)


def test_frames_with_texts_of_their_own_are_kept_apart(unet: UNetMotionModel, projected: list[int]) -> None:
    text = torch.cat([_text(seed) for seed in range(2 * FRAMES)])
    expected = _call(unet, text)
    projected.clear()
    with patch_module(unet, only="text_rows", self_check=False):
        for _ in range(2):
            assert _relative_error(_call(unet, text), expected) <= 1e-5
    assert projected == [2 * FRAMES] * 2


def test_a_new_text_or_weight_is_seen(unet: UNetMotionModel) -> None:
    texts = [_repeated(0), _repeated(5)]
    expected = [_call(unet, text) for text in texts]
    weight = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight
    with patch_module(unet, self_check=False):
        for text, one in zip(texts + texts, expected + expected, strict=True):
            assert _relative_error(_call(unet, text), one) <= 1e-5
        in_place = texts[0]
        in_place.copy_(texts[1])
        assert _relative_error(_call(unet, in_place), expected[1]) <= 1e-5
        with torch.no_grad():
            weight.mul_(3)
        out = _call(unet, in_place)
    after = _call(unet, in_place)
    assert _relative_error(out, after) <= 1e-5 and _relative_error(after, expected[1]) > 1e-4


def test_outside_a_call_of_the_model_nothing_is_known_of_a_text(unet: UNetMotionModel) -> None:
    text = _repeated(0)
    with patch_module(unet):
        with pytest.raises(RuntimeError):
            _call(unet, text[..., :-1])  # too narrow for the projections
        assert distinct_rows(text) is text


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_has_its_effect(unet: UNetMotionModel, when: str) -> None:
    text = _repeated(0)
    plain = _call(unet, text)
    report = patch_module(unet) if when == "before" else None
    _add_lora(unet)
    report = report or patch_module(unet)
    out = _call(unet, text)
    report.restore()
    expected = _call(unet, text)
    assert _relative_error(out, expected) <= 1e-5
    assert _relative_error(expected, plain) > 1e-2


def test_lora_that_comes_and_goes(unet: UNetMotionModel) -> None:
    text = _repeated(0)
    with patch_module(unet):
        plain = _call(unet, text)
        _add_lora(unet)
        assert _relative_error(_call(unet, text), plain) > 1e-2
        unet.disable_adapters()
        assert _relative_error(_call(unet, text), plain) <= 1e-5
        unet.delete_adapters("default")
        unet.unload_lora()
        assert _relative_error(_call(unet, text), plain) <= 1e-5


def _add_lora(unet: UNetMotionModel) -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    targets = r".*\.attentions\..*(to_k|to_q|proj_in|proj_out|proj)"
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
    unet.requires_grad_(False)


def test_ip_adapter_is_left_alone(unet: UNetMotionModel) -> None:
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    processor = IPAdapterAttnProcessor2_0(hidden_size=64, cross_attention_dim=32)
    block.attn2.set_processor(processor)
    text = (_repeated(0), [torch.randn(2 * FRAMES, 1, 4, 32)])
    rows = torch.randn(2 * FRAMES, 16, 64)
    with torch.no_grad():
        expected = block(rows, encoder_hidden_states=text)
        with patch_module(unet) as report:
            assert torch.equal(block(rows, encoder_hidden_states=text), expected)
            assert block.attn2.processor is processor
    left = {site.reason for site in report.sites if site.path == "mid_block.attentions.0.transformer_blocks.0"}
    assert left == {"it has a processor of its own, IPAdapterAttnProcessor2_0"}


def test_ip_adapter_after_patching_falls_back(unet: UNetMotionModel) -> None:
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    text = (_repeated(0), [torch.randn(2 * FRAMES, 1, 4, 32)])
    rows = torch.randn(2 * FRAMES, 16, 64)
    with torch.no_grad(), patch_module(unet) as report:
        block.attn2.set_processor(IPAdapterAttnProcessor2_0(hidden_size=64, cross_attention_dim=32))
        out = block(rows, encoder_hidden_states=text)
        assert any("a processor of its own" in reason for _, _, reason in report.fallbacks)
        report.restore()
        assert _relative_error(out, block(rows, encoder_hidden_states=text)) <= 1e-5


@pytest.mark.slow
def test_patched_denoiser_compiles_in_one_graph() -> None:
    """Of one level: the kinds of blocks are compiled one by one elsewhere."""
    one_level = {"down_block_types": ("DownBlockMotion",), "up_block_types": ("UpBlockMotion",)}
    unet = tiny_motion_unet(block_out_channels=(64,), **one_level).requires_grad_(False)
    text = _repeated(0)
    patch_module(unet)
    expected = _call(unet, text)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    torch.testing.assert_close(_call(compiled, text), expected, rtol=1e-4, atol=1e-5)


def test_the_pipeline_gives_each_prompt_its_clip() -> None:
    pipe = tiny_animatediff_pipeline(AnimateDiffPipeline)
    expected = [_clip(pipe, seed) for seed in (0, 7)]
    assert _relative_error(*expected) > 1e-3
    with patch_pipeline(pipe):
        for seed, clip in zip((0, 7, 0), (*expected, expected[0]), strict=True):
            assert _relative_error(_clip(pipe, seed), clip) <= 1e-5
