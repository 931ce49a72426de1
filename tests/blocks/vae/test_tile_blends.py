"""The seams between tiles: the bits of stock code, in fewer operations."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny_models import (
    tiny_autoencoder_kl,
    tiny_autoencoder_kl_cogvideox,
    tiny_autoencoder_kl_hunyuan_video,
    tiny_autoencoder_kl_hunyuanvideo15,
    tiny_autoencoder_kl_ltx_video,
    tiny_autoencoder_kl_mochi,
    tiny_autoencoder_kl_wan,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vae_checks import decode

from vidaccel import patch_module
from vidaccel.patching.report import PatchReport
from vidaccel.sites.site import Site

VAES = {
    "image": tiny_autoencoder_kl,
    "CogVideoX": tiny_autoencoder_kl_cogvideox,
    "HunyuanVideo": tiny_autoencoder_kl_hunyuan_video,
    "HunyuanVideo 1.5": tiny_autoencoder_kl_hunyuanvideo15,
    "LTX": tiny_autoencoder_kl_ltx_video,
    "Mochi": tiny_autoencoder_kl_mochi,
    "Wan": tiny_autoencoder_kl_wan,
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def site_of(report: PatchReport) -> Site:
    (site,) = (site for site in report.sites if site.op == "tile_blend")
    return site


def tiles(vae: Any, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Two that are as long in all but what ``name`` blends along."""
    sides = [2, 3, 7, 19, 17][: 4 if type(vae).__name__ == "AutoencoderKL" else 5]
    others = list(sides)
    others[{"blend_t": -3, "blend_v": -2, "blend_h": -1}[name]] += 5
    torch.manual_seed(0)
    a, b = torch.randn(others).to(device, dtype), torch.randn(sides).to(device, dtype)
    order = torch.channels_last if b.ndim == 4 else torch.channels_last_3d
    return a, b.contiguous(memory_format=order)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", VAES)
def test_a_seam_has_the_bits_of_stock_code(family: str, dtype: torch.dtype) -> None:
    vae = VAES[family]()
    report = patch_module(vae)
    for name in ("blend_t", "blend_v", "blend_h"):
        if not hasattr(vae, name):
            continue
        for extent in (0, 1, 6, 100):
            a, b = tiles(vae, name, dtype)
            before, expected = a.clone(), getattr(type(vae), name)(vae, a, b.clone(), extent)
            assert getattr(vae, name)(a, b, extent) is b
            assert torch.equal(b, expected) and torch.equal(a, before)
    assert site_of(report).implementations == {"torch"} and not site_of(report).fallbacks


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_seam_has_the_bits_of_stock_code_on_a_gpu(dtype: torch.dtype, device: torch.device) -> None:
    vae = tiny_autoencoder_kl_wan()
    patch_module(vae)
    for name in ("blend_v", "blend_h"):
        for extent in (1, 6, 100):
            a, b = tiles(vae, name, dtype, device)
            expected = getattr(type(vae), name)(vae, a, b.clone(), extent)
            assert torch.equal(getattr(vae, name)(a, b, extent), expected)


class Operations(TorchDispatchMode):
    """Counts the products, of which stock code takes two for each line of a seam."""

    products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += function is torch.ops.aten.mul.Tensor
        return function(*args, **kwargs or {})


def test_a_decode_in_tiles() -> None:
    vae = tiny_autoencoder_kl_mochi()
    vae.enable_tiling(32, 32, 24, 24)
    latents = torch.randn(1, vae.config.latent_channels, 2, 6, 6)
    with Operations() as stock:
        expected = decode(vae, latents)
    report = patch_module(vae, only="tile_blend")
    assert [site.op for site in report.sites] == ["tile_blend"] and report.sites[0].implementation == "not run yet"
    with Operations() as ours:
        assert torch.equal(decode(vae, latents), expected)
    assert ours.products < stock.products / 2
    report.sites[0].on = False
    with Operations() as off:
        assert torch.equal(decode(vae, latents), expected)
    assert off.products == stock.products
    report.restore()
    assert not {"blend_v", "blend_h"} & vars(vae).keys()


@pytest.mark.parametrize("change", ["dtype", "sides", "one tile", "gradients"])
def test_other_tiles_go_the_stock_way(change: str) -> None:
    vae = tiny_autoencoder_kl_wan()
    report = patch_module(vae)
    a, b = tiles(vae, "blend_h", torch.float32)
    a = {
        "dtype": a.double(),
        "sides": a[:, :1],  # which stock code broadcasts
        "one tile": b,
        "gradients": a.clone().requires_grad_(),
    }[change]
    twin = b.clone()
    expected = type(vae).blend_h(vae, twin if a is b else a, twin, 9)
    out = vae.blend_h(a, b, 9)
    assert torch.equal(out, expected) and out.requires_grad == expected.requires_grad
    assert sum(site_of(report).fallbacks.values()) == 1


def test_wrong_tiles_raise_what_stock_raises() -> None:
    vae = tiny_autoencoder_kl_wan()
    a, b = tiles(vae, "blend_h", torch.float32)
    with pytest.raises(RuntimeError) as stock:
        vae.blend_h(a[..., :3, :], b, 9)
    patch_module(vae)
    with pytest.raises(RuntimeError) as ours:
        vae.blend_h(a[..., :3, :], b, 9)
    assert str(ours.value) == str(stock.value)


def test_methods_of_somebody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(vae: Any, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        return b + 1

    vae = tiny_autoencoder_kl_wan()
    a, b = tiles(vae, "blend_h", torch.float32)
    vae.blend_h = lambda a, b, blend_extent: b + 2
    assert site_of(patch_module(vae)).state == "left alone" and torch.equal(vae.blend_h(a, b, 4), b + 2)
    vae = tiny_autoencoder_kl_wan()
    report = patch_module(vae)
    monkeypatch.setattr(type(vae), "blend_h", mine)
    assert torch.equal(vae.blend_h(a, b, 4), b + 1)
    vae.blend_h = lambda a, b, blend_extent: b + 3
    assert site_of(report).state == "left alone"
    report.restore()
    assert torch.equal(vae.blend_h(a, b, 4), b + 3) and "blend_v" not in vars(vae)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_stock_and_may_be_patched(copied: Any) -> None:
    vae = tiny_autoencoder_kl_wan()
    report = patch_module(vae)
    twin = copied(vae)
    assert twin.blend_h.__func__ is type(vae).blend_h and twin.blend_h.__self__ is twin
    assert site_of(patch_module(twin)).state == "active" and site_of(report).state == "active"


def test_compiled() -> None:
    vae = tiny_autoencoder_kl_wan()
    a, b = tiles(vae, "blend_h", torch.float32)
    expected = vae.blend_h(a, b.clone(), 9)
    patch_module(vae)
    blend = torch.compile(lambda a, b: vae.blend_h(a, b, 9), fullgraph=True, backend="aot_eager")
    assert torch.equal(blend(a, b), expected)
