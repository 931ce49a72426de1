"""A decode on several ranks: the pixels of a single one, each rank having made its share of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from ranks import Team
from tiny_models import tiny_autoencoder_kl_wan, tiny_synthetic_pipeline
from torch import Tensor, nn

from vidaccel import patch_pipeline

WAN = "wan2.1-t2v-1.3b"


@contextmanager
def counting(decoder: nn.Module) -> Iterator[Counter[str]]:
    """How many pixels' worth of SiLU's input the decoder works on, wherever its calls come from."""
    yield Counter()


def latents(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def two_decodes(name: str, vae: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """A decode by a patched VAE, and the same by all ranks together."""
    pipe, _ = tiny_synthetic_pipeline(name)
    pipe.vae, x = vae or pipe.vae, latents(*shape)
    with patch_pipeline(pipe, only="vae"):
        expected = pipe.vae.decode(x, return_dict=False)[0]
    report = patch_pipeline(pipe, parallel="guidance")
    found = pipe.vae.decode(x, return_dict=False)[0]
    site = next(site for site in report.sites if site.op == "decode")
    outcome = {
        "equal": bool(found.equal(expected)),
        "error": float((found - expected).abs().max() / expected.abs().max()),
        "site": (site.path, site.state, site.implementation, dict(site.fallbacks)),
        "sum": float(found.double().sum()),
        "sent": site.ranks.sent > 0,
    }
    report.restore()
    outcome["restored"] = "decode" not in vars(pipe.vae) and site.state == "restored"
    return outcome


def wan(frames: int, **options: Any) -> dict[str, Any]:
    return two_decodes(WAN, tiny_autoencoder_kl_wan(**options), (1, 4, frames, 4, 6))


@pytest.mark.parametrize("frames", [4, 5])
def test_frames_of_wan(two_ranks: Team, frames: int) -> None:
    first, second = two_ranks.run(wan, frames)
    assert first["sum"] == second["sum"]
    assert first["error"] < 1e-5 and first["restored"] and first["sent"]
    assert first["site"] == ("vae", "active", "2 ranks", {})
