"""What remembers, counts or draws random numbers inside a model runs as often as in a stock one, checked or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_checks import relative_error
from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from tiny_models import tiny_animatediff_pipeline, tiny_motion_unet
from torch import Tensor, nn

from vidaccel import patch_module, patch_pipeline
from vidaccel.clips.generation import generate

pytestmark = pytest.mark.usefixtures("plain_pytorch")

Change = Callable[[Any], None]


def pyramid_attention_broadcast(unet: Any) -> None:
    """diffusers' cache: every second call of an attention returns what the first did."""
    apply_pyramid_attention_broadcast(
        unet,
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=3,
            current_timestep_callback=lambda: 500,
        ),
    )


class RunningMean(nn.Module):
    """Returns the mean of all that it has been given, so that a call too many shows."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: int = 0
        self.total: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.total = x.clone() if self.total is None or self.total.shape != x.shape else self.total + x
        return self.total / self.calls


def stateful_module(unet: Any) -> None:
    for path, module in unet.named_modules():
        if path.endswith("attn1"):
            module.to_out[1] = RunningMean()


def stateful_hook(unet: Any) -> None:
    """It writes to what it is given."""

    def cumulate(module: Any, args: Any, out: Tensor) -> Tensor:
        module.kept = out.clone() if getattr(module, "kept", None) is None else 0.5 * (out + module.kept)
        return module.kept

    for path, module in unet.named_modules():
        if path.endswith(("norm2", "net.0.proj")):
            module.register_forward_hook(cumulate)


def random_hook(unet: Any) -> None:
    for path, module in unet.named_modules():
        if path.endswith(("conv1", "to_q", "ff")):
            module.register_forward_hook(lambda module, args, out: out + 0.1 * torch.randn_like(out))


def dropout(unet: Any) -> None:
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
            module.train()


DETERMINISTIC = [pyramid_attention_broadcast, stateful_module, stateful_hook]
# Which number of the generator meets which element goes by memory order; these ops keep it.
KEEPING_ORDER = ["geglu", "linear_geglu", "skip_concat", "spatial_attention", "text_rows", "unit_division"]
CHANGES = [
    *((change, None) for change in DETERMINISTIC),
    *((change, KEEPING_ORDER) for change in (random_hook, dropout)),
]


def three_steps(unet: Any) -> tuple[list[Tensor], Tensor]:
    """Outputs of three calls, and where the random numbers stand after them."""
    torch.manual_seed(1)
    text = torch.randn(2, 7, 32).repeat_interleave(3, dim=0)
    with torch.no_grad():
        outputs = [unet(torch.randn(2, 4, 3, 8, 8), torch.tensor(9.0 - i), text).sample for i in range(3)]
    return outputs, torch.get_rng_state()


@pytest.mark.parametrize(("change", "only"), CHANGES, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("change_first", [True, False], ids=["change, patch", "patch, change"])
@pytest.mark.slow
def test_same_outputs_checked_or_not(change: Change, only: list[str] | None, change_first: bool) -> None:
    stock = tiny_motion_unet()
    plain, _ = three_steps(copy.deepcopy(stock))
    change(stock)
    expected, random_state = three_steps(stock)
    assert all(relative_error(out, other) > 1e-4 for out, other in zip(expected[1:], plain[1:], strict=True))
    results = []
    for checked in (True, False):
        unet = tiny_motion_unet()
        if change_first:
            change(unet)
        report = patch_module(unet, only=only, self_check=checked)
        if not change_first:
            change(unet)
        assert any(site.state == "active" for site in report.sites)
        outputs, state = three_steps(unet)
        assert torch.equal(state, random_state), "as many random numbers were drawn"
        assert all(relative_error(out, right) <= 2e-5 for out, right in zip(outputs, expected, strict=True))
        assert not any(site.state == "failed" for site in report.sites)
        results.append(outputs)
    assert all(map(torch.equal, *results)), "the checks changed some bits"


@pytest.mark.parametrize("change", [random_hook, dropout], ids=lambda change: change.__name__)
def test_checks_draw_no_random_numbers(change: Change) -> None:
    results = []
    for checked in (True, False):
        unet = tiny_motion_unet()
        change(unet)
        patch_module(unet, self_check=checked)
        results.append(three_steps(unet))
    (checked_outputs, checked_state), (outputs, state) = results
    assert all(map(torch.equal, checked_outputs, outputs)) and torch.equal(checked_state, state)


def test_the_first_clip_under_a_cache_is_stocks() -> None:
    clips = []
    for patched in (False, True):
        pipe = tiny_animatediff_pipeline()
        pyramid_attention_broadcast(pipe.unet)
        if patched:
            patch_pipeline(pipe, allow="bit-exact")
        torch.manual_seed(0)
        arguments = {
            "prompt_embeds": torch.randn(1, 77, 32), "negative_prompt_embeds": torch.randn(1, 77, 32),
            "num_frames": 3, "height": 16, "width": 16, "num_inference_steps": 4,
        }  # fmt: skip
        clips.append(torch.as_tensor(generate(pipe, arguments, seed=0).frames))
    assert torch.equal(*clips)
