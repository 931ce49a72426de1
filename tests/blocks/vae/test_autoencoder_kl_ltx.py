"""Decoders and encoders of LTX-Video and LTX-2: every variant of their configuration, patched against stock."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_checks import OfPyTorch, frozen, relative_error
from copy_checks import Held, hollow_out
from diffusers import AutoencoderKLLTX2Video, AutoencoderKLLTXVideo
from kernel_checks import planted
from torch import Tensor, nn
from vae_checks import assert_no_worse, reasons

from vidaccel import patch_module
from vidaccel.blocks.vae.autoencoder_kl_ltx import FusedLTXVideoDecoder3d, decode_bytes
from vidaccel.kernels.norm.rms_norm_silu import RMS_NORM_SILU
from vidaccel.patching.report import PatchReport
from vidaccel.sites.block import SITES
from vidaccel.sites.site import Site

pytestmark = pytest.mark.usefixtures("plain_pytorch")

EQUAL = 1e-5
OPS = {"channels_last", "rms_norm_silu", "pixel_shuffle"}
CHANNELS = 8  # of the latents

Vae = AutoencoderKLLTXVideo | AutoencoderKLLTX2Video

OF_LTX = {
    "decoder_block_out_channels": (8, 16, 32, 32),
    "decoder_layers_per_block": (2, 1, 1, 1, 1),
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
}
OF_0_9_1 = OF_LTX | {
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
    "decoder_inject_noise": (True, True, True, False),
}
OF_LTX2 = {
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (2, 1, 1, 1),
    "decoder_causal": False,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
    "block_out_channels": (8, 8, 16, 32),
    "layers_per_block": (1, 1, 1, 1, 1),
}
STAGES = {"upsample_type": ("spatial", "temporal", "spatiotemporal")}
KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "ltx": (AutoencoderKLLTXVideo, OF_LTX),
    "ltx, causal, patch 2": (AutoencoderKLLTXVideo, OF_LTX | {"decoder_causal": True, "patch_size": 2}),
    "ltx 0.9.1": (AutoencoderKLLTXVideo, OF_0_9_1),
    "ltx 0.9.5": (AutoencoderKLLTXVideo, OF_0_9_1 | {"decoder_inject_noise": (False,) * 4}),
    "ltx2": (AutoencoderKLLTX2Video, OF_LTX2),
    "ltx2, causal, zeros": (
        AutoencoderKLLTX2Video,
        OF_LTX2 | {"decoder_causal": True, "decoder_spatial_padding_mode": "zeros"},
    ),
    "ltx2, stages, replicate": (
        AutoencoderKLLTX2Video,
        OF_LTX2 | STAGES | {"decoder_spatial_padding_mode": "replicate"},
    ),
    "ltx2, timesteps, noise": (
        AutoencoderKLLTX2Video,
        OF_LTX2
        | {
            "timestep_conditioning": True,
            "decoder_inject_noise": (True, False, True, True),
            "upsample_residual": (True, False, True),
        },
    ),
}  # fmt: skip
BOTH = "ltx", "ltx2"
DOWN = {
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "block_out_channels": (8, 16, 32, 64, 64),
    "spatio_temporal_scaling": (True,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
}
ENCODERS = {
    "ltx": ("ltx", {"block_out_channels": (8, 8, 16, 16)}),
    "ltx, not causal": ("ltx", {"encoder_causal": False}),
    "ltx 0.9.5": ("ltx", DOWN),
    "ltx2": ("ltx2", {}),
    "ltx2, not causal, reflect": ("ltx2", {"encoder_causal": False, "encoder_spatial_padding_mode": "reflect"}),
    "ltx2, convolutions": ("ltx2", {"downsample_type": ("conv",) * 4, "block_out_channels": (8,) * 4}),
}


def tiny(kind: str, **options: Any) -> Vae:
    model, config = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae: Any = model(latent_channels=CHANNELS, **config | options)
        vae.decoder, vae.encoder = frozen(vae.decoder), frozen(vae.encoder)
    return vae.eval()


@pytest.fixture(params=BOTH)
def vae(request: pytest.FixtureRequest) -> Vae:
    return tiny(request.param)


def draw(frames: int = 3, height: int = 3, width: int = 2, batch: int = 1) -> Tensor:
    return torch.randn(batch, CHANNELS, frames, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def decode(vae: Vae, latents: Tensor, **options: Any) -> Tensor:
    """The random numbers and the timesteps are the same each time."""
    torch.manual_seed(5)
    conditioned = vae.decoder.timestep_scale_multiplier is not None
    temb = torch.linspace(0.05, 0.4, len(latents), dtype=latents.dtype, device=latents.device) if conditioned else None
    return vae.decode(latents, temb, **options).sample


@torch.no_grad()
def encode(vae: Vae, clip: Tensor, **options: Any) -> Tensor:
    return vae.encode(clip, **options).latent_dist.parameters


def sites_of(report: PatchReport, path: str = "decoder") -> dict[str, Site]:
    return {site.op: site for site in report.sites if site.path == path}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 3, 2, 1), (3, 2, 3, 2)], ids=["image", "batch"])
def test_same_frames_and_exact_restore(shape: tuple[int, int, int, int], kind: str) -> None:
    vae, latents = tiny(kind), draw(*shape)
    gold = decode(copy.deepcopy(vae).double(), latents.double())
    expected = decode(vae, latents)
    state = torch.get_rng_state()
    traces = {name: (type(module), frozenset(vars(module))) for name, module in vae.named_modules()}
    with patch_module(vae) as report:
        for _ in range(2):  # the first is checked
            out = decode(vae, latents)
            assert relative_error(out, expected) <= EQUAL and out.stride() == expected.stride()
            assert torch.equal(torch.get_rng_state(), state), "it took other random numbers than stock"
        assert (out - gold).norm() <= 2 * (expected - gold).norm()
        assert not report.fallbacks and {site.state for site in report.sites} == {"active"}, str(report)
        sites = sites_of(report)
        assert sites.keys() == OPS and all(site.implementations for site in sites.values())
        assert not torch.equal(out, expected), "nothing was patched: equal bits from reordered sums"
    assert torch.equal(decode(vae, latents), expected)
    assert traces == {name: (type(module), frozenset(vars(module))) for name, module in vae.named_modules()}


@pytest.mark.parametrize("causal", [True, False])
def test_a_call_says_whether_it_is_causal(causal: bool) -> None:
    vae = tiny("ltx2")
    expected = decode(vae, draw(), causal=causal)
    assert causal == (relative_error(decode(vae, draw()), expected) > 0.01)
    with patch_module(vae) as report:
        assert relative_error(decode(vae, draw(), causal=causal), expected) <= EQUAL
        assert not report.fallbacks


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("shape", [(1, 3, 1, 64, 96), (2, 3, 9, 64, 64)], ids=["image", "batch"])
def test_same_latents_and_exact_restore(shape: tuple[int, ...], name: str) -> None:
    kind, options = ENCODERS[name]
    vae, clip = tiny(kind, **options), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = encode(vae, clip)
    with patch_module(vae) as report:
        for _ in range(2):
            out = encode(vae, clip)
            assert relative_error(out, expected) <= EQUAL and out.stride() == expected.stride()
        sites = sites_of(report, "encoder")
        assert not report.fallbacks and {site.state for site in sites.values()} == {"active"}, str(report)
        assert sites.keys() == OPS - {"pixel_shuffle"} and all(site.implementations for site in sites.values())
        assert not torch.equal(out, expected), "nothing was patched: equal bits from reordered sums"
    assert torch.equal(encode(vae, clip), expected)


def test_the_encoder_leaves_alone_what_does_not_fit(vae: Vae) -> None:
    with patch_module(vae) as report, torch.no_grad():
        for clip in (torch.zeros(1, 3, 9, 62, 64), torch.zeros(1, 4, 9, 64, 64), torch.zeros(1, 3, 9, 64, 64).half()):
            with pytest.raises(RuntimeError):
                vae.encode(clip)
    assert all(text in reasons(report) for text in ("patches", "not [B, 3, F, H, W]", "the weights torch.float32"))


@pytest.mark.parametrize("mode", ["slicing", "tiling", "framewise", "all"])
def test_the_switches_keep_their_meaning(mode: str, vae: Vae) -> None:
    if mode in ("slicing", "all"):
        vae.enable_slicing()
    if mode in ("tiling", "all"):
        vae.enable_tiling(96, 96, None, 64, 64)
    vae.use_framewise_decoding = mode in ("framewise", "all")
    latents = draw(4, 4, 4, 2)
    expected, seen = decode(vae, latents), []
    with patch_module(vae, skip="tile_batch") as report:  # whose batches the hook would see
        vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert not report.fallbacks, str(report)
    assert len(seen) == {"slicing": 2, "tiling": 4, "framewise": 4, "all": 32}[mode]


def test_the_other_ways_to_call(vae: Vae) -> None:
    expected = decode(vae, draw())
    patch_module(vae)
    with torch.no_grad():
        (out,) = vae.decode(draw(), return_dict=False)
    assert relative_error(out, expected) <= EQUAL
    with torch.inference_mode():
        assert relative_error(vae.decode(draw()).sample, expected) <= EQUAL
    other = draw().contiguous(memory_format=torch.channels_last_3d)
    assert relative_error(decode(vae, other), expected) <= EQUAL
    clip = torch.rand(1, 3, 9, 64, 64)
    with torch.no_grad():
        assert vae(clip).sample.shape == clip.shape


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_site_can_be_off(op: str, vae: Vae) -> None:
    expected = decode(vae, draw())
    with patch_module(vae) as report:
        site = sites_of(report)[op]
        site.on = False
        out = decode(vae, draw())
        assert relative_error(out, expected) <= EQUAL
        assert torch.equal(out, expected) == (op == "channels_last")
        site.on = True
        assert not torch.equal(decode(vae, draw()), expected)


class Lora(nn.Module):
    """Stands where a convolution stood, and does more."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 1.5 * self.base(*args, **kwargs)


