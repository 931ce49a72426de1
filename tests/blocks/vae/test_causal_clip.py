"""What all causal VAEs have in common: a clip goes in chunks, or as its caller gives it, and each looks back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_checks import relative_error
from tiny_models import (
    tiny_autoencoder_kl_cogvideox,
    tiny_autoencoder_kl_hunyuanvideo15,
    tiny_autoencoder_kl_mochi,
    tiny_autoencoder_kl_wan,
)
from torch import Tensor, nn
from vae_checks import decode, encode

from vidaccel import patch_module
from vidaccel.blocks.vae.causal_clip import Chunk


@torch.no_grad()
def decode_in_batches(vae: Any, latents: Tensor) -> Tensor:
    """Call CogVideoX's decoder with batches that are no views of one clip, so that it cannot decode ahead."""
    cache, pixels = None, []
    for batch in latents.split(2, dim=2):
        frames, cache = vae.decoder(batch.clone(), conv_cache=cache)
        pixels.append(frames)
    return torch.cat(pixels, dim=2)


@torch.no_grad()
def decode_frames(vae: Any, latents: Tensor) -> Tensor:
    """Call Wan's decoder frame by frame, so that it cannot decode ahead."""
    vae.clear_cache()
    cache, pixels = vae._feat_map, []
    for at, frame in enumerate(latents.split(1, dim=2)):
        pixels.append(vae.decoder(frame.clone(), feat_cache=cache, feat_idx=[0], first_chunk=at == 0))
    return torch.cat(pixels, dim=2)


CODERS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "wan-decodes": (tiny_autoencoder_kl_wan, decode, (1, 4, 5, 4, 4)),
    "wan-decodes-frames": (tiny_autoencoder_kl_wan, decode_frames, (1, 4, 3, 4, 4)),
    "wan-encodes": (tiny_autoencoder_kl_wan, encode, (1, 3, 9, 16, 16)),
    "cogvideox-decodes": (tiny_autoencoder_kl_cogvideox, decode, (1, 4, 7, 4, 4)),
    "cogvideox-decodes-batches": (tiny_autoencoder_kl_cogvideox, decode_in_batches, (1, 4, 4, 4, 4)),
    "cogvideox-encodes": (tiny_autoencoder_kl_cogvideox, encode, (1, 3, 17, 16, 16)),
    "hunyuanvideo15-decodes": (tiny_autoencoder_kl_hunyuanvideo15, decode, (1, 4, 4, 4, 4)),
    "hunyuanvideo15-encodes": (tiny_autoencoder_kl_hunyuanvideo15, encode, (1, 3, 13, 32, 32)),
    "mochi-decodes": (tiny_autoencoder_kl_mochi, decode, (1, 12, 3, 4, 4)),
}


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_what_chunks_hand_on_is_checked(coder: str, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where memory holds the whole clip: another one may be longer."""

    def spoilt(self: Chunk, conv: nn.Module, *args: Any, **kwargs: Any) -> None:
        keep_of(self, conv, *args, **kwargs)
        if conv in self.following:
            self.following[conv] = self.following[conv].flip(1) * 1.01

    keep_of, (make, run, shape) = Chunk.keep_of, CODERS[coder]
    vae, x = make(), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = run(vae, x)
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    if wrong:
        monkeypatch.setattr(Chunk, "keep_of", spoilt)
    with patch_module(vae) as report:
        assert relative_error(run(vae, x), expected) <= 1e-5
        assert any(site.state == "failed" for site in report.sites) is wrong, str(report)
