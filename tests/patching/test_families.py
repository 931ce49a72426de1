"""Which models and pipelines are served, through which wrappers, and what is said of the others."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, SanaWMPipeline, UNet2DModel
from tiny_models import tiny_autoencoder_kl_wan, tiny_svd_pipeline
from torch import nn

import vidaccel.pipelines
from vidaccel import patch_module, patch_pipeline
from vidaccel.errors import UsageError
from vidaccel.patching.families import (
    UNSERVED,
    off_reason,
    reason_unserved,
    rules_for,
    served_models,
    served_pipelines,
    unserved_pipeline,
    unwrapped,
)


@pytest.fixture
def unet() -> Any:
    return tiny_svd_pipeline().unet


def test_the_table_says_what_the_adapters_hold() -> None:
    folder = pkgutil.iter_modules(vidaccel.pipelines.__path__)
    adapters = [importlib.import_module(f"vidaccel.pipelines.{adapter.name}") for adapter in folder]
    assert sorted(model for adapter in adapters for model in getattr(adapter, "RULES", ())) == list(served_models())


def test_what_is_served_is_there() -> None:
    assert all(hasattr(diffusers, name) for name in served_pipelines())
    # no top-level name; holds several ControlNets
    assert all(hasattr(diffusers, name) for name in {*served_models()} - {"MultiControlNetModel"})


def as_is(model: nn.Module) -> nn.Module:
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def with_lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["to_q"]))


def subclassed(model: nn.Module) -> nn.Module:
    model.__class__ = type("MyUNet", (type(model),), {})
    return model


def everything(model: nn.Module) -> nn.Module:
    return compiled(with_lora(subclassed(model)))


@pytest.mark.parametrize("wrap", [as_is, compiled, with_lora, subclassed, everything])
def test_a_model_is_found_through(wrap: Any, unet: Any) -> None:
    rules = rules_for(unet)
    wrapped = wrap(unet)
    assert unwrapped(wrapped) is unet
    assert rules and rules_for(wrapped) == rules
    with patch_module(wrapped) as report:
        assert any(site.path == "mid_block.resnets.0.spatial_res_block" for site in report.sites)


def test_a_pipeline_with_a_compiled_model_has_the_same_paths() -> None:
    pipe = tiny_svd_pipeline()
    with patch_pipeline(pipe) as report:
        paths = [site.path for site in report.sites]
    pipe.unet = compiled(pipe.unet)
    with patch_pipeline(pipe) as report:
        assert [site.path for site in report.sites] == paths


def sana_wm() -> Any:
    return SanaWMPipeline(None, None, None, None, DDPMScheduler())


def test_other_pipelines_are_named_with_the_served_ones_and_the_nearest() -> None:
    reason = reason_unserved(sana_wm())
    assert reason.startswith("SanaWMPipeline has no part that vidaccel can patch (it has no model): its atten")
    assert "supported families" in reason and "stable_video_diffusion" in reason
    assert "; did you mean AnimateDiffPipeline" in unserved_pipeline("AnimateDifPipeline", ["UNet"])


def video_pipelines() -> Iterator[str]:
    """Names of the pipelines that diffusers exports whose files speak of frames."""
    exported = set(dir(diffusers))
    for path in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        text = path.read_text()
        if re.search(r"frames=|\bframes:", text):
            names = re.findall(r"^class (\w+Pipeline)\(", text, re.MULTILINE)
            yield from (name for name in names if name in exported and not re.search("T2I|I2I", name))


def test_every_video_pipeline_is_served_or_explained() -> None:
    video = set(video_pipelines())
    assert len(video) > 60 and not set(served_pipelines()) & set(UNSERVED)
    assert video <= {*served_pipelines(), *UNSERVED}, video - {*served_pipelines(), *UNSERVED}
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    assert not [name for name in UNSERVED if name.removesuffix("Pipeline") not in readme]


def test_a_denoiser_that_nobody_serves_is_in_the_report() -> None:
    pipe = sana_wm()
    pipe.register_modules(transformer=nn.Linear(1, 1), vae=tiny_autoencoder_kl_wan())
    with patch_pipeline(pipe) as report:
        (site,) = [site for site in report.sites if site.path == "transformer"]
        assert site.state == "left alone" and site.reason == UNSERVED["SanaWMPipeline"]
        assert any(site.path.startswith("vae.") and site.state == "active" for site in report.sites)
    with pytest.raises(UsageError, match="strict"):
        patch_pipeline(pipe, strict=True)


def test_other_models_are_named(unet: Any) -> None:
    other = UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    assert not rules_for(other) and off_reason(other) is None
    assert reason_unserved(other).startswith("UNet2DModel is not a model that vidaccel can patch; supported models: ")
    assert "did you mean" in reason_unserved(other)
    assert "int" in reason_unserved(3)
    with pytest.raises(UsageError, match="patch_module takes it"):
        patch_pipeline(unet)


WITHOUT_A_CLASS = """
from diffusers.models.{module} import {name}
del sys.modules["diffusers.models.{module}"].{name}
from vidaccel.patching.families import off_reason, reason_unserved, rules_for