def hook_a_child(vae: Vae) -> None:
    vae.decoder.up_blocks[1].resnets[0].register_forward_hook(lambda *_: _[2] * 1.5)


def swap_a_child(vae: Vae) -> None:
    resnet = vae.decoder.mid_block.resnets[0]
    resnet.conv2 = Lora(resnet.conv2)


def change_a_stride(vae: Vae) -> None:
    vae.decoder.conv_in.conv.stride = (1, 2, 2)


def train(vae: Vae) -> None:
    vae.decoder.up_blocks[0].resnets[0].dropout.p = 0.5
    vae.train()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_a_child, "forward hooks"),
        (swap_a_child, "replaced by Lora"),
        (change_a_stride, "another stride"),
        (train, "dropout is on"),
    ],
    ids=["hook", "lora", "stride", "dropout"],
)
def test_a_changed_child_runs_as_it_is(change: Callable[[Vae], None], reason: str, vae: Vae) -> None:
    report = patch_module(vae)
    decode(vae, draw(1))
    change(vae)
    out = decode(vae, draw(1, 4, 4))
    assert reason in reasons(report)
    report.restore()
    assert torch.equal(out, decode(vae, draw(1, 4, 4)))
    left = [site for site in patch_module(vae).sites if site.path == "decoder"]
    assert left and all(site.state == "left alone" and reason in site.reason for site in left)


