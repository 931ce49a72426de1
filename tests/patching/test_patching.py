"""Patch, report, restore: on a whole tiny pipeline, as a user would."""

from __future__ import annotations

import copy
import gc
import importlib
import itertools
import json
import logging
import pkgutil
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, StableVideoDiffusionPipeline, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import SpatioTemporalResBlock
from PIL import Image
from tiny_models import tiny_autoencoder_kl, tiny_svd_pipeline, tiny_svd_unet

import vidaccel.pipelines
from vidaccel import patch_module, patch_pipeline
from vidaccel.blocks.unet.attention_processor import Processor
from vidaccel.errors import UsageError
from vidaccel.kernels import choice
from vidaccel.kernels.attention.spatial_attention import SPATIAL_ATTENTION
from vidaccel.kernels.norm.group_norm_silu import GROUP_NORM_SILU
from vidaccel.kernels.op import Implementation
from vidaccel.patching import families
from vidaccel.sites.block import SITES
from vidaccel.sites.rules import ChannelsLastWeights, Rule, Swap

pytestmark = pytest.mark.usefixtures("plain_pytorch")

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))


@pytest.fixture
def pipe() -> StableVideoDiffusionPipeline:
    return tiny_svd_pipeline()


def clip(pipe: StableVideoDiffusionPipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    out = pipe(IMAGE, height=16, width=16, num_frames=3, num_inference_steps=2, generator=generator, output_type="np")
    return out.frames[0]


def relative_error(out: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))


def test_same_clip_and_exact_restore(pipe: StableVideoDiffusionPipeline) -> None:
    classes = {name: type(module) for name, module in pipe.unet.named_modules()}
    state = {name: (tensor.clone(), tensor.stride()) for name, tensor in pipe.unet.state_dict().items()}
    before = clip(pipe)
    report = patch_pipeline(pipe)
    after = clip(pipe)
    assert relative_error(after, before) <= 1e-5
    assert not np.array_equal(after, before), "nothing was patched: equal bits from reordered sums"
    assert not report.fallbacks
    assert {site.state for site in report.sites} == {"active"}
    report.restore()
    assert np.array_equal(clip(pipe), before)
    assert {name: type(module) for name, module in pipe.unet.named_modules()} == classes
    assert not any("_vidaccel" in key for module in pipe.unet.modules() for key in vars(module))
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, state[name][0]) and tensor.stride() == state[name][1], name


@pytest.mark.parametrize(
    "op",
    [
        *("one_token_attention", "unit_division", "alpha_blend", "temporal_attention", "add_layer_norm", "geglu"),
        "spatial_attention",
    ],
)
def test_each_op_alone(pipe: StableVideoDiffusionPipeline, op: str) -> None:
    before = clip(pipe)
    with patch_pipeline(pipe, only=op) as report:
        assert {site.op for site in report.sites} == {op}
        assert relative_error(clip(pipe), before) <= 1e-5
        not_reached = ("attn2", "attn1") if op in ("unit_division", "spatial_attention") else ()
        reached = [site for site in report.sites if not site.path.endswith(not_reached)]
        assert {site.implementation for site in reached} == {"torch"} and not report.fallbacks
    assert np.array_equal(clip(pipe), before)


def test_unit_division_is_bit_exact(pipe: StableVideoDiffusionPipeline) -> None:
    before = clip(pipe)
    with patch_pipeline(pipe, only="unit_division") as report:
        assert {site.fidelity for site in report.sites} == {"bit-exact"}
        assert np.array_equal(clip(pipe), before)


def test_patching_twice_changes_nothing(pipe: StableVideoDiffusionPipeline) -> None:
    first = patch_pipeline(pipe)
    once = clip(pipe)
    second = patch_pipeline(pipe)
    assert second.sites == first.sites
    assert np.array_equal(clip(pipe), once)
    second.restore()
    assert {site.state for site in first.sites} == {"restored"}


def test_a_second_call_adds_what_the_first_left_out(pipe: StableVideoDiffusionPipeline) -> None:
    before = clip(pipe)
    patch_pipeline(pipe, only="temporal_attention")
    report = patch_pipeline(pipe)
    temporal_block = "unet.mid_block.attentions.0.temporal_transformer_blocks.0"
    ops = [site.op for site in report.sites if site.path == temporal_block]
    assert sorted(ops) == ["add_layer_norm", "one_token_attention", "qkv_projection", "temporal_attention"]
    assert relative_error(clip(pipe), before) <= 1e-5
    report.restore()
    assert np.array_equal(clip(pipe), before)


