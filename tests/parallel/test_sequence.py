"""The tokens of a video transformer over ranks: the same clip, each rank with its share of the tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import FirstBlockCacheConfig
from ranks import Team
from tiny_models import tiny_synthetic_pipeline

from vidaccel import patch_pipeline
from vidaccel.errors import UsageError

pytestmark = pytest.mark.slow

FAMILIES = [
    "wan2.1-t2v-1.3b",
    "wan2.1-i2v-14b",
    "wan2.2-ti2v-5b",
    "wan2.2-t2v-a14b",
    "hunyuanvideo1.5-480p",
    "hunyuanvideo",
    "cogvideox-5b",
    "cogvideox-2b",
    "ltx-video-2b",
]


def clip(pipe: Any, call: dict[str, Any]) -> np.ndarray[Any, Any]:
    torch.manual_seed(0)
    out = pipe(**call, generator=torch.Generator().manual_seed(3), output_type="latent")
    return out.frames.float().numpy()


def two_clips(
    name: str, mode: str, skip: tuple[str, ...] = (), change: str = "", more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A clip by each rank alone, then one by all: how much they differ, and what the report says."""
    pipe, call = tiny_synthetic_pipeline(name)
    call |= {"num_inference_steps": 2, **(more or {})}
    with patch_pipeline(pipe, only="transformer*"):
        expected = clip(pipe, call)
    report = patch_pipeline(pipe, only="transformer*", skip=list(skip), parallel=mode)
    if change:
        CHANGES[change](pipe, report)
    found = clip(pipe, call)
    axes = [site for site in report.sites if site.op in ("guidance", "sequence")]
    outcome = {
        "error": float(np.abs(found - expected).max() / np.abs(expected).max()),
        "sites": {site.op: (site.state, site.implementation) for site in axes if site.path == "transformer"},
        "sent": {site.op: site.ranks.sent for site in axes if site.path == "transformer"},
        "fallbacks": sorted({(op, reason) for _, op, reason in report.fallbacks}),
        "failed": sorted(site.reason for site in report.sites if site.state == "failed"),
        "sum": float(found.sum()),
    }
    report.restore()
    fresh = tiny_synthetic_pipeline(name)[0]
    if change != "hook":
        outcome["restored"] = bool((clip(pipe, call) == clip(fresh, call)).all())
    return outcome


def hook(pipe: Any, report: Any) -> None:
    pipe.transformer.blocks[1].register_forward_hook(lambda module, args, out: out)


def cache(pipe: Any, report: Any) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))


def fail_on_the_second(pipe: Any, report: Any) -> None:
    if dist.get_rank() == 1:
        for site in report.sites:
            if site.op == "qk_norm_rope":
                site.fail("it was told to")


def switch_off(pipe: Any, report: Any) -> None:
    for site in report.sites:
        if site.op == "sequence":
            site.on = False


CHANGES = {change.__name__: change for change in (hook, cache, fail_on_the_second, switch_off)}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_clip_is_the_same(two_ranks: Team, name: str) -> None:
    first, second = two_ranks.run(two_clips, name, "sequence")
    assert first == second, "both ranks have the same clip, and say the same"
    assert first["error"] < 1e-4 and first["restored"] and not first["failed"]
    assert first["sites"] == {"sequence": ("active", "2 ranks")} and not first["fallbacks"]
    assert first["sent"]["sequence"] > 0


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "hunyuanvideo1.5-480p", "cogvideox-5b", "ltx-video-2b"])
def test_tokens_need_not_divide_by_the_ranks(two_ranks: Team, name: str) -> None:
    nine_tokens = {"height": 32, "num_frames": 17} if name == "ltx-video-2b" else {"height": 16}
    for outcome in two_ranks.run(two_clips, name, "sequence", (), "", nine_tokens):
        assert outcome["error"] < 1e-4 and not outcome["fallbacks"]