@pytest.mark.parametrize(
    ("kind", "latents", "temb", "reason"),
    [
        ("ltx", draw().double(), None, "not float16"),
        ("ltx", draw().half(), None, "the weights torch.float32"),
        ("ltx", draw()[:, :5], None, r"not \[B, 8, F, H, W\]"),
        ("ltx", draw()[:, :, :0], None, "the input is empty"),
        ("ltx2", draw(height=1), None, "by reflection"),
        ("ltx 0.9.5", draw(), None, "one timestep"),
    ],
    ids=["float64", "dtype", "channels", "no-frames", "too-small", "no-timestep"],
)
def test_bad_input_raises_as_stock_does(
    kind: str, latents: Tensor, temb: Tensor | None, reason: str, request: pytest.FixtureRequest
) -> None:
    vae = tiny(kind)
    with torch.no_grad():
        with pytest.raises((RuntimeError, TypeError, IndexError, ValueError)) as stock:
            vae.decode(latents, temb)
        with patch_module(vae) as report, pytest.raises(stock.type) as ours:
            vae.decode(latents, temb)
    assert str(ours.value) == str(stock.value)
    assert re.search(reason, reasons(report))


def test_gradients_go_the_original_way(vae: Vae) -> None:
    latents = draw(1).requires_grad_()
    with patch_module(vae) as report:
        vae.decode(latents).sample.sum().backward()
    assert latents.grad is not None and "gradients" in reasons(report)


