"""``vidaccel.compare`` on a tiny pipeline: right patches pass, faults fail and are blamed, nothing stays behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from planted_faults import FAULTS, Fault, planted
from tiny_models import tiny_svd_pipeline, tiny_synthetic_pipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vidaccel
from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.errors import UsageError
from vidaccel.fidelity.comparison import Baseline, Comparison, compare, unpatched

pytestmark = pytest.mark.usefixtures("plain_pytorch")

STEPS = 2
CALL: dict[str, Any] = {
    "image": Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)),
    "height": 16,
    "width": 16,
    "num_frames": 3,
    "num_inference_steps": STEPS,
}
Compare = Callable[..., Comparison]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_svd_pipeline()


@pytest.fixture(scope="module")
def baseline(pipe: Any) -> Iterator[Baseline]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VIDACCEL_IMPL", "torch")
        yield unpatched(pipe, quick=True, progress=False, **CALL)


@pytest.fixture
def compared(pipe: Any, baseline: Baseline) -> Compare:
    def run(patch: dict[str, Any] | None = None, **options: Any) -> Comparison:
        return compare(pipe, patch, baseline=baseline, progress=False, **options)

    return run


def blamed(comparison: Comparison) -> set[tuple[str, str]]:
    return {(site.path, site.op) for site in comparison.blame or () if site.ratio > 1}


def test_a_right_patch_passes_and_nothing_stays_behind(pipe: Any) -> None:
    classes = [type(module) for module in (*pipe.unet.modules(), *pipe.vae.modules())]
    attributes = [set(vars(module)) for module in (*pipe.unet.modules(), *pipe.vae.modules())]
    weights = {name: (x.clone(), x.stride()) for name, x in pipe.unet.state_dict().items()}
    decode = type(pipe.vae).decode
    comparison = vidaccel.compare(pipe, progress=False, **CALL)
    assert comparison.passed and comparison.verdict.reasons == () and not blamed(comparison)
    assert comparison.verdict.rule == "worst frame, steps and sites"
    assert {control.control for control in comparison.floor} >= {
        "other roundings",
        "math attention",
        "channels-last convolutions",
    }
    assert len(comparison.steps.patched) == STEPS and set(comparison.steps.controls) == {
        control.control for control in comparison.floor
    }
    assert comparison.latents is not None and 0 < comparison.latents.relative_error < 1e-4
    assert comparison.vae_psnr_db is not None and len(comparison.vae_psnr_db.frames) == 3
    assert comparison.reference.shape == comparison.patched.shape == (3, 16, 16, 3)
    assert comparison.reference.dtype == np.uint8 and comparison.blame
    assert [type(module) for module in (*pipe.unet.modules(), *pipe.vae.modules())] == classes
    assert [set(vars(module)) for module in (*pipe.unet.modules(), *pipe.vae.modules())] == attributes
    assert type(pipe.vae).decode is decode
    for name, (weight, stride) in weights.items():
        now = pipe.unet.state_dict()[name]
        assert torch.equal(now, weight) and now.stride() == stride


@pytest.mark.parametrize(
    ("patch", "around"),
    [
        pytest.param({}, nullcontext(), id="default"),
        pytest.param({"allow": "bit-exact"}, nullcontext(), id="bit-exact"),
        pytest.param({"only": "vae"}, nullcontext(), id="vae"),
        pytest.param({}, sdpa_kernel(SDPBackend.MATH), id="math-attention"),
    ],
)
def test_right_variants_pass(compared: Compare, patch: dict[str, Any], around: Any) -> None:
    with around:
        comparison = compared(patch)
    assert comparison.passed, comparison.verdict.reasons
    if patch.get("allow"):
        assert comparison.verdict.rule == "bit-identical" and math.isinf(comparison.clip.psnr_db.minimum)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_fails_and_is_blamed(pipe: Any, compared: Compare, fault: Fault) -> None:
    with planted(pipe, fault, steps=STEPS):
        comparison = compared({"self_check": False})
    assert not comparison.passed and comparison.verdict.reasons
    assert blamed(comparison) and all(fault.is_at(*site) for site in blamed(comparison))


@pytest.mark.parametrize("fault", [FAULTS[0], FAULTS[14]], ids=lambda fault: fault.name)
def test_a_fault_fails_also_where_the_check_at_first_sight_sends_the_site_back(
    pipe: Any, compared: Compare, fault: Fault
) -> None:
    with planted(pipe, fault, steps=STEPS):
        comparison = compared({"self_check": True})
    assert not comparison.passed and blamed(comparison) == {(fault.site, fault.ops[0])}
    if fault.first_call == 1:
        assert comparison.verdict.rule == "guard rail" and fault.site in comparison.verdict.reasons[0]


def test_two_faults_at_once_are_both_blamed(pipe: Any, compared: Compare) -> None:
    by_name = {fault.name: fault for fault in FAULTS}
    faults = by_name["SiLU twice"], by_name["two frames swapped"]
    with planted(pipe, *faults, steps=STEPS):
        comparison = compared({"self_check": False})
    assert blamed(comparison) == {(fault.site, fault.ops[0]) for fault in faults}
    worst = comparison.blame[0] if comparison.blame else None
    assert worst and worst.ratio == max(site.ratio for site in comparison.blame or ())
    left_out = compared({"skip": [site.skip for site in comparison.blame or () if site.ratio > 1]})
    assert left_out.passed


@pytest.mark.parametrize("spoilt", ["what it returns", "its argument"])
def test_a_fault_between_the_ops_is_blamed_on_its_block(spoilt: str, pipe: Any, compared: Compare) -> None:
    block = pipe.unet.mid_block.attentions[0]

    def wrong(x: Tensor, *args: Any) -> Any:
        out = type(block).fused_forward(block, x, *args)
        (out if spoilt == "what it returns" else x).mul_(1.1)
        return out

    block.fused_forward = wrong
    try:
        comparison = compared({"self_check": False})
    finally:
        del block.fused_forward
    assert not comparison.passed
    assert {path for path, _ in blamed(comparison)} == {"unet.mid_block.attentions.0"}


def test_hard_gates(compared: Compare) -> None:
    exact = compared(require_bit_exact=True, blame=False)
    assert not exact.passed and exact.verdict.rule == "bit-exact" and exact.blame is None
    floor = compared(min_psnr_db=500, blame=False)
    assert not floor.passed and "not the 500.0 dB asked for" in floor.verdict.reasons[0]
    assert compared(min_psnr_db=40, blame=False).passed


def test_a_patch_that_patches_nothing_fails(compared: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = compared({"skip": ["unet", "vae"]})
    assert not nothing.passed and nothing.guards[0].what == "nothing patched"
    monkeypatch.setattr(FusedGroupNorm, "call_reason", lambda self, input: "no time for norms today")
    fallen_back = compared({"only": "unet.conv_norm_out"})
    assert not fallen_back.passed and fallen_back.guards[0].what == "everything fell back"
    assert "no time for norms today" in fallen_back.verdict.reasons[0]


def test_a_nondeterministic_baseline_is_told(pipe: Any) -> None:
    noise = torch.Generator().manual_seed(0)

    def tremble(module: nn.Module, args: Any, output: Any) -> Tensor:
        return output * (1 + 1e-6 * torch.randn(output.shape, generator=noise))

    handle = pipe.unet.conv_in.register_forward_hook(tremble)
    try:
        comparison = compare(pipe, progress=False, controls=[], **CALL)
    finally:
        handle.remove()
    assert [guard.what for guard in comparison.guards] == ["nondeterministic baseline"]
    assert "forward hooks" in comparison.steps.left_out and comparison.steps.patched == ()


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "hunyuanvideo"])
def test_transformers_and_causal_decoders(name: str) -> None:
    """Calls for each half of the guidance, decoders that write into caches, texts whose padding is cut off."""
    pipe, call = tiny_synthetic_pipeline(name)
    comparison = compare(pipe, quick=True, progress=False, **call)
    assert comparison.passed, comparison.verdict.reasons
    assert comparison.steps.patched and comparison.decodes.patched
    assert {site.path.split(".")[0] for site in comparison.blame or ()} >= {"transformer"}


@pytest.mark.slow
def test_sites_of_a_compiled_model_are_looked_at() -> None:
    pipe, call = tiny_synthetic_pipeline("cogvideox-2b")
    pipe.transformer.compile(backend="eager")
    compiled = pipe.transformer._compiled_call_impl
    comparison = compare(pipe, quick=True, progress=False, controls=["math attention"], **call)
    assert comparison.passed, comparison.verdict.reasons
    assert any(site.path.startswith("transformer.") for site in comparison.blame or ())
    assert pipe.transformer._compiled_call_impl is compiled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"margin_db": "three"}, "margin_db must be a number of decibels", id="margin"),
        pytest.param({"margin_db": float("nan")}, "margin_db must be a number of decibels", id="nan"),
        pytest.param({"min_psnr_db": -1}, "min_psnr_db must be a number of decibels", id="floor"),
        pytest.param({"blame": "always"}, "blame must be", id="blame"),
        pytest.param({"controls": ["maths attention"]}, "did you mean math attention?", id="control"),
        pytest.param({"generator": None}, "compare sets generator itself: give seed=", id="generator"),
        pytest.param({"patch": {"skipp": "vae"}}, "unexpected keyword argument 'skipp'", id="patch"),
        pytest.param({"height": 8, "width": 8}, "at least 11x11 pixels", id="small"),
        pytest.param({"num_frame": 1}, "takes no num_frame; did you mean num_frames?", id="argument"),
    ],
)
def test_bad_input_gets_one_line(pipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        compare(pipe, progress=False, **(CALL | options))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_pipeline_that_is_patched_or_not_served_is_refused(pipe: Any) -> None:
    with vidaccel.patch_pipeline(pipe), pytest.raises(UsageError, match=r"its (unet|vae) is patched: restore it first"):
        compare(pipe, progress=False, **CALL)
    with pytest.raises(UsageError, match="vidaccel takes a diffusers pipeline"):
        compare(object())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_faults_and_right_variants_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDACCEL_IMPL")
    pipe = tiny_svd_pipeline().to("cuda", dtype)
    baseline = unpatched(pipe, quick=True, progress=False, **CALL)
    assert (right := compare(pipe, baseline=baseline, progress=False)).passed, right.verdict.reasons
    for fault in FAULTS:
        with planted(pipe, fault, steps=STEPS):
            patch = {"self_check": False, "cuda_graph": False}
            comparison = compare(pipe, patch, baseline=baseline, progress=False)
        assert not comparison.passed, fault.name
        assert blamed(comparison) and all(fault.is_at(*site) for site in blamed(comparison)), fault.name
