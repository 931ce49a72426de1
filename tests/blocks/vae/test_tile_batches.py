"""Tiles that are alike, decoded together: stock's clip, by fewer calls of the decoder."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from block_checks import relative_error
from diffusers.models.attention_processor import AttnProcessor2_0
from quick_and_slow import first_is_quick
from tiny_models import (
    tiny_autoencoder_kl,
    tiny_autoencoder_kl_cogvideox,
    tiny_autoencoder_kl_hunyuan_video,
    tiny_autoencoder_kl_hunyuanvideo15,
    tiny_autoencoder_kl_ltx_video,
    tiny_autoencoder_kl_mochi,
    tiny_autoencoder_kl_wan,
)
from torch import Tensor, nn
from vae_checks import assert_no_worse, decode, ran

from vidaccel import patch_module
from vidaccel.blocks.vae import tile_batches
from vidaccel.blocks.vae.autoencoder_kl_wan import _Progress
from vidaccel.patching.report import PatchReport
from vidaccel.sites.site import Site

EQUAL = 1e-5


def tiled_in_time(vae: Any) -> Any:
    vae.use_framewise_decoding = True
    return vae


# How a VAE is made, the arguments of enable_tiling, its latents, and how many tiles go at once at most.
CASES: dict[str, tuple[Callable[[], Any], tuple[Any, ...], tuple[int, ...], int]] = {
    "image": (tiny_autoencoder_kl, (), (2, 4, 20, 20), 9),
    "CogVideoX": (tiny_autoencoder_kl_cogvideox, (16, 24, 0.5, 0.5), (1, 4, 5, 3, 5), 6),
    "HunyuanVideo": (tiny_autoencoder_kl_hunyuan_video, (16, 16, None, 8, 8), (1, 4, 3, 5, 3), 8),
    "HunyuanVideo in time": (lambda: tiled_in_time(tiny_autoencoder_kl_hunyuan_video()), (16, 16, 8, 8, 8, 4),
                             (1, 4, 4, 3, 3), 4),
    "HunyuanVideo 1.5": (tiny_autoencoder_kl_hunyuanvideo15, (32, 32, 2, 2, 0.5), (1, 4, 2, 5, 3), 8),
    "LTX": (tiny_autoencoder_kl_ltx_video, (8, 8, None, 6, 6), (2, 4, 3, 8, 6), 2),
    "LTX with timesteps": (lambda: tiny_autoencoder_kl_ltx_video(timestep_conditioning=True), (8, 8, None, 6, 6),
                           (2, 4, 3, 8, 6), 2),
    "Mochi": (tiny_autoencoder_kl_mochi, (32, 32, 24, 24), (2, 12, 2, 8, 6), 2),
    "Wan": (tiny_autoencoder_kl_wan, (32, 32, 16, 24), (2, 4, 3, 6, 5), 2),
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_the_interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes minutes for a whole decode."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("VIDACCEL_IMPL", "torch")


def made(case: str) -> tuple[Any, Tensor, Callable[[Any, Tensor], Tensor]]:
    """A VAE that decodes in tiles, latents of several, and what decodes them."""
    make, tiling, shape, _ = CASES[case]
    vae = make()
    vae.enable_tiling(*tiling)
    torch.manual_seed(1)
    latents = torch.randn(shape)
    if case != "LTX with timesteps":
        return vae, latents, decode

    @torch.no_grad()
    def with_timestep(vae: Any, latents: Tensor) -> Tensor:
        return vae.decode(latents, torch.tensor([0.1, 0.2], device=latents.device)).sample

    return vae, latents, with_timestep


def site_of(report: PatchReport) -> Site:
    (site,) = (site for site in report.sites if site.op == "tile_batch")
    return site


@pytest.mark.parametrize("case", CASES)
def test_the_clip_is_stocks(case: str) -> None:
    vae, latents, run = made(case)
    expected = run(vae, latents)
    report = patch_module(vae)
    assert relative_error(run(vae, latents), expected) <= EQUAL
    assert site_of(report).implementations == {f"{CASES[case][3]} tiles at once"}
    assert not report.fallbacks, str(report)
    site_of(report).on = False
    assert relative_error(run(vae, latents), expected) <= EQUAL
    report.restore()
    assert "tiled_decode" not in vars(vae) and torch.equal(run(vae, latents), expected)


@pytest.mark.parametrize("case", first_is_quick(["image", "CogVideoX", "HunyuanVideo 1.5", "Wan"]))
def test_as_many_as_memory_holds(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents, run = made(case)
    expected = run(vae, latents)
    seen: list[int] = []
    right = tile_batches._together

    def noted(parts: list[Any]) -> Any:
        seen.append(len(parts))
        return right(parts)

    monkeypatch.setattr(tile_batches, "_together", noted)
    with patch_module(vae) as report:
        monkeypatch.setattr(type(vae.decoder), "bytes_at_once", lambda self, latents: 2**60)
        assert relative_error(run(vae, latents), expected) <= EQUAL
        assert set(seen) == {1} and site_of(report).implementations == {"one tile at a time"}
        seen.clear()
        tiles = len(latents) * 2  # of which two take all that is free
        monkeypatch.setattr(
            type(vae.decoder), "bytes_at_once", lambda self, latents: 0 if len(latents) <= tiles else 2**60
        )  # fmt: skip
        assert relative_error(run(vae, latents), expected) <= EQUAL
        assert max(seen) == 2
        monkeypatch.setattr(type(vae.decoder), "bytes_at_once", lambda self, latents: len(latents) * 2**31)
        seen.clear()
        run(vae, latents)
        assert max(seen) * len(latents) <= 4  # larger batches would fit, but be no faster


@pytest.mark.parametrize("case", ["image", "CogVideoX", "HunyuanVideo 1.5", "Wan"])
def test_memory_that_runs_out_all_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents, run = made(case)
    expected = run(vae, latents)
    right, sizes = tile_batches._together, []

    def full(parts: list[Any]) -> Any:
        sizes.append(len(parts))
        if len(parts) > 1:
            raise torch.OutOfMemoryError("so many tiles")
        return right(parts)

    monkeypatch.setattr(tile_batches, "_together", full)
    with patch_module(vae) as report:
        assert relative_error(run(vae, latents), expected) <= EQUAL
        assert sizes[:2] == [CASES[case][3], -(-CASES[case][3] // 2)] and not report.fallbacks
        monkeypatch.setattr(
            tile_batches, "_together", lambda parts: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
        )
        with pytest.raises(torch.OutOfMemoryError, match="no"):
            run(vae, latents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse_than_stocks(dtype: torch.dtype) -> None:
    vae, latents, run = made("Wan")
    vae.to(dtype)
    latents = latents.to(dtype)
    gold, stock = run(copy.deepcopy(vae).double(), latents.double()), run(vae, latents)
    with patch_module(vae):
        assert_no_worse(run(vae, latents), stock, gold)


def hooked(vae: Any) -> None:
    vae.decoder.register_forward_hook(lambda _, args, out: out * args[0].std() if isinstance(out, Tensor) else out)


def convolution_hooked(vae: Any) -> None:
    vae.post_quant_conv.register_forward_hook(lambda _, args, out: out * (1 + args[0].std()))


def lora_below(vae: Any) -> None:
    class Lora(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor, *args: Any) -> Tensor:
            return self.base(x, *args) * (1 + x.std())

    vae.decoder.conv_out = Lora(vae.decoder.conv_out)


def layer_hooked(vae: Any) -> None:
    vae.decoder.conv_out.register_forward_hook(lambda _, args, out: out * args[0].std())


class Mixing(AttnProcessor2_0):  # type: ignore[misc]  # diffusers is untyped
    def __call__(self, attn: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().__call__(attn, x, *args, **kwargs)
        return out * (1 + x.std())


def processor_replaced(vae: Any) -> None:
    vae.decoder.mid_block.attentions[0].processor = Mixing()


def class_replaced(vae: Any) -> None:
    class Mine(type(vae.decoder.mid_block)):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(x * (1 + x.std()), *args, **kwargs)

    vae.decoder.mid_block.__class__ = Mine


class Counting(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.calls = base, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.base(x) * self.calls


def convolution_replaced(vae: Any) -> None:
    vae.post_quant_conv = Counting(vae.post_quant_conv)


def decoder_compiled(vae: Any) -> None:
    vae.decoder.compile(backend="eager")


def another_decoder(vae: Any) -> None:
    vae.decoder = copy.deepcopy(vae.decoder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "a hook on its decoder"),
        (convolution_hooked, "a hook on its decoder"),
        (lora_below, "was replaced by Lora"),
        (another_decoder, "its decoder is not patched"),
        pytest.param(decoder_compiled, "its decoder is compiled", marks=pytest.mark.slow),
    ],
)
def test_what_would_tell_tiles_apart_sees_stocks_calls(change: Callable[[Any], None], reason: str) -> None:
    vae, latents, run = made("Wan")
    report = patch_module(vae)
    run(vae, latents)
    change(vae)
    out = run(vae, latents)
    assert any(reason in why for why in site_of(report).fallbacks), site_of(report).fallbacks
    report.restore()
    assert relative_error(out, run(vae, latents)) <= EQUAL


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (layer_hooked, "somebody looks at"),
        (lora_below, "a Lora, which is not of PyTorch"),
        (processor_replaced, "a processor is a Mixing"),
        (class_replaced, "a Mine, which is not of PyTorch"),
        (convolution_replaced, "its post_quant_conv is a Counting"),
    ],
)
def test_layers_of_images_see_stocks_calls(change: Callable[[Any], None], reason: str) -> None:
    vae, latents, run = made("image")
    stock = copy.deepcopy(vae)
    change(stock)
    report = patch_module(vae)
    run(vae, latents)
    change(vae)
    assert relative_error(run(vae, latents), run(stock, latents)) <= EQUAL
    assert any(reason in why for why in site_of(report).fallbacks), site_of(report).fallbacks


def test_a_method_of_somebodys_own_runs_as_often_as_in_stock() -> None:
    vae, latents, run = made("Wan")
    calls = [0]

    class Mine(type(vae)):  # type: ignore[misc]
        def clear_cache(self) -> None:
            calls[0] += 1
            super().clear_cache()

    vae.__class__ = Mine
    run(vae, latents)
    as_stock, calls[0] = calls[0], 0
    report = patch_module(vae)
    run(vae, latents)
    assert calls[0] == as_stock
    assert any("its clear_cache is not that" in why for why in site_of(report).fallbacks), site_of(report).fallbacks


@torch.no_grad()
@pytest.mark.parametrize("shape", [(), (1, 2)])
def test_a_tensor_that_is_not_of_as_many_samples(shape: tuple[int, ...]) -> None:
    vae = tiny_autoencoder_kl_ltx_video(timestep_conditioning=True)
    vae.enable_tiling(8, 8, None, 6, 6)
    latents = torch.randn(2 if shape else 1, 4, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    timestep = torch.full(shape, 0.05)
    expected = vae.decode(latents, timestep).sample
    with patch_module(vae):
        assert relative_error(vae.decode(latents, timestep).sample, expected) <= EQUAL


@pytest.mark.parametrize("case", ["image", "Wan"])
@pytest.mark.parametrize("of_class", [True, False])
def test_blends_of_somebodys_own_see_pixels_only(case: str, of_class: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents, run = made(case)
    masks: dict[int, Tensor] = {}
    right = type(vae).blend_v

    def blend_v(self: Any, a: Tensor, b: Tensor, extent: int) -> Any:
        extent = min(a.shape[-2], b.shape[-2], extent)
        return right(self, a, b * masks.setdefault(0, torch.linspace(1, 2, b.shape[-1], device=b.device)), extent)

    report = patch_module(vae)
    if of_class:
        monkeypatch.setattr(type(vae), "blend_v", blend_v)
    else:
        monkeypatch.setattr(vae, "blend_v", MethodType(blend_v, vae))
    latents = latents[..., :3]  # tiles of one width
    out = run(vae, latents)
    assert any("its blend_v is not that" in why for why in site_of(report).fallbacks), site_of(report).fallbacks
    report.restore()
    assert relative_error(out, run(vae, latents)) <= EQUAL


@pytest.mark.parametrize("case", CASES)
def test_a_fault_that_is_found_in_a_batch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents, run = made(case)
    expected = run(vae, latents)
    with patch_module(vae):
        monkeypatch.setattr(type(vae.decoder), "fused_forward", lambda self, *args: 1 / 0)
        assert relative_error(run(vae, latents), expected) <= EQUAL


def test_memory_that_runs_out_behind_the_first_call_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents, run = made("Wan")
    expected = run(vae, latents)
    right, calls = _Progress.take, iter(range(100))

    def full(self: Any, frames: int) -> Tensor:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("the second frame")
        return right(self, frames)

    monkeypatch.setattr(_Progress, "take", full)
    with patch_module(vae):
        assert relative_error(run(vae, latents), expected) <= EQUAL


def test_noise_is_drawn_in_stocks_order() -> None:
    vae = tiny_autoencoder_kl_ltx_video(decoder_inject_noise=(True, False, False))
    for name, parameter in vae.decoder.named_parameters():
        if "per_channel_scale" in name:
            nn.init.ones_(parameter)
    vae.enable_tiling(8, 8, None, 6, 6)
    latents = torch.randn(1, 4, 3, 8, 6)
    outs = []
    report: Any = None
    for patched in (False, True):
        if patched:
            report = patch_module(vae)
        torch.manual_seed(2)
        outs.append(decode(vae, latents))
    assert relative_error(outs[1], outs[0]) <= EQUAL
    assert any("noise" in why for why in site_of(report).fallbacks)


def test_gradients_go_through_stock_code() -> None:
    vae, latents, _ = made("Wan")
    report = patch_module(vae)
    leaf = latents.requires_grad_()
    vae.decode(leaf).sample.sum().backward()
    assert leaf.grad is not None and any("gradients" in why for why in site_of(report).fallbacks)


def test_no_gradient_is_recorded_where_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents, run = made("CogVideoX")
    expected = run(vae, latents)
    seen: list[Any] = []
    right = tile_batches._together

    def noted(parts: list[Any]) -> Any:
        seen.append(right(parts))
        return seen[-1]

    monkeypatch.setattr(tile_batches, "_together", noted)
    with patch_module(vae):
        assert relative_error(run(vae, latents.requires_grad_()), expected) <= EQUAL
    assert seen and not any(call.sample.requires_grad for batch in seen for call in batch.calls)


@pytest.mark.parametrize("case", ["image", "CogVideoX", "Wan"])
def test_wrong_latents_raise_what_stock_raises(case: str) -> None:
    vae, latents, run = made(case)
    with pytest.raises(RuntimeError) as stock:
        run(vae, latents[:, :3])
    with patch_module(vae), pytest.raises(RuntimeError) as ours:
        run(vae, latents[:, :3])
    assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize("case", ["CogVideoX", "Wan"])
def test_inference_mode(case: str) -> None:
    vae, latents, run = made(case)
    expected = run(vae, latents)
    with patch_module(vae) as report, torch.inference_mode():
        assert relative_error(vae.decode(latents.clone()).sample, expected) <= EQUAL
        assert not report.fallbacks and ran(report) == {f"{latents.shape[2]} of {latents.shape[2]} frames"}


def test_the_tuple_and_a_call_of_the_method_itself() -> None:
    vae, latents, run = made("Mochi")
    expected = run(vae, latents)
    with patch_module(vae), torch.no_grad():
        assert relative_error(vae.decode(latents, return_dict=False)[0], expected) <= EQUAL
        assert relative_error(vae.tiled_decode(latents).sample, expected) <= EQUAL
        assert relative_error(vae.tiled_decode(z=latents, return_dict=False)[0], expected) <= EQUAL


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_stock(copied: Any) -> None:
    vae, latents, run = made("CogVideoX")
    expected = run(vae, latents)
    report = patch_module(vae)
    twin = copied(vae)
    assert torch.equal(run(twin, latents), expected) and not site_of(report).implementations
    assert site_of(patch_module(twin)).state == "active"
    assert relative_error(run(twin, latents), expected) <= EQUAL


def test_a_class_with_a_decode_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents, run = made("HunyuanVideo 1.5")
    report = patch_module(vae)
    stock = type(vae).tiled_decode
    monkeypatch.setattr(type(vae), "tiled_decode", lambda self, z: stock(self, z) + 1)
    out = run(vae, latents)
    assert any("somebody replaced" in why for why in site_of(report).fallbacks)
    report.restore()
    assert relative_error(out, run(vae, latents)) <= EQUAL


def test_only_what_rounds_alike() -> None:
    vae, latents, run = made("CogVideoX")
    expected = run(vae, latents)
    with patch_module(vae, allow="bit-exact") as report:
        assert torch.equal(run(vae, latents), expected)
        assert not any(site.op == "tile_batch" and site.state == "active" for site in report.sites)


@pytest.mark.slow
def test_compiled_as_it_stands() -> None:
    vae, latents, run = made("image")
    expected = run(vae, latents)
    patch_module(vae)
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(vae.decode, backend="eager")(latents).sample
    assert relative_error(out, expected) <= EQUAL


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case: str, device: torch.device) -> None:
    vae, latents, run = made(case)
    vae.to(device).to(torch.float16)
    latents = latents.to(device, torch.float16)
    gold, stock = run(copy.deepcopy(vae).double(), latents.double()), run(vae, latents)
    with patch_module(vae) as report:
        out = run(vae, latents)
        assert site_of(report).implementations and not site_of(report).fallbacks, str(report)
    if gold.ndim == 5:
        assert_no_worse(out, stock, gold)
    else:
        assert (out - gold).norm() <= 2 * (stock - gold).norm()
