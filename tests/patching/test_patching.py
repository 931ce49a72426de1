"""Patch, report, restore: on a whole tiny pipeline, as a user would."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import pkgutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, StableVideoDiffusionPipeline, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import SpatioTemporalResBlock
from PIL import Image
from tiny_models import tiny_svd_pipeline

import vidaccel.pipelines
from vidaccel import patch_module, patch_pipeline
from vidaccel.blocks.unet import normalization
from vidaccel.errors import UsageError

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch implementations: this is about patching, and interpreted kernels are slow."""
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")


@pytest.fixture
def pipe() -> StableVideoDiffusionPipeline:
    return tiny_svd_pipeline()


def clip(pipe: StableVideoDiffusionPipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    out = pipe(IMAGE, height=32, width=32, num_frames=3, num_inference_steps=2, generator=generator, output_type="np")
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
    with pytest.raises(UsageError, match=r"DDPMPipeline has no part.*StableVideoDiffusionPipeline"):
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
    resnet.forward = resnet.forward
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


def test_a_wrong_kernel_is_found_out_and_replaced(
    pipe: StableVideoDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = clip(pipe)
    right = normalization.group_norm_silu
    monkeypatch.setattr(normalization, "group_norm_silu", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    report = patch_pipeline(pipe, only="group_norm_silu")
    with caplog.at_level(logging.WARNING, "vidaccel"):
        assert np.array_equal(clip(pipe), before)
    failed = [site for site in report.sites if site.state == "failed"]
    assert len(failed) > 20 and not any(site.implementations for site in report.sites)
    assert "differs from the original" in str(report)
    assert len(caplog.records) == len(failed), "one warning for each site"


def test_self_check_can_be_turned_off(pipe: StableVideoDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    right = normalization.group_norm_silu
    monkeypatch.setattr(normalization, "group_norm_silu", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
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

    def out_of_shared_memory(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(normalization, "group_norm_silu", out_of_shared_memory)
    report = patch_pipeline(pipe, only="group_norm_silu")
    assert np.array_equal(clip(pipe), before)
    reasons = {reason for _, _, reason in report.fallbacks}
    assert reasons == {"RuntimeError: out of resource: shared memory"}
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


def test_patched_denoiser_compiles_in_one_graph(pipe: StableVideoDiffusionPipeline) -> None:
    inputs = (torch.randn(2, 3, 8, 16, 16), torch.tensor(1.0), torch.randn(2, 1, 32), torch.ones(2, 3))
    patch_pipeline(pipe)
    with torch.no_grad():
        expected = pipe.unet(*inputs).sample
        compiled = torch.compile(pipe.unet, fullgraph=True, backend="aot_eager")
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


def test_importing_vidaccel_is_cheap() -> None:
    code = "import sys, vidaccel; sys.exit(any(name in sys.modules for name in ('torch', 'triton', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
