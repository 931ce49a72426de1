"""The tokens of a video transformer over ranks: the same clip, each rank with its share of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
import torch.distributed as dist
from coexistence.families import FAMILIES as TINY
from diffusers import (
    EDMEulerScheduler,
    FirstBlockCacheConfig,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
)
from ranks import Team
from tiny_models import tiny_relative, tiny_synthetic_pipeline
from torch.utils._pytree import tree_leaves
from transformer_checks import tiny_transformer

from vidaccel import patch_pipeline
from vidaccel.errors import UsageError
from vidaccel.patching.families import spread_for

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
    "ltx-2",
    "ltx-2.3",
    "mochi-1",
]


def cosmos_1() -> tiny_pipelines.Made:
    """Which adds an embedding of places to its tokens."""
    vae, config = tiny_pipelines.cosmos_vae(), {"extra_pos_embed_type": "learnable"}
    return tiny_pipelines.cosmos(
        "cosmos_text2world", "CosmosTextToWorldPipeline", vae, EDMEulerScheduler(), config, {}
    )  # fmt: skip


def framepack() -> tiny_pipelines.Made:
    pipe, call = tiny_pipelines.hunyuan_image_to_video(HunyuanVideoFramepackPipeline, **tiny_pipelines.FRAMEPACK)
    return pipe, call | {"latent_window_size": 2}


def token_replace() -> tiny_pipelines.Made:
    config = {"image_condition_type": "token_replace"}
    return tiny_pipelines.hunyuan_image_to_video(HunyuanVideoImageToVideoPipeline, **config)


def skyreels_forcing(**arguments: Any) -> tiny_pipelines.Made:
    transformer = tiny_transformer("SkyReelsV2Transformer3DModel", tiny_pipelines.SKYREELS)
    pipe, call = tiny_relative("wan2.1-t2v-1.3b", SkyReelsV2DiffusionForcingPipeline, transformer=transformer)
    return pipe, call | {"prompt": None, "base_num_frames": 17, "num_frames": 13} | arguments


RELATIVES: dict[str, Callable[[], tiny_pipelines.Made]] = {
    "allegro": tiny_pipelines.allegro,
    "anyflow": tiny_pipelines.anyflow,
    "chronoedit": tiny_pipelines.chronoedit,
    "consisid": tiny_pipelines.consisid,
    "cosmos-1": cosmos_1,
    "cosmos-2": TINY["Cosmos 2"],
    "easyanimate": tiny_pipelines.easyanimate,
    "framepack": framepack,
    "helios": tiny_pipelines.helios,
    "hunyuanvideo-i2v": token_replace,
    "skyreels-v2": tiny_pipelines.skyreels,
    "skyreels-v2-forcing": skyreels_forcing,
    "skyreels-v2-causal": partial(skyreels_forcing, ar_step=1, causal_block_size=2),
}


def made(name: str) -> tiny_pipelines.Made:
    if name == "helios-amplified":
        return tiny_pipelines.helios(is_amplify_history=True)
    return RELATIVES[name]() if name in RELATIVES else tiny_synthetic_pipeline(name)


def clip(pipe: Any, call: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The latents of a clip, and of its sound, if it has one."""
    torch.manual_seed(0)
    out = pipe(**call, generator=torch.Generator().manual_seed(3), output_type="latent")
    parts = tree_leaves((out.frames, getattr(out, "audio", None)))
    return np.concatenate([part.float().numpy().ravel() for part in parts if part is not None])