@pytest.mark.parametrize(
    ("name", "skip", "change", "fallback"),
    [
        ("wan2.1-t2v-1.3b", ("qk_norm_rope",), "", "qk_norm_rope is off, or failed"),
        ("hunyuanvideo1.5-480p", ("padded_text",), "", "padded_text is off, and attention keeps its mask"),
        ("cogvideox-5b", ("qk_norm_rope",), "", "it is off, or failed"),
        ("wan2.1-t2v-1.3b", ("transformer.blocks.1",), "", "a block is not patched"),
        ("wan2.1-t2v-1.3b", (), "hook", "a hook, or a processor of somebody's own, may look at all tokens"),
        ("wan2.1-t2v-1.3b", (), "cache", "a step cache is on, which looks at the tokens between blocks"),
    ],
)
def test_what_cannot_be_spread_runs_on_all_tokens(
    two_ranks: Team, name: str, skip: tuple[str, ...], change: str, fallback: str
) -> None:
    for outcome in two_ranks.run(two_clips, name, "sequence", skip, change):
        assert outcome["error"] < 1e-4
        assert fallback in {reason for _, reason in outcome["fallbacks"]}


def test_attention_by_the_dispatcher_of_diffusers(two_ranks: Team) -> None:
    for outcome in two_ranks.run(two_clips, "wan2.1-t2v-1.3b", "sequence", ("spatial_attention",)):
        assert outcome["error"] < 1e-4 and not outcome["fallbacks"] and outcome["sent"]["sequence"]


def test_what_fails_on_one_rank_fails_on_all(two_ranks: Team) -> None:
    first, second = two_ranks.run(two_clips, "wan2.1-t2v-1.3b", "sequence", (), "fail_on_the_second")
    assert first["failed"] == ["it failed on rank 1: it was told to"] * 2 and second["failed"] == ["it was told to"] * 2
    assert first["error"] < 1e-4 and first["sum"] == second["sum"]


def test_it_can_be_switched_off(two_ranks: Team) -> None:
    for outcome in two_ranks.run(two_clips, "wan2.1-t2v-1.3b", "sequence", (), "switch_off"):
        assert outcome["sites"] == {"sequence": ("off", "not run yet")} and outcome["sent"] == {"sequence": 0}


def compiled() -> tuple[list[str], str]:
    """What is said of a transformer that was compiled before it was patched, and of one that is compiled later."""
    lines = []
    for compile in (lambda pipe: pipe.transformer.compile(backend="eager"), wrap_transformer):
        pipe, _ = tiny_synthetic_pipeline("wan2.1-t2v-1.3b")
        compile(pipe)
        with pytest.raises(UsageError) as raised:
            patch_pipeline(pipe, parallel="sequence")
        lines.append(str(raised.value))
    pipe, _ = tiny_synthetic_pipeline("wan2.1-t2v-1.3b")
    report = patch_pipeline(pipe, parallel="sequence")
    pipe.transformer.compile(backend="eager")
    (site,) = [site for site in report.sites if site.op == "sequence"]
    return lines, site.reason


def wrap_transformer(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def test_what_is_compiled_is_not_split(two_ranks: Team) -> None:
    for lines, reason in two_ranks.run(compiled):
        assert all("the transformer is compiled" in line for line in lines)
        assert "compiled, or replaced, after it was patched" in reason


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "cogvideox-5b"])
def test_guidance_and_tokens_on_four_ranks(four_ranks: Team, name: str) -> None:
    outcomes = four_ranks.run(two_clips, name, "auto")
    for outcome in outcomes:
        assert outcome["error"] < 1e-4 and outcome["sum"] == outcomes[0]["sum"]
        assert outcome["sites"] == dict.fromkeys(("guidance", "sequence"), ("active", "2 ranks"))
        assert min(outcome["sent"].values()) > 0 and not outcome["fallbacks"]


def refused(name: str, mode: str) -> str:
    try:
        patch_pipeline(tiny_synthetic_pipeline(name)[0], parallel=mode)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "mode", "says"),
    [
        ("wan2.1-t2v-1.3b", "sequence", "2 heads do not divide by 4"),
        ("wan2.1-t2v-1.3b", "guidance", 'two halves, and there are 4 ranks; parallel="auto"'),
        ("wan2.1-t2v-1.3b", "frames", 'does not fit WanTransformer3DModel; parallel="sequence" does'),
        ("wan2.1-t2v-1.3b", "sequences", "did you mean sequence?"),
        ("mochi-1", "sequence", 'parallel="guidance" alone, on 2 ranks'),
    ],
)
def test_what_no_number_of_ranks_can_do_is_said_in_one_line(four_ranks: Team, name: str, mode: str, says: str) -> None:
    for line in four_ranks.run(refused, name, mode):
        assert says in line and "\n" not in line