def traces(pipe: StableVideoDiffusionPipeline) -> dict[str, Any]:
    """What patching could leave behind: classes, attributes, processors, the memory order and the bits of weights."""
    found: dict[str, Any] = {}
    for component in ("unet", "vae"):
        model = getattr(pipe, component)
        for path, module in model.named_modules():
            found[component, path] = type(module), set(vars(module)), vars(module).get("processor")
        for path, tensor in model.state_dict().items():
            found[component, path, "weight"] = tensor.stride(), tensor.sum().item()
    return found


def raising_at(number: int, right: Callable[..., Any]) -> Callable[..., Any]:
    calls = itertools.count(1)

    def apply(*args: Any) -> Any:
        if next(calls) == number:
            raise RuntimeError("out of memory")
        return right(*args)

    return apply


@pytest.mark.parametrize(
    ("rule", "number"),
    [(Swap, 1), (Swap, 7), (Swap, 50), (Processor, 3), (ChannelsLastWeights, 2)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_an_exception_while_patching_leaves_all_as_it_was(
    pipe: StableVideoDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, rule: type[Rule], number: int
) -> None:
    before = traces(pipe)
    monkeypatch.setattr(rule, "apply", raising_at(number, rule.apply))
    with pytest.raises(RuntimeError, match="out of memory"):
        patch_pipeline(pipe)
    assert traces(pipe) == before


def test_an_exception_in_a_second_call_leaves_the_first_ones_sites(
    pipe: StableVideoDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = traces(pipe)
    first = patch_pipeline(pipe, only=["temporal_attention", "unit_division", "channels_last"])
    expected = clip(pipe)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="out of memory"):
        patched.setattr(Swap, "apply", raising_at(40, Swap.apply))
        patch_pipeline(pipe)
    assert {site.state for site in first.sites} == {"active"}
    assert np.array_equal(clip(pipe), expected)
    first.restore()
    assert traces(pipe) == stock


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first-first", "second-first"])
def test_two_reports_restored_in_either_order(pipe: StableVideoDiffusionPipeline, order: tuple[int, int]) -> None:
    stock = traces(pipe)
    reports = [patch_pipeline(pipe, only=["temporal_attention", "spatial_attention"]), patch_pipeline(pipe)]
    reports[order[0]].restore()
    assert {site.state for site in reports[order[0]].sites} == {"restored"}
    reports[order[1]].restore()
    assert traces(pipe) == stock


def test_weights_that_were_channels_last_come_back_so(pipe: StableVideoDiffusionPipeline) -> None:
    for module in pipe.unet.down_blocks.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            order = torch.channels_last if module.weight.ndim == 4 else torch.channels_last_3d
            module.to(memory_format=order)
    pipe.vae.encoder.to(memory_format=torch.channels_last)
    before = traces(pipe)
    report = patch_pipeline(pipe)
    assert traces(pipe) != before
    report.restore()
    assert traces(pipe) == before


def test_weights_stay_such_as_gradients_can_be_taken_of(pipe: StableVideoDiffusionPipeline) -> None:
    with torch.inference_mode():
        report = patch_pipeline(pipe)
    assert not any(weight.is_inference() for weight in pipe.unet.parameters())
    with torch.inference_mode():
        report.restore()
    assert not any(weight.is_inference() for weight in pipe.unet.parameters())


def test_a_processor_that_somebody_kept_is_stock_after_restore(pipe: StableVideoDiffusionPipeline) -> None:
    """diffusers keeps them itself: unfuse_qkv_projections() puts back those of before."""
    before = clip(pipe)
    report = patch_pipeline(pipe)
    clip(pipe)
    kept = pipe.unet.attn_processors
    pipe.unet.set_default_attn_processor()
    report.restore()
    pipe.unet.set_attn_processor(kept)
    assert not any(hasattr(processor, SITES) for processor in pipe.unet.attn_processors.values())
    assert np.array_equal(clip(pipe), before)


def test_with_all_sites_off_the_bits_are_the_stock_ones(pipe: StableVideoDiffusionPipeline) -> None:
    """Also those of weights in another order, which no call of a block asks for."""
    before, found = clip(pipe), traces(pipe)
    with patch_pipeline(pipe) as report:
        after = clip(pipe)
        for _ in range(2):
            for site in report.sites:
                site.on = False
            assert np.array_equal(clip(pipe), before)
            for site in report.sites:
                site.on = True
            assert np.array_equal(clip(pipe), after)
        report.sites[0].on = False
    assert traces(pipe) == found


def hook_on(module: Any) -> Callable[[], None]:
    """Keeps the bound forward, as accelerate does; returns what takes the hook off."""
    module._old_forward = module.forward
    module.forward = lambda *args, **kwargs: module._old_forward(*args, **kwargs)

    def off() -> None:
        module.forward = module._old_forward
        del module._old_forward

    return off


def blocks_of(pipe: StableVideoDiffusionPipeline) -> list[Any]:
    unet = pipe.unet
    return [
        unet.mid_block.resnets[0].spatial_res_block,
        unet.down_blocks[0].attentions[0].transformer_blocks[0],
        unet.up_blocks[0],
        unet.conv_norm_out,
    ]


@pytest.mark.parametrize(
    "order", ["on patch restore off", "on patch off restore", "patch on restore off", "patch on off restore"]
)
def test_restore_under_hooks_that_keep_the_bound_forward(pipe: StableVideoDiffusionPipeline, order: str) -> None:
    before, classes = clip(pipe), [type(block) for block in blocks_of(pipe)]
    undo: list[Callable[[], None]] = []
    for step in order.split():
        if step == "on":
            undo = [hook_on(block) for block in blocks_of(pipe)]
        elif step == "off":
            for off in undo:
                off()
        elif step == "patch":
            report = patch_pipeline(pipe)
        else:
            report.restore()
        assert relative_error(clip(pipe), before) <= 1e-5, step
    assert np.array_equal(clip(pipe), before)
    assert [type(block) for block in blocks_of(pipe)] == classes


@pytest.mark.parametrize("order", ["on off patch", "patch on off"])
def test_blocks_are_fused_once_hooks_are_off_again(pipe: StableVideoDiffusionPipeline, order: str) -> None:
    """As by ``pipe.remove_all_hooks()``: a bound forward stays on every module that an offload hook was on."""
    before, undo = clip(pipe), []
    for step in order.split():
        if step == "on":
            undo = [hook_on(module) for module in pipe.vae.modules()]
        elif step == "off":
            for off in undo:
                off()
        else:
            report = patch_pipeline(pipe, only="vae")
    assert relative_error(clip(pipe), before) <= 1e-5
    assert {site.state for site in report.sites} == {"active"} and not report.fallbacks
    report.restore()
    assert np.array_equal(clip(pipe), before)


def test_restore_under_a_wrapper_of_a_forward(pipe: StableVideoDiffusionPipeline) -> None:
    """As DeepCache wraps blocks: it calls what it found, and puts it back some day."""
    before = clip(pipe)
    report = patch_pipeline(pipe)
    for block in blocks_of(pipe):
        found = block.forward
        block.forward = lambda *args, found=found, **kwargs: found(*args, **kwargs)
    assert relative_error(clip(pipe), before) <= 1e-5
    report.restore()
    assert np.array_equal(clip(pipe), before)
    for block in blocks_of(pipe):
        del block.forward
    assert np.array_equal(clip(pipe), before)


def test_a_module_that_was_replaced_stays(pipe: StableVideoDiffusionPipeline) -> None:
    report = patch_pipeline(pipe)
    pipe.unet.conv_norm_out = torch.nn.Identity()
    patched = clip(pipe)
    report.restore()
    assert type(pipe.unet.conv_norm_out) is torch.nn.Identity
    assert not any("_vidaccel" in key for module in pipe.unet.modules() for key in vars(module))
    assert relative_error(clip(pipe), patched) <= 1e-5


class DoublingProcessor(AttnProcessor2_0):
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 2 * super().__call__(*args, **kwargs)


class AdapterProcessor(torch.nn.Module):
    """With weights of its own, as ``load_ip_adapter`` puts one on every cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k_ip = torch.nn.Linear(32, 32)

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return AttnProcessor2_0()(attn, *args, **kwargs) + self.to_k_ip.bias.mean()


def stock_processors(unet: Any) -> None:
    unet.set_attn_processor(AttnProcessor2_0())


def default_processors(unet: Any) -> None:
    unet.set_default_attn_processor()


def doubling_processors(unet: Any) -> None:
    unet.set_attn_processor(DoublingProcessor())


def adapter_processors(unet: Any) -> None:
    torch.manual_seed(0)
    there = unet.attn_processors
    unet.set_attn_processor({path: AdapterProcessor() if "attn2" in path else there[path] for path in there})


@pytest.mark.parametrize(
    ("replace", "name", "served_again"),
    [
        (stock_processors, "AttnProcessor2_0", True),
        (default_processors, "AttnProcessor", False),
        (doubling_processors, "DoublingProcessor", False),
        (adapter_processors, "AdapterProcessor", False),
    ],
)
def test_replaced_processors(
    pipe: StableVideoDiffusionPipeline, replace: Callable[[Any], None], name: str, served_again: bool
) -> None:
    stock = tiny_svd_pipeline()
    replace(stock.unet)
    expected = clip(stock)
    report = patch_pipeline(pipe)
    clip(pipe)
    replace(pipe.unet)
    assert relative_error(clip(pipe), expected) <= 1e-5
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    site = next(site for site in report.sites if (site.path, site.op) == (path, "spatial_attention"))
    assert f"left alone: its processor is a {name} now" in str(report)
    assert (site.state, site.reason) == ("left alone", f"its processor is a {name} now")
    again = patch_pipeline(pipe)
    site = next(site for site in again.sites if (site.path, site.op) == (path, "spatial_attention"))
    assert site.state == ("active" if served_again else "left alone")
    assert relative_error(clip(pipe), expected) <= 1e-5
    again.restore(), report.restore()
    assert np.array_equal(clip(pipe), expected)
    assert type(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor).__name__ == name


def test_an_adapter_that_is_off_is_named(pipe: StableVideoDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vidaccel.pipelines.stable_video_diffusion", None)
    families._adapter.cache_clear()
    try:
        pipe.register_modules(vae=tiny_autoencoder_kl())
        with patch_pipeline(pipe) as report:
            (left,) = (site for site in report.sites if site.state == "left alone")
            assert left.path == "unet" and "UNetSpatioTemporalConditionModel" in left.reason
            assert "cannot be patched with the installed diffusers" in str(report)
            assert any(site.state == "active" and site.path.startswith("vae.") for site in report.sites)
        with pytest.raises(UsageError, match=r"strict: 1 sites cannot be patched, first unet: "):
            patch_pipeline(pipe, strict=True)
    finally:
        families._adapter.cache_clear()


def test_bit_exact_leaves_the_rest_alone(pipe: StableVideoDiffusionPipeline) -> None:
    before = clip(pipe)
    with patch_pipeline(pipe, allow="bit-exact") as report:
        assert np.array_equal(clip(pipe), before)
        states = {(site.fidelity, site.state, site.reason) for site in report.sites}
    assert states == {
        ("bit-exact", "active", ""),
        ("math-exact", "left alone", "it is math-exact, and allow='bit-exact'"),
    }


def test_a_second_patch_may_allow_more(pipe: StableVideoDiffusionPipeline) -> None:
    before = clip(pipe)
    patch_pipeline(pipe, allow="bit-exact")
    with patch_pipeline(pipe) as report:
        assert np.allclose(clip(pipe), before, atol=1e-3)
        assert not report.fallbacks
        assert {site.fidelity for site in report.sites if site.implementations} == {"bit-exact", "math-exact"}
    assert np.array_equal(clip(pipe), before)


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ({"only": "spacial_attention"}, {}, "only='spacial_attention' names no site; did you mean spatial_attention"),
        ({"skip": ["vea"]}, {}, "skip='vea' names no site; did you mean vae"),
        ({"only": 3}, {}, "only must be a name or several names, got 3"),
        ({"skip": ["vae", None]}, {}, "skip must be a name or several names, got ['vae', None]"),
        ({"allow": "bitexact"}, {}, "allow='bitexact' is no fidelity class; did you mean bit-exact"),
        ({"allow": 3}, {}, "allow=3 is no fidelity class; there are bit-exact, lossy, math-exact"),
        ({}, {"VIDACCEL_IMP": "torch"}, "VIDACCEL_IMP is no setting of vidaccel; did you mean VIDACCEL_IMPL"),
        ({}, {"VIDACCEL_IMPL": "geglu=tritn"}, "geglu has no implementation 'tritn'; did you mean triton"),
        ({}, {"VIDACCEL_IMPL": "gelu=torch"}, "there is no op 'gelu'; did you mean geglu"),
        ({}, {"VIDACCEL_TUNE": "offf"}, "VIDACCEL_TUNE='offf' is neither on nor off; did you mean off"),
        ({}, {"VIDACCEL_SELF_CHECK": "never"}, "VIDACCEL_SELF_CHECK='never' is neither on nor off"),
    ],
)
def test_a_wrong_word_is_told_with_the_nearest(
    pipe: StableVideoDiffusionPipeline,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    variables: dict[str, str],
    message: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = traces(pipe)
    with pytest.raises(UsageError, match=re.escape(message)):
        patch_pipeline(pipe, **arguments)
    assert traces(pipe) == before


def test_pytorchs_newer_precision_settings(pipe: StableVideoDiffusionPipeline) -> None:
    """Once they are used, PyTorch refuses to be asked through the older ones."""
    conv = torch.backends.cudnn.conv
    was, before = conv.fp32_precision, clip(pipe)
    try:
        with patch_pipeline(pipe) as report:
            clip(pipe)
            conv.fp32_precision = "ieee"
            assert relative_error(clip(pipe), before) <= 1e-5
            assert not report.fallbacks
    finally:
        conv.fp32_precision = was


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[object]]:
    """What is run for the clock, which here too measures spatial attention."""
    monkeypatch.delenv("VIDACCEL_IMPL")
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(SPATIAL_ATTENTION, "_measures", lambda *args: True)
    outputs: list[object] = []
    monkeypatch.setattr(choice, "gpu_milliseconds", lambda run: outputs.append(run()) or 1.0)
    SPATIAL_ATTENTION.forget()
    yield outputs
    choice.drop()
    SPATIAL_ATTENTION.forget()


@pytest.mark.parametrize("tune", ["on", "off"])
def test_tuning_can_be_turned_off(
    pipe: StableVideoDiffusionPipeline,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    measured: list[object],
    tune: str,
) -> None:
    monkeypatch.setenv("VIDACCEL_TUNE", tune)
    before = clip(pipe)
    with patch_pipeline(pipe, only="spatial_attention"):
        assert relative_error(clip(pipe), before) <= 1e-5
    assert bool(measured) == bool(list(tmp_path.rglob("*.json"))) == (tune == "on")


def test_a_pipeline_that_is_no_longer_used_goes() -> None:
    pipe = tiny_svd_pipeline()
    patch_pipeline(pipe)
    clip(pipe)
    gone = [weakref.ref(module) for model in (pipe.unet, pipe.vae) for module in model.modules()]
    del pipe
    gc.collect()
    assert not [ref() for ref in gone if ref() is not None]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"only": "vae"}, lambda s: s.path.startswith("vae.") or s.path == "vae"),
        ({"only": ["unet.down_blocks.*:group_norm_silu"]}, lambda s: s.path.startswith("unet.down_blocks.")),
        ({"skip": ["vae", "channels_last"]}, lambda s: s.path.startswith("unet") and s.op != "channels_last"),
        ({"only": "unet.mid_block", "skip": "alpha_blend"}, lambda s: s.path.startswith("unet.mid_block.")),
    ],
    ids=["component", "pattern-and-op", "skip", "both"],
)
def test_choice_of_sites(
    pipe: StableVideoDiffusionPipeline, choice: dict[str, str], expected: Callable[..., bool]
) -> None:
    report = patch_pipeline(pipe, **choice)
    assert report.sites and all(expected(site) for site in report.sites)


def test_unknown_site_lists_those_that_exist(pipe: StableVideoDiffusionPipeline) -> None:
    with pytest.raises(UsageError, match=r"only='unet.nowhere' names no site; did you mean .*unet"):
        patch_pipeline(pipe, only="unet.nowhere")


def test_unsupported_pipeline_names_the_supported() -> None:
    unet = UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    with pytest.raises(UsageError, match=r"DDPMPipeline has no part.*families.*stable_video_diffusion"):
        patch_pipeline(DDPMPipeline(unet, DDPMScheduler()))
    with pytest.raises(UsageError, match=r"Linear is not a model"):
        patch_module(torch.nn.Linear(1, 1))
    with pytest.raises(UsageError, match=r"takes a diffusers pipeline, got int"):
        patch_pipeline(3)


def test_patch_module_takes_a_bare_denoiser(pipe: StableVideoDiffusionPipeline) -> None:
    with patch_module(pipe.unet, only="mid_block") as report:
        assert {site.path.partition(".")[0] for site in report.sites} == {"mid_block"}


def test_what_has_its_own_processor_or_hook_is_left_alone(pipe: StableVideoDiffusionPipeline) -> None:
    pipe.unet.mid_block.attentions[0].temporal_transformer_blocks[0].attn1.set_processor(AttnProcessor())
    resnet = pipe.unet.mid_block.resnets[0].spatial_res_block
    hook_on(resnet)
    report = patch_pipeline(pipe)
    left = {(s.path, s.op): s.reason for s in report.sites if s.state == "left alone"}
    block = "unet.mid_block.attentions.0.temporal_transformer_blocks.0"
    assert "processor of its own, AttnProcessor" in left[block, "temporal_attention"]
    assert "hook" in left["unet.mid_block.resnets.0.spatial_res_block", "group_norm_silu"]
    assert "left alone: it has a processor of its own" in str(report)
    report.restore()
    with pytest.raises(UsageError, match=r"strict: .* sites cannot be patched"):
        patch_pipeline(pipe, strict=True)
    assert not any(hasattr(module, "_vidaccel") for module in pipe.unet.modules())


def test_forward_hooks_on_a_bypassed_child_still_run(pipe: StableVideoDiffusionPipeline) -> None:
    seen = []
    pipe.unet.mid_block.resnets[0].spatial_res_block.norm1.register_forward_hook(lambda *_: seen.append(1))
    report = patch_pipeline(pipe, only="unet.mid_block", self_check=False)
    clip(pipe)
    assert len(seen) == 2, "once for each denoising step"
    assert any("forward hooks" in reason for _, _, reason in report.fallbacks)


def plant(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]) -> None:
    """Let ``group_norm_silu`` prefer another implementation."""
    monkeypatch.setenv("VIDACCEL_IMPL", "group_norm_silu=planted,torch")
    monkeypatch.setitem(GROUP_NORM_SILU.implementations, "planted", Implementation(run))
    GROUP_NORM_SILU.forget()


def one_percent_more(*args: Any) -> torch.Tensor:
    return 1.01 * GROUP_NORM_SILU.reference(*args)


def test_a_wrong_kernel_is_found_out_and_replaced(
    pipe: StableVideoDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = clip(pipe)
    plant(monkeypatch, one_percent_more)
    report = patch_pipeline(pipe, only="group_norm_silu")
    with caplog.at_level(logging.WARNING, "vidaccel"):
        assert relative_error(clip(pipe), before) <= 1e-5
    failed = [site for site in report.sites if site.state == "failed"]
    assert len(failed) > 20
    assert "failed: " in str(report) and "is off by" in str(report)
    assert len(caplog.records) == len(failed), "one warning for each site"
    assert np.array_equal(clip(pipe), before), "the original code runs from then on"


def test_self_check_can_be_turned_off(pipe: StableVideoDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, one_percent_more)
    report = patch_pipeline(pipe, only="group_norm_silu", self_check=False)
    clip(pipe)
    assert {site.state for site in report.sites} == {"active"}


def test_a_check_that_runs_out_of_memory_does_not_end_the_clip(
    pipe: StableVideoDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = clip(pipe)

    def out_of_memory(*args: object) -> None:
        raise torch.OutOfMemoryError

    report = patch_pipeline(pipe, only="unet.conv_norm_out")
    monkeypatch.setattr(type(pipe.unet.conv_norm_out), "original_forward", out_of_memory)
    with caplog.at_level(logging.WARNING, "vidaccel"):
        assert relative_error(clip(pipe), before) <= 1e-5
    assert "unet.conv_norm_out: not checked against the original block: out of memory" in caplog.messages
    assert {site.state for site in report.sites} == {"active"} and not report.fallbacks


def test_a_kernel_that_raises_falls_back_and_is_counted(
    pipe: StableVideoDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = clip(pipe)

    def out_of_shared_memory(*args: object) -> None:
        raise RuntimeError("out of resource: shared memory")

    plant(monkeypatch, out_of_shared_memory)
    report = patch_pipeline(pipe, only="group_norm_silu")
    assert relative_error(clip(pipe), before) <= 1e-5
    reasons = {reason for _, _, reason in report.fallbacks}
    assert reasons == {"planted: RuntimeError: out of resource: shared memory"}
    assert "fell back in" in str(report)


def test_gradients_go_through_the_original(pipe: StableVideoDiffusionPipeline) -> None:
    inputs = {
        "sample": torch.randn(1, 3, 8, 16, 16),
        "timestep": torch.tensor(1.0),
        "encoder_hidden_states": torch.randn(1, 1, 32),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
    }
    expected = pipe.unet(**inputs).sample
    report = patch_pipeline(pipe, only="unet", skip="channels_last")
    out = pipe.unet(**inputs).sample
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all("gradients" in reason for _, _, reason in report.fallbacks) and report.fallbacks


def test_patched_pipeline_copies_saves_and_loads(pipe: StableVideoDiffusionPipeline, tmp_path: object) -> None:
    keys = set(pipe.unet.state_dict())
    patch_pipeline(pipe)
    patched = clip(pipe)
    twin = copy.deepcopy(pipe)
    assert type(twin.unet.mid_block.resnets[0]) is SpatioTemporalResBlock, "a copy is a stock model"
    assert np.abs(clip(twin) - patched).max() < 1e-4
    assert set(pipe.unet.state_dict()) == keys
    pipe.save_pretrained(str(tmp_path))
    loaded = StableVideoDiffusionPipeline.from_pretrained(str(tmp_path))
    loaded.set_progress_bar_config(disable=True)
    restored = twin.unet.state_dict()
    assert all(torch.equal(weight, restored[name]) for name, weight in loaded.unet.state_dict().items())
    # not the same bits: weights read from a file lie at other addresses, and CPU kernels go by their alignment
    assert np.abs(clip(loaded) - clip(twin)).max() < 1e-4


@pytest.mark.slow
def test_patched_denoiser_compiles_in_one_graph() -> None:
    """Of one level, whose attention is in the middle: the kinds of blocks are compiled one by one elsewhere."""
    one_level = {"down_block_types": ("DownBlockSpatioTemporal",), "up_block_types": ("UpBlockSpatioTemporal",)}
    unet = tiny_svd_unet(block_out_channels=(64,), num_attention_heads=2, **one_level)
    inputs = (torch.randn(2, 3, 8, 4, 4), torch.tensor(1.0), torch.randn(2, 1, 32), torch.ones(2, 3))
    patch_module(unet)
    with torch.no_grad():
        expected = unet(*inputs).sample
        compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs).sample, expected, rtol=1e-4, atol=1e-5)


def test_summary_is_json(pipe: StableVideoDiffusionPipeline) -> None:
    report = patch_pipeline(pipe)
    clip(pipe)
    summary = json.loads(json.dumps(report.summary()))
    assert summary["active"] == len(report.sites)
    assert summary["ops"]["group_norm_silu"]["implementations"] == ["torch"]


def test_block_signatures_are_the_originals() -> None:
    """Cache hooks look parameters up by name, gradient checkpointing passes them by position."""
    import inspect

    folder = pkgutil.iter_modules(vidaccel.pipelines.__path__)
    for adapter in [importlib.import_module(f"vidaccel.pipelines.{adapter.name}") for adapter in folder]:
        for rule in {rule for rules in getattr(adapter, "RULES", {}).values() for rule in rules}:
            if fused := getattr(rule, "fused", None):
                ours, theirs = (inspect.signature(cls.forward).parameters for cls in (fused, fused.original))
                assert list(ours) == list(theirs), fused
                assert fused.__name__ == fused.original.__name__
                # users find attentions by it
                assert hasattr(fused, "processor") == hasattr(fused.original, "processor"), fused


def test_importing_vidaccel_is_cheap() -> None:
    code = "import sys, vidaccel; sys.exit(any(name in sys.modules for name in ('torch', 'triton', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