def two_clips(
    name: str, mode: str, skip: tuple[str, ...] = (), change: str = "", more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A clip by each rank alone, then one by all: how much they differ, and what the report says."""
    pipe, call = made(name)
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
    fresh = made(name)[0]
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


@pytest.mark.parametrize("name", [*FAMILIES, *RELATIVES])
def test_the_clip_is_the_same(two_ranks: Team, name: str) -> None:
    first, second = two_ranks.run(two_clips, name, "sequence")
    sent = [outcome.pop("sent")["sequence"] for outcome in (first, second)]
    assert first == second, "both ranks have the same clip, and say the same"
    assert first["error"] < 1e-4 and first["restored"] and not first["failed"]
    assert first["sites"] == {"sequence": ("active", "2 ranks")} and not first["fallbacks"]
    assert min(sent) > 0


ODD: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": {"height": 16},
    "hunyuanvideo1.5-480p": {"height": 16},
    "cogvideox-5b": {"height": 16},
    "ltx-video-2b": {"height": 32, "num_frames": 17},
    "ltx-2": {"height": 32, "num_frames": 17},
    "ltx-2.3": {"height": 32, "num_frames": 17},
    "mochi-1": {"height": 16, "num_frames": 13},
    "allegro": {"height": 16, "num_frames": 12},
    "anyflow": {"height": 16},
    "chronoedit": {
        "height": 16, "num_frames": 9, "enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 1,
    },
    "consisid": {"height": 16},
    "cosmos-2": {"height": 16},
    "easyanimate": {"height": 16, "num_frames": 9},
    "skyreels-v2": {"height": 16},
    "skyreels-v2-causal": {"height": 16, "num_frames": 9, "causal_block_size": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_tokens_need_not_divide_by_the_ranks(two_ranks: Team, name: str) -> None:
    first, second = two_ranks.run(two_clips, name, "sequence", (), "", ODD[name])
    assert first["sent"] != second["sent"], "one has a token more"
    for outcome in (first, second):
        assert outcome["error"] < 1e-4 and not outcome["fallbacks"]


def test_fewer_tokens_than_ranks_are_not_spread(two_ranks: Team) -> None:
    one_token = {"num_frames": 1, "height": 16, "width": 16}
    for outcome in two_ranks.run(two_clips, "wan2.1-t2v-1.3b", "sequence", (), "", one_token):
        assert outcome["error"] < 1e-4 and not outcome["sent"]["sequence"]
        assert outcome["fallbacks"] == [("sequence", "the clip has fewer tokens (1) than there are ranks (2)")]


def first_call(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """What the transformer is called with first."""
    calls: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: calls.append(given), with_kwargs=True
    )  # fmt: skip
    clip(pipe, call)
    hook.remove()
    return calls[0]


def residuals(pipe: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Of a ControlNet."""
    pipe.transformer.register_to_config(controlnet_block_every_n=1)
    batch, _, frames, height, width = given["hidden_states"].shape
    shape = batch, frames * height * width // 4, 32
    return {"block_controlnet_hidden_states": [noise(*shape, seed=seed) for seed in range(2)]}


def mask_of_video(pipe: Any, given: dict[str, Any]) -> dict[str, Any]:
    batch, tokens, _ = given["hidden_states"].shape
    return {"video_self_attention_mask": (noise(batch, tokens, tokens) > 0).float()}


def mask_of_text(pipe: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"encoder_attention_mask": (torch.arange(8) < torch.tensor([[5], [3]])).long()}


def half_perturbed(pipe: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": torch.tensor([0.0, 1.0])}


def isolated(pipe: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"isolate_modalities": True}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MORE = {more.__name__: more for more in (residuals, mask_of_video, mask_of_text, half_perturbed, isolated)}


def two_calls(name: str, more: str) -> tuple[float, set[str]]:
    """How much a transformer's outputs, alone and by all ranks, differ when it is given more than pipelines give it."""
    pipe, call = made(name)
    given = first_call(pipe, call)
    given |= MORE[more](pipe, given) | {"return_dict": False}
    with torch.no_grad(), patch_pipeline(pipe, only="transformer*"):
        expected = pipe.transformer(**given)
    with torch.no_grad(), patch_pipeline(pipe, only="transformer*", parallel="sequence") as report:
        found = pipe.transformer(**given)
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]
    return max(errors), {reason for *_, reason in report.fallbacks}


@pytest.mark.parametrize(
    ("name", "more", "fallbacks"),
    [
        ("cosmos-2", "residuals", set()),
        ("ltx-2", "mask_of_video", set()),
        ("ltx-2", "mask_of_text", set()),
        ("ltx-2", "isolated", set()),
        ("ltx-2.3", "half_perturbed", {"values stand for self-attention in some samples"}),
    ],
)
def test_what_pipelines_seldom_give(two_ranks: Team, name: str, more: str, fallbacks: set[str]) -> None:
    for error, reasons in two_ranks.run(two_calls, name, more):
        assert error < 1e-4 and reasons == fallbacks


def test_the_heads_of_the_sound_are_to_divide_too() -> None:
    model = tiny_synthetic_pipeline("ltx-2")[0].transformer
    model.register_to_config(num_attention_heads=4)
    assert spread_for(model).reason(model, 4) == "its 2 heads do not divide by 4"


@pytest.mark.parametrize(
    ("name", "skip", "change", "fallback"),
    [
        ("wan2.1-t2v-1.3b", ("qk_norm_rope",), "", "qk_norm_rope is off, or failed"),
        ("hunyuanvideo1.5-480p", ("padded_text",), "", "padded_text is off, and attention keeps its mask"),
        ("cogvideox-5b", ("qk_norm_rope",), "", "it is off, or failed"),
        ("cosmos-2", ("qk_norm_rope",), "", "qk_norm_rope is off, or failed"),
        ("easyanimate", ("qk_norm_rope",), "", "qk_norm_rope is off, or failed"),
        ("allegro", ("spatial_attention",), "", "it is off, or failed"),
        ("helios-amplified", (), "", "it amplifies the keys of its history"),
        ("ltx-2", ("qk_norm_rope",), "", "qk_norm_rope is off, or failed"),
        ("mochi-1", ("padded_text",), "", "padded_text is off, or failed"),
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


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "skyreels-v2-causal", "cosmos-2", "ltx-2"])
def test_attention_by_the_dispatcher_of_diffusers(two_ranks: Team, name: str) -> None:
    for outcome in two_ranks.run(two_clips, name, "sequence", ("spatial_attention",)):
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


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "cogvideox-5b", "mochi-1", "ltx-2", "skyreels-v2"])
def test_guidance_and_tokens_on_four_ranks(four_ranks: Team, name: str) -> None:
    outcomes = four_ranks.run(two_clips, name, "auto")
    for outcome in outcomes:
        assert outcome["error"] < 1e-4 and outcome["sum"] == outcomes[0]["sum"]
        assert outcome["sites"] == dict.fromkeys(("guidance", "sequence"), ("active", "2 ranks"))
        assert min(outcome["sent"].values()) > 0 and not outcome["fallbacks"]


def refused(name: str, mode: str) -> str:
    try:
        patch_pipeline(made(name)[0], parallel=mode)
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
        ("mochi-1", "sequence", "2 heads do not divide by 4"),
        ("skyreels-v2", "sequence", "2 heads do not divide by 4"),
        ("wan2.1-vace-1.3b", "sequence", 'parallel="guidance" alone, on 2 ranks'),
    ],
)
def test_what_no_number_of_ranks_can_do_is_said_in_one_line(four_ranks: Team, name: str, mode: str, says: str) -> None:
    for line in four_ranks.run(refused, name, mode):
        assert says in line and "\n" not in line
