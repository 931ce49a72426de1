"""One memory order through a whole UNet: stock code permutes and copies, a patched model does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from copy_checks import Copies, hollow_out
from tiny_models import tiny_motion_unet, tiny_svd_pipeline, tiny_synthetic_pipeline
from torch import Tensor, nn

from vidaccel import patch_module

BATCH, FRAMES, SIDE = 2, 2, 16
# Half the side has at least 64 channels; the latents, which the first convolution copies, and the text have fewer.
SMALLEST = BATCH * FRAMES * 64 * (SIDE // 2) ** 2

Arguments = dict[str, Any]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def svd() -> tuple[nn.Module, Arguments]:
    return tiny_svd_pipeline().unet, {
        "sample": noise(BATCH, FRAMES, 8, SIDE, SIDE),
        "timestep": torch.tensor(0.5),
        "encoder_hidden_states": noise(BATCH, 1, 32),
        "added_time_ids": noise(BATCH, 3),
    }


def text_to_video(unet: nn.Module) -> tuple[nn.Module, Arguments]:
    return unet, {
        "sample": noise(BATCH, 4, FRAMES, SIDE, SIDE),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": noise(BATCH, 5, 32),
    }


def animatediff() -> tuple[nn.Module, Arguments]:
    unet, arguments = text_to_video(tiny_motion_unet())
    text = arguments["encoder_hidden_states"].repeat_interleave(FRAMES, dim=0)  # as the pipeline passes it
    return unet, arguments | {"encoder_hidden_states": text}


def modelscope() -> tuple[nn.Module, Arguments]:
    return text_to_video(tiny_synthetic_pipeline("modelscope")[0].unet)


def i2vgen_xl() -> tuple[nn.Module, Arguments]:
    unet, arguments = text_to_video(tiny_synthetic_pipeline("i2vgen-xl")[0].unet)
    image = {"image_latents": arguments["sample"], "image_embeddings": noise(BATCH, 32), "fps": torch.tensor([16, 16])}
    return unet, arguments | image


@pytest.mark.parametrize("make", [svd, animatediff, modelscope, i2vgen_xl], ids=lambda make: make.__name__)
@torch.no_grad()
def test_no_activation_is_copied(
    make: Callable[[], tuple[nn.Module, Arguments]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hollow_out(monkeypatch)
    unet, arguments = make()
    with Copies(SMALLEST) as stock:
        unet(**arguments)
    with patch_module(unet, self_check=False) as report:
        unet(**arguments)
        with Copies(SMALLEST) as patched:
            out = unet(**arguments).sample
    assert out.shape == (arguments["sample"].shape if make is not svd else (BATCH, FRAMES, 4, SIDE, SIDE))
    assert not report.fallbacks and "triton" in {name for site in report.sites for name in site.implementations}
    assert patched.found == []
    assert len(stock.found) > 4 * sum(len(block.resnets) for block in unet.up_blocks)
