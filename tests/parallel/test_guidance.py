"""Guidance on two ranks: the same clip as one process makes, half of the work each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from ranks import Team
from tiny_models import tiny_animatediff_pipeline, tiny_relative, tiny_svd_unet, tiny_synthetic_pipeline
from torch import nn
from transformer_checks import tiny_transformer

from vidaccel import patch_pipeline
from vidaccel.parallel.guidance import CHANGED, UNEXPECTED, UNPAIRED, Guidance
from vidaccel.parallel.ranks import axes_of
from vidaccel.patching.parallel import is_guided

pytestmark = pytest.mark.slow

BATCHED = ["svd", "animatediff", "i2vgen-xl", "modelscope", "cogvideox-5b", "ltx-video-2b", "mochi-1"]
ONE_AFTER_THE_OTHER = ["wan2.1-t2v-1.3b", "hunyuanvideo1.5-480p", "kandinsky_6", "motif_video"]
STEPS = 3


@contextmanager
def counting(model: nn.Module) -> Iterator[Counter[str]]:
    """How many samples, and calls, ``model`` itself runs."""
    count: Counter[str] = Counter()
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        count["calls"] += 1
        count["samples"] += len(out[0])
        return out

    model.forward = counted
    try:
        yield count
    finally:
        del model.forward


def clip(pipe: Any, call: dict[str, Any]) -> np.ndarray[Any, Any]:
    torch.manual_seed(0)  # I2VGenXL's VAE draws from the default generator
    out = pipe(**call, generator=torch.Generator().manual_seed(3), output_type="latent")
    return out.frames.float().numpy()


def made(name: str) -> tiny_pipelines.Made:
    make = getattr(tiny_pipelines, name, None)
    return make() if make else tiny_synthetic_pipeline(name)


def two_clips(name: str) -> dict[str, Any]:
    pipe, call = made(name)
    call |= {"num_inference_steps": STEPS}
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    denoiser = getattr(pipe, part)
    with patch_pipeline(pipe, only=part), counting(denoiser) as alone:
        expected = clip(pipe, call)
    report = patch_pipeline(pipe, only=part, parallel="guidance")
    with counting(denoiser) as shared:
        found = clip(pipe, call)
    site = next(site for site in report.sites if site.op == "guidance")
    outcome = {
        "error": float(np.abs(found - expected).max() / np.abs(expected).max()),
        "alone": dict(alone),
        "shared": dict(shared),
        "site": (site.state, site.implementation, dict(site.fallbacks)),
        "sum": float(found.sum()),
    }
    report.restore()
    outcome["restored"] = bool((clip(pipe, call) == clip(made(name)[0], call)).all())
    return outcome


@pytest.mark.parametrize("name", [*BATCHED, *ONE_AFTER_THE_OTHER])
def test_the_clip_is_the_same_for_half_of_the_work(two_ranks: Team, name: str) -> None:
    first, second = two_ranks.run(two_clips, name)
    assert first == second, "both ranks have the same clip, and say the same"
    assert first["error"] < 1e-4 and first["restored"]
    assert first["site"] == ("active", "2 ranks", {})
    whole = first["alone"]["samples"]
    # of the first step, each rank runs both calls: it is not known yet that there will be a second one
    assert first["shared"]["samples"] == (whole // 2 if name in BATCHED else whole // 2 + 1)


def halves_apart() -> tuple[bool, bool]:
    """Whether a call has the bits of its halves, run one by one; and a clip with another text those of one process."""
    unet = tiny_svd_unet()
    pipe = SimpleNamespace(components={"unet": unet}, unet=unet)
    generator = torch.Generator().manual_seed(1)
    sample, text, ids = (torch.randn(2, *shape, generator=generator) for shape in ((3, 8, 4, 4), (1, 32), (3,)))
    with torch.no_grad():
        with patch_pipeline(pipe):
            apart = [unet(sample[i : i + 1], 0.5, text[i : i + 1], ids[i : i + 1]).sample for i in range(2)]
        with patch_pipeline(pipe, parallel="guidance"):
            found = unet(sample, 0.5, encoder_hidden_states=text, added_time_ids=ids).sample
    return found.equal(torch.cat(apart)), len(found) == 2


def test_halves_have_the_bits_of_halves_run_apart(two_ranks: Team) -> None:
    assert two_ranks.run(halves_apart) == [(True, True)] * 2


class TakesTheFirst(nn.Module):
    """A processor that gives every sample the first one's output, as those do that edit one picture like another."""

    def forward(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = AttnProcessor2_0()(attn, hidden_states, *args, **kwargs)
        return out[:1].expand_as(out)


def with_processor(of_whom: str, scale: float) -> tuple[float, set[str]]:
    """Two clips of AnimateDiff whose attentions look at all samples: how far they are off, and what is counted."""
    pipe = tiny_animatediff_pipeline(diffusers.AnimateDiffPAGPipeline, pag_applied_layers="mid_block.*attn1")
    if of_whom == "own":
        attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
        del attention.processor  # a module cannot stand where an object stood
        attention.processor = TakesTheFirst()
    texts = (torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    call = {"num_inference_steps": STEPS, "num_frames": 3, "height": 16, "width": 16, "guidance_scale": scale}
    call |= dict(zip(("prompt_embeds", "negative_prompt_embeds"), texts, strict=True))
    call |= {"pag_scale": 2.0 if of_whom == "PAG" else 0.0}
    with patch_pipeline(pipe, only="unet"):
        expected = clip(pipe, call)
    with patch_pipeline(pipe, only="unet", parallel="guidance") as report:
        found = clip(pipe, call)
    site = next(site for site in report.sites if site.op == "guidance")
    return float(np.abs(found - expected).max() / np.abs(expected).max()), set(site.fallbacks)


@pytest.mark.parametrize(
    ("of_whom", "scale", "kind"),
    [
        ("PAG", 7.5, "PAGCFGIdentitySelfAttnProcessor2_0"),
        ("PAG", 1.0, "PAGIdentitySelfAttnProcessor2_0"),
        ("own", 7.5, "TakesTheFirst"),
    ],
)
def test_a_processor_that_may_look_at_both_halves_does(two_ranks: Team, of_whom: str, scale: float, kind: str) -> None:
    for error, reasons in two_ranks.run(with_processor, of_whom, scale):
        assert error < 1e-5 and reasons == {f"a {kind} may look at both halves of guidance"}


class Positions(nn.Module):
    """Has arguments that are for all samples, and one that nobody knows."""

    def forward(self, x: torch.Tensor, indices_frames: torch.Tensor, strange: Any = None) -> torch.Tensor:
        out = x * indices_frames.sum()
        return out if strange is None else out + strange.sum()


def with_positions() -> tuple[bool, bool, dict[str, int]]:
    model, reasons = Positions(), Counter[str]()
    guidance = Guidance(axes_of([2])[0], lambda reason: reasons.update([reason]))
    x = torch.arange(2.0)[:, None]
    with torch.no_grad():
        two, four = (guidance.call(model, model, (x, torch.arange(float(n))), {}) for n in (2, 4))
        whole = guidance.call(model, model, (x, torch.ones(2), torch.arange(4.0)), {})
    right = two.equal(model(x, torch.arange(2.0))) and four.equal(model(x, torch.arange(4.0)))
    return right, whole.equal(model(x, torch.ones(2), torch.arange(4.0))), dict(reasons)


def test_what_is_for_all_samples_is_not_cut(two_ranks: Team) -> None:
    reasons = {"strange has 4 rows, where the batch has 2": 1}
    assert two_ranks.run(with_positions) == [(True, True, reasons)] * 2


class Sum(nn.Module):
    """Stands for a denoiser: what it was called with, in one number."""

    def forward(self, x: torch.Tensor, text: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return (x + text) * scale


def calls_in_turn() -> tuple[list[float], list[int], dict[str, int]]:
    """Two clips with two texts each, calls that are no pair, and a text that is written to between two steps."""
    model, ran, reasons = Sum(), [], Counter[str]()
    guidance = Guidance(axes_of([2])[0], lambda reason: reasons.update([reason]))

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        ran[-1] += 1
        return model(*args, **kwargs)

    def call(x: torch.Tensor, text: torch.Tensor, **more: Any) -> float:
        ran.append(0)
        out = guidance.call(run, model, (x, text), more)
        assert out.equal(model(x, text, **more)), "every rank has the result of every call"
        return float(out)

    def numbers(value: float) -> torch.Tensor:
        return torch.full((1, 1), value)

    results = []
    with torch.no_grad():
        for first, second in ((10.0, 20.0), (30.0, 40.0)):
            texts = numbers(first), numbers(second)
            for step in range(3):
                x = numbers(step)
                results += [call(x, text) for text in texts]
        texts[1].add_(1)
        x = numbers(7.0)
        results += [call(x, text) for text in texts]
        x = numbers(8.0)
        results += [call(x, texts[0]), call(x, texts[0], scale=2.0)]  # not the second text
        x = numbers(9.0)
        results += [call(numbers(9.0), text) for text in texts]  # equal numbers, but another tensor
    return results, ran, dict(reasons)


def test_only_the_second_call_of_a_pair_is_foretold(two_ranks: Team) -> None:
    (results, ran, reasons), other = two_ranks.run(calls_in_turn)
    assert other == (results, ran, reasons)
    clip = [1, 1, 1, 0, 1, 0]  # of the first step both calls are run by both; then one each
    assert ran[:12] == clip * 2 and ran[12:14] == [1, 1], "a text that was written to is no text of the step before"
    assert reasons == {UNEXPECTED: 3}  # another scale, the call behind that, and another tensor


def with_an_adapter_for_the_first() -> tuple[list[float], dict[str, int]]:
    """How far off calls are whose second half goes without the LoRA of the first, and what is counted."""
    pipe, call = tiny_synthetic_pipeline("wan2.1-t2v-1.3b")
    model = pipe.transformer
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    texts = [call["prompt_embeds"], call["negative_prompt_embeds"]]

    def steps() -> list[torch.Tensor]:
        outs, generator = [], torch.Generator().manual_seed(1)
        for step in range(3):
            x, timestep = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.tensor([900.0 - step])
            for text, switch in zip(texts, (model.enable_adapters, model.disable_adapters), strict=True):
                switch()
                outs.append(model(hidden_states=x, timestep=timestep, encoder_hidden_states=text).sample)
        return outs

    with torch.no_grad():
        with patch_pipeline(pipe, only="transformer"):
            expected = steps()
        with patch_pipeline(pipe, only="transformer", parallel="guidance") as report:
            errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(steps(), expected, strict=True)]
    return errors, next(dict(site.fallbacks) for site in report.sites if site.op == "guidance")


def test_a_model_that_changes_between_the_halves_is_run_again(two_ranks: Team) -> None:
    for errors, reasons in two_ranks.run(with_an_adapter_for_the_first):
        assert len(errors) == 6 and max(errors) < 1e-5 and reasons[CHANGED] == 2


def chunk_by_chunk() -> tuple[float, set[str]]:
    """Two clips of AnyFlow FAR: its cache of keys and values, a pair of tensors, has two rows."""
    chunks = {"chunk_partition": [1, 2, 2]}
    model = tiny_transformer("AnyFlowFARTransformer3DModel", tiny_pipelines.ANYFLOW | chunks | {"full_chunk_limit": 2})
    pipe, call = tiny_relative(
        "wan2.1-t2v-1.3b",
        diffusers.AnyFlowFARPipeline,
        transformer=model,
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(),
    )
    call |= chunks | {"height": 64, "width": 64, "num_frames": 17, "guidance_scale": 3.0, "num_inference_steps": 2}
    with patch_pipeline(pipe, only="transformer"):
        expected = clip(pipe, call)
    with patch_pipeline(pipe, only="transformer", parallel="guidance") as report:
        found = clip(pipe, call)
    site = next(site for site in report.sites if site.op == "guidance")
    return float(np.abs(found - expected).max() / np.abs(expected).max()), set(site.fallbacks)


def test_a_cache_that_later_calls_read_is_filled_on_all_ranks(two_ranks: Team) -> None:
    for error, reasons in two_ranks.run(chunk_by_chunk):
        assert error < 1e-5 and reasons == {"kv_cache is to have what the call leaves to later ones"}


def calls_with_latents_of_their_own() -> dict[str, int]:
    """Three steps as Cosmos makes them of a picture: for each text the latents are joined anew."""
    reasons = Counter[str]()
    guidance = Guidance(axes_of([2])[0], lambda reason: reasons.update([reason]))
    model, texts = Sum(), torch.tensor([[[1.0]], [[2.0]]])
    with torch.no_grad():
        for step in range(3):
            for text in texts:
                guidance.call(model, model, (torch.full((1, 1), float(step)), text), {})
    return dict(reasons)


def test_calls_that_are_no_pairs_are_counted(two_ranks: Team) -> None:
    assert two_ranks.run(calls_with_latents_of_their_own) == [{UNPAIRED: 4}] * 2  # all but those of the first step


@pytest.mark.parametrize(
    ("pipeline_class", "guided"),
    [
        (diffusers.StableVideoDiffusionPipeline, True),
        (diffusers.AnimateDiffPipeline, True),
        (diffusers.WanPipeline, True),
        (diffusers.LTXPipeline, True),
    ],
)
def test_which_pipelines_are_guided(pipeline_class: type, guided: bool) -> None:
    assert is_guided(pipeline_class.__new__(pipeline_class)) is guided


@pytest.mark.parametrize("name", ["hunyuanvideo", "hunyuanvideo1.5-480p"])
def test_a_distilled_model_is_not_guided(name: str) -> None:
    assert is_guided(tiny_synthetic_pipeline(name)[0]) is (name != "hunyuanvideo")