def test_what_memory_cannot_hold_is_explained(vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    report = patch_module(vae, self_check=False)
    right = F.conv3d

    def conv3d(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.shape[2] > 12:
            raise torch.OutOfMemoryError("too long")
        return right(x, *args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(F, "conv3d", OfPyTorch(conv3d))
        with pytest.raises(torch.OutOfMemoryError, match=r"3 latent frames of 2 clips of 2 x 3:.*use_framewise"):
            decode(vae, draw(batch=2))
    out = decode(vae, draw())
    report.restore()
    assert relative_error(out, decode(vae, draw())) <= EQUAL


def test_what_the_decoder_does_wrong_is_found(vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = decode(vae, draw())
    with patch_module(vae) as report:
        kind: Any = type(vae.decoder)
        right = kind.fused_forward
        monkeypatch.setattr(kind, "fused_forward", lambda *args: right(*args).flip(2))
        assert relative_error(decode(vae, draw()), expected) <= EQUAL
        assert {site.state for site in sites_of(report).values()} == {"failed"}


def test_what_the_norm_does_wrong_is_found(vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "rms_norm_silu=triton,pixel_shuffle=torch")
    latents = draw(1, 2, 2)
    expected = decode(vae, latents)
    with planted(RMS_NORM_SILU, "triton", lambda outputs: outputs[-1].mul_(1.01)), patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert {site.op for site in report.sites if site.state == "failed"} == {"rms_norm_silu"}


@pytest.mark.parametrize("kind", ["ltx", "ltx 0.9.5", "ltx2"])
def test_halves_are_no_worse_than_stock(kind: str) -> None:
    vae, latents = tiny(kind).to(torch.bfloat16), draw(2, 2, 3).to(torch.bfloat16)
    gold = decode(copy.deepcopy(vae).double(), latents.double())
    stock = decode(vae, latents)
    with patch_module(vae) as report:
        out = decode(vae, latents)
        assert not report.fallbacks and {site.state for site in report.sites} == {"active"}, str(report)
    for frame in range(gold.shape[2]):
        error, own = ((x[:, :, frame].double() - gold[:, :, frame]).norm() for x in (out, stock))
        assert error <= 2 * own


@pytest.mark.parametrize("kind", ["ltx", "ltx 0.9.5", "ltx2"])
def test_memory_held(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without the workspaces of convolutions; as on a GPU, whose convolutions leave rows."""
    hollow_out(monkeypatch)
    monkeypatch.delenv("VIDACCEL_IMPL")
    vae, latents = tiny(kind), draw(9, 8, 8)
    with patch_module(vae, self_check=False):
        decode(vae, latents)
        with Held() as held:
            decode(vae, latents)
    estimate = decode_bytes(vae.decoder, latents)
    assert 0.75 * estimate <= held.most <= estimate


@pytest.mark.parametrize("kind", ["ltx", "ltx 0.9.1", "ltx2"])
def test_with_the_kernels(kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDACCEL_IMPL")
    vae, latents = tiny(kind).to(device), draw(2, 2, 2).to(device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = decode(vae, latents)
        with patch_module(vae, self_check=False) as report:
            assert relative_error(decode(vae, latents), expected) <= EQUAL
    assert not report.fallbacks, str(report)
    ways = {op: site.implementations for op, site in sites_of(report).items()}
    assert ways == {"channels_last": {"torch"}} | {op: {"triton"} for op in OPS - {"channels_last"}}


def test_a_copy_is_stock(vae: Vae) -> None:
    patch_module(vae)
    twin = copy.deepcopy(vae)
    assert not hasattr(twin.decoder, SITES) and not isinstance(twin.decoder, FusedLTXVideoDecoder3d)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("model", [AutoencoderKLLTXVideo, AutoencoderKLLTX2Video], ids=["ltx", "ltx2"])
def test_as_wide_as_released(
    model: type[Any], dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of every frame to float32 without TF32, beside stock's."""
    monkeypatch.delenv("VIDACCEL_IMPL")
    options = {"decoder_causal": False} if model is AutoencoderKLLTX2Video else {}
    with torch.device(device):
        vae = model(**options).eval()
        latents = torch.randn(1, 128, 4, 9, 10)
    with torch.backends.cudnn.flags(allow_tf32=False):
        gold = decode(vae, latents)
    vae, latents = vae.to(dtype), latents.to(dtype)
    stock = decode(vae, latents)
    with patch_module(vae) as report:
        out = decode(vae, latents)
    assert not report.fallbacks, str(report)
    assert {way for site in report.sites for way in site.implementations} == {"torch", "triton"}
    assert_no_worse(out, stock, gold)