class {name}({name}): pass
gone = {name}.__new__({name})
def served(name):
    kind = getattr(diffusers, name)
    return bool(rules_for(kind.__new__(kind)))
others = [served(name) for name in {others}]
assert all(others), others
assert not rules_for(gone)
for reason in (off_reason(gone), reason_unserved(gone)):
    assert reason.startswith("{name}") and "ImportError: cannot import name {name!r}" in reason, reason
"""
WITH_ANOTHER_SIGNATURE = """
import types
from diffusers.models.transformers import transformer_wan
from vidaccel.patching.families import off_reason, reason_unserved, rules_for

def forward(self, hidden_states, something_new, *args): pass
# as if it were of that module: what somebody else puts there is no other diffusers
transformer_wan.WanTransformerBlock.forward = types.FunctionType(forward.__code__, vars(transformer_wan))
def made(name):
    kind = getattr(diffusers, name)
    return kind.__new__(kind)
assert not rules_for(made("WanTransformer3DModel"))
reason = off_reason(made("WanTransformer3DModel"))
assert "WanTransformerBlock.forward takes (self, hidden_states, something_new, args), expected (self, hidd" in reason
others = ["AutoencoderKLWan", "LTXVideoTransformer3DModel", "UNetMotionModel"]
assert all(rules_for(made(name)) for name in others)
"""
ONE_MODEL = """
from vidaccel.patching.families import rules_for, served_pipelines
served_pipelines()
assert not any(name.startswith("vidaccel.pipelines.") for name in sys.modules)
rules_for(diffusers.AutoencoderKL.__new__(diffusers.AutoencoderKL))
names = [name for name in sys.modules if name.startswith("vidaccel.pipelines.")]
assert names == ["vidaccel.pipelines.autoencoder_kl"], names
"""
# diffusers takes seconds to import: once, and then every script gets a process of its own
IN_PROCESSES_OF_THEIR_OWN = """
import os, sys, traceback
import diffusers
from diffusers import AutoencoderKL, I2VGenXLUNet, UNet3DConditionModel, UNetMotionModel
for script in {scripts}:
    if not os.fork():
        try:
            exec(script, {{"__name__": "script", "sys": sys, "diffusers": diffusers}})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.wait()[1] == 0, script
"""


@pytest.mark.slow
def test_every_family_is_imported_by_itself_and_breaks_by_itself() -> None:
    """When one of its models is met, and when another diffusers has removed a class."""
    without = [
        ("unets.unet_motion_model", "UNetMotionModel", ["UNetSpatioTemporalConditionModel", "AutoencoderKL"]),
        ("unets.unet_i2vgen_xl", "I2VGenXLUNet", ["UNet3DConditionModel", "UNetMotionModel"]),
        ("unets.unet_3d_condition", "UNet3DConditionModel", ["I2VGenXLUNet", "UNetMotionModel"]),
    ]
    scripts = [WITHOUT_A_CLASS.format(module=module, name=name, others=others) for module, name, others in without]
    code = IN_PROCESSES_OF_THEIR_OWN.format(scripts=[ONE_MODEL, WITH_ANOTHER_SIGNATURE, *scripts])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
